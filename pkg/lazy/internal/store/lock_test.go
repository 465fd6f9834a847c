package store_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// TestLockOfAChild has a copy of the closed lock's descriptor go a moment later, as a child has it between fork and execve.
func TestLockOfAChild(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := store.Open(dir, store.Options{})
	must(t, err)
	fd, err := unix.FcntlInt(s.LockFile().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	must(t, s.Close())
	closed := make(chan error, 1)
	time.AfterFunc(50*time.Millisecond, func() { closed <- unix.Close(fd) })
	open(t, dir, store.Options{})
	must(t, <-closed)
}
