package rebuild

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// Command returns the command that builds the job in a file; see [RunChild].
type Command func(jobFile string) *exec.Cmd

// Self returns a [Command] that executes this program's own file with the arguments args and the job file.
func Self(args ...string) Command {
	return func(jobFile string) *exec.Cmd {
		// The link, not its target: after an upgrade of the file it still is the
		// program that wrote the job.
		cmd := exec.Command("/proc/self/exe", append(slices.Clip(args), jobFile)...)
		cmd.Args[0] = os.Args[0]
		return cmd
	}
}

// memoryLimit is the soft limit of the child's Go heap (GOMEMLIMIT): a conversion stays under 150 MiB.
const memoryLimit = "128MiB"

const defaultTimeout = time.Hour

// errCalledOff says that a build was ended because the queue's Run ended.
var errCalledOff = errors.New("called off")

func (o *Options) timeout() time.Duration {
	if o.Timeout <= 0 {
		return defaultTimeout
	}
	return o.Timeout
}

// build runs the child and returns when it has ended, nil when it says that it built the image.
func (q *Queue) build(ctx context.Context, job Job, lock *os.File) error {
	cmd := q.o.Command(filepath.Join(q.dir, dirJobs, job.imageKey()+".json"))
	log := &tail{log: q.o.Log}
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{lock} // as long as the child lives, the queue is locked
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(childEnv(cmd.Environ()), "GOMEMLIMIT="+memoryLimit)
	cmd.WaitDelay = q.o.Grace
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the build process: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()

	// The child ends itself at its timeout; this is for one that cannot.
	limit := time.NewTimer(job.Options.timeout() + 2*childMargin)
	defer limit.Stop()
	var why error
	select {
	case err := <-exited:
		return describeExit(err, log)
	case <-ctx.Done():
		if errors.Is(context.Cause(ctx), ErrDetach) {
			return ErrDetach
		}
		why = errCalledOff
	case <-limit.C:
		why = fmt.Errorf("the build did not end within %v", job.Options.timeout())
	}
	return errors.Join(why, q.end(cmd, exited))
}

// end asks the child to end, then kills it. The handle is [os.Process]'s, which never means another process.
func (q *Queue) end(cmd *exec.Cmd, exited <-chan error) error {
	grace := time.NewTimer(q.o.Grace)
	defer grace.Stop()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		q.o.Log.Warn("end the build process", zap.Error(err))
	}
	select {
	case err := <-exited:
		return err
	case <-grace.C:
	}
	if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		q.o.Log.Warn("kill the build process", zap.Error(err))
	}
	return <-exited
}

// describeExit turns the end of a child into an error that says how it ended and its last words.
func describeExit(err error, log *tail) error {
	if err == nil {
		return errors.New("the build process said nothing of a result")
	}
	if last := log.lastLine(); last != "" {
		return fmt.Errorf("the build process ended: %w: %s", err, last)
	}
	return fmt.Errorf("the build process ended: %w", err)
}

// childEnv returns the environment without what belongs to the plugin alone.
func childEnv(env []string) []string {
	var kept []string
	for _, e := range env {
		if !strings.HasPrefix(e, "NRI_") && !strings.HasPrefix(e, "GOMEMLIMIT=") {
			kept = append(kept, e)
		}
	}
	return kept
}

// maxTail is how much of a child's output is kept, in bytes.
const maxTail = 8 << 10

// tail keeps the end of what is written to it and logs its lines. Safe for concurrent use.
type tail struct {
	log *zap.Logger

	mu   sync.Mutex // guards buf
	buf  []byte
	line []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - maxTail; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	for rest := p; len(rest) > 0; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		if room := maxTail - len(t.line); len(line) > room {
			line = line[:room]
		}
		t.line = append(t.line, line...)
		if ended {
			t.log.Debug("build process: " + string(t.line))
			t.line = t.line[:0]
		}
		rest = after
	}
	return len(p), nil
}

func (t *tail) lastLine() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(t.buf)), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
