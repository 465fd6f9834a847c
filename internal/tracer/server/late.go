package server

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
)

// An instance that was not ready when the container started may come later. What was touched before counts as a whole
// file, which is not less than the truth; what is touched for the first time from then on has ranges.

// ends reads from the parent's pipe or socket and reports its end.
func (s *session) ends(fd int) bool {
	if !s.c.Pages.Later {
		return atEnd(fd)
	}
	var text [64]byte
	var rights [64]byte
	n, m, _, _, err := unix.Recvmsg(fd, text[:], rights[:], unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	}
	if n == 0 {
		return true
	}
	if p, ok := received(text[:n], rights[:m]); ok {
		s.armLate(p)
	}
	return false
}

// atEnd reads from the parent's pipe or socket, which carries nothing any more, and reports its end.
func atEnd(fd int) bool {
	var b [64]byte
	n, err := unix.Read(fd, b[:])
	return n == 0 || (err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR))
}

// armedAhead waits for what the parent says of the arming that it did, and returns why that failed.
func armedAhead(stdin *os.File) error {
	var b [stream.MaxArmed]byte
	for {
		n, err := unix.Read(int(stdin.Fd()), b[:])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("hear whether the trace instance is armed: %w", err)
		case n == 0:
			return errors.New("nobody says whether the trace instance is armed")
		case string(b[:n]) != stream.Armed:
			return errors.New(string(b[:n]))
		default:
			return nil
		}
	}
}

// received returns the instance of a message; false when it has none. Other descriptors in it are closed.
func received(text, rights []byte) (Pages, bool) {
	fd := descriptor(rights)
	if fd < 0 {
		return Pages{}, false
	}
	p := Pages{Instance: os.NewFile(uintptr(fd), "tracefs instance")}
	if p.Spec.UnmarshalText(text) != nil {
		_ = p.Instance.Close()
		return Pages{}, false
	}
	return p, true
}

// descriptor returns the first descriptor of a control message, -1 when there is none. Others are closed.
func descriptor(rights []byte) int {
	first := -1
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return first
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if first >= 0 {
				_ = unix.Close(fd)
				continue
			}
			first = fd
		}
	}
	return first
}

// armLate makes the kernel record page events from now on. Where it cannot, the list is of whole files, as it would have been.
func (s *session) armLate(p Pages) {
	if s.pages != nil {
		_ = p.Instance.Close() // one is enough
		return
	}
	l, err := newPageLog(p, s.t, s.comms, s.c.MaxFiles, s.widener)
	if err != nil {
		s.out.send(stream.Drained{Why: err.Error()})
		return
	}
	s.pages, s.engine = l, l.engine()
	if why := s.armPages(nil); why != "" {
		s.out.send(stream.Drained{Why: why})
		return
	}
	// Files that are waiting in the queue were opened before, perhaps.
	s.late, s.owed, s.unseen = true, true, math.MaxUint32
	l.begin(s.since())
}

// seesPages notes, when the queue is empty, that page events tell of all files that come.
func (s *session) seesPages() {
	if s.late {
		s.late, s.unseen = false, s.entries.n
	}
}
