// Package endproc ends processes that watch over each other.
package endproc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// All kills processes that would start each other again, as a lazy mount's daemon and its holders do: all are stopped
// first. It waits up to 5 s for each to end. Processes that have ended already, and the number 0, are no error.
func All(pids ...int) error {
	p := processes{}
	p.stop(pids)
	return p.kill()
}

// Logging does what [All] does to pids and to the processes whose standard error is a file in dir, those that start meanwhile among them: a
// daemon and its holders, whichever of them there are.
func Logging(dir string, pids ...int) error {
	p := processes{}
	p.stop(pids)
	for calm := 0; calm < 2; {
		calm++
		found, err := logging(dir)
		if err != nil {
			return errors.Join(err, p.kill())
		}
		if p.stop(found) {
			calm = 0
		}
		time.Sleep(10 * time.Millisecond) //nolint:forbidigo // one that is stopped runs on for a moment, and nothing says for how long
	}
	return p.kill()
}

// logging returns the processes whose standard error is a file in dir.
func logging(dir string) (pids []int, err error) {
	links, err := filepath.Glob("/proc/[0-9]*/fd/2")
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	for _, link := range links {
		name, err := os.Readlink(link)
		if err != nil || filepath.Dir(name) != dir {
			continue // or it has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(link))))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// processes are pidfds of processes that were stopped, by their numbers.
type processes map[int]int

// stop stops processes, and reports whether one of them was not stopped before.
func (p processes) stop(pids []int) (more bool) {
	for _, pid := range pids {
		if _, ok := p[pid]; ok {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has ended
		}
		_ = unix.PidfdSendSignal(fd, unix.SIGSTOP, nil, 0) // it may have ended
		p[pid], more = fd, true
	}
	return more
}

// kill kills them, and waits.
func (p processes) kill() (err error) {
	for _, fd := range p {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) // it may have ended
	}
	for pid, fd := range p {
		n, perr := 0, error(unix.EINTR)
		for errors.Is(perr, unix.EINTR) {
			n, perr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000) //nolint:gosec // a descriptor
		}
		if n == 0 && perr == nil {
			perr = fmt.Errorf("process %d was killed and has not ended after 5 s", pid)
		}
		err = errors.Join(err, perr, unix.Close(fd))
	}
	return err
}
