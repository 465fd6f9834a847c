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
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Options says how daemon and holder start each other.
type Options struct {
	// Holder is the command line of a process that calls [Run], Daemon that of the daemon. The
	// program is the daemon's own, whatever their first words are.
	Holder, Daemon []string
	// Log gets what happens to the holder; nil: nothing is logged.
	Log *zap.Logger
}

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

	mu     sync.Mutex // guards what follows
	conn   *net.UnixConn
	kept   map[string]*os.File // our own duplicates
	holder int                 // its process, 0 when not known
	ending bool

	watched chan struct{} // closed when watch has ended
	stop    context.CancelFunc
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
	l := &Link{o: o, kept: map[string]*os.File{}, watched: make(chan struct{}), stop: stop}
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
	if err != nil {
		stop()
		return nil, Taken{}, errors.Join(err, closeAll(taken.Files), closeAll(l.kept))
	}
	go l.watch(ctx)
	return l, taken, nil
}

// take receives what the holder has.
func (l *Link) take(taken *Taken) (err error) {
	unix.CloseOnExec(fdLink)
	if l.conn, err = adopt(fdLink); err != nil {
		return fmt.Errorf("holder's socket: %w", err)
	}
	l.holder = os.Getppid()
	for {
		m, files, err := receive(l.conn)
		if errors.Is(err, io.EOF) { // a new holder is started by watch
			return nil
		}
		if err != nil {
			return errors.Join(fmt.Errorf("take from the holder: %w", err), l.conn.Close())
		}
		for i, f := range files {
			his, err1 := dup(f)
			mine, err2 := dup(f)
			if err := errors.Join(err1, err2, f.Close()); err != nil {
				return errors.Join(err, l.conn.Close())
			}
			taken.Files[m.Names[i]], l.kept[m.Names[i]] = his, mine
		}
		if m.Op == opEnd {
			taken.Whole = m.Whole
			return nil
		}
	}
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
	l.tell(message{Op: opKeep, Names: []string{name}}, []int{int(mine.Fd())})
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
			l.tell(message{Op: opDrop, Names: []string{n}}, nil)
		}
	}
	return errors.Join(errs...)
}

// tell sends m. A holder that is gone needs no telling: watch starts another, which gets everything.
func (l *Link) tell(m message, fds []int) {
	if err := send(l.conn, m, fds); err != nil {
		l.o.Log.Warn("holder does not hear", zap.String("op", m.Op), zap.Error(err))
	}
}

// Program makes the holder start another program when this process ends, with the same command line: path is absolute and the caller's
// to check. When that does not start, or ends soon, the holder goes on with its own.
func (l *Link) Program(path string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tell(message{Op: opDaemon, Argv: l.o.Daemon, Program: path}, nil)
}

// Kept returns how many descriptors the holder has.
func (l *Link) Kept() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.kept)
}

// Names returns the names of the descriptors that the holder has, sorted.
func (l *Link) Names() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.kept))
}

// Holder returns the process of the holder.
func (l *Link) Holder() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.holder
}

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
		l.tell(message{Op: opDone}, nil)
	}
	err := errors.Join(l.conn.CloseRead(), closeAll(l.kept))
	l.mu.Unlock()
	<-l.watched
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
	defer close(l.watched)
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
func (l *Link) startHolder() error {
	conn, theirs, err := pair()
	if err != nil {
		return err
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return errors.Join(fmt.Errorf("pidfd_open: %w", err), conn.Close(), theirs.Close())
	}
	pidfd := os.NewFile(uintptr(self), "pidfd")
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = l.o.Holder
	cmd.Stderr = os.Stderr
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{theirs, pidfd}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	l.conn, l.holder = conn, 0
	err = cmd.Start()
	if closed := errors.Join(theirs.Close(), pidfd.Close()); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("start holder: %w", err) // conn has lost its other end: watch tries again
	}
	l.holder = cmd.Process.Pid
	go func() { _ = cmd.Wait() }() // ends with the holder, which outlives this process or is reaped here
	err = send(conn, message{Op: opDaemon, Argv: l.o.Daemon}, nil)
	if err == nil {
		err = sendFiles(conn, l.kept, true)
	}
	if err != nil {
		return fmt.Errorf("give everything to the holder: %w", err)
	}
	return nil
}
