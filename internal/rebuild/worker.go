package rebuild

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/internal/atomicfile"
)

// ErrDetach leaves a running build alone when it is the cause of the end of [Queue.Run]'s context: it goes on without us and holds the lock until it has ended.
var ErrDetach = errors.New("rebuild: detach")

// idle is how often a queue without work is looked at: another process may have added to it.
const idle = time.Minute

// Run works on the queue until ctx ends, and returns when nothing of it is running any
// more: a build is asked to end, then killed, and will be built from its start by the next
// Run without the attempt being counted; see [ErrDetach] for the other way. One build
// runs at a time, whatever number of processes run the queue. Call it once per Queue.
func (q *Queue) Run(ctx context.Context) {
	q.warn("clean queue", atomicfile.Clean(q.root, dirTemp))
	for ctx.Err() == nil {
		wait, err := q.step(ctx)
		if err != nil && ctx.Err() == nil {
			q.o.Log.Warn("work on the rebuild queue", zap.String("dir", q.dir), zap.Error(err))
			wait = q.o.Backoff(1)
		}
		if wait <= 0 {
			continue
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-q.wake:
		}
		t.Stop()
	}
}

// step works on one job and returns how long to wait before the next.
func (q *Queue) step(ctx context.Context) (time.Duration, error) {
	jobs, err := q.Jobs()
	if err != nil {
		return 0, err
	}
	wait, name := idle, ""
	for _, j := range jobs {
		d := q.due(&j)
		if d <= 0 {
			name = j.imageKey() + ".json"
			break
		}
		wait = min(wait, d)
	}
	if name == "" {
		return wait, nil
	}
	lock, err := q.root.OpenFile(fileLock, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	// The lock goes with the last descriptor: ours here, or that of a child we left alone.
	defer func() { q.warn("release queue", lock.Close()) }()
	if ok, err := flock(lock); err != nil || !ok {
		return q.o.Poll, err
	}
	return 0, q.work(ctx, name, lock)
}

// due returns how long a job has to wait, 0 or less: not any longer. What is further away than any wait was noted before somebody set
// the clock back.
func (q *Queue) due(j *Job) time.Duration {
	d := time.Until(j.NotBefore)
	if d > q.o.Backoff(max(j.Attempts, 1)) {
		return 0
	}
	return d
}

// work brings one job forward; the build lock is held.
func (q *Queue) work(ctx context.Context, name string, lock *os.File) error {
	job, exists, err := q.readJob(name)
	if err != nil || !exists || q.due(&job) > 0 {
		return err // another process was faster
	}
	if ended, err := q.settle(ctx, job, nil); ended || err != nil {
		return err
	}
	if job.Attempts >= q.o.MaxAttempts {
		return q.fail(ctx, job, failure{Error: died(job.LastError)})
	}
	if err := errors.Join(q.cleanWork(), q.dropLists(ctx)); err != nil {
		return err
	}
	// Counted before it runs: what kills the build may kill us too.
	err = q.update(ctx, job.Key, func(j *Job) {
		j.Attempts++
		j.LastError = fmt.Sprintf("build %d of %d ended without a result", j.Attempts, q.o.MaxAttempts)
	})
	if err != nil {
		return err
	}
	job.Attempts++
	q.o.Log.Debug("build", zap.String("image", job.Image.Reference), zap.String("target", job.Target), zap.Int("attempt", job.Attempts))
	buildErr := q.build(ctx, job, lock)
	if errors.Is(buildErr, ErrDetach) {
		return nil
	}
	after := context.WithoutCancel(ctx)
	ended, err := q.settle(after, job, buildErr)
	if ended || err != nil {
		return err
	}
	if ctx.Err() != nil {
		return q.update(after, job.Key, func(j *Job) { j.Attempts--; j.LastError = "" })
	}
	return q.fail(after, job, failure{Error: fmt.Sprint(buildErr)})
}

func died(last string) string {
	if last == "" {
		return "the build ended each time without a result"
	}
	return last
}

// settle looks for what a build of job left behind: a result or an error.
func (q *Queue) settle(ctx context.Context, job Job, buildErr error) (ended bool, err error) {
	var res Result
	exists, err := readJSON(q.root, filepath.Join(dirDone, job.Key+".json"), &res)
	if exists && err == nil && res.Key == job.Key { // put removed what was there before the job was
		return true, q.finish(ctx, job, res)
	}
	var f failure
	name := filepath.Join(dirWork, job.Key+errorSuffix)
	exists, err = readJSON(q.root, name, &f)
	q.warn("read the error of a build", err)
	if !exists || err != nil {
		return false, nil //nolint:nilerr // a file that tells nothing is as good as none
	}
	if errors.Is(buildErr, errCalledOff) {
		return false, q.remove(name)
	}
	return true, errors.Join(q.fail(ctx, job, f), q.remove(name))
}

// finish removes a job that was built, and tells of it.
func (q *Queue) finish(ctx context.Context, job Job, res Result) error {
	if err := q.keepBuilt(&job); !errors.Is(err, fs.ErrNotExist) { // it was finished before
		q.warn("keep the list of an image", err)
	}
	if err := q.drop(ctx, job); err != nil {
		return err
	}
	q.warn("clean queue", q.cleanWork())
	q.warn("clean queue", errors.Join(q.prune(dirDone, maxDone), q.prune(dirBuilt, maxDone)))
	q.warn("clean queue", q.remove(filepath.Join(dirFailed, job.Key+".json")))
	if q.o.Built != nil {
		q.o.Built(job, res)
	}
	return nil
}

// fail counts a failure: the job waits for its next attempt or is given up.
func (q *Queue) fail(ctx context.Context, job Job, f failure) error {
	if !f.Permanent && job.Attempts < q.o.MaxAttempts {
		wait := q.o.Backoff(max(job.Attempts, 1))
		q.o.Log.Warn("rebuild failed, will be tried again", zap.String("image", job.Image.Reference),
			zap.Int("attempt", job.Attempts), zap.Int("of", q.o.MaxAttempts), zap.Duration("in", wait), zap.String("error", f.Error))
		return q.update(ctx, job.Key, func(j *Job) {
			j.LastError = f.Error
			j.NotBefore = time.Now().UTC().Add(wait)
		})
	}
	end := Failure{
		Version: version, Key: job.Key, Job: job, Error: f.Error, Permanent: f.Permanent,
		Attempts: job.Attempts, Failed: time.Now().UTC(),
	}
	if err := q.writeJSON(filepath.Join(dirFailed, job.Key+".json"), &end); err != nil {
		return err
	}
	if err := q.drop(ctx, job); err != nil {
		return err
	}
	q.warn("clean queue", q.cleanWork())
	q.warn("clean queue", q.prune(dirFailed, maxFailed))
	if q.o.Failed != nil {
		q.o.Failed(job, end)
	}
	return nil
}

// update changes the job file of key; a job that was replaced or removed stays as it is.
func (q *Queue) update(ctx context.Context, key string, change func(*Job)) error {
	unlock, err := q.lockState(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	name := key[:24] + ".json"
	job, exists, err := q.readJob(name)
	if err != nil || !exists || job.Key != key {
		return err
	}
	change(&job)
	return q.writeJSON(filepath.Join(dirJobs, name), &job)
}

// drop removes a job and its list unless it was replaced.
func (q *Queue) drop(ctx context.Context, job Job) error {
	unlock, err := q.lockState(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	name := job.imageKey() + ".json"
	now, exists, err := q.readJob(name)
	if err != nil || !exists || now.Key != job.Key {
		return err
	}
	return errors.Join(q.remove(filepath.Join(dirJobs, name)), q.remove(filepath.Join(dirLists, job.Key+".list")))
}

// cleanWork removes what builds left behind; the build lock is held, so none is running.
func (q *Queue) cleanWork() error {
	entries, err := fs.ReadDir(q.root.FS(), dirWork)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, q.root.RemoveAll(filepath.Join(dirWork, e.Name())))
	}
	return errors.Join(errs...)
}

// dropLists removes the lists of jobs that were replaced; the build lock is held, so
// none of them is being read.
func (q *Queue) dropLists(ctx context.Context) error {
	unlock, err := q.lockState(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	jobs, err := q.Jobs()
	if err != nil {
		return err
	}
	wanted := map[string]bool{}
	for _, j := range jobs {
		wanted[j.Key+".list"] = true
	}
	entries, err := fs.ReadDir(q.root.FS(), dirLists)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if !wanted[e.Name()] {
			errs = append(errs, q.remove(filepath.Join(dirLists, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// prune keeps the newest files of a directory.
func (q *Queue) prune(dir string, keep int) error {
	entries, err := fs.ReadDir(q.root.FS(), dir)
	if err != nil || len(entries) <= keep {
		return err
	}
	age := func(e fs.DirEntry) time.Time {
		info, err := e.Info()
		if err != nil {
			return time.Time{} // gone already: first to go
		}
		return info.ModTime()
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int {
		if c := age(a).Compare(age(b)); c != 0 {
			return c
		}
		return strings.Compare(a.Name(), b.Name())
	})
	var errs []error
	for _, e := range entries[:len(entries)-keep] {
		errs = append(errs, q.remove(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
