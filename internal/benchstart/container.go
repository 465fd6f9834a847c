package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/headstart-oci/headstart/internal/readylog"
	"github.com/headstart-oci/headstart/internal/runroot"
)

// startTimeout bounds one start of a container.
const startTimeout = 3 * time.Minute

// readyLine is what the programs of package workload print when they serve.
var readyLine = regexp.MustCompile(`^ready|start worker process`)

// started is an image that is where a container can be started on it.
type started struct {
	began  time.Time // of everything
	layers []string  // directories, the lowest first
	pids   []int     // of the daemons that serve it
	// report fills in what the mode knows of the start until ready; may be nil. after is report once the program has ended.
	report, after func(*result) error
	stops         []func() error // what takes it away, in reverse
}

func (s *started) onClose(f func() error) { s.stops = append(s.stops, f) }

func (s *started) close() (err error) {
	for _, stop := range slices.Backward(s.stops) {
		err = errors.Join(err, stop())
	}
	s.stops = nil
	return err
}

// start is one start of a container.
type start struct{ began, ready time.Time }

// startContainer starts the image's command on the layers, waits until it says that it is ready, calls atReady, if it is not nil,
// and ends it. What a program reads to end is no part of its start: atReady does not see it.
func startContainer(ctx context.Context, img *image, layers []string, scratch string, atReady func() error) (s start, err error) {
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return s, err
	}
	ready := make(chan time.Time, 1)
	found := func(string) { ready <- time.Now() }
	var said tailWriter
	var once sync.Once
	tee := readylog.NewTee(&said, readyLine, func(line string) { once.Do(func() { found(line) }) })
	c := img.config
	s.began = time.Now()
	p, err := runroot.Start(ctx, runroot.Options{
		Layers: layers, Scratch: scratch, Args: append(append([]string(nil), c.Entrypoint...), c.Cmd...), Env: c.Env, Dir: c.WorkingDir, User: c.User,
		Stdout: tee, Stderr: tee,
	})
	if err != nil {
		return s, err
	}
	defer func() {
		p.End(2 * time.Second)
		_ = p.Wait() // ended by us
	}()
	if err := p.Release(); err != nil {
		return s, err
	}
	limit := time.NewTimer(startTimeout)
	defer limit.Stop()
	select {
	case s.ready = <-ready:
	case <-p.Done():
		select {
		case s.ready = <-ready: // said so and ended
			return s, call(atReady)
		default:
		}
		return s, fmt.Errorf("the container ended before it was ready: %w: %s", p.Wait(), said.String())
	case <-limit.C:
		return s, fmt.Errorf("the container is not ready after %s: %s", startTimeout, said.String())
	case <-ctx.Done():
		return s, ctx.Err()
	}
	return s, call(atReady)
}

func call(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

// tailWriter keeps the last bytes of what is written. Safe for concurrent use.
type tailWriter struct {
	mu  sync.Mutex
	buf []byte
}

var _ io.Writer = (*tailWriter)(nil)

// Write implements io.Writer.
func (t *tailWriter) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	t.buf = t.buf[max(0, len(t.buf)-2000):]
	return len(p), nil
}

// String returns what was kept.
func (t *tailWriter) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
