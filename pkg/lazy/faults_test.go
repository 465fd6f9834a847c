package lazy_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
)

func TestRefused(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	file := filepath.Join(b.dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v5 := lazy.Request{Reference: "oci:" + filepath.Join(testenv.Fixtures(t), "oci", "nydus-v5"), Platform: "linux/amd64"}
	plain := lazy.Request{Reference: "oci:" + filepath.Join(testenv.Fixtures(t), "oci", "source"), Platform: "linux/amd64"}
	none := lazy.Request{Reference: "oci:" + filepath.Join(b.dir, "none")}
	dir := b.mountpoint("mnt")
	for _, tt := range []struct {
		name string
		dir  string
		r    lazy.Request
		want error
		text string
	}{
		{"no directory", filepath.Join(b.dir, "none"), layout(t), os.ErrNotExist, "none"},
		{"a file", file, layout(t), unix.ENOTDIR, "file"},
		{"RAFS v5", dir, v5, lazy.ErrUnsupported, "RAFS v5"},
		{"RAFS v5, loose", dir, loose(t, "v5-zstd"), lazy.ErrUnsupported, "RAFS v5"},
		{"a plain image", dir, plain, nil, "plain container image"},
		{"no image", dir, none, os.ErrNotExist, "none"},
		{"nothing", dir, lazy.Request{}, nil, "want a reference"},
		{"both", dir, lazy.Request{Reference: "oci:x", Bootstrap: "y", BlobDir: "z"}, nil, "want a reference"},
		{"a driver that is none", dir, lazy.Request{Reference: layout(t).Reference, Driver: "ext4"}, nil, "ext4"},
		{"a policy that is none", dir, lazy.Request{Reference: layout(t).Reference, Background: "often"}, nil, "often"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := b.client.Mount(t.Context(), tt.dir, b.of(tt.r))
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Mount() = %+v, %v, want %v with %q", m, err, tt.want, tt.text)
			}
		})
	}
	if s, err := b.client.Status(t.Context(), false); len(s.Mounts) != 0 {
		t.Errorf("Status() = %+v, %v, want nothing mounted", s, err)
	}
	for _, d := range []string{"mounts", "bootstraps", "blobs"} {
		if left, err := os.ReadDir(filepath.Join(b.state, d)); err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
			t.Errorf("%s: %v, %v, want nothing", d, left, err)
		}
	}
}

// speak sends one message to the daemon and returns its answer.
func speak(t *testing.T, b *box, message string) string {
	t.Helper()
	sockets, err := filepath.Glob(filepath.Join(b.run, "*.sock"))
	if err != nil || len(sockets) != 1 {
		t.Fatalf("sockets %v, %v", sockets, err)
	}
	c := dial(t, sockets[0])
	defer c.Close()
	if _, err := c.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(message))), message...)); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var size [4]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return ""
	}
	answer := make([]byte, min(binary.LittleEndian.Uint32(size[:]), 1<<20))
	if _, err := io.ReadFull(c, answer); err != nil {
		t.Error(err)
	}
	return string(answer)
}

// dial connects to a socket whose path may be long.
func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), filepath.Base(path)))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Others than our clients talk to the daemon.
func TestProtocol(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	for message, want := range map[string]string{
		`{"protocol":2,"version":"newer","op":"mount"}`:   "speaks protocol 2, the daemon",
		`{"protocol":1,"version":"odd","op":"celebrate"}`: "is not known",
		`{"protocol":1,"op":"mount"}`:                     "nothing to mount",
		`{"protocol":1,"op":"mount","request":{}}`:        "want a reference",
		`{"protocol":1,"op":"wait","device":1}`:           "no lazy mount",
		`{"protocol":1`:                                   "",
	} {
		if got := speak(t, b, message); !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%s is answered with %q, want %q", message, got, want)
		}
	}
	// A client that only connects, and one that asks for a mount and goes away.
	sockets, _ := filepath.Glob(filepath.Join(b.run, "*.sock"))
	silent := dial(t, sockets[0])
	defer silent.Close()
	request := fmt.Sprintf(`{"protocol":1,"op":"mount","dir":"/nowhere","request":{"reference":%q,"platform":"linux/amd64","background":"none"}}`, layout(t).Reference)
	if got := speak(t, b, request); !strings.Contains(got, `"bdi":"erofs-`) {
		t.Errorf("mount is answered with %q", got)
	}
	eventually(t, func() string {
		if s := b.status(); len(s.Mounts) != 1 {
			return fmt.Sprintf("%d mounts, want that of the client that stayed alone", len(s.Mounts))
		}
		return ""
	})
	compare(t, m.Dir)
}

// Another daemon has the state directory.
func TestLocked(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), layout(t))
	run := filepath.Join(b.dir, "other-run")
	cmd := exec.Command(b.binary, "lazyd", "--state-dir", b.state, "--run-dir", run)
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "in use by another daemon") {
		t.Errorf("second daemon: %v\n%s", err, out)
	}
	compare(t, m.Dir)
}

// A state directory whose file system has no pre-content events is for FUSE alone, and EROFS is refused before anything is mounted.
func TestStateDirectory(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "pre-content events", fanotify.Probe(fanotify.FeaturePreAccess))
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	testenv.Kernel(t, "FUSE", fuse.Probe())
	b := newBoxOf(t, lazy.DriverAuto)
	b.state, b.run = filepath.Join(dir, "state"), filepath.Join(dir, "run")
	b.client = b.clientOf(b.state, b.run)
	defer b.end() // before the file system goes
	m := b.mount(b.mountpoint("mnt"), layout(t))
	if m.Driver != lazy.DriverFUSE || !strings.Contains(m.DriverReason, "tmpfs") {
		t.Errorf("mount with its state on tmpfs: driver %s (%s), want FUSE and why", m.Driver, m.DriverReason)
	}
	compare(t, m.Dir)
	where := []string{"--state-dir", b.state, "--run-dir", b.run}
	mount := []string{"mount", layout(t).Reference, "--platform", "linux/amd64", "--driver", "erofs", b.mountpoint("erofs")}
	out, err := exec.Command(b.binary, append(mount, where...)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), b.state) || !strings.Contains(string(out), "on tmpfs") {
		t.Errorf("EROFS mount with its state on tmpfs: %v\n%s", err, out)
	}
	out, err = exec.Command(b.binary, append([]string{"status"}, where...)...).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "fuse") || !strings.Contains(string(out), "tmpfs") {
		t.Errorf("status: %v\n%s\nwant the driver and why", err, out)
	}
	b.unmount(m.Dir)
}
