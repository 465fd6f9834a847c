package tracer

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// armAhead arms the instance, where there is one, while the server starts: each takes some two milliseconds, and the container
// waits. What it returns gets the outcome.
func (s *Session) armAhead() <-chan error {
	in := s.pages
	if in == nil {
		return nil
	}
	armed := make(chan error, 1)
	s.arming.Go(func() { armed <- in.ArmAll(func() ([]int, error) { return tracefs.Family(s.o.PID) }) })
	return armed
}

// tell tells the server, which may not live any more, how the arming went.
func (s *Session) tell(armed <-chan error) {
	if armed == nil {
		return
	}
	s.lending.Go(func() {
		said := stream.Armed
		if err := <-armed; err != nil {
			said = cmp.Or(oneLine(err.Error()), "it failed")
		}
		if _, err := io.WriteString(s.stdin, said[:min(len(said), stream.MaxArmed)]); err != nil {
			s.log.Debug("tell the tracer that its instance is armed", zap.Error(err))
		}
	})
}

// lend waits for an instance, in the background, for a server that began without, and hands it over. Called once; unlend ends it.
func (s *Session) lend() {
	ctx, cancel := context.WithCancel(context.Background())
	s.unlend = cancel
	conn, ok := s.stdin.(*net.UnixConn)
	if !s.later || !ok {
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
		if err != nil && ctx.Err() == nil && !over(err) {
			s.filesOnly(err.Error())
		}
	})
}

// over reports whether err comes of a server that has ended, or was told to.
func over(err error) bool {
	return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed)
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
