package fuse

import (
	"errors"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readiness waits for a descriptor to be readable. Who waits long does so without a thread that blocks: those of many mounts would take the runtime's
// processors from those who answer, until it notices. The descriptor itself stays in blocking mode, which it shares with the holder, whose
// runtime would wake for every request too. So an epoll instance of our own lies between it and the runtime's. What is watched there tells of
// one event and is silent until somebody waits again.
//
// Who has just answered, where requests come one soon after the other, waits for the next one with its thread, for a moment and if not too many do: the
// runtime's way costs more than to answer a small read.
type readiness struct {
	file *os.File // of the instance
	conn syscall.RawConn
	fd   int   // what is waited for
	most int32 // of threads that wait for a moment

	// Of the one caller of wait; kept because what system calls are given is allocated anew each time else.
	began   time.Time     // when it waited last
	gap     time.Duration // how long the last wait took; 0: it was no hot one
	events  [1]unix.EpollEvent
	polled  [1]unix.PollFd
	timeout unix.Timespec
}

const (
	// hotWait is how long a thread waits that has just answered. It is longer than a tick of the kernel's clock (10 ms at 100 Hz): a timer that is not the
	// next to end costs nothing, where one of 200 µs has a virtual machine leave to its host for each request (1 to 2 µs of some 10).
	hotWait = 12 * time.Millisecond
	// hotGap is the most there may be from one wait to the next: a program that reads now and then would keep others from waiting so.
	hotGap = 5 * time.Millisecond
)

// hot counts the threads that do, in all servers of the process. They hold processors of the runtime meanwhile: half of them at most.
var hot atomic.Int32

// newReadiness takes all descriptors that are needed. What it waits for comes with watch.
func newReadiness() (*readiness, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create", err)
	}
	if err := unix.SetNonblock(ep, true); err != nil { // has the runtime wait for it
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(ep))
	}
	r := &readiness{file: os.NewFile(uintptr(ep), "requests"), most: int32(runtime.GOMAXPROCS(0) / 2)} //nolint:gosec // processors
	if r.conn, err = r.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, r.file.Close())
	}
	return r, nil
}

// watch says what is waited for, once. A device of FUSE must be mounted: before that it has nobody wait (fs/fuse/dev.c fuse_dev_poll), and
// whoever began to is never woken.
func (r *readiness) watch(fd int) error {
	r.fd = fd
	var err error
	ctlErr := r.conn.Control(func(ep uintptr) { err = r.arm(int(ep), unix.EPOLL_CTL_ADD) })
	return errors.Join(ctlErr, err)
}

// arm has the instance ep tell of the next event, or of one that is there.
func (r *readiness) arm(ep, op int) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(ep, op, r.fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(r.fd)})) //nolint:gosec // a descriptor
}

// wait returns when the descriptor may be readable, or has failed; os.ErrDeadlineExceeded after wake. busy: the caller has just answered a request,
// and started nothing that needs a processor. One caller at a time.
func (r *readiness) wait(busy bool) error {
	now := time.Now()
	quick := now.Sub(r.began) < hotGap
	r.began = now
	r.gap = 0
	if busy && quick && r.hot() {
		r.gap = time.Since(now)
		return nil
	}
	var err error
	armed := false
	readErr := r.conn.Read(func(ep uintptr) bool {
		if !armed {
			armed = true
			if err = r.arm(int(ep), unix.EPOLL_CTL_MOD); err != nil {
				return true
			}
		}
		var n int
		n, err = unix.EpollWait(int(ep), r.events[:], 0)
		if errors.Is(err, unix.EINTR) {
			err = nil
			return true // who asks tries again
		}
		return err != nil || n > 0
	})
	return errors.Join(readErr, err)
}

// hot waits with this thread for a moment and reports whether there is an event.
func (r *readiness) hot() bool {
	defer hot.Add(-1)
	if hot.Add(1) > r.most {
		return r.pending()
	}
	return r.poll(hotWait)
}

// pending reports whether there is an event. The caller is the one that may call wait.
func (r *readiness) pending() bool { return r.poll(0) }

// poll keeps the processor: to give that back and take it again wakes the runtime's monitor, which then looks every 20 µs who
// waits, at the cost of him who reads. A collector of garbage, or whoever else stops the world, interrupts the call with a signal.
func (r *readiness) poll(d time.Duration) bool {
	r.polled[0] = unix.PollFd{Fd: int32(r.fd), Events: unix.POLLIN} //nolint:gosec // a descriptor
	r.timeout = unix.NsecToTimespec(int64(d))
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&r.polled[0])), 1, uintptr(unsafe.Pointer(&r.timeout)), 0, 0, 0)
	return errno == 0 && n > 0
}

// wake ends every wait.
func (r *readiness) wake() { _ = r.file.SetReadDeadline(time.Unix(1, 0)) } // of a file that is closed nobody waits

func (r *readiness) close() error { return r.file.Close() }
