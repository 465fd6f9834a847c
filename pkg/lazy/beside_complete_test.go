package lazy_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// half is an image of every second name in the root of another one, over the same blobs.
func (b *box) half(r lazy.Request) lazy.Request {
	b.t.Helper()
	boot, err := os.ReadFile(r.Bootstrap)
	if err != nil {
		b.t.Fatal(err)
	}
	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		b.t.Fatal(err)
	}
	var kept []rafs.Dirent
	for i, c := range img.Root.Children {
		if i%2 == 0 {
			kept = append(kept, c)
		}
	}
	img.Root.Children, img.Prefetch = kept, nil
	var out bytes.Buffer
	if _, err := rafs.WriteBootstrap(&out, img); err != nil {
		b.t.Fatal(err)
	}
	r.Bootstrap = filepath.Join(b.dir, "half.boot")
	if err := os.WriteFile(r.Bootstrap, out.Bytes(), 0o600); err != nil {
		b.t.Fatal(err)
	}
	return r
}

// A complete mount needs nobody, also when the daemon died while another mount used more of the same blobs and that one cannot be taken over:
// the mark that was made for it stays, and reaches both. What the other one has not got stays an error.
func TestCompleteBesideLost(t *testing.T) {
	t.Parallel()
	reference := newBox(t)
	r := loose(t, "v6-zstd")
	want := treeOf(t, reference.whole("reference", r).Dir)
	for name, lose := range map[string]func(b *box, m lazy.Mount) string{
		"bootstrap": func(b *box, m lazy.Mount) string { return filepath.Join(b.state, "bootstraps", m.Bootstrap) },
		"record":    func(b *box, m lazy.Mount) string { return filepath.Join(b.state, "mounts", m.ID+".json") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			b.command("--limit", "3s")
			m := b.whole("half", b.half(r))
			other := b.mount(b.mountpoint("other"), r)
			if err := os.Remove(lose(b, other)); err != nil {
				t.Fatal(err)
			}
			b.killDaemon()
			b.still(m)
			same, differ, failed := want.fresh(t, m.Dir)
			if same == 0 || differ != 0 || failed != 0 {
				t.Errorf("of the complete mount %d files are right, %d wrong, %d errors, want all right", same, differ, failed)
			}
			if same, differ, failed = want.fresh(t, other.Dir); differ != 0 || failed == 0 {
				t.Errorf("of the mount that was lost %d files are right, %d wrong, %d errors, want errors, and none wrong", same, differ, failed)
			}
			b.unmount(m.Dir)
			if same, differ, failed = want.fresh(t, other.Dir); differ != 0 || failed == 0 {
				t.Errorf("without the complete mount, of that which was lost %d files are right, %d wrong, %d errors, want errors, and none wrong", same, differ, failed)
			}
			if err := unmountSoon(func() error { return unix.Unmount(other.Dir, 0) }); err != nil {
				t.Error(err)
			}
		})
	}
}

// A mount becomes complete also when one that needed more of the same blobs was unmounted before all of that was fetched, which nobody fetches any more.
func TestCompleteBesideUnmounted(t *testing.T) { eachDriver(t, testCompleteBesideUnmounted) }

func testCompleteBesideUnmounted(t *testing.T, b *box) {
	r := loose(t, "v6-zstd")
	all := r
	all.Background, all.NoPrefetch = "none", true
	needy := b.mount(b.mountpoint("needy"), all)
	some := b.half(r)
	some.Background = "full"
	m := b.mount(b.mountpoint("half"), some)
	time.Sleep(time.Second) // it has its own by then, mostly
	if got := b.at(m.Dir); got.State == lazy.StateComplete {
		t.Fatalf("%+v: complete, though the other one needs more", got)
	}
	b.unmount(needy.Dir)
	b.still(m)
	want := treeOf(t, b.whole("again", r).Dir)
	if same, differ, failed := want.fresh(t, m.Dir); same == 0 || differ != 0 || failed != 0 {
		t.Errorf("%d files are right, %d wrong, %d errors, want all right", same, differ, failed)
	}
	compare(t, b.mountpoint("again"))
}

// A daemon that died when it had begun to make a complete mount lazy again, for the sake of a chunk that is wrong, leaves one that is served.
func TestDieInRepair(t *testing.T) { eachDriver(t, testDieInRepair) }

func testDieInRepair(t *testing.T, b *box) {
	m := b.whole("mnt", loose(t, "v6-zstd"))
	if b.driver == lazy.DriverEROFS { // it lets go of all after it has said that it is complete
		eventually(t, func() string {
			fds := stolen(t, b.status().Holder, filepath.Join(b.state, "blobs"))
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
			if len(fds) > 0 {
				return fmt.Sprintf("%d files of a complete mount are kept", len(fds))
			}
			return ""
		})
	}
	name := filepath.Join(b.state, "mounts", m.ID+".json")
	record, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	lazily := bytes.Replace(record, []byte(`"complete": true`), []byte(`"complete": false`), 1)
	if bytes.Equal(lazily, record) {
		t.Fatalf("not complete: %s", record)
	}
	if err := os.WriteFile(name, lazily, 0o600); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	b.still(m)
	compare(t, m.Dir)
}

// still waits for a daemon that says that a mount is complete.
func (b *box) still(m lazy.Mount) {
	b.t.Helper()
	eventually(b.t, func() string {
		s, err := b.client.Status(b.t.Context(), false)
		for _, got := range s.Mounts {
			if got.ID == m.ID && got.State == lazy.StateComplete {
				return ""
			}
		}
		return fmt.Sprintf("%+v, %v, want %s complete", s, err, m.ID)
	})
}

// fresh reads those files of a tree that are below dir, from the disk, and counts what comes of it.
func (tr tree) fresh(t testing.TB, dir string) (same, differ, failed int) {
	t.Helper()
	for _, name := range tr.names {
		sum, err := readFresh(dir + name)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case errors.Is(err, unix.EIO):
			failed++
		case err != nil:
			t.Error(err)
		case sum != tr.sums[name]:
			differ++
		case sum != sha256.Sum256(nil):
			same++
		}
	}
	return same, differ, failed
}
