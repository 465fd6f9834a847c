package server

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// openRegular opens the regular file at path p below the directory dir to read from it, and nothing else: a container may put
// a device or a FIFO there at any time, whose opening does something. So what is there is held before it is looked at, and
// what was looked at is opened by way of the server's own descriptor.
func (t *target) openRegular(dir int, p string) (int, error) {
	held, err := beneath(dir, p, unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(held) }()
	return t.reopen(held)
}

// reopen opens for reading what the O_PATH descriptor held stands for, if that is a regular file. Another process' lease may
// be in the way of that, which it does not wait for.
func (t *target) reopen(held int) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(held, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, errIrregular
	}
	return unix.Openat(t.fds, strconv.Itoa(held), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOATIME|unix.O_CLOEXEC, 0)
}

var errIrregular = errors.New("not a regular file")
