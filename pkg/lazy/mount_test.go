package lazy_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
)

func TestMount(t *testing.T) {
	requests := map[string]lazy.Request{"layout": layout(t)}
	for _, variant := range []string{"v6-zstd", "v6-lz4_block", "v6-zstd-batch", "v6-zstd-sha256-64k"} {
		requests[variant] = loose(t, variant)
	}
	old := layout(t)
	old.Reference = strings.TrimSuffix(old.Reference, "nydus-v6") + "nydus-v5"
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE, lazy.DriverAuto} {
		for name, r := range requests {
			if driver == lazy.DriverEROFS || driver == lazy.DriverFUSE && (!testing.Short() || name == "layout") {
				t.Run(string(driver)+"/"+name, func(t *testing.T) { testMount(t, driver, r) })
			}
		}
		for name, r := range map[string]lazy.Request{"layout-v5": old, "v5-zstd": loose(t, "v5-zstd"), "v5-lz4-sha256": loose(t, "v5-lz4-sha256")} {
			if driver == lazy.DriverFUSE && !testing.Short() || driver == lazy.DriverAuto && (!testing.Short() || name != "layout-v5") {
				t.Run(string(driver)+"/"+name, func(t *testing.T) { testMount(t, driver, r) })
			}
		}
	}
}

// testMount reads a whole image through a mount, cold, complete, and mounted again.
func testMount(t *testing.T, driver lazy.Driver, r lazy.Request) {
	t.Parallel()
	b := newBoxOf(t, driver)
	dir := b.mountpoint("mnt")
	r.ReadAhead = lazy.DefaultReadAhead // they have no prefetch blob
	m := b.mount(dir, r)
	if driver == lazy.DriverAuto {
		driver = lazy.DriverFUSE
	}
	if m.Driver != driver || (m.DriverReason == "") != (driver == lazy.DriverEROFS) {
		t.Errorf("driver %s (%s), want %s", m.Driver, m.DriverReason, driver)
	}
	if m.Dir != dir || m.State != lazy.StateLazy || m.Local != 0 || m.Total == 0 || m.Blobs == 0 {
		t.Errorf("Mount() = %+v, want lazy at %s with nothing local", m, dir)
	}
	if kib, err := erofs.ReadAhead(m.BDI); err != nil || kib != lazy.DefaultReadAhead {
		t.Errorf("read-ahead is %d KiB, %v, want %d", kib, err, lazy.DefaultReadAhead)
	}
	compare(t, dir)
	s := b.status()
	if len(s.Mounts) != 1 || s.Mounts[0].Stats.Waits == 0 || s.Mounts[0].Stats.Demand.Bytes == 0 {
		t.Errorf("status %+v, want one mount that somebody waited for", s)
	}
	// All was read, so all is local, and nobody is in the way.
	done, err := b.client.Wait(t.Context(), m.Device)
	if err != nil || done.State != lazy.StateComplete || done.Local != m.Total || done.Total != m.Total {
		t.Errorf("Wait() = %+v, %v, want complete with %d bytes", done, err, m.Total)
	}
	ahead := lazy.NormalReadAhead
	if m.Driver == lazy.DriverFUSE {
		ahead = lazy.FUSEReadAhead
	}
	eventually(t, func() string {
		if kib, err := erofs.ReadAhead(m.BDI); err != nil || kib != ahead {
			return fmt.Sprintf("read-ahead is %d KiB, %v, want %d", kib, err, ahead)
		}
		return ""
	})
	if marks := marksOf(t, s.PID); marks != 0 {
		t.Errorf("%d marks are left", marks)
	}
	compare(t, dir)
	b.unmount(dir)
	eventually(t, func() string { // a mount namespace that somebody made meanwhile may have it too, for a while
		if s, err := b.client.Status(t.Context(), false); len(s.Mounts) != 0 || err != nil && !errors.Is(err, lazy.ErrNoDaemon) {
			return fmt.Sprintf("after unmount: %+v, %v, want no mounts", s.Mounts, err)
		}
		return ""
	})
	// What was fetched is there for the next one.
	if again := b.mount(dir, r); again.Local != again.Total {
		t.Errorf("mounted again: %d of %d bytes local, want all", again.Local, again.Total)
	}
	compare(t, dir)
}

// The prefetch blob and the background bring everything without a reader.
func TestBackground(t *testing.T) { mostlyEROFS(t, testBackground) }

func testBackground(t *testing.T, b *box) {
	r := layout(t)
	r.Background = "full"
	m := b.mount(b.mountpoint("mnt"), r)
	if done, err := b.client.Wait(t.Context(), m.Device); err != nil || done.State != lazy.StateComplete {
		t.Errorf("Wait() = %+v, %v, want complete", done, err)
	}
	compare(t, m.Dir)
	if s := b.status(); s.Mounts[0].Stats.Demand.Bytes != 0 {
		t.Errorf("%+v, want nothing on demand", s.Mounts[0].Stats)
	}
}

func TestBusy(t *testing.T) { eachDriver(t, testBusy) }

func testBusy(t *testing.T, b *box) {
	m := b.mount(b.mountpoint("mnt"), layout(t))
	f, err := os.Open(m.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := b.client.Unmount(t.Context(), m.Dir, false); !errors.Is(err, lazy.ErrBusy) {
		t.Errorf("Unmount(in use) = %v, want ErrBusy", err)
	}
	compare(t, m.Dir)
	if err := b.client.Unmount(t.Context(), m.Dir, true); err != nil {
		t.Errorf("Unmount(in use, lazy) = %v", err)
	}
	if s := b.status(); len(s.Mounts) != 1 {
		t.Errorf("%d mounts while one is in use, want 1", len(s.Mounts))
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, func() string {
		if s, err := b.client.Status(t.Context(), false); err == nil && len(s.Mounts) != 0 || err != nil && !errors.Is(err, lazy.ErrNoDaemon) {
			return fmt.Sprintf("after the last user: %+v, %v, want no mount", s, err)
		}
		return ""
	})
	if err := b.client.Unmount(t.Context(), m.Dir, false); !errors.Is(err, lazy.ErrNotMounted) {
		t.Errorf("Unmount(not mounted) = %v, want ErrNotMounted", err)
	}
}

// Somebody unmounts with umount(8), and nobody asks us.
func TestForeignUnmount(t *testing.T) { mostlyEROFS(t, testForeignUnmount) }

func testForeignUnmount(t *testing.T, b *box) {
	m := b.mount(b.mountpoint("mnt"), layout(t))
	if out, err := exec.Command("umount", m.Dir).CombinedOutput(); err != nil {
		t.Fatalf("umount: %v\n%s", err, out)
	}
	eventually(t, func() string {
		records, err := os.ReadDir(filepath.Join(b.state, "mounts"))
		boots, err2 := os.ReadDir(filepath.Join(b.state, "bootstraps"))
		if err = errors.Join(err, err2); err != nil || len(records)+len(boots) != 0 {
			return fmt.Sprintf("records %v, bootstraps %v, %v, want none", records, boots, err)
		}
		return ""
	})
}

func TestSameImageTwice(t *testing.T) { mostlyEROFS(t, testSameImageTwice) }

func testSameImageTwice(t *testing.T, b *box) {
	one, two := b.mount(b.mountpoint("one"), layout(t)), b.mount(b.mountpoint("two"), layout(t))
	if one.Device == two.Device || one.BDI == two.BDI {
		t.Errorf("two mounts are one: %+v, %+v", one, two)
	}
	var g errgroup.Group
	for _, m := range []lazy.Mount{one, two} {
		g.Go(func() error { return compareErr(t, m.Dir) })
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	b.unmount(one.Dir)
	compare(t, two.Dir)
	blobs, err := os.ReadDir(filepath.Join(b.state, "blobs"))
	if err != nil || len(blobs) != two.Blobs {
		t.Errorf("%d cache files for %d blobs, %v", len(blobs), two.Blobs, err)
	}
}

// alive reports whether the superblock of a mount exists. The kernel gives names of backing devices of FUSE mounts out again, but
// nobody else mounts while this is asked.
func alive(m lazy.Mount) (bool, error) {
	if m.Driver == lazy.DriverEROFS {
		return erofs.Alive(m.BDI)
	}
	_, err := os.Stat(filepath.Join("/sys/class/bdi", m.BDI))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// resident returns a process' resident memory in KiB.
func resident(t testing.TB, pid int) (kib int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib
		}
	}
	t.Fatalf("no VmRSS of %d", pid)
	return 0
}

// A mount made from another mount namespace is there and nowhere else.
func TestOtherNamespace(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	first := b.mount(b.mountpoint("first"), layout(t)) // the daemon is of this namespace
	dir := b.mountpoint("mnt")
	testenv.MountNamespace(t, func() error {
		// A program of this namespace: goroutines may run on any thread.
		out, err := exec.Command(b.binary, "mount", layout(t).Reference, dir, "--platform", "linux/amd64", "--state-dir", b.state, "--run-dir", b.run).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mount: %w\n%s", err, out)
		}
		if err := compareErr(t, dir); err != nil {
			return err
		}
		if out, err := exec.Command(b.binary, "umount", dir, "--state-dir", b.state, "--run-dir", b.run).CombinedOutput(); err != nil {
			return fmt.Errorf("umount: %w\n%s", err, out)
		}
		// What the daemon cannot see is not mounted from something else.
		if err := unix.Mount("none", b.mountpoint("hidden"), "tmpfs", 0, ""); err != nil {
			return err
		}
		image := filepath.Join(b.dir, "hidden", "image")
		if err := os.CopyFS(image, os.DirFS(strings.TrimPrefix(layout(t).Reference, "oci:"))); err != nil {
			return err
		}
		out, err = exec.Command(b.binary, "mount", "oci:"+image, dir, "--platform", "linux/amd64", "--state-dir", b.state, "--run-dir", b.run).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "another mount namespace") {
			return fmt.Errorf("mount of what the daemon cannot see: %w\n%s", err, out)
		}
		return unix.Unmount(filepath.Join(b.dir, "hidden"), unix.MNT_DETACH)
	})
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v in the test's namespace, want nothing", entries, err)
	}
	b.unmount(first.Dir)
}
