package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// holder is the state of a holder's process.
type holder struct {
	log  *zap.Logger
	argv []string
	// program is another one that the daemon asked for; empty: this process' own. One that does not start, or whose daemon ends soon,
	// is not tried again.
	program string
	files   map[string]*os.File
	whole   bool
	conn    *net.UnixConn
	daemon  int // pidfd
	child   *exec.Cmd
	tried   bool // the daemon was started from program
	known   bool // of a spare: the holder has a duplicate of its socket
}

// Run is the holder: it is called in a process that [Join] started, and returns when the
// daemon said that it is done, or ended with nothing kept. It heeds no signal that can be
// ignored: who wants it to end ends what the daemon is there for. Cancelling ctx ends it
// between two daemons.
func Run(ctx context.Context, log *zap.Logger) error {
	if log == nil {
		log = zap.NewNop()
	}
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	// The last process to choose when memory is short; it may not be allowed to say so.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
	unix.CloseOnExec(fdLink)
	unix.CloseOnExec(fdPeer)
	conn, err := adopt(fdLink)
	if err != nil {
		return fmt.Errorf("a holder is started by its daemon only: %w", err)
	}
	h := &holder{log: log, files: map[string]*os.File{}, conn: conn, daemon: fdPeer}
	pause, born := time.Duration(0), time.Time{}
	for {
		done, err := h.serve()
		if done || err != nil {
			return err
		}
		if !h.whole && anyConnected(h.files) { // which sees the end of this process
			log.Warn("the daemon is gone and has not given everything to this holder: the spare has it")
			return nil
		}
		if len(h.files) == 0 {
			log.Info("the daemon is gone and had nothing kept")
			return nil
		}
		if h.tried && time.Since(born) < goodLife {
			log.Error("the program that was to take over does not: the old one goes on", zap.String("program", h.program))
			h.program = ""
		}
		pause = backoff(pause, time.Since(born))
		log.Warn("the daemon is gone; starting another", zap.Int("kept", len(h.files)), zap.Duration("pause", pause))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		born = time.Now()
		if err := h.restart(); err != nil {
			log.Error("start the daemon", zap.String("program", h.program), zap.Error(err)) // serve sees that it is not there
		}
	}
}

// serve obeys a daemon until it has ended as a process; done is what it said before.
func (h *holder) serve() (done bool, err error) {
	for !done {
		m, files, err := receive(h.conn)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			// A daemon that talks nonsense must not cost what is kept already.
			h.log.Error("message of the daemon", zap.Error(err))
			if errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed) {
				break
			}
			continue
		}
		done = h.obey(m, files)
	}
	if err := h.conn.Close(); err != nil {
		h.log.Warn("close socket", zap.Error(err))
	}
	if done || h.superseded() {
		return true, nil
	}
	return false, h.waitDaemon()
}

// How long a holder may take to end when the socket of its spare has ended.
const (
	// dyingLimit is for one that may never have heard of the spare: it may live, and start a daemon.
	dyingLimit = 10 * time.Second
	// knownLimit is for one that had a duplicate of the socket: it closed that, so it is ending, which takes what it takes. It is bounded
	// as one that was out of descriptors when the duplicate came has none, and lives.
	knownLimit = 5 * time.Minute
)

// superseded reports whether this process is a spare that is not needed: the holder lives, and starts a daemon which does not know
// of this process. Else it is the holder from now on.
func (h *holder) superseded() bool {
	f := h.files[namePrimary]
	if f == nil {
		return false
	}
	defer h.drop(namePrimary)
	if gone(int(f.Fd()), h.patience()) {
		h.log.Warn("daemon and holder are gone: the spare takes their place", zap.Int("kept", len(h.files)-1))
		return false
	}
	h.log.Warn("the daemon is gone, and its holder does not know of this spare")
	return true
}

// patience is how long a spare waits for the holder's end.
func (h *holder) patience() time.Duration {
	if h.known {
		return knownLimit
	}
	return dyingLimit
}

// gone waits until the process of a pidfd has ended, with all its threads, for a negative time without end.
func gone(pidfd int, limit time.Duration) bool {
	poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}} //nolint:gosec // a descriptor fits an int32
	for {
		wait := -1
		if limit >= 0 {
			wait = int(limit / time.Millisecond)
		}
		n, err := unix.Poll(poll, wait)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

func (h *holder) obey(m message, files []*os.File) (done bool) {
	switch m.Op {
	case opDaemon:
		h.argv, h.program, h.tried = m.Argv, m.Program, false
	case opKeep:
		for i, n := range m.Names {
			h.keep(n, files[i])
			if n == namePrimary {
				h.known = m.Known
			}
		}
	case opEnd:
		h.whole = m.Whole
	case opDrop:
		for _, n := range m.Names {
			h.drop(n)
		}
	case opDone:
		return true
	default:
		h.log.Error("message of the daemon is not known", zap.String("op", m.Op))
	}
	return false
}

func (h *holder) keep(name string, f *os.File) {
	if name != nameDaemon {
		h.drop(name)
		h.files[name] = f
		return
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, f.Close()); err != nil {
		h.log.Error("the daemon's descriptor", zap.Error(err))
		return
	}
	if h.daemon >= 0 {
		_ = unix.Close(h.daemon)
	}
	h.daemon = fd
}

func (h *holder) drop(name string) {
	f := h.files[name]
	if f == nil {
		return
	}
	delete(h.files, name)
	if err := f.Close(); err != nil {
		h.log.Warn("close", zap.String("name", name), zap.Error(err))
	}
}

// waitDaemon waits until no thread of the daemon is left.
func (h *holder) waitDaemon() error {
	if h.daemon < 0 {
		return nil
	}
	if !gone(h.daemon, -1) {
		return errors.New("wait for the daemon: no pidfd")
	}
	err := unix.Close(h.daemon)
	h.daemon = -1
	if h.child != nil {
		_ = h.child.Wait() // how it ended does not matter
		h.child = nil
	}
	return err
}

// restart starts the daemon and sends it what is kept. A daemon that did not get all of it is ended: it would wait for the rest for ever.
func (h *holder) restart() error {
	conn, theirs, err := pair()
	if err != nil {
		return err
	}
	old := h.conn
	h.conn = conn
	_ = old.Close()
	cmd := exec.Command("/proc/self/exe")
	if h.tried = h.program != ""; h.tried {
		cmd = exec.Command(h.program)
	}
	cmd.Args = h.argv
	cmd.Stderr = os.Stderr
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), envHeld+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	pidfd := -1
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, PidFD: &pidfd}
	// Before the process is there: while it lives, no spare must take this one's place.
	if err = sendFiles(conn, spareLinks(h.files)); err == nil {
		err = cmd.Start()
	}
	if closed := theirs.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return err
	}
	h.child, h.daemon = cmd, pidfd
	if err = sendFiles(conn, withoutSpares(h.files)); err == nil {
		err = send(conn, message{Op: opEnd, Whole: h.whole}, nil)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("give everything to the daemon: %w", err), unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0))
	}
	return nil
}
