package lazy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// Errors of this package; all answer to errors.Is, also at a client. Others are those of
// packages remote and rafs.
var (
	// ErrUnsupported: an image or a machine that cannot be used for lazy mounts.
	ErrUnsupported = store.ErrUnsupported
	// ErrPermission: CAP_SYS_ADMIN is missing.
	ErrPermission = erofs.ErrPermission
	// ErrBusy: the mount has open files or processes in it.
	ErrBusy = erofs.ErrBusy
	// ErrLocked: another daemon has the state directory.
	ErrLocked = store.ErrLocked
	// ErrVersion: client and daemon do not understand each other.
	ErrVersion = errors.New("daemon and client are of different versions")
	// ErrNotMounted: no lazy mount is there.
	ErrNotMounted = errors.New("no lazy mount")
	// ErrNoDaemon: no daemon runs, and none was to be started.
	ErrNoDaemon = errors.New("no daemon runs")
	// ErrFailed: daemon and holders of a mount died at once; what was not local is lost to it.
	ErrFailed = errors.New("the mount has lost its daemon")
)

// Request says what to mount. Paths are absolute and are those of the daemon's mount namespace,
// that of the client that started it.
type Request struct {
	// Reference names an image as [remote.Parse] reads it; with a digest, it is that manifest.
	Reference string `json:"reference,omitempty"`
	// Bootstrap and BlobDir are loose files in place of an image: a bare bootstrap, and a directory
	// with one file for each blob, named by its id.
	Bootstrap string `json:"bootstrap,omitempty"`
	BlobDir   string `json:"blob_dir,omitempty"`
	// Platform chooses from an index, "os/arch[/variant]"; empty: this machine's.
	Platform string `json:"platform,omitempty"`
	Remote   Remote `json:"remote,omitzero"`
	// Share says which chunks of other mounts are used where they are on this node: [ShareAllowed], [ShareAll] or
	// [ShareNone]; empty: ShareAllowed.
	Share string `json:"share,omitempty"`
	// Background is what happens to data that no list names: "none", "idle" (while nobody waits
	// for anything) or "full"; empty: "idle". Rate bounds it in bytes a second; 0: no bound.
	Background string `json:"background,omitempty"`
	Rate       int64  `json:"rate,omitempty"`
	// NoPrefetch leaves the prefetch blob and table alone.
	NoPrefetch bool `json:"no_prefetch,omitempty"`
	// Driver says what answers reads; empty: [DriverAuto].
	Driver Driver `json:"driver,omitempty"`
	// ReadAhead is how many KiB the kernel reads ahead while the mount is not complete; 0:
	// [DefaultReadAhead] while there is a prefetch blob to stream and the driver is EROFS, else [NormalReadAhead]; negative: none.
	ReadAhead int `json:"read_ahead,omitempty"`
}

// DefaultReadAhead is the read-ahead in KiB of a mount that is not complete and has a prefetch blob: a fault drags in little
// that the list left out. NormalReadAhead is the kernel's own (VM_READAHEAD_PAGES), for complete ones, and for those of which
// nobody knows what a start reads: what is fetched for a fault is more than that anyhow, and whoever reads all waits for fewer events.
// FUSEReadAhead is that of complete mounts behind FUSE, where it costs no fetch and spares three of four requests to the daemon: the
// most that one request asks for.
const (
	DefaultReadAhead = 4
	NormalReadAhead  = 128
	FUSEReadAhead    = 512
)

// Remote says how a registry or containerd is reached: the fields of [remote.Options] that a
// daemon can keep. It has names of files with credentials, and no credentials.
type Remote struct {
	PlainHTTP         bool          `json:"plain_http,omitempty"`
	HostsDir          string        `json:"hosts_dir,omitempty"`
	DockerConfig      string        `json:"docker_config,omitempty"`
	ContainerdAddress string        `json:"containerd_address,omitempty"`
	Namespace         string        `json:"namespace,omitempty"`
	Proxy             string        `json:"proxy,omitempty"` // no user and password: it is stored
	RegistryFallback  bool          `json:"registry_fallback,omitempty"`
	Retries           int           `json:"retries,omitempty"`
	Stall             time.Duration `json:"stall_ns,omitempty"`
}

func (r Remote) options() remote.Options {
	o := remote.Options{
		PlainHTTP: r.PlainHTTP, HostsDir: r.HostsDir, DockerConfig: r.DockerConfig,
		ContainerdAddress: r.ContainerdAddress, Namespace: r.Namespace, RegistryFallback: r.RegistryFallback, Retries: r.Retries,
		Proxy: r.Proxy,
	}
	if r.Stall > 0 {
		o.Timeouts = remote.Timeouts{Connect: min(r.Stall, 5*time.Second), Header: r.Stall, Stall: r.Stall}
	}
	return o
}

// check refuses what cannot be meant.
func (r *Request) check() error {
	switch {
	case (r.Reference == "") == (r.Bootstrap == ""):
		return fmt.Errorf("want a reference, or a bootstrap with a blob directory")
	case r.Bootstrap != "" && r.BlobDir == "":
		return fmt.Errorf("bootstrap %s: want the directory of its blobs", r.Bootstrap)
	case strings.Contains(r.Remote.Proxy, "@"):
		return fmt.Errorf("proxy %q: no user and password can be kept with a mount", "…"+r.Remote.Proxy[strings.LastIndexByte(r.Remote.Proxy, '@'):])
	case r.Rate < 0:
		return fmt.Errorf("rate of %d bytes a second, want 0 for no bound, or more", r.Rate)
	case r.ReadAhead > 1<<20:
		return fmt.Errorf("read-ahead of %d KiB, want at most %d", r.ReadAhead, 1<<20)
	}
	if _, err := r.claim("", ""); err != nil {
		return err
	}
	_, err := r.background()
	if err == nil {
		_, err = ParseDriver(string(r.Driver))
	}
	return err
}

// absolute returns the request with absolute paths, and with the file of credentials that
// this process would take: the daemon's directory and environment are others.
func (r Request) absolute() (_ Request, err error) {
	if r.Remote.DockerConfig == "" {
		r.Remote.DockerConfig = dockerConfig()
	}
	for _, p := range []*string{&r.Bootstrap, &r.BlobDir, &r.Remote.HostsDir, &r.Remote.DockerConfig} {
		if *p != "" && err == nil {
			*p, err = filepath.Abs(*p)
		}
	}
	if err != nil || r.Reference == "" {
		return r, err
	}
	ref, err := remote.Parse(r.Reference)
	if err != nil {
		return r, err
	}
	if ref.Path != "" {
		if ref.Path, err = filepath.Abs(ref.Path); err != nil {
			return r, err
		}
		r.Reference = ref.String()
	}
	return r, nil
}

// dockerConfig returns docker's directory of this process, empty when there is none.
func dockerConfig() string {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(home, ".docker")
	}
	if _, err := os.Stat(filepath.Join(dir, "config.json")); err != nil {
		return ""
	}
	return dir
}

// files returns the local files and directories that the request names.
func (r *Request) files() ([]fileID, error) {
	paths := []string{r.Remote.HostsDir, r.Remote.DockerConfig, r.Bootstrap, r.BlobDir}
	if r.Reference != "" {
		ref, err := remote.Parse(r.Reference)
		if err != nil {
			return nil, err
		}
		paths = append(paths, ref.Path)
	}
	var files []fileID
	for _, p := range paths {
		if p == "" {
			continue
		}
		if !filepath.IsAbs(p) {
			return nil, fmt.Errorf("%s: want an absolute path: the daemon has a working directory of its own", p)
		}
		f, err := identify(p)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func (r *Request) background() (fill.Background, error) {
	if r.Background == "" {
		return fill.BackgroundIdle, nil
	}
	return fill.ParseBackground(r.Background)
}

// readAhead returns the KiB that the kernel reads ahead until the mount is complete.
func (r *record) readAhead() int {
	// Behind FUSE each read-ahead is a request of its own to the daemon, and small ones cost more than they spare.
	return r.Request.readAhead(r.Origin.Prefetch >= 0 && r.driver() == DriverEROFS)
}

// completeReadAhead returns the KiB that the kernel reads ahead when the mount is complete.
func (r *record) completeReadAhead() int {
	if r.driver() == DriverFUSE {
		return FUSEReadAhead
	}
	return NormalReadAhead
}

// readAhead returns the KiB for a mount whose prefetch blob, if it has one, is streamed.
func (r *Request) readAhead(prefetch bool) int {
	switch {
	case r.ReadAhead == 0 && prefetch && !r.NoPrefetch:
		return DefaultReadAhead
	case r.ReadAhead == 0:
		return NormalReadAhead
	}
	return max(0, r.ReadAhead)
}

// State says how far a mount is.
type State string

// The states of mounts.
const (
	StateLazy     State = "lazy"     // some of it is fetched when it is read
	StateComplete State = "complete" // all of it is local; with EROFS nobody is in the way of a read
	StateFailed   State = "failed"   // its daemon was lost: what was not local cannot be read
)

// Traffic counts what was fetched for a mount.
type Traffic = fill.Traffic

// Stats count what happened to the blobs of a mount since it was made, or its daemon was started.
// Mounts that share blobs share counts.
type Stats = fill.Stats

// Miss is a chunk that a reader waited for although everything that a list names was there.
type Miss = fill.Miss

// Mount is one lazy mount.
type Mount struct {
	ID string `json:"id"`
	// Dir is where the client attached it, in its own mount namespace. It may have moved.
	Dir       string    `json:"dir"`
	Reference string    `json:"reference"`
	Digest    string    `json:"digest,omitempty"` // of the manifest
	State     State     `json:"state"`
	Error     string    `json:"error,omitempty"` // why it failed
	Since     time.Time `json:"since"`
	Device    uint64    `json:"device"` // st_dev
	BDI       string    `json:"bdi"`    // of /sys/class/bdi
	// Driver answers its reads, and DriverReason says why it is not EROFS.
	Driver       Driver `json:"driver"`
	DriverReason string `json:"driver_reason,omitempty"`
	Bootstrap    string `json:"bootstrap"`
	Blobs        int    `json:"blobs"`
	// Local of Total bytes are in the cache: uncompressed, in blocks, of what the image uses.
	Local int64 `json:"local_bytes"`
	Total int64 `json:"total_bytes"`
	// Prefetched: all that the list names was fetched, as far as it could be: the prefetch blob, or the files of the prefetch table where there is none.
	Prefetched bool   `json:"prefetched"`
	Stats      Stats  `json:"stats"`
	Misses     []Miss `json:"misses,omitempty"`
}

// Status is a daemon with its mounts.
type Status struct {
	PID    int `json:"pid"`
	Holder int `json:"holder_pid"`
	// Spare is the second holder, which is there some seconds after the daemon; 0 before.
	Spare    int     `json:"spare_pid,omitempty"`
	Version  string  `json:"version"`
	StateDir string  `json:"state_dir"`
	Mounts   []Mount `json:"mounts"`
}
