package lazy_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// deafBox makes the readers of a box give up soon.
func deafBox(t *testing.T, b *box) *box {
	t.Helper()
	var err error
	b.client, err = lazy.NewClient(lazy.ClientOptions{StateDir: b.state, RunDir: b.run, Command: []string{
		b.binary, "lazyd", "--state-dir", b.state, "--run-dir", b.run, "--idle", "100ms", "--limit", "1s",
	}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// deafen puts a FIFO in the place of each blob of a copy of loose files: who opens it waits for ever, whatever becomes of its context.
func deafen(t *testing.T, dir string) (heal func()) {
	t.Helper()
	blobs, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(blobs) == 0 {
		t.Fatal(blobs, err)
	}
	for _, name := range blobs {
		if err := errors.Join(os.Rename(name, filepath.Join(filepath.Dir(dir), filepath.Base(name))), unix.Mkfifo(name, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		for _, name := range blobs {
			free(t, name)
			if err := os.Rename(filepath.Join(filepath.Dir(dir), filepath.Base(name)), name); err != nil {
				t.Error(err)
			}
		}
	}
}

// free lets go whoever waits at a FIFO, now or later in the test: a file that cannot be read at an offset.
func free(t *testing.T, name string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Error(err)
		return
	}
	t.Cleanup(func() { f.Close() })
}

// deafMount mounts loose files and makes their source one that never answers, with a reader that has met it.
func deafMount(t *testing.T, b *box) (m lazy.Mount, heal func()) {
	t.Helper()
	r := loose(t, "v6-zstd")
	dir := filepath.Join(b.dir, "source", "blobs")
	if err := os.CopyFS(dir, os.DirFS(r.BlobDir)); err != nil {
		t.Fatal(err)
	}
	r.BlobDir, r.NoPrefetch, r.Share = dir, true, "none"
	m = b.mount(b.mountpoint("deaf"), r)
	heal = sync.OnceFunc(deafen(t, dir))
	t.Cleanup(heal)
	if _, err := os.ReadFile(biggest(t, m.Dir)); !errors.Is(err, unix.EIO) {
		t.Fatalf("read from a source that never answers: %v, want EIO", err)
	}
	return m, heal
}

// soon fails the test unless f returns without an error before somebody would lose patience.
func soon(t *testing.T, what string, f func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := f(ctx); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// A source that never answers, whatever is said to it, keeps neither unmounts nor later mounts waiting.
func TestUnmountDeaf(t *testing.T) { mostlyEROFS(t, testUnmountDeaf) }

func testUnmountDeaf(t *testing.T, b *box) {
	deafBox(t, b)
	m, heal := deafMount(t, b)
	soon(t, "unmount", func(ctx context.Context) error { return b.client.Unmount(ctx, m.Dir, false) })
	soon(t, "the end of the mount", func(ctx context.Context) error {
		for ctx.Err() == nil {
			if s, err := b.client.Status(ctx, false); err != nil || len(s.Mounts) == 0 {
				return ignore(err, lazy.ErrNoDaemon)
			}
			time.Sleep(20 * time.Millisecond)
		}
		return ctx.Err()
	})
	// With the blobs that are in use still.
	other := b.mountpoint("other")
	soon(t, "mount of the same blobs from another source", func(ctx context.Context) error {
		_, err := b.client.Mount(ctx, other, b.of(loose(t, "v6-zstd")))
		return err
	})
	compare(t, other)
	heal()
	uncacheTree(t, other)
	compare(t, other)
	b.unmount(other)
}

// uncacheTree has the kernel drop what it has read of the files of a tree.
func uncacheTree(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			err = uncache(name)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// ignore drops an error that is want.
func ignore(err, want error) error {
	if errors.Is(err, want) {
		return nil
	}
	return err
}

// A daemon that is to end does, although a source never answers, and the next one serves all mounts.
func TestTerminateDeaf(t *testing.T) {
	t.Parallel()
	b := deafBox(t, newBox(t))
	m, heal := deafMount(t, b)
	other := b.mount(b.mountpoint("other"), layout(t))
	// A client may wait for an image that does not come either.
	archive := filepath.Join(b.dir, "image.tar")
	if err := unix.Mkfifo(archive, 0o600); err != nil {
		t.Fatal(err)
	}
	r := lazy.Request{Reference: "oci-archive:" + archive}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	mounting := make(chan error, 1)
	go func() {
		_, err := b.client.Mount(ctx, b.mountpoint("never"), b.of(r))
		mounting <- err
	}()
	before := b.status()
	soon(t, "restart", func(ctx context.Context) error {
		_, after, err := b.client.Restart(ctx, b.binary)
		if err == nil && (after.PID == before.PID || len(after.Mounts) != 2) {
			err = fmt.Errorf("%+v, want another daemon than %d with two mounts", after, before.PID)
		}
		return err
	})
	cancel()
	if err := <-mounting; err == nil {
		t.Error("Mount() of a FIFO succeeded")
	}
	free(t, archive)
	if err := os.Remove(archive); err != nil {
		t.Error(err)
	}
	compare(t, other.Dir)
	heal()
	eventually(t, func() string {
		if err := compareErr(t, m.Dir); err != nil {
			return err.Error()
		}
		return ""
	})
}

// A daemon that takes mounts over serves all but the one whose image is in a file that nobody can open, and that one when it can be.
func TestTakeOverDeaf(t *testing.T) {
	t.Parallel()
	b := deafBox(t, newBox(t))
	archive := filepath.Join(b.dir, "image.tar")
	dir := strings.TrimPrefix(layout(t).Reference, "oci:")
	if out, err := exec.Command(testenv.Tool(t, "tar"), "-C", dir, "-cf", archive, ".").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	r := layout(t)
	r.Reference, r.Share = "oci-archive:"+archive, "none"
	m := b.mount(b.mountpoint("mnt"), r)
	other := b.mount(b.mountpoint("other"), loose(t, "v6-zstd"))
	before := b.status()
	if err := errors.Join(os.Rename(archive, archive+"-away"), unix.Mkfifo(archive, 0o600)); err != nil {
		t.Fatal(err)
	}
	heal := sync.OnceFunc(func() {
		free(t, archive)
		if err := os.Rename(archive+"-away", archive); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(heal)
	kill(t, before.PID)
	soon(t, "the next daemon", func(ctx context.Context) error {
		s, err := b.client.Status(ctx, false)
		if err == nil && (s.PID == before.PID || len(s.Mounts) != 2 || s.Mounts[0].State != lazy.StateLazy) {
			err = fmt.Errorf("%+v, want another daemon than %d with two mounts", s, before.PID)
		}
		return err
	})
	compare(t, other.Dir)
	if _, err := os.ReadFile(biggest(t, m.Dir)); !errors.Is(err, unix.EIO) {
		t.Errorf("read from an image that cannot be opened: %v, want EIO", err)
	}
	soon(t, "unmount", func(ctx context.Context) error { return b.client.Unmount(ctx, other.Dir, false) })
	heal()
	eventually(t, func() string {
		if err := compareErr(t, m.Dir); err != nil {
			return err.Error()
		}
		return ""
	})
}
