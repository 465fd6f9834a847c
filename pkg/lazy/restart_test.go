package lazy_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// copyOf copies the command, as an upgrade would put another one there.
func copyOf(t *testing.T, b *box, name string) string {
	t.Helper()
	from, err := os.Open(b.binary)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	path := filepath.Join(b.dir, name)
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(to, from)
	if err = errors.Join(err, to.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// programOf returns what a process runs.
func programOf(t *testing.T, pid int) string {
	t.Helper()
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		t.Error(err)
	}
	return path
}

// A daemon is replaced by another program while it is read from; what cannot be started leaves the old one in place.
func TestRestart(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	newer, broken, text := copyOf(t, b, "newer"), filepath.Join(b.dir, "broken"), filepath.Join(b.dir, "text")
	for path, mode := range map[string]os.FileMode{broken: 0o755, text: 0o644} {
		if err := os.WriteFile(path, []byte("no program at all"), mode); err != nil {
			t.Fatal(err)
		}
	}
	ends, err := exec.LookPath("false")
	if err != nil {
		t.Fatal(err)
	}
	before := b.status()
	for _, path := range []string{"", "optimizer", text, filepath.Join(b.dir, "none"), b.dir} {
		if _, _, err := b.client.Restart(t.Context(), path); err == nil {
			t.Errorf("Restart(%q) = nil, want an error", path)
		}
	}
	onMount := filepath.Join(m.Dir, "bin", "tool")
	if _, _, err := b.client.Restart(t.Context(), onMount); !errors.Is(err, lazy.ErrUnsupported) || !strings.Contains(err.Error(), m.Dir) {
		t.Errorf("Restart(%s) = %v, want that it lies on a mount", onMount, err)
	}
	if s := b.status(); s.PID != before.PID {
		t.Errorf("daemon %d, want %d still", s.PID, before.PID)
	}
	read := make(chan error, 1)
	go func() { read <- compareErr(t, m.Dir) }()
	was, is, err := b.client.Restart(t.Context(), newer)
	if err != nil || was.PID != before.PID || is.Holder != before.Holder || len(is.Mounts) != 1 || programOf(t, is.PID) != newer {
		t.Errorf("Restart() = %+v, %+v, %v, which runs %s; want another daemon with the mount, from %s", was, is, err, programOf(t, is.PID), newer)
	}
	// A file that the kernel does not start, and a program that ends at once.
	for _, path := range []string{broken, ends} {
		before := b.status()
		_, is, err = b.client.Restart(t.Context(), path)
		if err != nil || is.PID == before.PID || len(is.Mounts) != 1 || !slices.Contains([]string{b.binary, newer}, programOf(t, is.PID)) {
			// The newer one where it has lived for so long that it has replaced the holder.
			t.Errorf("Restart(%s) = %+v, %v, which runs %s; want one from %s", path, is, err, programOf(t, is.PID), b.binary)
		}
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	b.unmount(m.Dir)
	if _, is, err := b.client.Restart(t.Context(), newer); (err != nil || is.PID != 0) && !errors.Is(err, lazy.ErrNoDaemon) {
		t.Errorf("Restart(nothing mounted) = %+v, %v, want the daemon's end", is, err)
	}
}

// A program on an overlay over a mount, or over such an overlay, is not taken either: its pages would come from the daemon that it is to replace.
func TestRestartFromOverlay(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	before := b.status()
	for depth, merged := 0, m.Dir; depth < 2; depth++ { // as in a container's root
		lower, empty := merged, b.mountpoint(fmt.Sprintf("empty-%d", depth))
		merged = b.mountpoint(fmt.Sprintf("merged-%d", depth))
		if err := unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+empty+":"+lower); err != nil {
			testenv.Kernel(t, "overlays of lazy mounts", err)
		}
		defer func() {
			if err := unix.Unmount(merged, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}()
		through := filepath.Join(merged, "bin", "tool")
		if _, _, err := b.client.Restart(t.Context(), through); !errors.Is(err, lazy.ErrUnsupported) || !strings.Contains(err.Error(), m.Dir) {
			t.Errorf("Restart(%s) = %v, want that it lies on a mount", through, err)
		}
	}
	if s := b.status(); s.PID != before.PID {
		t.Errorf("daemon %d, want %d still", s.PID, before.PID)
	}
}

// A service waits while another daemon serves the directory, and takes its place; it stays with nothing mounted.
func TestService(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	first := b.status()
	cmd := exec.Command(b.binary, "lazyd", "--service", "--state-dir", b.state, "--run-dir", b.run)
	log, err := os.Create(filepath.Join(b.dir, "service.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	wait := testenv.Start(t, cmd)
	eventually(t, func() string {
		text, err := os.ReadFile(log.Name())
		if want := fmt.Sprintf(`waiting for its end	{"pid": %d}`, first.PID); err != nil || !strings.Contains(string(text), want) {
			return fmt.Sprintf("the service says %q, %v, want %s", text, err, want)
		}
		return ""
	})
	b.unmount(m.Dir)
	eventually(t, func() string {
		if s, err := b.client.Status(t.Context(), false); err != nil || s.PID != cmd.Process.Pid {
			return fmt.Sprintf("%+v, %v, want the service %d", s, err, cmd.Process.Pid)
		}
		return ""
	})
	time.Sleep(1500 * time.Millisecond) // longer than a janitor's look
	again := b.mount(m.Dir, layout(t))
	if s := b.status(); s.PID != cmd.Process.Pid || len(s.Mounts) != 1 {
		t.Errorf("%+v, want the service %d with a mount", s, cmd.Process.Pid)
	}
	// The manager stops it: what serves the mount lives on.
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != nil {
		t.Errorf("the service ended with %v", err)
	}
	compare(t, again.Dir)
	if t.Failed() {
		text, _ := os.ReadFile(log.Name())
		t.Logf("%s", text)
	}
	if s := b.status(); s.PID == cmd.Process.Pid || len(s.Mounts) != 1 {
		t.Errorf("after the service: %+v, want another daemon with the mount", s)
	}
	b.unmount(again.Dir)
	// A restart with nothing mounted ends the one that is left, which would stay for half a minute.
	if _, is, err := b.client.Restart(t.Context(), b.binary); (err != nil || is.PID != 0) && !errors.Is(err, lazy.ErrNoDaemon) {
		t.Errorf("Restart(nothing mounted) = %+v, %v", is, err)
	}
}
