package lazy_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Who unmounts and mounts again at once goes on with what was fetched, also when the holder takes its time to close what it kept.
func TestQuickRemount(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	r := loose(t, "v6-zstd")
	dir := b.mountpoint("mnt")
	m := b.mount(dir, r)
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, _ := d.Info(); info.Size() > 0 {
				files = append(files, path)
			}
		}
		return err
	})
	if err != nil || len(files) < 100 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	local := int64(0)
	for round := range 8 {
		if _, err := os.ReadFile(files[round*len(files)/8]); err != nil {
			t.Error(err)
		}
		s := b.status()
		at := slices.IndexFunc(s.Mounts, func(x lazy.Mount) bool { return x.ID == m.ID })
		if at < 0 {
			t.Fatalf("round %d: %+v, want %s", round, s.Mounts, m.ID)
		}
		local = s.Mounts[at].Local
		holder := s.Holder
		if round%2 == 0 {
			if err := unix.Kill(holder, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			go func() {
				time.Sleep(300 * time.Millisecond)
				_ = unix.Kill(holder, unix.SIGCONT)
			}()
			b.unmount(dir)
		} else if err := unmountSoon(func() error { return unix.Unmount(dir, 0) }); err != nil { // umount(8)
			t.Fatal(err)
		}
		if m = b.mount(dir, r); m.Local < local {
			t.Fatalf("round %d: %d bytes local after the remount, %d before", round, m.Local, local)
		}
	}
	if local == 0 {
		t.Error("nothing was read: nothing was shown")
	}
	compare(t, dir)
}

// lesser writes a bootstrap with half of what is in the root of a loose image, and returns a request for it.
func lesser(t *testing.T, r lazy.Request) lazy.Request {
	t.Helper()
	boot, err := os.Open(r.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	defer boot.Close()
	info, err := boot.Stat()
	if err != nil {
		t.Fatal(err)
	}
	img, err := rafs.Open(boot, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	img.Root.Children = slices.DeleteFunc(img.Root.Children, func(rafs.Dirent) bool { n++; return n%2 == 0 })
	r.Bootstrap = filepath.Join(t.TempDir(), "image.boot")
	f, err := os.Create(r.Bootstrap)
	if err == nil {
		_, err = rafs.WriteBootstrap(f, img)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// An image is complete once all its own chunks are there, whatever images needed of its blobs that are gone.
func TestCompleteAfterAnotherImage(t *testing.T) {
	mostlyEROFS(t, func(t *testing.T, b *box) {
		all := loose(t, "v6-zstd")
		r := lesser(t, all)
		r.Background = "full"
		dir := b.mountpoint("mnt")
		total := b.mount(dir, all).Total
		b.unmount(dir)
		m := b.mount(dir, r)
		if m.Total == 0 || m.Total >= total {
			t.Errorf("half an image is %d bytes of %d: nothing is shown", m.Total, total)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		done, err := b.client.Wait(ctx, m.Device)
		if err != nil || done.State != lazy.StateComplete || done.Local != m.Total {
			t.Errorf("Wait() = %+v, %v, want complete with %d bytes", done, err, m.Total)
		}
		b.unmount(dir)
		if again := b.mount(dir, all); again.Total != total {
			t.Errorf("the whole image is %d bytes beside what is left of it, %d before", again.Total, total)
		}
		compare(t, dir)
	})
}
