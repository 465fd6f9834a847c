package fanotify_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func newGroup(t *testing.T, o fanotify.Options) *fanotify.Group {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, fanotify.FeatureGroup.String(), fanotify.Probe(fanotify.FeatureGroup))
	g, err := fanotify.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// watched returns a directory with n files, whose opens of children the group sees.
func watched(t *testing.T, g *fanotify.Group, n int) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "hs-*") // many files; a disk would be slow
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	err = g.Mark(fanotify.Mark{Mask: fanotify.Open | fanotify.Access | unix.FAN_EVENT_ON_CHILD, Dir: unix.AT_FDCWD, Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func read(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
}

func TestQueued(t *testing.T) {
	g := newGroup(t, fanotify.Options{})
	dir := watched(t, g, 3)
	events := make([]fanotify.Event, 2)
	for _, want := range []int{0, 3, 1} {
		if n, err := g.Queued(); n != want || err != nil {
			t.Errorf("Queued() = %d, %v; want %d", n, err, want)
		}
		if want == 0 {
			read(t, filepath.Join(dir, "0"), filepath.Join(dir, "1"), filepath.Join(dir, "2"))
			continue
		}
		n, err := g.Read(events)
		for i := range events[:n] {
			err = errors.Join(err, events[i].Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestGroup(t *testing.T) {
	g := newGroup(t, fanotify.Options{})
	dir := watched(t, g, 3)
	events := make([]fanotify.Event, 2)
	if n, err := g.Read(events); n != 0 || !errors.Is(err, fanotify.ErrEmpty) {
		t.Fatalf("Read of an empty queue = %d, %v; want 0, %v", n, err, fanotify.ErrEmpty)
	}
	read(t, dir+"/0", dir+"/1", dir+"/2")
	var names []string
	for {
		n, err := g.Read(events)
		if errors.Is(err, fanotify.ErrEmpty) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for i := range events[:n] {
			e := &events[i]
			name, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(e.FD)))
			if err != nil {
				t.Fatal(err)
			}
			if e.Mask&fanotify.Open == 0 || int(e.PID) != os.Getpid() || e.Err != 0 {
				t.Errorf("event %+v of %s", *e, name)
			}
			flags, err := unix.FcntlInt(uintptr(e.FD), unix.F_GETFD, 0)
			if err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("descriptor flags %#x, %v; want close-on-exec", flags, err)
			}
			names = append(names, filepath.Base(name))
			if err := errors.Join(e.Close(), e.Close()); err != nil {
				t.Error(err)
			}
		}
	}
	if len(names) != 3 || names[0] != "0" || names[2] != "2" {
		t.Errorf("files %q, want 0 1 2", names)
	}
	if n, err := g.Read(nil); n != 0 || err != nil {
		t.Errorf("Read(nil) = %d, %v", n, err)
	}
	if err := errors.Join(g.Close(), g.Close()); err != nil {
		t.Error(err)
	}
	if _, err := g.Read(events); err == nil || errors.Is(err, fanotify.ErrEmpty) {
		t.Errorf("Read after Close = %v, want an error", err)
	}
}

func TestIgnoreAndFlush(t *testing.T) {
	g := newGroup(t, fanotify.Options{})
	testenv.Kernel(t, fanotify.FeatureEvictable.String(), fanotify.Probe(fanotify.FeatureEvictable))
	dir := watched(t, g, 2)
	events := make([]fanotify.Event, 8)
	if err := g.Mark(fanotify.Mark{Mask: fanotify.Open | fanotify.Access, Dir: unix.AT_FDCWD, Path: dir + "/0", Ignore: true}); err != nil {
		t.Fatal(err)
	}
	read(t, dir+"/0")
	if n, err := g.Read(events); !errors.Is(err, fanotify.ErrEmpty) {
		t.Errorf("Read after an ignored open = %d, %v; want nothing", n, err)
	}
	if err := g.Flush(fanotify.Inode); err != nil {
		t.Fatal(err)
	}
	read(t, dir+"/1")
	if n, err := g.Read(events); !errors.Is(err, fanotify.ErrEmpty) {
		t.Errorf("Read without marks = %d, %v; want nothing", n, err)
	}
}

// TestOverflow holds that a queue that was full says so.
func TestOverflow(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/fs/fanotify/max_queued_events")
	if err != nil {
		testenv.Kernel(t, "fs.fanotify.max_queued_events", err)
	}
	limit, err := strconv.Atoi(string(b[:len(b)-1]))
	if err != nil || limit > 1<<17 {
		t.Skipf("fs.fanotify.max_queued_events is %q", b)
	}
	g := newGroup(t, fanotify.Options{Bounded: true})
	// Events of one file are merged; different files are not.
	dir := watched(t, g, limit+10)
	for i := range limit + 10 {
		f, err := os.Open(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	events := make([]fanotify.Event, 64)
	for {
		n, err := g.Read(events)
		if err != nil {
			t.Fatalf("no overflow before %v", err)
		}
		last := events[n-1]
		for i := range events[:n] {
			if err := events[i].Close(); err != nil {
				t.Fatal(err)
			}
		}
		if last.Mask&fanotify.Overflow != 0 {
			if last.FD != fanotify.NoFD || last.Err != 0 {
				t.Errorf("overflow event %+v", last)
			}
			return
		}
	}
}

func TestProbe(t *testing.T) {
	testenv.Root(t)
	for _, f := range []fanotify.Feature{
		fanotify.FeatureGroup, fanotify.FeatureFilesystemMark, fanotify.FeatureOpenExec,
		fanotify.FeatureEvictable, fanotify.FeatureOpenErrors, fanotify.FeaturePreAccess,
	} {
		if err := fanotify.Probe(f); err != nil && !errors.Is(err, fanotify.ErrUnsupported) {
			t.Errorf("Probe(%s) = %v, want nil or %v", f, err, fanotify.ErrUnsupported)
		} else {
			t.Logf("%s: %v", f, err)
		}
	}
	if err := fanotify.Probe(fanotify.Feature(200)); !errors.Is(err, fanotify.ErrUnsupported) {
		t.Errorf("Probe(200) = %v, want %v", err, fanotify.ErrUnsupported)
	}
	g := newGroup(t, fanotify.Options{})
	if err := g.Mark(fanotify.Mark{Mask: 1 << 63, Dir: unix.AT_FDCWD, Path: "/"}); !errors.Is(err, fanotify.ErrUnsupported) {
		t.Errorf("Mark of an unknown event = %v, want %v", err, fanotify.ErrUnsupported)
	}
	if err := g.Mark(fanotify.Mark{Mask: fanotify.Open, Dir: unix.AT_FDCWD, Path: "/nonexistent"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Mark of nothing = %v, want %v", err, os.ErrNotExist)
	}
}

// TestPermission runs this test binary without CAP_SYS_ADMIN. A group without it can be
// had since Linux 5.13, but not one with an unlimited queue.
func TestPermission(t *testing.T) {
	if os.Getenv("HEADSTART_TEST_UNPRIVILEGED") != "" {
		if _, err := fanotify.New(fanotify.Options{}); !errors.Is(err, fanotify.ErrPermission) {
			t.Errorf("New = %v, want %v", err, fanotify.ErrPermission)
		}
		return
	}
	testenv.Root(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", exe, "-test.run", "^TestPermission$")
	cmd.Env = append(os.Environ(), "HEADSTART_TEST_UNPRIVILEGED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
