package fuse

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readiness waits for a descriptor to be readable without a thread that blocks: those of many mounts would take the runtime's processors from
// those who answer, until it notices. The descriptor itself stays in blocking mode, which it shares with the holder, whose
// runtime would wake for every request too. So an epoll instance of our own lies between it and the runtime's.
type readiness struct {
	file *os.File // of the instance
	conn syscall.RawConn
}

// newReadiness takes all descriptors that are needed. What it waits for comes with watch.
func newReadiness() (*readiness, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create", err)
	}
	if err := unix.SetNonblock(ep, true); err != nil { // has the runtime wait for it
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(ep))
	}
	r := &readiness{file: os.NewFile(uintptr(ep), "requests")}
	if r.conn, err = r.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, r.file.Close())
	}
	return r, nil
}

// watch says what is waited for, once. A device of FUSE must be mounted: before that it has nobody wait (fs/fuse/dev.c fuse_dev_poll), and
// whoever began to is never woken.
func (r *readiness) watch(fd int) error {
	var err error
	ctlErr := r.conn.Control(func(ep uintptr) {
		err = unix.EpollCtl(int(ep), unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}) //nolint:gosec // a descriptor
	})
	return errors.Join(ctlErr, os.NewSyscallError("epoll_ctl", err))
}

// wait returns when the descriptor may be readable, or has failed; os.ErrDeadlineExceeded after wake. One caller at a time.
func (r *readiness) wait() error {
	var err error
	readErr := r.conn.Read(func(ep uintptr) bool {
		var events [1]unix.EpollEvent
		var n int
		n, err = unix.EpollWait(int(ep), events[:], 0)
		if errors.Is(err, unix.EINTR) {
			err = nil
			return true // who asks tries again
		}
		return err != nil || n > 0
	})
	return errors.Join(readErr, err)
}

// wake ends every wait.
func (r *readiness) wake() { _ = r.file.SetReadDeadline(time.Unix(1, 0)) } // of a file that is closed nobody waits

func (r *readiness) close() error { return r.file.Close() }
