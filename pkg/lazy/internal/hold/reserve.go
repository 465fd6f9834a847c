package hold

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// lowest is the first descriptor that a daemon has free once it is linked. An event of fanotify is known by its number, which the next daemon
// has to keep free until it is answered: those below are for what that one has opened by then.
const lowest = 32

// reserve takes all descriptors below lowest that are free. The caller holds mu.
func (l *Link) reserve() error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	high, err := unix.FcntlInt(null.Fd(), unix.F_DUPFD_CLOEXEC, lowest)
	if err = errors.Join(os.NewSyscallError("fcntl", err), null.Close()); err != nil {
		return err
	}
	for {
		fd, err := unix.FcntlInt(uintptr(high), unix.F_DUPFD_CLOEXEC, fdLink)
		if err != nil {
			return errors.Join(os.NewSyscallError("fcntl", err), unix.Close(high))
		}
		if fd >= lowest {
			return errors.Join(unix.Close(fd), unix.Close(high))
		}
		l.low = append(l.low, fd)
	}
}

// release gives back what reserve took. The caller holds mu, or nobody else is there any more.
func (l *Link) release() {
	for _, fd := range l.low {
		_ = unix.Close(fd) // only a number
	}
	l.low = nil
}
