package server

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// Tracers share a quarter of the groups that a user may have, and one that ends has none any more.
func TestSpare(t *testing.T) {
	name := filepath.Join(t.TempDir(), "limit")
	open := func(limit int) *spare {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		s := newSpare(fd, limit)
		t.Cleanup(func() {
			if err := s.close(); err != nil {
				t.Error(err)
			}
		})
		return s
	}
	const limit, all = 12, 3
	a, b := open(limit), open(limit)
	seen := map[int]bool{}
	for i := range all {
		s := a
		if i == 1 {
			s = b
		}
		n, ok := s.take()
		if !ok || seen[n] {
			t.Fatalf("take() = %d, %t; want one that nobody has, %v are taken", n, ok, seen)
		}
		seen[n] = true
	}
	for _, s := range []*spare{a, b} {
		if n, ok := s.take(); ok {
			t.Errorf("take() = %d, of %d that are taken", n, all)
		}
	}
	if err := a.close(); err != nil { // as the end of its process does
		t.Fatal(err)
	}
	if n, ok := a.take(); ok {
		t.Errorf("take() of a closed one = %d", n)
	}
	last := -1
	for range all - 1 {
		n, ok := b.take()
		if !ok {
			t.Fatal("what somebody had who ended cannot be taken")
		}
		last = n
	}
	b.give(last)
	if n, ok := open(limit).take(); !ok || n != last {
		t.Errorf("take() = %d, %t; want %d, which was given back", n, ok, last)
	}
	for _, few := range []int{-1, 0, 3} {
		if n, ok := open(few).take(); ok {
			t.Errorf("take() = %d of a limit of %d", n, few)
		}
	}
}

// Where all spare groups are taken, a session that has events to hold goes on with the group that it has; one that could take some has
// none any more at its end.
func TestRotateWithoutSpare(t *testing.T) {
	for name, limit := range map[string]int{"none": 0, "one": 4} {
		t.Run(name, func(t *testing.T) {
			s, dir, _ := heldSession(t, 10)
			file, err := os.Create(filepath.Join(t.TempDir(), "limit"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = file.Close() })
			fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			s.spare = newSpare(fd, limit)
			want := limit / 4
			for i := range want + 1 {
				if got := s.rotate(); got != (i < want) {
					t.Errorf("rotation %d: %t", i, got)
				}
			}
			if len(s.queues) != want+1 {
				t.Errorf("%d groups, want %d", len(s.queues), want+1)
			}
			opened(t, dir, 0, 10)
			if _, err := s.drain(burst); err != nil && !errors.Is(err, fanotify.ErrEmpty) {
				t.Fatal(err)
			}
			if s.entries.n < 10 {
				t.Errorf("%d files, want 10", s.entries.n)
			}
			if err := s.closing.Wait(); err != nil {
				t.Fatal(err)
			}
			for i, held := range s.spare.held {
				if held && len(s.queues) == 1 && s.queues[0].spare != i {
					t.Errorf("group %d is not given back", i)
				}
			}
			if err := s.closeQueues(); err != nil {
				t.Fatal(err)
			}
			for i, held := range s.spare.held {
				if held {
					t.Errorf("group %d is not given back at the end", i)
				}
			}
		})
	}
}
