package lazy_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// Two clients mount at one directory at once: one mount lies on the other, and both can be unmounted.
func TestTwoClientsOneDirectory(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	dir := b.mountpoint("mnt")
	var g errgroup.Group
	for range 2 {
		g.Go(func() error {
			_, err := b.client.Mount(t.Context(), dir, layout(t))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	compare(t, dir)
	for left := 2; left > 0; left-- {
		if s := b.status(); len(s.Mounts) != left {
			t.Errorf("%+v, want %d mounts", s.Mounts, left)
		}
		b.unmount(dir)
	}
	if err := b.client.Unmount(t.Context(), dir, false); !errors.Is(err, lazy.ErrNotMounted) {
		t.Errorf("Unmount(nothing) = %v, want ErrNotMounted", err)
	}
}

// A daemon that is stopped makes readers wait and clients that are in a hurry go; when it goes on, so do they.
func TestStoppedDaemon(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	pid := b.status().PID
	stop(t, pid)
	read := make(chan error, 1)
	go func() { read <- compareErr(t, m.Dir) }()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if s, err := b.client.Status(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Status(stopped) = %+v, %v, want the deadline", s, err)
	}
	select {
	case err := <-read:
		t.Errorf("readers ended with %v while the daemon was stopped", err)
	default:
	}
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	if s := b.status(); s.PID != pid || len(s.Mounts) != 1 || s.Mounts[0].Stats.Failed != 0 {
		t.Errorf("%+v, want daemon %d and no read that failed", s, pid)
	}
}

// stop stops a daemon, which the end of the test lets go on.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { // each thread by itself
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil || len(threads) == 0 {
			return fmt.Sprintf("threads %v, %v", threads, err)
		}
		for _, name := range threads {
			if text, err := os.ReadFile(name); err == nil && !strings.Contains(string(text), "State:\tT") {
				return name + " runs"
			}
		}
		return ""
	})
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGCONT) })
}

// Who looks for a FUSE mount whose daemon is stopped is told so, and does not wait for what only the daemon can say of its files.
func TestUnmountOfStoppedDaemon(t *testing.T) {
	t.Parallel()
	b := newBoxOf(t, lazy.DriverFUSE)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	stop(t, b.status().PID)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- b.client.Unmount(ctx, m.Dir, false) }()
	select {
	case err := <-done:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Unmount(of a stopped daemon) = %v, want the deadline", err)
		}
	case <-time.After(time.Minute):
		t.Error("Unmount(of a stopped daemon) waits, past its deadline")
	}
}

// The state directory is removed under a daemon: mounts are served on, new ones say why they cannot be, and when the daemon has ended all is
// as before.
func TestStateDirectoryRemoved(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	if err := os.RemoveAll(b.state); err != nil {
		t.Fatal(err)
	}
	compare(t, m.Dir)
	_, err := b.client.Mount(t.Context(), b.mountpoint("other"), loose(t, "v6-lz4_block"))
	if err == nil || !strings.Contains(err.Error(), "was removed") {
		t.Errorf("Mount() = %v, want that the directory was removed", err)
	}
	b.unmount(m.Dir)
	eventually(t, func() string { // it has nothing to stay for
		if s, err := b.client.Status(t.Context(), false); !errors.Is(err, lazy.ErrNoDaemon) {
			return "the daemon stays: " + s.StateDir
		}
		return ""
	})
	compare(t, b.mount(m.Dir, loose(t, "v6-zstd")).Dir)
	if _, err := os.Stat(filepath.Join(b.state, "lock")); err != nil {
		t.Error(err)
	}
}
