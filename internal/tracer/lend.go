package tracer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// input returns the session's end of what is to be the standard input of cmd, and, where that is a socket, the end of the process,
// which the caller closes.
func (s *Session) input(cmd *exec.Cmd) (ours io.Closer, theirs *os.File, err error) {
	if !s.later {
		ours, err = cmd.StdinPipe()
		return ours, nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "the tracer's input")
	mine := os.NewFile(uintptr(fds[0]), "input of the tracer")
	conn, err := net.FileConn(mine) // a copy
	if err = errors.Join(err, mine.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	cmd.Stdin = theirs
	return conn, theirs, nil
}

// lend waits for an instance, in the background, for a server that began without, and hands it over. Called once; unlend ends it.
func (s *Session) lend() {
	ctx, cancel := context.WithCancel(context.Background())
	s.unlend = cancel
	conn, ok := s.stdin.(*net.UnixConn)
	if !ok {
		return
	}
	s.lending.Go(func() {
		in, err := s.o.Pages.Get(ctx)
		if err == nil {
			s.mu.Lock()
			s.pages = in // giveBack has it from now on
			s.mu.Unlock()
			err = hand(conn, in)
		}
		if err != nil && ctx.Err() == nil {
			s.filesOnly(err.Error())
		}
	})
}

// hand sends an instance to the server at the other end of conn.
func hand(conn *net.UnixConn, in *tracefs.Instance) error {
	spec, err := in.Spec().MarshalText()
	if err != nil {
		return err
	}
	_, _, err = conn.WriteMsgUnix(spec, unix.UnixRights(int(in.File().Fd())), nil)
	return err
}
