package server

import (
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A user may have 128 fanotify groups (/proc/sys/fs/fanotify/max_user_groups), and the kernel does not tell how many there are. A
// tracer needs one, and takes more when it holds events; where many hold events at once, none must be left without. So all
// tracers of this machine share a quarter of the groups for that: who takes one locks a byte of the limit's own file, which every
// tracer can open and whose locks end with their holder, however it dies.

// spare are the groups that tracers may have besides their first. It is safe for concurrent use.
type spare struct {
	mu   sync.Mutex
	fd   int    // of the file whose bytes are locked; -1: none can be had
	held []bool // by this process; one for each group that there is for all together
}

// openSpare returns the groups of the machine whose /proc is open as proc.
func openSpare(proc int) *spare {
	fd, err := unix.Openat(proc, "sys/fs/fanotify/max_user_groups", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &spare{fd: -1} // before Linux 5.13, or without the privilege
	}
	var b [32]byte
	n, err := unix.Pread(fd, b[:], 0)
	if err != nil {
		n = 0
	}
	limit, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil {
		limit = 0
	}
	return newSpare(fd, limit)
}

// maxSpare bounds the groups that are shared where a user may have very many.
const maxSpare = 1024

// newSpare returns a quarter of limit, and takes over fd.
func newSpare(fd, limit int) *spare {
	return &spare{fd: fd, held: make([]bool, min(max(limit, 0)/4, maxSpare))}
}

// take returns the number of a group that nobody has, false when there is none.
func (s *spare) take() (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return 0, false
	}
	for i := range s.held {
		if !s.held[i] && s.lock(i, unix.F_WRLCK) == nil {
			s.held[i] = true
			return i, true
		}
	}
	return 0, false
}

// give gives back what take returned; the group has to be closed by then.
func (s *spare) give(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[i] = false
	if s.fd >= 0 {
		_ = s.lock(i, unix.F_UNLCK) // at the latest it is free when this process ends
	}
}

func (s *spare) lock(i int, kind int16) error {
	return unix.FcntlFlock(uintptr(s.fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: int64(i), Len: 1})
}

// close gives all of them back.
func (s *spare) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return replace(&s.fd, -1)
}
