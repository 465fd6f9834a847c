package lazy_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
)

// When daemon, holder and spare die in the same moment, nobody has the connections of FUSE mounts any more: all reads are errors, none gives zeros. The
// next daemon says so; what was fetched is there for the next mount.
func TestAllDieFUSE(t *testing.T) {
	t.Parallel()
	b := newBoxOf(t, lazy.DriverFUSE)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v5-zstd"))
	compare(t, m.Dir)
	if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
		t.Fatal(err)
	}
	b.killEverybody()
	eventually(t, func() string {
		// What the kernel has read before may be read still; this it has to ask for.
		var st unix.Statfs_t
		if err := unix.Statfs(m.Dir, &st); !errors.Is(err, unix.ENOTCONN) {
			return fmt.Sprintf("statfs of a mount that nobody answers: %v, want ENOTCONN", err)
		}
		return ""
	})
	other := b.mount(b.mountpoint("other"), loose(t, "v5-zstd"))
	if other.Local != other.Total {
		t.Errorf("mounted again: %d of %d bytes local, want all", other.Local, other.Total)
	}
	compare(t, other.Dir)
	states := map[string]lazy.State{}
	for _, got := range b.status().Mounts {
		states[got.Dir] = got.State
	}
	if states[m.Dir] != lazy.StateFailed {
		t.Errorf("states %v, want that of %s to be failed", states, m.Dir)
	}
	b.unmount(m.Dir)
	b.unmount(other.Dir)
}

// A connection whose mount nobody knows is ended: its readers get errors.
func TestRecordIsLostFUSE(t *testing.T) {
	t.Parallel()
	b := newBoxOf(t, lazy.DriverFUSE)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v6-zstd"))
	if err := os.WriteFile(filepath.Join(b.state, "mounts", m.ID+".json"), []byte("no record"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	eventually(t, func() string {
		if _, err := os.ReadFile(filepath.Join(m.Dir, "app", "main")); err == nil {
			return "read of a mount that nobody knows gives data"
		}
		return ""
	})
	if err := unmountSoon(func() error { return unix.Unmount(m.Dir, 0) }); err != nil {
		t.Error(err)
	}
}

// EROFS and FUSE mounts of one image share its cache files, also when their daemon dies, and each may go first.
func TestBothDrivers(t *testing.T) {
	t.Parallel()
	for _, first := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		if testing.Short() && first == lazy.DriverFUSE {
			continue
		}
		t.Run(string(first)+" first", func(t *testing.T) {
			t.Parallel()
			b := newBoxOf(t, lazy.DriverEROFS)
			drivers := []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE}
			if first == lazy.DriverFUSE {
				drivers[0], drivers[1] = drivers[1], drivers[0]
			}
			var mounts []lazy.Mount
			for _, driver := range drivers {
				r := loose(t, "v6-zstd")
				r.Driver = driver
				mounts = append(mounts, b.mount(b.mountpoint(string(driver)), r))
			}
			var g errgroup.Group
			for _, m := range mounts {
				g.Go(func() error { return compareErr(t, m.Dir) })
			}
			b.killDaemon()
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
			if blobs, err := os.ReadDir(filepath.Join(b.state, "blobs")); err != nil || len(blobs) != mounts[0].Blobs {
				t.Errorf("%d cache files for %d blobs, %v", len(blobs), mounts[0].Blobs, err)
			}
			b.unmount(mounts[0].Dir)
			compare(t, mounts[1].Dir)
			// Again, over what a mount has already.
			r := loose(t, "v6-zstd")
			r.Driver = drivers[0]
			again := b.mount(mounts[0].Dir, r)
			compare(t, again.Dir)
			b.unmount(mounts[1].Dir)
			compare(t, again.Dir)
		})
	}
}

// An overlay with a writable layer lies on a FUSE mount; devices and set-user-ID programs are what they are.
func TestOverlayFUSE(t *testing.T) {
	t.Parallel()
	b := newBoxOf(t, lazy.DriverFUSE)
	m := b.mount(b.mountpoint("mnt"), loose(t, "v5-zstd"))
	upper, work, merged := b.mountpoint("upper"), b.mountpoint("work"), b.mountpoint("merged")
	if err := unix.Mount("overlay", merged, "overlay", 0, "lowerdir="+m.Dir+",upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	unmounted := false
	defer func() {
		if err := unix.Unmount(merged, 0); !unmounted && err != nil {
			t.Error(err)
		}
	}()
	compare(t, merged)
	name := filepath.Join(merged, "app", "main")
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString("more")
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil || string(got) != string(want)+"more" {
		t.Errorf("appended: %d bytes, %v, want %d", len(got), err, len(want)+4)
	}
	if got, err := os.ReadFile(filepath.Join(m.Dir, "app", "main")); err != nil || string(got) != string(want) {
		t.Errorf("below: %d bytes, %v, want %d as before", len(got), err, len(want))
	}
	if err := os.Remove(filepath.Join(merged, "app", "main-link")); err != nil {
		t.Error(err)
	}
	const options = "ro,relatime fuse.headstart ro,user_id=0,group_id=0,default_permissions,allow_other,max_read=524288"
	if got := optionsOf(t, m.Dir); got != options {
		t.Errorf("mountinfo: %q, want %q", got, options)
	}
	if err := unmountSoon(func() error { return unix.Unmount(merged, 0) }); err != nil {
		t.Error(err)
	}
	unmounted = true
	b.unmount(m.Dir)
}

// optionsOf returns what the kernel says of the mount at dir: its options, its file system, and the options of that.
func optionsOf(t testing.TB, dir string) string {
	t.Helper()
	all, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(all)) {
		mount, fs, _ := strings.Cut(line, " - ")
		if m, f := strings.Fields(mount), strings.Fields(fs); len(m) > 5 && len(f) == 3 && m[4] == dir {
			return m[5] + " " + f[0] + " " + f[2]
		}
	}
	return ""
}

// A FUSE mount reads little ahead while that may have to be fetched, and as much as one request has once all is local: in the mount that
// became complete, in one that is complete when it is made, and in one whose daemon ended. One of which something was wrong reads little ahead again.
func TestReadAheadFUSE(t *testing.T) {
	t.Parallel()
	b := newBoxOf(t, lazy.DriverFUSE)
	c, err := lazy.NewClient(lazy.ClientOptions{
		StateDir: b.state, RunDir: b.run,
		Command: []string{b.binary, "lazyd", "--state-dir", b.state, "--run-dir", b.run, "--idle", "100ms", "--limit", "300ms"},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.client = c
	r := loose(t, "v6-zstd")
	blobs := filepath.Join(b.dir, "blobs")
	if err := os.CopyFS(blobs, os.DirFS(r.BlobDir)); err != nil {
		t.Fatal(err)
	}
	r.BlobDir = blobs
	await := func(m lazy.Mount, want int) {
		t.Helper()
		eventually(t, func() string {
			if kib, err := erofs.ReadAhead(m.BDI); err != nil || kib != want {
				return fmt.Sprintf("read-ahead of %s is %d KiB, %v, want %d", m.Dir, kib, err, want)
			}
			return ""
		})
	}
	first := b.mount(b.mountpoint("first"), r)
	if kib, err := erofs.ReadAhead(first.BDI); err != nil || kib != lazy.NormalReadAhead {
		t.Errorf("read-ahead is %d KiB, %v, want %d", kib, err, lazy.NormalReadAhead)
	}
	compare(t, first.Dir)
	await(first, lazy.FUSEReadAhead)
	second := b.mount(b.mountpoint("second"), r)
	await(second, lazy.FUSEReadAhead)
	compare(t, second.Dir) // in large requests: nothing of it was read before
	if err := erofs.SetReadAhead(first.BDI, lazy.NormalReadAhead); err != nil {
		t.Fatal(err)
	}
	b.killDaemon()
	await(first, lazy.FUSEReadAhead)
	b.spoil()
	if err := os.Rename(blobs, blobs+"-away"); err != nil {
		t.Fatal(err)
	}
	if v := b.verify(); len(v.Bad) == 0 || v.Refetched != 0 {
		t.Errorf("%+v, want what is wrong, and nothing fetched again", v)
	}
	await(first, lazy.NormalReadAhead)
	await(second, lazy.NormalReadAhead)
	b.unmount(first.Dir)
	b.unmount(second.Dir)
}
