// Package server traces the files that one container touches: it joins the container's
// mount namespace, marks its root, and streams first touches until the container ends or
// its parent says so. It is the whole of optimizer-server; package stream has the form of
// what it writes.
//
// It needs CAP_SYS_ADMIN, the host's /proc at /proc, and the calling goroutine's thread
// for itself: [Run] leaves that thread in no state to run anything else.
package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// DefaultMaxFiles is how many files one trace holds unless told otherwise; more become a
// loss. About 100 bytes of memory each.
const DefaultMaxFiles = 1 << 20

// Config says what to trace.
type Config struct {
	PID int // a process of the container, as the host numbers it; greater than 0
	// Attach says that the process runs already: that its start is missing is a loss.
	Attach   bool
	Pages    Pages  // where page events come from; the zero value: nowhere
	Root     string // directory inside that process' root; empty means "/"
	MaxFiles int    // 0 and what exceeds 2^31-1 mean DefaultMaxFiles
}

// Pages is an instance of tracefs that somebody else made, as its open directory.
type Pages struct {
	Instance *os.File // nil: none
	Spec     tracefs.Spec
	// Ahead says that the parent arms the instance while this process starts. It says on the standard input how that
	// went: [stream.Armed], or why it failed.
	Ahead bool
	// Later says that an instance may come through the standard input, a socket: its descriptor with its Spec as text.
	Later bool
}

// Codes of [stream.Failure].
const (
	codeLate      = "late"      // the container was gone before the marks were in place
	codePrivilege = "privilege" // a capability is missing
	codeKernel    = "kernel"    // the kernel cannot do what is needed
	codeInternal  = "internal"
)

// failure is an error with the code that goes with it.
type failure struct {
	code string
	err  error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// classify gives err the code its cause deserves.
func classify(err error) *failure {
	var f *failure
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT):
		return &failure{codeLate, err}
	case errors.Is(err, fanotify.ErrPermission), errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return &failure{codePrivilege, err}
	case errors.Is(err, fanotify.ErrUnsupported), errors.Is(err, unix.ENOSYS):
		return &failure{codeKernel, err}
	}
	return &failure{codeInternal, err}
}

// Run traces until the container's process ends, ctx is cancelled, or stdin, when it is a
// pipe or a socket, reaches its end; then it flushes and returns nil. What it cannot start
// it reports both as a [stream.Failure] and as an error.
// Once it has written its last frame it holds nothing of the container.
func Run(ctx context.Context, c Config, stdin, stdout *os.File) error {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	if c.MaxFiles <= 0 || c.MaxFiles > math.MaxInt32 {
		c.MaxFiles = DefaultMaxFiles
	}
	out := newOutput(stdout)
	s, err := arm(c, stdin, out)
	if err != nil {
		f := classify(err)
		out.send(stream.Failure{Code: f.code, Text: f.Error()})
		return errors.Join(err, out.finish())
	}
	err = s.loop(ctx, stdin)
	err = errors.Join(err, s.release())
	if err != nil {
		out.send(stream.Failure{Code: codeInternal, Text: err.Error()})
	} else {
		out.send(s.end())
	}
	return errors.Join(err, out.finish())
}

// arm joins the container and puts the marks in place.
func arm(c Config, stdin *os.File, out *output) (*session, error) {
	raiseFileLimit()
	t, err := openTarget(c.PID)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", c.PID, err)
	}
	g, err := newGroup()
	if err != nil {
		return nil, errors.Join(err, t.close())
	}
	s := newSession(c, t, g, out)
	if t.runs = c.Attach; c.Attach {
		s.losses.Lose(trace.Loss{Reason: "late", Count: -1, Detail: "attached to a running process: what it touched before is not known"})
	}
	note := s.openPages(c.Pages)
	if c.Pages.Later {
		s.openWidener()
	}
	fail := func(err error) (*session, error) {
		return nil, errors.Join(err, s.closePages(), g.Close(), t.close())
	}
	if err := t.join(c.Root); err != nil {
		return fail(fmt.Errorf("join process %d: %w", c.PID, err))
	}
	if s.pages != nil || c.Pages.Later {
		t.survey()
	}
	var by func() error
	if c.Pages.Ahead {
		by = func() error { return armedAhead(stdin) }
	}
	if n := s.armPages(by); note == "" {
		note = n
	}
	if s.pages != nil && s.pages.exact() && t.numbersDo() {
		if n, ok := t.learn(); ok {
			s.lean = newLean(n)
		}
	}
	kind, err := t.mark(g, s.lean != nil)
	if err != nil {
		return fail(fmt.Errorf("mark the root of process %d: %w", c.PID, err))
	}
	s.armed, s.dated = time.Now(), fileTime()
	if s.pages != nil {
		s.pages.begin(0)
	}
	out.send(stream.Ready{Armed: s.armed, Mark: kind.String(), Engine: s.engine, Note: note, Early: t.unstarted()})
	return s, nil
}

// openPages makes ready to read page events, which needs to see the host still, and returns why
// it cannot; "" too when nobody wants it to.
func (s *session) openPages(p Pages) string {
	if p.Instance == nil {
		return ""
	}
	s.openWidener()
	l, err := newPageLog(p, s.t, s.comms, s.c.MaxFiles, s.widener)
	if err != nil {
		return err.Error()
	}
	s.pages, s.engine = l, l.engine()
	return ""
}

// armPages makes the kernel record page events, if not somebody else does, and returns why that failed.
func (s *session) armPages(by func() error) string {
	if s.pages == nil {
		return ""
	}
	err := errNoLayers
	if s.t.sees() {
		err = s.pages.arm(by)
	}
	if err == nil {
		return ""
	}
	s.engine = engineFiles
	return errors.Join(err, s.closePages()).Error()
}

// openWidener opens what tells what was mapped around a fault. Without it that has no upper bound but the file.
func (s *session) openWidener() {
	if w, err := tracefs.NewWidener(); err == nil {
		s.widener = w
	}
}

// closePages gives up the page events.
func (s *session) closePages() error {
	var err error
	if s.widener != nil {
		err = s.widener.Close()
	}
	l := s.pages
	if s.pages = nil; l == nil {
		return err
	}
	return errors.Join(err, l.close())
}

// raiseFileLimit lifts the soft limit of open files to the hard one. It is a precaution:
// only a few dozen are ever open, so a refusal is no error.
func raiseFileLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil && l.Cur < l.Max {
		l.Cur = l.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
	}
}

// since is the time since arming; never negative.
func (s *session) since() time.Duration { return max(time.Since(s.armed), 0) }
