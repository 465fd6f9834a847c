package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Options says how daemon and holder start each other.
type Options struct {
	// Holder is the command line of a process that calls [Run], Daemon that of the daemon. The
	// program is the daemon's own, whatever their first words are.
	Holder, Daemon []string
	// Spare is how long the daemon lives before it starts a second holder; 0: [DefaultSpare]. Negative: it starts none. One that takes over
	// from another waits a twentieth of that.
	Spare time.Duration
	// Log gets what happens to the holder; nil: nothing is logged.
	Log *zap.Logger
}

// DefaultSpare is the pause before the spare is started: who starts a daemon waits for data, and the spare would take
// its part of the processors.
const DefaultSpare = 2 * time.Second

// Taken is what a daemon finds when it starts.
type Taken struct {
	// Files are what an earlier daemon kept, by name; the caller's to close. They stay kept.
	Files map[string]*os.File
	// Restarted: the daemon's holder started it, another daemon was there before.
	Restarted bool
	// Whole is false when that daemon died while it gave everything to a new holder: there
	// may be more that is lost.
	Whole bool
}

// Link is a daemon's connection to its holder. Safe for concurrent use.
type Link struct {
	o Options

	mu      sync.Mutex // guards what follows
	conn    *net.UnixConn
	kept    map[string]*os.File // our own duplicates
	primary *os.File            // pidfd of the holder; nil when not known
	spare   *spare              // nil: there is none yet
	old     []*net.UnixConn     // to spares of earlier daemons
	low     []int               // descriptors that keep their numbers from others, see reserve
	ending  bool

	// Processes, 0 when not known. They are changed with mu held, and read by who does not wait while one is being started.
	holderPID, sparePID atomic.Int64

	watching sync.WaitGroup // of watch and watchSpare
	stop     context.CancelFunc
}

// Restarted reports whether a holder has started this process, in the place of a daemon that ended, and Join was not called yet.
func Restarted() bool { return os.Getenv(envHeld) != "" }

// Join connects the calling process, a daemon, with its holder: the one that started it, or
// one that Join starts. The caller ends the link with Done or Close.
func Join(o Options) (*Link, Taken, error) {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	ctx, stop := context.WithCancel(context.Background())
	l := &Link{o: o, kept: map[string]*os.File{}, stop: stop}
	taken := Taken{Files: map[string]*os.File{}}
	var err error
	if Restarted() {
		taken.Restarted = true
		err = errors.Join(os.Unsetenv(envHeld), l.take(&taken))
	} else {
		l.mu.Lock()
		err = l.startHolder()
		l.mu.Unlock()
	}
	if err == nil {
		l.mu.Lock()
		err = l.reserve()
		l.mu.Unlock()
	}
	if err != nil {
		stop()
		for _, c := range l.old {
			err = errors.Join(err, c.Close())
		}
		l.release()
		return nil, Taken{}, errors.Join(err, closeAll(taken.Files), closeAll(l.kept))
	}
	l.watching.Go(func() { l.watch(ctx) })
	if o.Spare >= 0 {
		l.watching.Go(func() { l.watchSpare(ctx, taken.Restarted) })
	}
	return l, taken, nil
}

// take receives what the holder has.
func (l *Link) take(taken *Taken) (err error) {
	unix.CloseOnExec(fdLink)
	if l.conn, err = adopt(fdLink); err != nil {
		return fmt.Errorf("holder's socket: %w", err)
	}
	if err := l.findHolder(); err != nil {
		return errors.Join(fmt.Errorf("holder: %w", err), l.conn.Close())
	}
	for {
		m, files, err := receive(l.conn)
		if errors.Is(err, io.EOF) {
			if anyConnected(l.kept) { // it sees the end of this process
				return errors.Join(errors.New("the holder has died before it gave everything: its spare has it"), l.conn.Close())
			}
			return nil // a new holder is started by watch
		}
		if err != nil {
			return errors.Join(fmt.Errorf("take from the holder: %w", err), l.conn.Close())
		}
		for i, f := range files {
			if isSpare(m.Names[i]) {
				if err := l.inherit(m.Names[i], f); err != nil {
					return errors.Join(err, l.conn.Close())
				}
				continue
			}
			his, err1 := dup(f)
			mine, err2 := dup(f)
			if err := errors.Join(err1, err2, f.Close()); err != nil {
				return errors.Join(err, l.conn.Close())
			}
			taken.Files[m.Names[i]], l.kept[m.Names[i]] = his, mine
		}
		if m.Op == opEnd {
			taken.Whole = m.Whole
			l.giveOld()
			return nil
		}
	}
}

// findHolder finds out who made the socket. Where that process has ended already, primary stays nil, and watch starts another.
func (l *Link) findHolder() error {
	raw, err := l.conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, ctlErr); err != nil {
		return err
	}
	pid := int(cred.Pid)
	l.holderPID.Store(int64(pid))
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	if os.Getppid() != pid { // it has ended, and its number may be another's
		return f.Close()
	}
	l.primary = f
	return nil
}

// dup duplicates f to a number in the upper half of what this process may have: low ones may mean something to
// a daemon that takes over from another, like the numbers of events that it read.
func dup(f *os.File) (*os.File, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn() // f.Fd would make the file block, for everybody who has it
	if err != nil {
		return nil, err
	}
	var copied int
	ctlErr := raw.Control(func(fd uintptr) {
		copied, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, int(min(limit.Cur/2, maxBase)))
	})
	if err = errors.Join(err, ctlErr); err != nil {
		return nil, fmt.Errorf("duplicate descriptor: %w", err)
	}
	return os.NewFile(uintptr(copied), f.Name()), nil
}

// maxBase is the lowest number of duplicates where descriptors are plenty.
const maxBase = 1 << 16

func closeAll(files map[string]*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Keep gives the holder a duplicate of f under a name of up to 255 bytes, which replaces one that was
// kept under it. f stays the caller's. From then on a daemon that is started anew finds it.
func (l *Link) Keep(name string, f *os.File) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("keep descriptor: name of %d bytes, want 1 to %d", len(name), maxName)
	}
	mine, err := dup(f)
	if err != nil {
		return fmt.Errorf("keep %s: %w", name, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ending {
		return errors.Join(fmt.Errorf("keep %s: the holder is ending", name), mine.Close())
	}
	if old := l.kept[name]; old != nil {
		err = old.Close()
	}
	l.kept[name] = mine
	l.tellAll(message{Op: opKeep, Names: []string{name}}, []int{int(mine.Fd())})
	return err
}

// Drop makes the holder close what it keeps under names. Names that it does not know are no error.
func (l *Link) Drop(names ...string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, n := range names {
		if f := l.kept[n]; f != nil {
			errs = append(errs, f.Close())
			delete(l.kept, n)
			l.tellAll(message{Op: opDrop, Names: []string{n}}, nil)
		}
	}
	return errors.Join(errs...)
}

// tell sends m, and reports whether that is in the holder's queue. A holder that is gone needs no telling: watch starts another, which gets everything.
func (l *Link) tell(m message, fds []int) bool {
	err := send(l.conn, m, fds)
	if err != nil {
		l.o.Log.Warn("holder does not hear", zap.String("op", m.Op), zap.Error(err))
	}
	return err == nil
}

// Program makes the holder start another program when this process ends, with the same command line: path is absolute and the caller's
// to check. When that does not start, or ends soon, the holder goes on with its own.
func (l *Link) Program(path string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tell(message{Op: opDaemon, Argv: l.o.Daemon, Program: path}, nil)
}

// Kept returns how many descriptors the holder has.
func (l *Link) Kept() int { return len(l.Names()) }

// Names returns the names of the descriptors that the holder has, sorted.
func (l *Link) Names() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(l.kept)), isSpare)
}

// Holder returns the process of the holder.
func (l *Link) Holder() int { return int(l.holderPID.Load()) }

// Done ends the holder, which closes everything it keeps and does not start the daemon again.
// Later calls return nil.
func (l *Link) Done() error { return l.end(true) }

// Close leaves the holder alone: when this process ends, it starts the daemon again.
func (l *Link) Close() error { return l.end(false) }

func (l *Link) end(done bool) error {
	l.mu.Lock()
	if l.ending {
		l.mu.Unlock()
		return nil
	}
	l.ending = true
	l.stop()
	if done {
		l.endSpares() // first: it would take the holder's place
		l.tell(message{Op: opDone}, nil)
	}
	err := errors.Join(l.conn.CloseRead(), closeAll(l.kept))
	if l.spare != nil {
		err = errors.Join(err, l.spare.conn.CloseRead())
	}
	if l.primary != nil {
		err = errors.Join(err, l.primary.Close())
	}
	l.release()
	l.mu.Unlock()
	l.watching.Wait()
	for _, c := range l.spareConns() {
		err = errors.Join(err, c.Close())
	}
	return errors.Join(err, l.conn.Close())
}

// Pauses before a process is started again that ended soon after its start.
const (
	firstPause = 50 * time.Millisecond
	longPause  = 5 * time.Second
	goodLife   = 10 * time.Second // who lived as long is started again at once
)

// backoff returns the pause before the next start, given the last one and how long the process lived.
func backoff(last, lived time.Duration) time.Duration {
	switch {
	case lived >= goodLife:
		return 0
	case last == 0:
		return firstPause
	}
	return min(2*last, longPause)
}

// watch waits for the holder's end and starts another.
func (l *Link) watch(ctx context.Context) {
	pause, born := time.Duration(0), time.Time{}
	for {
		l.mu.Lock()
		conn := l.conn
		l.mu.Unlock()
		for {
			// Nothing comes but the end; a holder that says something is not understood.
			if _, _, err := receive(conn); err != nil {
				break
			}
		}
		if ctx.Err() != nil {
			return
		}
		l.o.Log.Warn("the holder is gone; starting another", zap.Int("pid", l.Holder()))
		pause = backoff(pause, time.Since(born))
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		born = time.Now()
		l.mu.Lock()
		if !l.ending {
			_ = conn.Close()
			if err := l.startHolder(); err != nil {
				l.o.Log.Error("start a holder", zap.Error(err))
			}
		}
		l.mu.Unlock()
	}
}

// startHolder starts a holder and gives it everything. The caller holds mu.
func (l *Link) startHolder() (err error) {
	defer func() { err = errors.Join(err, l.reserve()) }() // what the one before had
	p, err := l.begin(func(conn *net.UnixConn) error {
		// Before its process is there: while it lives, no spare must take it for dead.
		return sendFiles(conn, spareLinks(l.kept))
	})
	if p.conn != nil {
		l.conn = p.conn
	}
	l.holderPID.Store(int64(p.pid))
	if l.primary != nil {
		err = errors.Join(err, l.primary.Close())
	}
	if l.primary = p.pidfd; err != nil {
		return fmt.Errorf("start holder: %w", err) // conn has lost its other end: watch tries again
	}
	l.tellPrimary()
	if err := l.give(p.conn, withoutSpares(l.kept)); err != nil {
		return fmt.Errorf("give everything to the holder: %w", err)
	}
	return nil
}

// process is a holder that was started.
type process struct {
	conn  *net.UnixConn
	pid   int
	pidfd *os.File
}

// begin starts a process that calls [Run], and calls before with the socket to it, before it is there. There is a socket also when
// there is an error, with nobody at its other end.
func (l *Link) begin(before func(*net.UnixConn) error) (p process, err error) {
	conn, theirs, err := pair()
	if err != nil {
		return p, err
	}
	p.conn = conn
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return p, errors.Join(fmt.Errorf("pidfd_open: %w", err), theirs.Close())
	}
	pidfd := os.NewFile(uintptr(self), "pidfd")
	err = before(conn)
	his := -1
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = l.o.Holder
	cmd.Stderr = os.Stderr
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, pidfd}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, PidFD: &his}
	if err == nil {
		err = cmd.Start()
	}
	if closed := errors.Join(theirs.Close(), pidfd.Close()); err == nil {
		err = closed
	}
	if err != nil {
		return p, err
	}
	p.pid = cmd.Process.Pid
	if his >= 0 {
		p.pidfd = os.NewFile(uintptr(his), "pidfd")
	}
	go func() { _ = cmd.Wait() }() // ends with the holder, which outlives this process or is reaped here
	return p, nil
}

// give sends a new holder everything.
func (l *Link) give(conn *net.UnixConn, files map[string]*os.File) error {
	err := send(conn, message{Op: opDaemon, Argv: l.o.Daemon}, nil)
	if err == nil {
		err = sendFiles(conn, files)
	}
	if err == nil {
		err = send(conn, message{Op: opEnd, Whole: true}, nil)
	}
	return err
}
