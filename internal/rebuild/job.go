// Package rebuild keeps a queue of image rebuilds on disk and works it off, one at a time
// over all processes, each build in a child process of its own.
//
// A job is one image (reference, manifest digest, platform) with one access list and the
// options of the build. Under the queue's directory are
//
//	jobs/IMAGE.json     what is waiting or being built: one per image and options
//	lists/KEY.list      the job's list (a hard link; the list store may retire its own)
//	work/               the build's temporary files, the child's log and its error
//	done/KEY.json       what was built, and where
//	built/IMAGE.list    the list that an image was built for last
//	failed/KEY.json     what was given up, with the error's text
//	lock, state.lock    held during a build; held while the files above change
//
// where IMAGE hashes digest, platform, target and options, and KEY is IMAGE and the hash of the
// list's accesses. Every file is put in place whole. A process that dies leaves at worst a
// job with one attempt counted, and temporary files that the next holder of the lock removes.
// A child whose parent dies goes on: it holds the lock, writes its result itself, and the
// next process that works on the queue finds it.
package rebuild

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
)

// The values of [Options.Target].
const (
	TargetLayout     = "layout"
	TargetRegistry   = "registry"
	TargetContainerd = "containerd"
)

// Options is how and to where images are built; it is kept in the job, so that a restart
// with another configuration finishes what was asked for.
type Options struct {
	Target    string `json:"target"` // TargetLayout, TargetRegistry or TargetContainerd
	LayoutDir string `json:"layout_dir,omitempty"`
	Reference string `json:"reference"` // template, see [ExpandReference]

	Compressor       string        `json:"compressor"`
	Digester         string        `json:"digester"`
	ChunkSize        int64         `json:"chunk_size"` // bytes
	Workers          int           `json:"workers,omitempty"`
	MarkPrefetchBlob bool          `json:"mark_prefetch_blob,omitempty"`
	Timeout          time.Duration `json:"timeout"` // of one attempt; 0: one hour

	ContainerdAddress   string `json:"containerd_address,omitempty"`
	ContainerdNamespace string `json:"containerd_namespace,omitempty"`
	HostsDir            string `json:"hosts_dir,omitempty"`
	DockerConfig        string `json:"docker_config,omitempty"`
}

// Image names what is rebuilt.
type Image struct {
	Reference string `json:"reference"` // as the runtime gave it
	Digest    string `json:"digest"`    // of the manifest for Platform
	Platform  string `json:"platform"`  // os/arch[/variant]
}

// Recording is what the job's run read and lost, for the line that is logged when the image is built.
type Recording struct {
	Container string        `json:"container,omitempty"`
	Name      string        `json:"name,omitempty"`
	Pod       string        `json:"pod,omitempty"`
	Namespace string        `json:"namespace,omitempty"`
	Files     int           `json:"files"`      // accesses
	ReadFiles int           `json:"files_read"` // of them read or executed
	Bytes     int64         `json:"bytes"`      // sizes of the accessed files
	Skipped   int64         `json:"skipped"`    // touched files that are no content of the image
	Lost      string        `json:"lost,omitempty"`
	Duration  time.Duration `json:"duration"`
	End       string        `json:"end"`
	List      string        `json:"list"` // the file of the list that the image is built for: the run's, or that of several runs
}

// Request asks for a rebuild.
type Request struct {
	Image     Image
	List      string // path of the list in its native format; it is linked or copied
	ListHash  string // hash of the list's accesses: equal lists are built once
	Options   Options
	Recording Recording
	// Overwrite builds an image again, for its lists together, when this one names more than 1 % in chunks that the image was not
	// built for.
	Overwrite bool
}

// Job is one file of the queue.
type Job struct {
	Version   int       `json:"version"`
	Key       string    `json:"key"`
	Created   time.Time `json:"created"`
	Image     Image     `json:"image"`
	List      string    `json:"list"` // absolute path of the queue's own link
	ListHash  string    `json:"list_hash"`
	Target    string    `json:"target"` // reference as package remote parses it
	Options   Options   `json:"options"`
	Recording Recording `json:"recording"`
	Overwrite bool      `json:"overwrite,omitempty"`

	// Attempts counts started builds that were not called off; NotBefore is when the next may start.
	Attempts  int       `json:"attempts"`
	NotBefore time.Time `json:"not_before,omitzero"`
	LastError string    `json:"last_error,omitempty"`
}

// Result is what a build made; it is kept in done/.
type Result struct {
	Version       int           `json:"version"`
	Key           string        `json:"key"`
	Image         Image         `json:"image"`
	Target        string        `json:"target"`   // where the image is, as package remote parses it
	Manifest      string        `json:"manifest"` // digest of the built manifest
	Source        string        `json:"source,omitempty"`
	Blobs         int           `json:"blobs"`      // layers: blobs, prefetch blob, bootstrap
	BlobBytes     int64         `json:"blob_bytes"` // their stored bytes
	SourceBytes   int64         `json:"source_bytes,omitempty"`
	PrefetchBlob  string        `json:"prefetch_blob,omitempty"` // digest; empty when the list named no data
	PrefetchBytes int64         `json:"prefetch_bytes"`          // stored
	PrefetchFiles int           `json:"prefetch_files"`
	ListPath      string        `json:"list_path,omitempty"`
	Finished      time.Time     `json:"finished"`
	Duration      time.Duration `json:"duration"`
}

// Failure is a job that was given up; it is kept in failed/.
type Failure struct {
	Version   int       `json:"version"`
	Key       string    `json:"key"`
	Job       Job       `json:"job"`
	Error     string    `json:"error"`
	Permanent bool      `json:"permanent"` // trying again cannot help
	Attempts  int       `json:"attempts"`
	Failed    time.Time `json:"failed"`
}

// version is that of every file of the queue.
const version = 1

// maxFile bounds a file of the queue in bytes.
const maxFile = 1 << 20

// imageKey returns the name of an image's job: what makes two results the same thing.
func imageKey(i Image, target string, o *Options) string {
	h := sha256.New()
	for _, s := range []string{
		i.Digest, i.Platform, target, o.Compressor, o.Digester,
		fmt.Sprint(o.ChunkSize), fmt.Sprint(o.MarkPrefetchBlob),
	} {
		fmt.Fprintf(h, "%d:%s,", len(s), s)
	}
	return hex.EncodeToString(h.Sum(nil))[:24]
}

// listKey shortens the hash of a list to a part of a file name.
func listKey(hash string) string {
	sum := sha256.Sum256([]byte(hash))
	return hex.EncodeToString(sum[:])[:12]
}

// ReadJob reads a job file. It returns an error for a file that is not whole or of a later version.
func ReadJob(path string) (Job, error) {
	var j Job
	f, err := os.Open(path)
	if err != nil {
		return Job{}, err
	}
	defer f.Close() //nolint:errcheck // only read from
	if err := decode(f, &j); err != nil {
		return Job{}, fmt.Errorf("read job %s: %w", path, err)
	}
	if err := j.check(); err != nil {
		return Job{}, fmt.Errorf("read job %s: %w", path, err)
	}
	return j, nil
}

var errBadFile = errors.New("bad file")

func (j *Job) check() error {
	switch {
	case j.Version != version:
		return fmt.Errorf("%w: got version %d, want %d", errBadFile, j.Version, version)
	case !validKey(j.Key):
		return fmt.Errorf("%w: got key %q", errBadFile, j.Key)
	case j.Image.Digest == "" || j.Target == "" || j.List == "":
		return fmt.Errorf("%w: digest, target or list is missing", errBadFile)
	case j.Attempts < 0:
		return fmt.Errorf("%w: got %d attempts", errBadFile, j.Attempts)
	}
	return nil
}

// validKey reports whether key is IMAGE-LIST; keys become file names.
func validKey(key string) bool {
	image, list, ok := strings.Cut(key, "-")
	return ok && len(image) == 24 && len(list) == 12 && isHex(image) && isHex(list)
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

func (j *Job) imageKey() string { return j.Key[:24] }

// decode reads one JSON value of at most maxFile bytes.
func decode(r io.Reader, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return err
	}
	if len(data) > maxFile {
		return fmt.Errorf("%w: more than %d bytes", errBadFile, maxFile)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%w: %w", errBadFile, err)
	}
	return nil
}

// readJSON reads name below root into v; exists is false when there is no such file.
func readJSON(root *os.Root, name string, v any) (exists bool, err error) {
	f, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close() //nolint:errcheck // only read from
	if err := decode(f, v); err != nil {
		return true, fmt.Errorf("read %s: %w", name, err)
	}
	return true, nil
}
