package lazy_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
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
