package lazy_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/endproc"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// box is a state directory with a daemon, the real command's.
type box struct {
	t      testing.TB
	client *lazy.Client
	dir    string
	state  string
	run    string
	binary string
	driver lazy.Driver // of its mounts, unless they ask for another
}

// mostlyEROFS is eachDriver, but for short runs.
func mostlyEROFS(t *testing.T, f func(t *testing.T, b *box)) {
	if testing.Short() {
		t.Run(string(lazy.DriverEROFS), func(t *testing.T) {
			t.Parallel()
			f(t, newBox(t))
		})
		return
	}
	eachDriver(t, f)
}

// eachDriver runs a test with a box for each driver.
func eachDriver(t *testing.T, f func(t *testing.T, b *box)) {
	for _, driver := range []lazy.Driver{lazy.DriverEROFS, lazy.DriverFUSE} {
		t.Run(string(driver), func(t *testing.T) {
			t.Parallel()
			f(t, newBoxOf(t, driver))
		})
	}
}

// newBox returns a box for EROFS mounts whose daemon starts with the first mount, and sees to it that nothing
// stays after the test.
func newBox(t testing.TB) *box { return newBoxOf(t, lazy.DriverEROFS) }

// newBoxOf is newBox for mounts of one driver.
func newBoxOf(t testing.TB, driver lazy.Driver) *box {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	if driver == lazy.DriverFUSE {
		testenv.Kernel(t, "FUSE", fuse.Probe())
	} else {
		testenv.Kernel(t, "pre-content events", fanotify.Probe(fanotify.FeaturePreAccess))
		testenv.Kernel(t, "EROFS mounts of plain files", erofs.Probe(dir))
	}
	b := &box{t: t, driver: driver, dir: dir, state: filepath.Join(dir, "state"), run: filepath.Join(dir, "run"), binary: testenv.Binary(t, "optimizer")}
	b.client = b.clientOf(b.state, b.run)
	t.Cleanup(b.end)
	return b
}

func (b *box) clientOf(state, run string) *lazy.Client {
	b.t.Helper()
	c, err := lazy.NewClient(lazy.ClientOptions{
		StateDir: state, RunDir: run, Version: "test",
		Command: []string{b.binary, "lazyd", "--state-dir", state, "--run-dir", run, "--idle", "100ms", "--limit", "10s"},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// end unmounts what is left and waits until the daemon has ended.
func (b *box) end() {
	ctx := context.Background()
	s, err := b.client.Status(ctx, false)
	for _, m := range s.Mounts {
		// The test's mount; what it unmounted itself is gone.
		if err := b.client.Unmount(ctx, m.Dir, true); err != nil {
			b.t.Logf("clean up: %v", err)
		}
	}
	for deadline := time.Now().Add(time.Minute); !errors.Is(err, lazy.ErrNoDaemon) && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if now, e := b.client.Status(ctx, false); e == nil {
			s, err = now, nil
		} else {
			err = e
		}
	}
	if !errors.Is(err, lazy.ErrNoDaemon) {
		var elsewhere []int
		for _, m := range s.Mounts {
			elsewhere = append(elsewhere, whoHas(m.Device)...)
		}
		if len(elsewhere) > 0 { // mount namespaces of programs that know nothing of this test
			b.t.Logf("the daemon stays since processes %v have copies of its mounts", elsewhere)
		} else {
			b.t.Errorf("the daemon stays: %+v, %v", s, err)
		}
		_ = endproc.Logging(b.run, s.Spare, s.Holder, s.PID)
	}
	if logs, err := filepath.Glob(filepath.Join(b.run, "*.log")); err == nil && b.t.Failed() {
		for _, name := range logs {
			log, _ := os.ReadFile(name)
			b.t.Logf("%s:\n%.6000s", filepath.Base(name), log)
		}
	}
}

// whoHas returns the processes in whose mount namespaces a device is mounted.
func whoHas(device uint64) (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/mountinfo") // the pattern is right
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			continue // it has ended
		}
		mounts, err := mountinfo.GetMountsFromReader(f, func(m *mountinfo.Info) (skip, stop bool) {
			return unix.Mkdev(uint32(m.Major), uint32(m.Minor)) != device, false
		})
		f.Close()
		if pid, e := strconv.Atoi(filepath.Base(filepath.Dir(name))); errors.Join(err, e) == nil && len(mounts) > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// mountpoint makes a directory to mount at.
func (b *box) mountpoint(name string) string {
	b.t.Helper()
	dir := filepath.Join(b.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	return dir
}

func (b *box) mount(dir string, r lazy.Request) lazy.Mount {
	b.t.Helper()
	m, err := b.client.Mount(b.t.Context(), dir, b.of(r))
	if err != nil {
		b.t.Fatal(err)
	}
	return m
}

// of returns the request with the box's driver.
func (b *box) of(r lazy.Request) lazy.Request {
	r.Driver = cmp.Or(r.Driver, b.driver)
	return r
}

func (b *box) status() lazy.Status {
	b.t.Helper()
	s, err := b.client.Status(b.t.Context(), true)
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// unmount unmounts dir and waits until the daemon has seen the mount's end: a mount namespace that another test made meanwhile
// has it too, for a while.
func (b *box) unmount(dir string) {
	b.t.Helper()
	m, err := b.client.Find(b.t.Context(), dir)
	if err == nil {
		err = unmountSoon(func() error { return b.client.Unmount(b.t.Context(), dir, false) })
	}
	if err != nil {
		b.t.Fatal(err)
	}
	eventually(b.t, func() string {
		s, err := b.client.Status(b.t.Context(), false)
		if errors.Is(err, lazy.ErrNoDaemon) {
			return ""
		}
		if err != nil || slices.ContainsFunc(s.Mounts, func(left lazy.Mount) bool { return left.ID == m.ID }) {
			return fmt.Sprintf("unmounted %s: %+v, %v, want the mount gone", dir, s.Mounts, err)
		}
		return ""
	})
}

// unmountSoon unmounts, again and again while the mount is in use: a child that another test has forked has its files open until its execve, which
// takes a while where processors are scarce.
func unmountSoon(unmount func() error) (err error) {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err = unmount(); !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// layout is the zoo of the shared fixtures, as the real nydusify converted it.
func layout(t testing.TB) lazy.Request {
	return lazy.Request{Reference: "oci:" + filepath.Join(testenv.Fixtures(t), "oci", "nydus-v6"), Platform: "linux/amd64", Background: "none"}
}

// loose is a variant of it as loose files.
func loose(t testing.TB, variant string) lazy.Request {
	dir := filepath.Join(testenv.Fixtures(t), "nydus", variant)
	return lazy.Request{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs"), Background: "none"}
}

// compare has the fixtures' own program compare a tree with what the images mean.
func compare(t testing.TB, dir string) {
	t.Helper()
	if err := compareErr(t, dir); err != nil {
		t.Error(err)
	}
}

func compareErr(t testing.TB, dir string) error {
	fixtures := testenv.Fixtures(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), dir, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cmp_tree.py %s: %w\n%.2000s", dir, err, out)
	}
	return nil
}

// eventually waits until ok returns "", else fails with what it says.
func eventually(t testing.TB, ok func() string) {
	t.Helper()
	said := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if said = ok(); said == "" {
			return
		}
	}
	t.Error(said)
}
