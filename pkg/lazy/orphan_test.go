package lazy_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// A mount whose record was lost has the data files that another one is made of, which the next daemon takes over. When that one is unmounted, what
// is missing is an error for the first, never zeros, however long it stays; who mounts the image again fills it for both.
func TestOrphanBesideAdopted(t *testing.T) {
	t.Parallel()
	reference := newBox(t)
	r := loose(t, "v6-zstd")
	want := treeOf(t, reference.whole("reference", r).Dir)
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		t.Run(string(driver), func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			b.command("--limit", "3s")
			orphan := b.mount(b.mountpoint("orphan"), r)
			r := r
			r.Driver = driver
			known := b.mount(b.mountpoint("known"), r)
			if err := os.Remove(filepath.Join(b.state, "mounts", orphan.ID+".json")); err != nil {
				t.Fatal(err)
			}
			b.killDaemon()
			eventually(t, func() string {
				s, err := b.client.Status(t.Context(), false)
				if err != nil || len(s.Mounts) != 1 || s.Mounts[0].ID != known.ID || s.Mounts[0].State != lazy.StateLazy {
					return fmt.Sprintf("%+v, %v, want %s alone, lazy", s, err, known.ID)
				}
				return ""
			})
			for i, name := range want.names {
				if i%9 != 0 {
					continue
				}
				if got, err := os.ReadFile(known.Dir + name); err != nil || sha256.Sum256(got) != want.sums[name] {
					t.Errorf("%s of the mount that was taken over is wrong (%v)", name, err)
				}
			}
			b.unmount(known.Dir)
			b.orphaned(want, orphan.Dir, driver)
			time.Sleep(2500 * time.Millisecond) // longer than a daemon stays that has nothing to do
			b.orphaned(want, orphan.Dir, driver)
			b.killDaemon()
			b.orphaned(want, orphan.Dir, lazy.DriverFUSE)

			again := b.whole("again", loose(t, "v6-zstd"))
			compare(t, again.Dir)
			if same, differ, failed := want.fresh(t, orphan.Dir); same == 0 || differ != 0 || failed != 0 {
				t.Errorf("after the image was mounted again, %d files are right, %d wrong, %d errors, want all right", same, differ, failed)
			}
			b.unmount(again.Dir)
			if same, differ, failed := want.fresh(t, orphan.Dir); same == 0 || differ != 0 || failed != 0 {
				t.Errorf("when all is local, %d files are right, %d wrong, %d errors, want all right", same, differ, failed)
			}
			if err := unmountSoon(func() error { return unix.Unmount(orphan.Dir, 0) }); err != nil {
				t.Error(err)
			}
		})
	}
}

// orphaned reads a mount that nobody fills: what is missing is an error. What the daemon had when it was of a mount with EROFS can be read.
func (b *box) orphaned(want tree, dir string, driver lazy.Driver) {
	b.t.Helper()
	if same, differ, failed := want.fresh(b.t, dir); differ != 0 || failed == 0 || same == 0 && driver == lazy.DriverEROFS {
		b.t.Errorf("of the mount that nobody knows %d files are right, %d wrong, %d errors, want errors, and none wrong", same, differ, failed)
	}
	if _, err := b.client.Status(b.t.Context(), false); errors.Is(err, lazy.ErrNoDaemon) {
		b.t.Error("no daemon answers its readers")
	}
}
