package lazy_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// A mount that cannot be filled any more gives what is there, and errors for the rest, never zeros, also when another mount of the same blobs came and
// went, with a daemon that died meanwhile and one that did not.
func TestFailedBesideAnother(t *testing.T) {
	t.Parallel()
	reference := newBox(t)
	r := loose(t, "v6-zstd")
	want := treeOf(t, reference.whole("reference", r).Dir)
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		for _, die := range []bool{false, true} {
			t.Run(fmt.Sprint(driver, die), func(t *testing.T) {
				b := newBox(t)
				b.command("--limit", "3s")
				m := b.mount(b.mountpoint("one"), r)
				b.fail(m)
				r := r
				r.Driver = driver
				other := b.mount(b.mountpoint("other"), r)
				for i, name := range want.names {
					if i%9 != 0 {
						continue
					}
					if got, err := os.ReadFile(other.Dir + name); err != nil || sha256.Sum256(got) != want.sums[name] {
						t.Errorf("%s of the other mount is wrong (%v)", name, err)
					}
				}
				if die {
					kill(t, b.status().PID)
					eventually(t, func() string {
						if s, err := b.client.Status(t.Context(), false); err != nil || len(s.Mounts) != 2 {
							return fmt.Sprintf("%+v, %v, want both mounts", s, err)
						}
						return ""
					})
				}
				b.unmount(other.Dir)
				wrong, failed := 0, 0
				for _, name := range want.names {
					got, err := os.ReadFile(m.Dir + name)
					switch {
					case errors.Is(err, unix.EIO):
						failed++
					case err != nil:
						t.Error(err)
					case sha256.Sum256(got) != want.sums[name]:
						wrong++
					}
				}
				// The next daemon finds the bootstrap that the other mount has brought back.
				if wrong != 0 || (failed != 0) == die || failed == len(want.names) {
					t.Errorf("of %d files %d are wrong and %d are errors, want none wrong, and some errors: %t", len(want.names), wrong, failed, !die)
				}
				b.unmount(m.Dir)
			})
		}
	}
}

// fail makes a mount one that cannot be filled any more.
func (b *box) fail(m lazy.Mount) {
	b.t.Helper()
	if err := os.Remove(filepath.Join(b.state, "bootstraps", m.Bootstrap)); err != nil {
		b.t.Fatal(err)
	}
	kill(b.t, b.status().PID)
	eventually(b.t, func() string {
		s, err := b.client.Status(b.t.Context(), false)
		if err != nil || len(s.Mounts) != 1 || s.Mounts[0].State != lazy.StateFailed {
			return fmt.Sprintf("%+v, %v, want a failed mount", s, err)
		}
		return ""
	})
}

// What turns out wrong on disk of a complete blob that a failed mount alone has is an error for it from then on: the blob had lost its mark.
func TestVerifyFailed(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	r := loose(t, "v6-zstd")
	m := b.mount(b.mountpoint("one"), r)
	b.fail(m)
	other := b.whole("other", r)
	want := treeOf(t, other.Dir)
	if err := os.Remove(filepath.Join(b.state, "bootstraps", m.Bootstrap)); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	b.still(other)
	b.unmount(other.Dir)
	eventually(t, func() string {
		if n := b.narrow(); n != 0 {
			return fmt.Sprintf("%d marks of what is complete, want none", n)
		}
		return ""
	})
	if same, differ, failed := want.fresh(t, m.Dir); same == 0 || differ != 0 || failed != 0 {
		t.Errorf("of a failed mount, all of which is local, %d files are right, %d wrong, %d errors", same, differ, failed)
	}
	b.spoil()
	v, err := b.client.VerifyCache(t.Context(), nil, nil)
	if err != nil || len(v.Bad) == 0 || v.Refetched != 0 || len(v.Failed) != 0 {
		t.Errorf("VerifyCache() = %+v, %v, want chunks that are wrong, which nobody can fetch", v, err)
	}
	same, differ, failed := want.fresh(t, m.Dir)
	if same == 0 || differ != 0 || failed == 0 {
		t.Errorf("after the check %d files are right, %d wrong, %d errors, want none wrong, and some of each else", same, differ, failed)
	}
	b.unmount(m.Dir)
	compare(t, b.whole("again", r).Dir)
}
