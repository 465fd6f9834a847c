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

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/watch"
)

// inode is what a mark of an inode names: the superblock's device and the number.
type inode struct{ dev, ino uint64 }

// marksIn returns the inodes that a process' fanotify groups have marked, and the lines of marks of anything else: a whole mount, a
// whole file system.
func marksIn(t testing.TB, pid int) (inodes map[inode]bool, wide []string) {
	t.Helper()
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
	if err != nil || len(infos) == 0 {
		t.Fatalf("descriptors of %d: %d, %v", pid, len(infos), err)
	}
	inodes = map[inode]bool{} // a group that is kept twice counts once
	for _, name := range infos {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // closed since
		}
		for line := range strings.Lines(string(b)) {
			rest, ok := strings.CutPrefix(line, "fanotify ")
			if !ok || strings.HasPrefix(rest, "flags:") {
				continue
			}
			var i inode
			if n, err := fmt.Sscanf(rest, "ino:%x sdev:%x ", &i.ino, &i.dev); n == 2 && err == nil {
				inodes[i] = true
			} else {
				wide = append(wide, strings.TrimSpace(line))
			}
		}
	}
	return inodes, wide
}

// marksOf counts the marks of a process' fanotify groups, which must be of inodes.
func marksOf(t testing.TB, pid int) int {
	t.Helper()
	inodes, wide := marksIn(t, pid)
	if len(wide) != 0 {
		t.Errorf("process %d marks more than single files: %q", pid, wide)
	}
	return len(inodes)
}

// narrow fails the test unless daemon and holders mark nothing but cache data files, and returns how many the daemon marks.
func (b *box) narrow() int {
	b.t.Helper()
	data, err := filepath.Glob(filepath.Join(b.state, "blobs", "*", "data"))
	if err != nil {
		b.t.Fatal(err)
	}
	caches := map[inode]bool{}
	for _, name := range data {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			b.t.Fatal(err)
		}
		caches[inode{uint64(unix.Major(st.Dev))<<20 | uint64(unix.Minor(st.Dev)), st.Ino}] = true // as the kernel prints it
	}
	s := b.status()
	for _, pid := range []int{s.Holder, s.Spare, s.PID} {
		if pid == 0 {
			continue // no spare yet
		}
		inodes, wide := marksIn(b.t, pid)
		for i := range inodes {
			if !caches[i] {
				b.t.Errorf("process %d marks inode %d of device %#x, which is none of the %d cache files", pid, i.ino, i.dev, len(caches))
			}
		}
		if len(wide) != 0 {
			b.t.Errorf("process %d marks more than single files: %q", pid, wide)
		}
	}
	return marksOf(b.t, s.PID)
}

// The daemon and its holders mark the cache files of what is not complete, and nothing else ever: no mount and no file system, on which
// they write themselves.
func TestMarks(t *testing.T) { mostlyEROFS(t, testMarks) }

func testMarks(t *testing.T, b *box) {
	r := loose(t, "v6-zstd")
	marked := func(when string, least, most int) {
		t.Helper()
		if b.driver == lazy.DriverFUSE {
			least, most = 0, 0
		}
		if n := b.narrow(); n < least || n > most {
			t.Errorf("%s: %d marks, want %d to %d", when, n, least, most)
		}
	}
	one := b.mount(b.mountpoint("one"), r)
	marked("nothing was read", one.Blobs, one.Blobs)
	two := b.mount(b.mountpoint("two"), loose(t, "v6-lz4_block"))
	marked("of two images", one.Blobs+two.Blobs, one.Blobs+two.Blobs)
	var g errgroup.Group
	for _, m := range []lazy.Mount{one, two} {
		g.Go(func() error { return compareErr(t, m.Dir) })
	}
	for range 5 {
		marked("while they are read", 0, one.Blobs+two.Blobs)
	}
	b.killDaemon()
	b.spared()
	marked("after another daemon took over", 0, one.Blobs+two.Blobs)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	for _, m := range []lazy.Mount{one, two} {
		if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
			t.Error(err)
		}
	}
	eventually(t, func() string {
		if n := marksOf(t, b.status().PID); n != 0 {
			return fmt.Sprintf("%d marks of complete images", n)
		}
		return ""
	})
	b.quiet()
}

// The check can fail: it sees marks of mounts, of file systems and of inodes.
func TestMarksAreSeen(t *testing.T) {
	testenv.Root(t)
	testenv.Kernel(t, "filesystem marks", fanotify.Probe(fanotify.FeatureFilesystemMark))
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := testenv.Unmount(dir); err != nil {
			t.Error(err)
		}
	}()
	g, err := fanotify.New(fanotify.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, kind := range []fanotify.Kind{fanotify.Inode, fanotify.Mount, fanotify.Filesystem} {
		if err := g.Mark(fanotify.Mark{Kind: kind, Mask: fanotify.Open, Dir: unix.AT_FDCWD, Path: dir}); err != nil {
			t.Fatal(err)
		}
	}
	inodes, wide := marksIn(t, os.Getpid())
	if len(inodes) != 1 || len(wide) != 2 {
		t.Errorf("one mark of each kind: %v, %q, want an inode and two that are none", inodes, wide)
	}
}

// stolen returns duplicates of a process' descriptors that refer to what has a name. The caller closes them.
func stolen(t testing.TB, pid int, name string) (fds []int) {
	t.Helper()
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(to, name) {
			continue
		}
		var fd int
		if _, err := fmt.Sscan(filepath.Base(link), &fd); err != nil {
			t.Fatal(err)
		}
		if fd, err = unix.PidfdGetfd(process, fd, 0); err == nil { // else it was closed since
			fds = append(fds, fd)
		}
	}
	return fds
}

// quiet fails the test unless, soon, no event or request waits: not in a queue of the kernel, and not in a table of the daemon.
func (b *box) quiet() {
	b.t.Helper()
	eventually(b.t, func() string { return waiting(b.t, b.status().PID) })
}

// waiting says what waits for an answer of a daemon: "" when nothing does.
func waiting(t testing.TB, pid int) string {
	t.Helper()
	looked := 0
	for _, fd := range stolen(t, pid, "anon_inode:[fanotify]") { // an os.File would make it block for the daemon
		n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
		_ = unix.Close(fd)
		if looked++; err != nil || n != 0 {
			return fmt.Sprintf("%d bytes of events are queued, %v", n, err)
		}
	}
	for name, pending := range map[string]func(*os.File) (int, error){
		"memfd:headstart-pending": func(f *os.File) (int, error) {
			table, err := watch.OpenTable(f)
			if err != nil {
				return 0, errors.Join(err, f.Close())
			}
			return table.Pending(), table.Close()
		},
		"memfd:headstart-fuse": func(f *os.File) (int, error) {
			table, err := fuse.OpenTable(f)
			if err != nil {
				return 0, errors.Join(err, f.Close())
			}
			return table.Pending(), table.Close()
		},
	} {
		for _, fd := range stolen(t, pid, "/"+name) {
			n, err := pending(os.NewFile(uintptr(fd), name))
			if looked++; err != nil || n != 0 {
				return fmt.Sprintf("%d pending in %s, %v", n, name, err)
			}
		}
	}
	if looked == 0 {
		return "the daemon has neither a group nor a table"
	}
	return ""
}
