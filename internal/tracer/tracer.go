// Package tracer runs one optimizer-server per container and turns what it streams into
// a trace. A tracer that dies, hangs or cannot start never harms the container: what is
// missing becomes a loss in the trace.
//
//	s, err := tracer.Start(ctx, tracer.Options{Server: path, PID: pid, Timeout: time.Minute})
//	…
//	select {
//	case <-s.Ready(): // armed
//	case <-deadline:  // go on without; the session keeps trying
//	}
//	…
//	s.Stop("stop")
//	<-s.Done()
//	r := s.Result()
package tracer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// Reasons for the end of a recording, as [Result.End] has them.
const (
	EndExit    = "exit"    // the container's process ended
	EndStop    = "stop"    // somebody asked for it, or the context was cancelled
	EndTimeout = "timeout" // Options.Timeout passed
	EndIdle    = "idle"    // Options.Idle passed without a first touch
	EndKilled  = "killed"  // the tracer died, hung or never started
)

// Errors that [Result.Err] answers to with errors.Is.
var (
	// ErrLate: the container was gone before the tracer was armed.
	ErrLate = errors.New("container gone before tracing began")
	// ErrPrivilege: the tracer lacks CAP_SYS_ADMIN.
	ErrPrivilege = errors.New("tracer lacks privileges")
	// ErrKernel: the kernel cannot do what the tracer needs.
	ErrKernel = errors.New("kernel cannot trace")
	// ErrKilled: the tracer ended without saying that it had sent everything.
	ErrKilled = errors.New("tracer died")
)

// DefaultGrace is how long a tracer that was asked to end may go without sending
// anything before it is killed.
const DefaultGrace = 10 * time.Second

// waitDelay is how long the standard error of a process that ended is still read.
const waitDelay = time.Second

// Options says what to trace and for how long.
type Options struct {
	Server string        // path of the optimizer-server binary
	Pages  *tracefs.Pool // where page events come from; nil: whole files only
	// PagesWait is how long a start waits for page events when none are ready; 0: as long as it takes. When that is over the recording
	// begins without, and gets them as soon as there are some: files that were touched before then count as a whole.
	PagesWait time.Duration
	Reserve   *Reserve      // of servers of that binary which stand by; nil: one is started
	PID       int           // the container's first process, as the host numbers it
	Attach    bool          // it runs already, so that its start is missing: a loss
	Timeout   time.Duration // 0: none; the recording ends then, counted from arming
	Idle      time.Duration // 0: none; ends when no file was touched for the first time for that long
	Grace     time.Duration // 0: DefaultGrace
	Log       *zap.Logger   // nil: silent
}

// Result is what one session recorded.
type Result struct {
	Trace    trace.Trace
	End      string        // one of the End constants, or the reason handed to Stop
	Armed    time.Time     // wall clock of arming; zero when it never armed
	Early    bool          // the container's command had not begun then: nothing of it was missed, however late that was
	Duration time.Duration // from arming to the end
	Engine   string        // what recorded: "fanotify", or that and what told the pages
	Grade    string        // how exact the ranges are: one of the trace package's grades
	Mark     string        // what was marked: "filesystem", or "mount", which misses other mounts of the same files
	Err      error         // the tracer could not start or died; the Trace then has a Loss
}

// Session is one running recording. All methods are safe for concurrent use.
type Session struct {
	o   Options
	log *zap.Logger
	*process
	spec    string         // of the instance that was ready
	later   bool           // there was no instance in time, and one may come
	unlend  func()         // ends the wait for it
	lending sync.WaitGroup // done when nobody waits for it
	arming  sync.WaitGroup // done when the instance that was ready is armed, or failed to be
	// returning is done when the pool has what was given back.
	returning sync.WaitGroup

	ready   chan struct{}
	done    chan struct{}
	stop    chan struct{} // closed by the first Stop
	touched chan struct{} // one token: something was touched for the first time, or arming
	alive   chan struct{} // one token: a frame came in

	closeInput sync.Once

	// mu guards what follows.
	mu    sync.Mutex
	why   string
	pages *tracefs.Instance // nil: none, or given back

	res Result // written before done is closed
}

// Start spawns the server for one container and returns without waiting for it. It
// returns an error when the options are wrong or the binary cannot be run; whatever
// fails later is in [Session.Result]. Cancelling ctx is the same as Stop("stop").
// Every session started ends by itself, at the latest Grace after it was asked to.
func Start(ctx context.Context, o Options) (*Session, error) {
	if o.PID <= 0 {
		return nil, fmt.Errorf("start tracer: pid %d, want a process id", o.PID)
	}
	if o.Timeout < 0 || o.Idle < 0 || o.Grace < 0 {
		return nil, fmt.Errorf("start tracer: negative duration (timeout %v, idle %v, grace %v)", o.Timeout, o.Idle, o.Grace)
	}
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	s := &Session{
		o: o, log: o.Log.With(zap.Int("pid", o.PID)),
		ready: make(chan struct{}), done: make(chan struct{}), stop: make(chan struct{}),
		touched: make(chan struct{}, 1), alive: make(chan struct{}, 1),
	}
	s.takePages(ctx)
	armed := s.armAhead()
	if err := s.spawn(); err != nil {
		s.giveBack()
		s.returning.Wait()
		return nil, fmt.Errorf("start tracer %s: %w", o.Server, err)
	}
	s.tell(armed)
	s.lend()
	go s.run(ctx)
	return s, nil
}

// spawn has a server that stands by do it, or starts one.
func (s *Session) spawn() error {
	args := []string{"--pid", strconv.Itoa(s.o.PID)}
	if s.o.Attach {
		args = append(args, "--attach")
	}
	var instance *os.File
	if s.pages != nil {
		args = append(args, "--pages", s.spec, "--pages-ahead")
		instance = s.pages.File()
	}
	if s.later {
		args = append(args, "--pages-later")
	}
	if p := s.o.Reserve.order(args, instance); p != nil {
		s.process = p
		return nil
	}
	p, cmd := newProcess(s.o.Server)
	cmd.Args = append(cmd.Args, args...)
	if instance != nil {
		cmd.ExtraFiles = []*os.File{instance} // descriptor 3
	}
	socket := 0
	if s.later {
		socket = unix.SOCK_STREAM
	}
	if err := p.start(socket); err != nil {
		return err
	}
	s.process = p
	return nil
}

// takePages gets an instance for the page events. Without one the recording goes on.
func (s *Session) takePages(ctx context.Context) {
	if s.o.Pages == nil {
		return
	}
	if s.o.PagesWait > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.o.PagesWait)
		defer cancel()
	}
	in, err := s.o.Pages.Get(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		s.later = true
		return
	}
	if err != nil {
		s.filesOnly(err.Error())
		return
	}
	spec, err := in.Spec().MarshalText()
	if err != nil {
		s.filesOnly(err.Error())
		s.o.Pages.Put(in)
		return
	}
	s.pages, s.spec = in, string(spec)
}

// filesOnly logs why there are no page events.
func (s *Session) filesOnly(why string) {
	s.log.Warn("recording whole files, not ranges: " + oneLine(why))
}

// giveBack returns the instance to its pool, unless that was done before. A pool that was closed removes it,
// which takes tens of milliseconds; the stream is read meanwhile.
func (s *Session) giveBack() {
	s.mu.Lock()
	in := s.pages
	s.pages = nil
	s.mu.Unlock()
	if in != nil {
		s.returning.Go(func() {
			s.arming.Wait()
			s.o.Pages.Put(in)
		})
	}
}

// Ready returns a channel that is closed once the marks are in place; it never is when
// the tracer could not start.
func (s *Session) Ready() <-chan struct{} { return s.ready }

// Done returns a channel that is closed when the recording has ended and every event is in.
func (s *Session) Done() <-chan struct{} { return s.done }

// Stop asks the recording to end and returns at once; what happened before is still
// recorded. The first reason given wins. Safe at any time, any number of times.
func (s *Session) Stop(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.why != "" {
		return
	}
	if reason == "" {
		reason = EndStop
	}
	s.why = reason
	close(s.stop)
}

// Result returns what was recorded. It waits for Done.
func (s *Session) Result() Result {
	<-s.done
	return s.res
}
