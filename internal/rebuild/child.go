package rebuild

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// BuildFunc builds the image of job; its temporary files go to the directory temp, which
// is removed afterwards. The image must be published as a whole, at the end. The result's
// Version, Key, Image, Finished and Duration are filled in by the caller.
type BuildFunc func(ctx context.Context, job Job, temp string) (Result, error)

// errorSuffix makes the name of a child's error file in work/ from its job's key.
const errorSuffix = ".error.json"

// childMargin is how long a build that does not heed its timeout may go on.
const childMargin = time.Minute

// failure is a child's error file.
type failure struct {
	Error     string `json:"error"`
	Permanent bool   `json:"permanent"`
}

type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// Permanent marks err as one that another attempt cannot help.
func Permanent(err error) error { return permanent{err} }

// IsPermanent reports whether err was marked by [Permanent].
func IsPermanent(err error) bool {
	var p permanent
	return errors.As(err, &p)
}

// RunChild is what a [Command]'s process does: it builds the job in jobFile at the lowest priority
// and leaves the result, or the error, where the queue finds it. It returns the
// error too. It stops at ctx's end and at the job's timeout; a build that heeds neither ends the process.
func RunChild(ctx context.Context, jobFile string, build BuildFunc) error {
	// Our output goes to the parent, which may die before us.
	signal.Ignore(syscall.SIGPIPE)
	if err := LowerPriority(); err != nil {
		// A build at normal priority is better than none.
		fmt.Fprintln(os.Stderr, "lower the priority:", err)
	}
	job, err := ReadJob(jobFile)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Dir(filepath.Dir(jobFile)))
	if err != nil {
		return fmt.Errorf("open queue: %w", err)
	}
	defer root.Close() //nolint:errcheck // nothing was written through it

	ctx, cancel := context.WithTimeoutCause(ctx, job.Options.timeout(), fmt.Errorf("the build did not end within %v", job.Options.timeout()))
	defer cancel()
	hang := time.AfterFunc(job.Options.timeout()+childMargin, func() {
		fmt.Fprintln(os.Stderr, "the build hangs")
		os.Exit(1)
	})
	defer hang.Stop()

	err = runJob(ctx, root, job, build)
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
		err = cause
	}
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return err // called off: no fault of the job
	}
	report := failure{Error: err.Error(), Permanent: IsPermanent(err)}
	return errors.Join(err, writeJSON(root, filepath.Join(dirWork, job.Key+errorSuffix), &report))
}

func runJob(ctx context.Context, root *os.Root, job Job, build BuildFunc) (err error) {
	began := time.Now()
	temp := filepath.Join(dirWork, job.Key)
	if err := root.Mkdir(temp, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the build's directory: %w", err)
	}
	defer func() { err = errors.Join(err, root.RemoveAll(temp)) }()
	res, err := build(ctx, job, filepath.Join(root.Name(), temp))
	if err != nil {
		return err
	}
	res.Version, res.Key, res.Image = version, job.Key, job.Image
	res.ListPath = job.Recording.List
	res.Finished, res.Duration = time.Now().UTC(), time.Since(began)
	if res.Target == "" {
		res.Target = job.Target
	}
	if err := writeJSON(root, filepath.Join(dirDone, job.Key+".json"), &res); err != nil {
		return fmt.Errorf("the image is built, its record is not: %w", err)
	}
	return nil
}
