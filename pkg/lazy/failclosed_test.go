package lazy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// biggest returns the path of the largest file below dir.
func biggest(t *testing.T, dir string) string {
	t.Helper()
	var name string
	var size int64
	if err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > size {
			name, size = p, info.Size()
		}
		return err
	}); err != nil || name == "" {
		t.Fatalf("largest file of %s: %q, %v", dir, name, err)
	}
	return name
}

// killDaemon kills the daemon and waits for its end.
func (b *box) killDaemon() {
	b.t.Helper()
	pid := b.status().PID
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		b.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); unix.Kill(pid, 0) == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
}

// A daemon that cannot start again must not take the events' group with it: readers wait, and never get zeros.
func TestRestartFails(t *testing.T) { eachDriver(t, testRestartFails) }

func testRestartFails(t *testing.T, b *box) {
	r := loose(t, "v6-zstd")
	want, err := os.ReadFile(biggest(t, b.mount(b.mountpoint("reference"), r).Dir))
	if err != nil {
		t.Fatal(err)
	}
	b.unmount(b.mountpoint("reference"))
	if err := os.RemoveAll(filepath.Join(b.state, "blobs")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if s, err := b.client.Status(t.Context(), false); err == nil {
			return fmt.Sprintf("daemon %d is there still", s.PID)
		}
		return ""
	})
	m := b.mount(b.mountpoint("mnt"), r)
	name := biggest(t, m.Dir)
	mounts := filepath.Join(b.state, "mounts")
	if err := errors.Join(os.Rename(mounts, mounts+".away"), os.WriteFile(mounts, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	type result struct {
		got []byte
		err error
	}
	read := make(chan result, 1)
	go func() {
		got, err := os.ReadFile(name)
		read <- result{got, err}
	}()
	select {
	case got := <-read:
		t.Fatalf("read without a daemon: %d bytes, right: %v, %v; want none", len(got.got), bytes.Equal(got.got, want), got.err)
	case <-time.After(time.Second):
	}
	if err := errors.Join(os.Remove(mounts), os.Rename(mounts+".away", mounts)); err != nil {
		t.Fatal(err)
	}
	if got := <-read; got.err != nil || !bytes.Equal(got.got, want) {
		t.Errorf("read after the daemon could start: %d bytes, right: %v, %v", len(got.got), bytes.Equal(got.got, want), got.err)
	}
}

// A record that cannot be read is no reason to forget that its mount lives.
func TestRecordIsLost(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	name := biggest(t, m.Dir)
	if err := os.WriteFile(filepath.Join(b.state, "mounts", m.ID+".json"), []byte("no record"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Not a blob's directory either: it is left alone.
	if err := os.WriteFile(filepath.Join(b.state, "blobs", "stray"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	time.Sleep(2 * time.Second) // longer than the daemon stays with nothing mounted
	got, err := os.ReadFile(name)
	if err == nil {
		t.Errorf("read of a mount that nobody knows: %d bytes, zeros: %v; want an error", len(got), len(bytes.Trim(got, "\x00")) == 0)
	}
	if s := b.status(); len(s.Mounts) != 0 {
		t.Errorf("%+v, want no mount that is known", s.Mounts)
	}
	if err := unmountSoon(func() error { return unix.Unmount(m.Dir, 0) }); err != nil {
		t.Error(err)
	}
}

// What a mount is to read from may not lie on a mount of the same daemon, by whatever name: the next daemon would wait for itself.
func TestSourceOnMount(t *testing.T) { eachDriver(t, testSourceOnMount) }

func testSourceOnMount(t *testing.T, b *box) {
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	link := filepath.Join(b.dir, "link")
	if err := os.Symlink(filepath.Join(m.Dir, "etc"), link); err != nil {
		t.Fatal(err)
	}
	blobs, hosts, docker, image := loose(t, "v6-lz4_block"), loose(t, "v6-lz4_block"), loose(t, "v6-lz4_block"), layout(t)
	blobs.BlobDir = m.Dir
	hosts.Remote.HostsDir = link
	docker.Remote.DockerConfig = filepath.Join(m.Dir, "etc")
	image.Reference = "oci:" + filepath.Join(m.Dir, "app")
	for name, r := range map[string]lazy.Request{"blob directory": blobs, "hosts, by a link": hosts, "credentials": docker, "layout": image} {
		_, err := b.client.Mount(t.Context(), b.mountpoint("other"), b.of(r))
		if !errors.Is(err, lazy.ErrUnsupported) || !strings.Contains(err.Error(), "lies on the lazy mount at "+m.Dir) {
			t.Errorf("%s: Mount() = %v, want that it lies on %s", name, err, m.Dir)
		}
	}
	b.unmount(m.Dir)
}
