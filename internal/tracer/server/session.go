package server

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

const (
	// batch is how many events are read, and so how many files are open, at once.
	batch = 32
	// burst is how many events are handled before the other descriptors get a look.
	burst = 4096
	// restTime is how many milliseconds of events are handled together while they come. A
	// wake-up for each would take a core away from a workload that uses all of them.
	restTime = 2
	// hotAfter is how many events of one file that told nothing new make the server ask
	// the kernel for no more of them.
	hotAfter = 16
)

// session is one recording after arming.
type session struct {
	c       Config
	t       *target
	queues  []*queue       // the last one is that of new events
	closing errgroup.Group // of queues
	spare   *spare         // nil: it has one group, and had no more
	out     *output
	names   *namer
	origin  *origin
	others  *outsiders
	pages   *pageLog         // nil: files only
	widener *tracefs.Widener // nil: folios cannot be looked up
	unseen  uint32           // so many entries were touched, or may have been, before there were page events
	late    bool             // page events have begun and events of before may be queued: see seesPages
	handed  bool             // the parent was told that it may have their instance
	lean    *lean            // nil: files are named at once
	engine  string
	grade   string
	comms   *comms
	self    int32
	armed   time.Time
	dated   time.Time        // the same as fileTime tells it
	events  []fanotify.Event // the batch being handled
	busy    func() bool      // reports whether there is no CPU to spare
	now     time.Duration    // when the event being handled came, after arming
	owed    bool             // events were held, and not all of them were handled since
	touched bool             // a file was touched for the first time since this was last asked
	seed    maphash.Seed
	known   map[file]uint32 // index into entries
	entries blocks[entry]
	paths   []string // by entry, of those that have one
	pending map[inode][]pending
	losses  trace.Recorder // only its losses are used
	nextID  uint32
	seen    int64
	skipped int64
	cool    bool // ignore marks work
	pace    pace
	reason  string
	beaten  time.Time // at the end: when beat last did something
}

// inode names a file for as long as it exists.
type inode struct{ dev, ino uint64 }

// file names a file under one of its names; name is 0 for files that have only one.
type file struct {
	inode
	name uint64
}

// entry is what is known of a file that was touched.
type entry struct {
	ino   uint64 // as the root shows it
	id    uint32
	how   trace.How
	hot   uint8
	state state
}

type state uint8

const (
	listed  state = iota // sent to the parent
	waiting              // its path is not known yet
	left                 // no content of the image
)

// pending is an access whose path has to be looked for at the end.
type pending struct {
	entry  uint32
	access trace.Access
	image  bool // known to be content of the image
	gone   bool // the kernel says that its name was deleted; not worth a search
}

func newSession(c Config, t *target, g *fanotify.Group, out *output) *session {
	s := &session{
		c: c, t: t, queues: []*queue{{group: g, spare: -1}}, out: out,
		names:   newNamer(t),
		others:  newOutsiders(t),
		comms:   newComms(t.proc, c.PID),
		engine:  engineFiles,
		grade:   trace.GradeFile,
		self:    int32(os.Getpid()), //nolint:gosec // process ids fit: the kernel's limit is 2^22
		armed:   time.Now(),
		dated:   fileTime(),
		events:  make([]fanotify.Event, batch),
		seed:    maphash.MakeSeed(),
		known:   make(map[file]uint32),
		pending: make(map[inode][]pending),
		cool:    true,
		busy:    t.busy,
	}
	s.origin = newOrigin(t)
	return s
}

// loop handles events until the recording is to end.
func (s *session) loop(ctx context.Context, stdin *os.File) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("create eventfd: %w", err)
	}
	// The callback holds the descriptor, so it is closed only when it can no longer run.
	ran := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ran)
		_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-ran
		}
		_ = unix.Close(wake)
	}()
	in := -1
	if isStream(stdin) {
		in = int(stdin.Fd())
	}
	s.pace.keep(0)
	defer s.pace.end()
	for s.reason == "" {
		s.out.flush()
		if s.out.err != nil {
			return s.out.err
		}
		if err := s.wait(wake, in); err != nil {
			return err
		}
		if err := s.look(wake, in); err != nil {
			return err
		}
	}
	s.pace.end()
	return s.finish()
}

// look handles what there is and then lets more gather.
func (s *session) look(wake, in int) error {
	before := s.seen
	s.touched = false
	empty, err := s.drain(burst)
	if err != nil {
		return err
	}
	if empty {
		s.owed = false
		s.seesPages()
	}
	n := s.seen - before
	s.pace.keep(n)
	switch {
	case s.reason != "" || n == 0:
	case n >= rush && !s.owed && s.busy():
		s.owed = true
		return s.hold(s.touched, wake, in)
	case n < burst:
		s.rest(n, wake, in)
	}
	return nil
}

// workNice is the nice value of the thread that handles events while the workload runs: the
// kernel's queue holds them as long as the machine has better things to do.
const workNice = 10

// crowd is how many events in the kernel's queue are many. It compares each event with up to 128 of those
// that wait, one in 128 of them, to merge equal ones, and the workload pays for that: fs/notify/fanotify/fanotify.c
// fanotify_merge.
const crowd = 1024

// pace is the priority of the calling thread, which must be locked: low, but while events crowd.
type pace struct {
	yields func() // puts the priority back; nil: it is as it was
}

// keep sets the priority after a look at the queue that found n events.
func (p *pace) keep(n int64) {
	switch {
	case n >= crowd:
		p.end()
	case n < crowd/4 && p.yields == nil:
		p.yields = yieldCPU()
	}
}

// end puts the priority back.
func (p *pace) end() {
	if p.yields != nil {
		p.yields()
		p.yields = nil
	}
}

// yieldCPU lowers the priority of the calling thread, which must be locked, and returns what puts it
// back. Without the privilege to do that the thread keeps the lower one.
func yieldCPU() func() {
	raw, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	before := niceBase - raw // getpriority(2): the system call returns 20 less the value
	if err != nil || before >= workNice {
		return func() {}
	}
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, workNice) // then it competes
	return func() { _ = unix.Setpriority(unix.PRIO_PROCESS, 0, before) }
}

const niceBase = 20

// wait blocks until there is something to do and sets the reason when that is to end.
// A reason found before a drain covers everything that happened before it.
func (s *session) wait(wake, in int) error {
	fds := []unix.PollFd{
		{Fd: pollFD(s.current().group.FD()), Events: unix.POLLIN},
		{Fd: pollFD(s.t.pidfd), Events: unix.POLLIN},
		{Fd: pollFD(wake), Events: unix.POLLIN},
		{Fd: pollFD(in), Events: unix.POLLIN}, // -1 is left out by poll(2)
		{Fd: -1, Events: unix.POLLOUT},
	}
	if s.out.waiting() {
		fds[4].Fd = pollFD(s.out.fd)
	}
	for {
		n, err := unix.Poll(fds, s.patience())
		if err == nil && n == 0 {
			if len(s.queues) == 1 {
				s.quiet()
			}
			return nil
		}
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for events: %w", err)
		}
	}
	switch {
	case fds[1].Revents != 0:
		s.reason = "exit"
	case fds[2].Revents != 0:
		s.reason = "stop"
	case fds[3].Revents != 0 && s.ends(in):
		s.reason = "stop"
	}
	return nil
}

// rest lets events gather for restTime after n of them, less when they crowd, unless something else happens, which
// wait sees then.
func (s *session) rest(n int64, wake, in int) {
	fds := []unix.PollFd{
		{Fd: pollFD(s.t.pidfd), Events: unix.POLLIN},
		{Fd: pollFD(wake), Events: unix.POLLIN},
		{Fd: pollFD(in), Events: unix.POLLIN},
	}
	long := restTime
	if s.lean != nil {
		long = leanRest
	}
	long = max(1, long*crowd/4/max(int(n), crowd/4))
	_, _ = unix.Poll(fds, long) // cut short by a signal it is a shorter rest
}

// patience is how many milliseconds to wait for something to happen, -1 for ever.
func (s *session) patience() int {
	if len(s.queues) > 1 {
		return 0 // an older queue is not empty, and nobody polls it
	}
	if s.lean == nil || s.lean.unnamed == 0 {
		return -1
	}
	return s.lean.quiet
}

// quiet uses the time in which nothing happens.
func (s *session) quiet() {
	s.lean.quiet = min(s.lean.quiet*2, int(time.Hour/time.Millisecond))
	_ = s.nameEntries(func(i uint32, _ *layer, p string, _ uint64, _ int64) { s.noted(i, p) }) // the rest has time till the end
}

// isStream reports whether f is a pipe or a socket, whose end means that the parent is gone.
func isStream(f *os.File) bool {
	if f == nil {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&(os.ModeNamedPipe|os.ModeSocket) != 0
}

// finish takes what is still queued and looks for the paths that are missing.
func (s *session) finish() error {
	// Without marks the queue is finite, even when others go on using the root.
	g := s.current().group
	if err := errors.Join(g.Flush(fanotify.Filesystem), g.Flush(fanotify.Mount)); err != nil {
		return err
	}
	if err := s.drainRest(); err != nil {
		return err
	}
	s.out.idle, s.beaten = true, time.Now()
	s.resolvePending()
	if s.lean != nil { // what is missing now is looked for in the layers
		s.t.part(&s.closing)
	}
	if s.pages != nil {
		for _, l := range s.pages.stop() {
			s.losses.Lose(l)
		}
		s.seen += s.pages.events
		if err := s.handBack(); err != nil {
			return err
		}
		s.resolvePages()
	}
	for _, p := range s.comms.processes() {
		s.out.send(stream.Process{Process: p})
	}
	return nil
}

// handBack tells the parent that it may have the trace instance, to reuse or to remove it while files are named here.
func (s *session) handBack() error {
	err := s.pages.reader.Close()
	if s.out.orphaned() { // then release is left to put an end to its events
		return err
	}
	s.handed = true
	s.out.send(stream.Drained{})
	s.out.flush()
	return err
}

// noted keeps the path of the listed file of entry i for when its pages are looked up.
func (s *session) noted(i uint32, p string) {
	if s.pages == nil && !s.c.Pages.Later {
		return
	}
	for uint32(len(s.paths)) <= i { //nolint:gosec // at most Config.MaxFiles
		s.paths = append(s.paths, "")
	}
	s.paths[i] = p
}

// pathOf returns what noted kept, "" when that is nothing.
func (s *session) pathOf(i uint32) string {
	if i < uint32(len(s.paths)) { //nolint:gosec // at most Config.MaxFiles
		return s.paths[i]
	}
	return ""
}

// owns reports whether the instance is not somebody else's by now: a parent that lives and was told that it may have it
// may have armed it for another container.
func (s *session) owns() bool {
	if !s.handed {
		return true
	}
	threads, err := s.pages.instance.Filter()
	return err == nil && (len(threads) == 0 || slices.Contains(threads, s.t.pid))
}

// release closes everything of the container.
func (s *session) release() error {
	var err error
	if s.pages != nil && s.out.orphaned() && s.owns() {
		// Else the parent does it, beside other work: it takes the kernel tens of milliseconds.
		err = s.pages.instance.Disarm()
	}
	return errors.Join(err, s.closePages(), s.closeQueues(), s.t.leave(), s.t.close())
}

// end is the last frame.
func (s *session) end() stream.End {
	return stream.End{
		Reason: s.reason, Engine: s.engine, Grade: s.grade, Elapsed: s.since(), Events: s.seen, Skipped: s.skipped,
		Losses: s.losses.Trace().Losses,
	}
}
