package rebuild

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// Names under the queue's directory.
const (
	dirJobs   = "jobs"
	dirLists  = "lists"
	dirWork   = "work"
	dirDone   = "done"
	dirBuilt  = "built"
	dirFailed = "failed"
	dirTemp   = "tmp"
	fileLock  = "lock"
	fileState = "state.lock"
)

// Bounds of what the queue keeps.
const (
	maxJobs   = 1000 // waiting jobs; one per image
	maxDone   = 1000 // newest results kept
	maxFailed = 200  // newest failures kept
)

// ErrFull is returned by [Queue.Add] when maxJobs jobs are waiting.
var ErrFull = errors.New("rebuild queue is full")

// QueueOptions configures a [Queue]; the zero value is the default, except for Command.
type QueueOptions struct {
	// Command returns the command that works on the job file: it must call [RunChild].
	Command Command
	// MaxAttempts is how many builds of a job may fail before it is given up; 0: 5.
	MaxAttempts int
	// Backoff is the wait after the n-th failure, n from 1; nil: 30 s, 2 min, 8 min, … at most 1 h.
	Backoff func(n int) time.Duration
	// RetryFailed is how long a job that was given up is not accepted again; 0: 1 h.
	RetryFailed time.Duration
	// Poll is how often a queue that another process works on is looked at; 0: 2 s.
	Poll time.Duration
	// Grace is how long a child may take to end when it is asked to; 0: 5 s.
	Grace time.Duration
	// Log gets what happens to jobs; nil: nothing is logged.
	Log *zap.Logger
	// Built and Failed are called from Run when a job ends; nil: nothing.
	Built  func(Job, Result)
	Failed func(Job, Failure)
}

// Queue is the queue below one directory. Several processes may have it open at once, and
// every method is safe for concurrent use. It holds one descriptor until Close.
type Queue struct {
	dir  string
	root *os.Root
	o    QueueOptions
	wake chan struct{}
}

// Open opens the queue at dir, which is created where it is missing (mode 0700: jobs name
// images and credentials' files). It starts nothing; see [Queue.Run].
func Open(dir string, o QueueOptions) (*Queue, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open queue: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open queue: %w", err)
	}
	for _, d := range []string{dirJobs, dirLists, dirWork, dirDone, dirBuilt, dirFailed, dirTemp} {
		if err := root.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("open queue: %w", errors.Join(err, root.Close()))
		}
	}
	o.defaults()
	return &Queue{dir: dir, root: root, o: o, wake: make(chan struct{}, 1)}, nil
}

func (o *QueueOptions) defaults() {
	if o.MaxAttempts == 0 {
		o.MaxAttempts = 5
	}
	if o.Backoff == nil {
		o.Backoff = func(n int) time.Duration {
			return min(30*time.Second<<(2*min(n-1, 8)), time.Hour)
		}
	}
	if o.RetryFailed == 0 {
		o.RetryFailed = time.Hour
	}
	if o.Poll == 0 {
		o.Poll = 2 * time.Second
	}
	if o.Grace == 0 {
		o.Grace = 5 * time.Second
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
}

// Close releases the directory. Run must have returned.
func (q *Queue) Close() error { return q.root.Close() }

// Verdict is what [Queue.Add] decided.
type Verdict string

// The verdicts.
const (
	Queued          Verdict = "queued"
	Replaced        Verdict = "queued, in place of an older list of this image"
	AlreadyQueued   Verdict = "not queued: a rebuild of this image is waiting already"
	AlreadyBuilt    Verdict = "not queued: built from an equal list already"
	BuiltForAnother Verdict = "not queued: this image was built for another list already (overwrite = true builds it again)"
	Unchanged       Verdict = "not queued: this image was built for what this run read already"
	FailedBefore    Verdict = "not queued: the same rebuild failed a short while ago"
)

// Decision is the answer of [Queue.Add].
type Decision struct {
	Verdict Verdict
	Key     string
	Target  string
	Result  *Result  // of AlreadyBuilt, BuiltForAnother and Unchanged
	Lacks   float64  // of Unchanged: the share of the run's chunks that the image was not built for
	Failure *Failure // of FailedBefore
}

// Add puts a job into the queue, or says why not. It blocks for as long as another process
// changes the queue, some milliseconds, and gives up with ctx. Errors are [ErrReference],
// [ErrFull] and those of the file system; a queue that Add failed on is as it was.
func (q *Queue) Add(ctx context.Context, r Request) (Decision, error) {
	target, err := TargetOf(r.Image, &r.Options)
	if err != nil {
		return Decision{}, err
	}
	if r.Image.Digest == "" {
		return Decision{}, fmt.Errorf("%w: the image's digest is not known", ErrReference)
	}
	image := imageKey(r.Image, target, &r.Options)
	d := Decision{Key: image + "-" + listKey(r.ListHash), Target: target}

	unlock, err := q.lockState(ctx)
	if err != nil {
		return Decision{}, err
	}
	defer unlock()
	if stop, err := q.refuse(&d, image, r.Overwrite); stop || err != nil {
		return d, err
	}
	d.Verdict = Queued
	old, exists, err := q.readJob(image + ".json")
	switch {
	case err != nil:
		q.setAside(image+".json", err)
	case exists && (old.Key == d.Key || !r.Overwrite):
		d.Verdict = AlreadyQueued
		return d, nil
	case exists:
		d.Verdict = Replaced
	}
	var union *persist.List
	if r.Overwrite {
		base := filepath.Join(dirBuilt, image+".list")
		if d.Verdict == Replaced {
			base = filepath.Join(dirLists, old.Key+".list")
		}
		if union = q.extend(&d, image, base, &r); d.Verdict == Unchanged || d.Verdict == AlreadyQueued {
			return d, nil
		}
	}
	if err := q.put(&d, image, union, &r); err != nil {
		return Decision{}, fmt.Errorf("queue rebuild: %w", err)
	}
	// The list of a replaced job stays: its build may be going on. See dropLists.
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return d, nil
}

// put writes the files of a job that was accepted, whose list is union, or r's where that is nil.
func (q *Queue) put(d *Decision, image string, union *persist.List, r *Request) error {
	name := filepath.Join(dirLists, d.Key+".list")
	job := Job{
		Version: version, Key: d.Key, Created: time.Now().UTC(), Image: r.Image,
		List: filepath.Join(q.dir, name), ListHash: r.ListHash,
		Target: d.Target, Options: r.Options, Recording: r.Recording, Overwrite: r.Overwrite,
	}
	if union != nil {
		job.Recording.List = filepath.Join(q.dir, dirBuilt, image+".list") // it is there when the image is built
	}
	if err := q.keepList(r.List, name, union); err != nil {
		return err
	}
	// The result of an image that is gone must not be taken for this job's. Dates would not tell: clocks are set back.
	if err := q.remove(filepath.Join(dirDone, d.Key+".json")); err != nil {
		return err
	}
	if err := q.writeJSON(filepath.Join(dirJobs, image+".json"), &job); err != nil {
		return errors.Join(err, q.remove(name))
	}
	return nil
}

// refuse fills d and returns true when the job must not be queued.
func (q *Queue) refuse(d *Decision, image string, overwrite bool) (bool, error) {
	if res, ok := q.result(d.Key); ok {
		d.Verdict, d.Result = AlreadyBuilt, &res
		return true, nil
	}
	if !overwrite {
		res, ok, err := q.last(image)
		if err != nil {
			return false, err
		}
		if ok {
			d.Verdict, d.Result = BuiltForAnother, &res
			return true, nil
		}
	}
	if f, err := q.failedBefore(d.Key, image); err != nil {
		return false, err
	} else if f != nil {
		d.Verdict, d.Failure = FailedBefore, f
		return true, nil
	}
	jobs, err := q.names(dirJobs)
	if err != nil {
		return false, err
	}
	if len(jobs) >= maxJobs && !slices.Contains(jobs, image+".json") {
		return false, fmt.Errorf("%w: %d jobs are waiting", ErrFull, len(jobs))
	}
	return false, nil
}

// failedBefore returns a failure that is no older than RetryFailed: of the job with this key, or of another of its image that no attempt
// can help, whatever the list. nil: there is none.
func (q *Queue) failedBefore(key, image string) (*Failure, error) {
	failed, err := q.names(dirFailed)
	if err != nil {
		return nil, err
	}
	for _, n := range failed {
		if !strings.HasPrefix(n, image+"-") {
			continue
		}
		var f Failure
		exists, err := readJSON(q.root, filepath.Join(dirFailed, n), &f)
		// A failure that is yet to come is from before somebody set the clock back: nobody knows how old it is.
		age := time.Since(f.Failed)
		if err == nil && exists && (f.Permanent || n == key+".json") && age >= 0 && age < q.o.RetryFailed {
			return &f, nil
		}
	}
	return nil, nil
}

// last returns the latest result of an image; false when there is none.
func (q *Queue) last(image string) (last Result, ok bool, err error) {
	done, err := q.names(dirDone)
	if err != nil {
		return Result{}, false, err
	}
	for _, n := range done {
		if !strings.HasPrefix(n, image+"-") {
			continue
		}
		if res, there := q.result(strings.TrimSuffix(n, ".json")); there && (!ok || res.Finished.After(last.Finished)) {
			last, ok = res, true
		}
	}
	return last, ok, nil
}

// result returns the result of key, unless it is a layout whose image is gone.
func (q *Queue) result(key string) (Result, bool) {
	var res Result
	exists, err := readJSON(q.root, filepath.Join(dirDone, key+".json"), &res)
	if err != nil || !exists || res.Version != version || res.Key != key {
		return Result{}, false
	}
	if dir, ok := layoutOf(res.Target); ok {
		alg, hex, _ := strings.Cut(res.Manifest, ":")
		if _, err := os.Stat(filepath.Join(dir, "blobs", alg, hex)); errors.Is(err, fs.ErrNotExist) {
			return Result{}, false
		}
	}
	return res, true
}

func layoutOf(target string) (string, bool) {
	rest, ok := strings.CutPrefix(target, "oci:")
	if i := strings.LastIndexByte(rest, ':'); ok && i >= 0 {
		return rest[:i], true
	}
	return rest, ok
}

// keepList makes the queue's own link of the list at path, or a copy where links do not work; union is written in its place if there
// is one.
func (q *Queue) keepList(path, name string, union *persist.List) error {
	if err := q.remove(name); err != nil {
		return err
	}
	if union != nil {
		return atomicfile.Write(q.root, dirTemp, name, 0o600, func(w io.Writer) error {
			_, err := union.WriteTo(w)
			return err
		})
	}
	if err := os.Link(path, filepath.Join(q.dir, name)); err == nil {
		return atomicfile.SyncDir(q.root, dirLists)
	}
	return q.copyList(path, name)
}

func (q *Queue) copyList(path, name string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read from
	return atomicfile.Write(q.root, dirTemp, name, 0o600, func(w io.Writer) error {
		_, err := io.Copy(w, f)
		return err
	})
}

// Jobs returns the waiting jobs, the oldest first. Files that are no jobs are set aside.
func (q *Queue) Jobs() ([]Job, error) {
	names, err := q.names(dirJobs)
	if err != nil {
		return nil, err
	}
	var jobs []Job
	for _, n := range names {
		j, exists, err := q.readJob(n)
		switch {
		case errors.Is(err, errBadFile):
			q.setAside(n, err)
		case err != nil:
			return nil, err
		case exists:
			jobs = append(jobs, j)
		}
	}
	slices.SortFunc(jobs, func(a, b Job) int { return a.Created.Compare(b.Created) })
	return jobs, nil
}

func (q *Queue) readJob(name string) (Job, bool, error) {
	var j Job
	exists, err := readJSON(q.root, filepath.Join(dirJobs, name), &j)
	if err == nil && exists {
		if err = j.check(); err == nil && j.imageKey()+".json" != name {
			err = fmt.Errorf("%w: got key %s in %s", errBadFile, j.Key, name)
		}
	}
	if err != nil {
		return Job{}, exists, fmt.Errorf("job %s: %w", name, err)
	}
	return j, exists, nil
}

// setAside moves a job file that cannot be read out of the way.
func (q *Queue) setAside(name string, why error) {
	err := q.root.Rename(filepath.Join(dirJobs, name), filepath.Join(dirFailed, name+".bad"))
	q.o.Log.Warn("set aside a job file that cannot be read", zap.String("file", name), zap.NamedError("why", why), zap.Error(err))
}

// names returns the .json files of a directory in the order of their names.
func (q *Queue) names(dir string) ([]string, error) {
	entries, err := fs.ReadDir(q.root.FS(), dir)
	if err != nil {
		return nil, fmt.Errorf("read queue: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".json") && e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (q *Queue) writeJSON(name string, v any) error { return writeJSON(q.root, name, v) }

func writeJSON(root *os.Root, name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if len(data) > maxFile {
		return fmt.Errorf("write %s: got %d bytes, want at most %d", name, len(data), maxFile)
	}
	return atomicfile.Write(root, dirTemp, name, 0o600, func(w io.Writer) error {
		_, err := w.Write(append(data, '\n'))
		return err
	})
}

func (q *Queue) remove(name string) error {
	if err := q.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (q *Queue) warn(what string, err error) {
	if err != nil {
		q.o.Log.Warn(what, zap.Error(err))
	}
}

// lockState takes the lock under which the queue's files change. It is held for
// milliseconds; a holder that was stopped is waited for until ctx ends.
func (q *Queue) lockState(ctx context.Context) (unlock func(), err error) {
	f, err := q.root.OpenFile(fileState, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock queue: %w", err)
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := flock(f)
		if ok {
			return func() { q.warn("unlock queue", f.Close()) }, nil
		}
		if err != nil {
			return nil, fmt.Errorf("lock queue: %w", errors.Join(err, f.Close()))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("lock queue: another process holds %s: %w", filepath.Join(q.dir, fileState), errors.Join(ctx.Err(), f.Close()))
		}
	}
}

// flock tries to take the lock of f; ok is false when another description has it.
func flock(f *os.File) (ok bool, err error) {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, err
		}
	}
}

// Dir returns the queue's directory.
func (q *Queue) Dir() string { return q.dir }
