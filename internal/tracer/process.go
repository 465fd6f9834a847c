package tracer

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a server: one that runs for a session, or stands by for one.
type process struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser // carries a few messages at most; its end asks the server to finish
	stdout io.ReadCloser
	stderr tail
	expiry *time.Timer // of one that stands by
}

// newProcess returns a process that is not started; what it is to do is added to its command.
func newProcess(server string) (*process, *exec.Cmd) {
	p := &process{cmd: exec.Command(server)}
	p.cmd.Env = []string{"GOMAXPROCS=2", "GOTRACEBACK=single"}
	p.cmd.Dir = "/"
	p.cmd.Stderr = &p.stderr
	// The binary may be a script whose children outlive it and keep its output open.
	p.cmd.WaitDelay = waitDelay
	// A group of its own: ^C at a terminal is for the parent, which then asks for the end.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return p, p.cmd
}

// start starts the process. Its standard input is a socket of the type given, a pipe where that is 0: the
// end comes by itself when this process dies.
func (p *process) start(socket int) (err error) {
	var theirs *os.File
	if socket == 0 {
		p.stdin, err = p.cmd.StdinPipe()
	} else {
		p.stdin, theirs, err = socketPair(socket)
	}
	if err != nil {
		return err
	}
	if theirs != nil {
		p.cmd.Stdin = theirs
		defer theirs.Close() //nolint:errcheck // the process has its own by then
	}
	if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
		return errors.Join(err, p.stdin.Close())
	}
	if err := p.cmd.Start(); err != nil {
		_ = p.stdin.Close() // a pipe is closed already
		return err
	}
	return nil
}

// socketPair returns the two ends of a socket.
func socketPair(kind int) (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "the tracer's input")
	mine := os.NewFile(uintptr(fds[0]), "input of the tracer")
	conn, err := net.FileConn(mine) // a copy
	if err = errors.Join(err, mine.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	ours, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.Join(fmt.Errorf("make a socket: it is a %T", conn), conn.Close(), theirs.Close())
	}
	return ours, theirs, nil
}

// tail keeps the first bytes that a process wrote to its standard error.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const maxTail = 4 << 10 // bytes

// Write implements io.Writer; it never fails and keeps at most maxTail bytes.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p[:min(len(p), maxTail-len(t.b))]...)
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

// asExit returns how a process ended in one line.
func asExit(err error) string {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "exit status 0"
	case errors.As(err, &exit):
		return exit.Error()
	case errors.Is(err, os.ErrClosed), errors.Is(err, exec.ErrWaitDelay):
		return "ended, output cut off"
	}
	return err.Error()
}
