package lazy_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// A daemon that is to end waits for no client: not for one that says nothing, nor for one that stops in the middle.
func TestTerminateWithSilentClients(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	before := b.status()
	sockets, err := filepath.Glob(filepath.Join(b.run, "*.sock"))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("sockets %v, %v", sockets, err)
	}
	for _, said := range []string{"", "\x10", "\x10\x00\x00\x00{"} {
		c := dial(t, sockets[0])
		defer c.Close()
		if _, err := c.Write([]byte(said)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Kill(before.PID, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { // sooner than such a client is given up
		if s, err := b.client.Status(t.Context(), false); err != nil || s.PID == before.PID || len(s.Mounts) != 1 {
			return fmt.Sprintf("after SIGTERM: %+v, %v, want another daemon with the mount", s, err)
		}
		return ""
	})
	compare(t, m.Dir)
}

// A daemon whose directories were removed, and made anew by another one, leaves that one its socket when it ends.
func TestSuccessorsSocket(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	first := b.status()
	fd, err := unix.PidfdOpen(first.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(os.RemoveAll(b.run), os.RemoveAll(b.state)); err != nil {
		t.Fatal(err)
	}
	again := b.mount(b.mountpoint("again"), layout(t))
	t.Cleanup(func() { _ = unix.Unmount(again.Dir, unix.MNT_DETACH) }) // where nobody can be asked
	second := b.status()
	if second.PID == first.PID || len(second.Mounts) != 1 {
		t.Fatalf("%+v, want another daemon than %d", second, first.PID)
	}
	if err := unmountSoon(func() error { return unix.Unmount(m.Dir, 0) }); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000); n != 1 {
		t.Fatalf("the daemon with nothing mounted stays: %v", err)
	}
	if s, err := b.client.Status(t.Context(), false); err != nil || s.PID != second.PID {
		t.Errorf("Status() = %+v, %v, want that of daemon %d", s, err, second.PID)
	}
	compare(t, again.Dir)
}

// A daemon that takes over makes a socket where the name of the one before is gone.
func TestSocketGone(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	before := b.status()
	sockets, err := filepath.Glob(filepath.Join(b.run, "*.sock"))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("%v, %v, want one socket", sockets, err)
	}
	if err := os.Remove(sockets[0]); err != nil {
		t.Fatal(err)
	}
	kill(t, before.PID)
	eventually(t, func() string {
		if s, err := b.client.Status(t.Context(), false); err != nil || s.PID == before.PID || len(s.Mounts) != 1 {
			return fmt.Sprintf("%+v, %v, want another daemon than %d with its mount", s, err, before.PID)
		}
		return ""
	})
	compare(t, m.Dir)
	kill(t, b.status().PID) // and the next one takes that
	eventually(t, func() string {
		if s, err := b.client.Status(t.Context(), false); err != nil || len(s.Mounts) != 1 {
			return fmt.Sprintf("%+v, %v, want the mount", s, err)
		}
		return ""
	})
	b.unmount(m.Dir)
}

// Another user who gets at the socket is told so before the daemon has read a byte of his.
func TestOtherUser(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	b.mount(b.mountpoint("mnt"), layout(t))
	sockets, err := filepath.Glob(filepath.Join(b.run, "*.sock"))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("sockets %v, %v", sockets, err)
	}
	dir, err := os.MkdirTemp("", "hs-socket-") // short, and to be reached by anybody
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}()
	for _, err := range []error{os.Chmod(dir, 0o755), os.Chmod(sockets[0], 0o666), os.Link(sockets[0], filepath.Join(dir, "s"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if said := asUser(t, 65534, filepath.Join(dir, "s")); !strings.Contains(said, "user 65534 may not ask") {
		t.Errorf("another user hears %q", said)
	}
}

// asUser connects to a socket as another user and returns what is said to him, who says nothing.
func asUser(t *testing.T, uid int, path string) string {
	t.Helper()
	said := ""
	err := testenv.OwnThread(func() error {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			return errno
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}), unix.Connect(fd, &unix.SockaddrUnix{Name: path}))
		for err == nil {
			p := make([]byte, 4096)
			var n int
			if n, err = unix.Read(fd, p); err != nil || n <= 0 {
				return err
			}
			said += string(p[:n])
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return said
}
