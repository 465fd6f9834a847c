package fuse

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Reads that fail for a while, as for want of memory, do not end the server: it is told of requests by a socket whose reads fail while nobody
// listens at the other end.
func TestReadFailsForAWhile(t *testing.T) {
	bind := func(at unix.Sockaddr) int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(fd, at)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	local := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	name := func(fd int) unix.Sockaddr {
		at, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	dev, kernel := bind(local), bind(local)
	if err := errors.Join(unix.Connect(dev, name(kernel)), unix.Connect(kernel, name(dev))); err != nil {
		t.Fatal(err)
	}
	s := newFake(t, dev)
	ended := make(chan error, 1)
	go func() { ended <- s.Run() }()
	ask := func() {
		t.Helper()
		if _, err := unix.Write(kernel, request(opGetattr, 3, fakeFile, make([]byte, 16))); err != nil {
			t.Fatal(err)
		}
		if answer := answered(t, kernel, true); errnoOf(answer) != 0 || len(answer) == sizeOutHeader {
			t.Fatalf("GETATTR: %d bytes, errno %d", len(answer), errnoOf(answer))
		}
	}
	ask()
	defer unix.Close(kernel)
	if err := unix.Connect(kernel, &unix.SockaddrInet4{Port: 9, Addr: local.Addr}); err != nil { // it listens to somebody else
		t.Fatal(err)
	}
	for range 3 {
		s.fail(1, unix.EIO) // nobody is there: the next read is refused
		deadline := time.Now().Add(time.Minute)
		for s.warned.Load() == 0 && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	if s.warned.Load() == 0 {
		t.Error("no read has failed: nothing was shown")
	}
	select {
	case err := <-ended:
		t.Fatalf("Run() = %v after a read that failed", err)
	default:
	}
	if err := unix.Connect(kernel, name(dev)); err != nil {
		t.Fatal(err)
	}
	ask()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Run() = %v after Close", err)
		}
	case <-time.After(time.Minute):
		t.Error("Run does not end")
	}
}
