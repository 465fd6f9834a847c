// Package endproc ends processes that watch over each other.
package endproc

import (
	"errors"

	"golang.org/x/sys/unix"
)

// All kills processes that would start each other again, as a lazy mount's daemon and its holder do: all are stopped
// first. It waits up to 5 s for each to end. Processes that have ended already are no error.
func All(pids ...int) (err error) {
	var fds []int
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds = append(fds, fd)
		}
	}
	for _, signal := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} {
		for _, fd := range fds {
			_ = unix.PidfdSendSignal(fd, signal, nil, 0) // it may have ended
		}
	}
	for _, fd := range fds {
		_, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000) //nolint:gosec // a descriptor
		err = errors.Join(err, perr, unix.Close(fd))
	}
	return err
}
