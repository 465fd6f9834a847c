package tracer_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// window is the kernel's default for what is mapped around a fault, in pages: 64 KiB, aligned in
// the address space, so that a page is at most this less one from the one that was touched.
// Source: mm/memory.c fault_around_pages, do_fault_around.
var window = int64((64 << 10) / os.Getpagesize())

// coldBox is a box whose image is an EROFS filesystem of its own, so that its page cache is
// the box's alone: cold when mounted, with read-ahead off, so that a page is cached when it was touched
// and only then.
type coldBox struct {
	box
	image string
}

// newColdBox makes an image of what the shell script setup puts into a directory.
func newColdBox(t *testing.T, setup string) *coldBox {
	t.Helper()
	needKernel(t)
	mkfs := testenv.Tool(t, "mkfs.erofs")
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", "mode=755")
	c := &coldBox{box: box{lower: dir + "/lower", upper: dir + "/upper", merged: dir + "/merged"}, image: t.TempDir() + "/image"}
	for _, d := range []string{"/tree", "/lower", "/upper", "/merged", "/work"} {
		if err := os.Mkdir(dir+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash", "-euc", "mkdir -p dev; [ -e dev/null ] || mknod -m 666 dev/null c 1 3; "+setup)
	cmd.Dir = dir + "/tree"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup: %v\n%s", err, out)
	}
	if out, err := exec.Command(mkfs, c.image, dir+"/tree").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	before := bdis(t)
	err := testenv.MountEROFSAt(c.lower, c.image)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENOSYS) {
		testenv.Kernel(t, "EROFS mounts of plain files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE)", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := testenv.Unmount(c.lower); err != nil {
			t.Error(err)
		}
	})
	fresh := 0
	for name := range bdis(t) {
		if !before[name] && strings.Contains(name, "erofs") {
			fresh++
			if err := os.WriteFile("/sys/class/bdi/"+name+"/read_ahead_kb", []byte("0"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if fresh == 0 {
		t.Fatal("the mount has no bdi")
	}
	mount(t, "overlay", c.merged, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s/work", c.lower, c.upper, dir))
	return c
}

// bdis returns the names of what has a read-ahead setting.
func bdis(t *testing.T) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir("/sys/class/bdi")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, e := range entries {
		names[e.Name()] = true
	}
	return names
}

// pageSet is a set of pages of a file.
type pageSet map[int64]bool

// files returns the regular files of the image that are not empty, and their sizes.
func (c *coldBox) files(t *testing.T) map[string]int64 {
	t.Helper()
	sizes := make(map[string]int64)
	err := filepath.WalkDir(c.lower, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > 0 {
			sizes[strings.TrimPrefix(p, c.lower)] = info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sizes
}

// warm reads all of the image.
func (c *coldBox) warm(t *testing.T) {
	t.Helper()
	for p := range c.files(t) {
		if _, err := os.ReadFile(c.lower + p); err != nil {
			t.Fatal(err)
		}
	}
}

func pagesOf(size int64) int64 {
	page := int64(os.Getpagesize())
	return (size + page - 1) / page
}

// bounds returns the lower and upper bound that a trace gives for a file.
func bounds(t *testing.T, r tracer.Result, path string, size int64) (lower, upper pageSet) {
	t.Helper()
	lower, upper = make(pageSet), make(pageSet)
	a, ok := find(r, path)
	if !ok {
		return lower, upper
	}
	if a.Ranges == nil {
		t.Errorf("%s: no ranges", path)
	}
	page := int64(os.Getpagesize())
	for _, g := range a.Ranges {
		if g.Offset%page != 0 || g.Length <= 0 || g.Offset+g.Length > size {
			t.Errorf("%s: range %+v in a file of %d bytes", path, g, size)
		}
		for p := g.Offset / page; p < pagesOf(g.Offset+g.Length); p++ {
			if upper[p] {
				t.Errorf("%s: page %d is in two ranges", path, p)
			}
			upper[p] = true
			if g.Certain {
				lower[p] = true
			}
		}
	}
	return lower, upper
}

// judge holds lower bound ⊆ truth ⊆ upper bound for one file, and that the upper bound adds
// no page that is not in the window around a touched one.
func judge(t *testing.T, path string, lower, truth, upper pageSet) {
	t.Helper()
	for p := range lower {
		if !truth[p] {
			t.Errorf("%s: page %d is certain and was not touched", path, p)
		}
	}
	for p := range truth {
		if !upper[p] {
			t.Errorf("%s: page %d was touched and is missing", path, p)
		}
	}
	for p := range upper {
		near := false
		for q := p - window + 1; q < p+window; q++ {
			near = near || truth[q]
		}
		if !near {
			t.Errorf("%s: page %d is listed and nothing near it was touched", path, p)
		}
	}
}

// judgeInserted holds what entered the page cache for a cold file against what was touched: just that.
func judgeInserted(t *testing.T, path string, truth, inserted pageSet) {
	t.Helper()
	for p := range inserted {
		if !truth[p] {
			t.Errorf("%s: page %d entered the cache and was not touched", path, p)
		}
	}
	for p := range truth {
		if !inserted[p] {
			t.Errorf("%s: page %d was touched and did not enter the cache", path, p)
		}
	}
}

// knownWays are ways of touching bytes that the test's program knows.
var knownWays = []string{"read", "pread", "readv", "preadv", "sendfile", "splice", "mmap", "private"}

// knownFiles is a script that makes a file of size bytes for each way, and one more, below k.
func knownFiles(size int) string {
	return "mkdir k; for f in " + strings.Join(knownWays, " ") + " none; do head -c " + strconv.Itoa(size) + " /dev/urandom > k/$f; done"
}

// knownCalls returns arguments of the program that touch parts of those files, and the pages of these parts
// by way.
func knownCalls(size int) (args []string, truth map[string]pageSet) {
	page := os.Getpagesize()
	random := rand.New(rand.NewPCG(7, 9))
	truth = make(map[string]pageSet)
	for _, way := range knownWays {
		truth[way] = make(pageSet)
		offsets := []int{0, page - 1, 5 * page, 300_000, size - 1}
		for range 8 {
			offsets = append(offsets, random.IntN(size))
		}
		for i, off := range offsets {
			n := min([]int{1, 2, page, page + 1, 3, 40_000}[i%6], size-off)
			args = append(args, fmt.Sprintf("%s:/k/%s:%d:%d", way, way, off, n))
			for p := off / page; p <= (off+n-1)/page; p++ {
				truth[way][int64(p)] = true
			}
		}
	}
	return args, truth
}

// judgeCalls holds a trace of those calls against the pages that they touched.
func judgeCalls(t *testing.T, r tracer.Result, truth map[string]pageSet, size int64) {
	t.Helper()
	for _, way := range knownWays {
		lower, upper := bounds(t, r, "/k/"+way, size)
		judge(t, way, lower, truth[way], upper)
		if way != "mmap" && way != "private" && len(lower) != len(upper) {
			t.Errorf("%s: %d pages certain of %d; reads are exact", way, len(lower), len(upper))
		}
	}
}

// TestRangesOfCalls holds the ranges of a program that touches known bytes in every way against
// those bytes, page by page, cold and warm.
func TestRangesOfCalls(t *testing.T) {
	const size = 1<<20 + 123
	setup := "cp " + workload(t) + " program; " + knownFiles(size)
	c := newColdBox(t, setup)
	args, truth := knownCalls(size)
	args = append([]string{"/program", "ranges", "pread:/k/none:0:0"}, args...)
	for _, state := range []string{"cold", "warm"} {
		t.Run(state, func(t *testing.T) {
			if state == "warm" {
				c.warm(t)
			}
			watch := c.watchInsertions(t)
			r := c.record(t, pivot, args...)
			inserted := c.touched(t, watch.stop(t), c.files(t))
			for _, way := range knownWays {
				if state == "cold" {
					judgeInserted(t, way, truth[way], inserted["/k/"+way])
				}
			}
			judgeCalls(t, r, truth, size)
			if a, ok := find(r, "/k/none"); !ok || a.Ranges == nil || len(a.Ranges) > 0 {
				t.Errorf("a file of which nothing was read: %+v, listed %v; want empty ranges", a, ok)
			}
			if r.Grade == trace.GradeFile || (state == "warm" && r.Grade != trace.GradeFaultAround) {
				t.Errorf("grade %q by %q", r.Grade, r.Engine)
			}
		})
	}
}

// TestRangesOfCopy is the same for copy_file_range, which copies within a filesystem only.
func TestRangesOfCopy(t *testing.T) {
	b := newDiskBox(t, "head -c 1000000 /dev/urandom > f")
	r := b.record(t, pivot, "/program", "ranges", "copy:/f:4095:2", "copy:/f:200000:70000")
	want := pageSet{0: true, 1: true}
	for p := int64(200_000) / int64(os.Getpagesize()); p <= 269_999/int64(os.Getpagesize()); p++ {
		want[p] = true
	}
	lower, upper := bounds(t, r, "/f", 1_000_000)
	judge(t, "copied", lower, want, upper)
	if len(lower) != len(want) {
		t.Errorf("%d pages certain, want %d", len(lower), len(want))
	}
}

// pythonTree copies the interpreter, what it is linked to and its library into a tree.
const pythonTree = `
	exe=$(readlink -f /usr/bin/python3)
	for f in "$exe" $(ldd "$exe" | grep -o '/[^ ]*'); do
		mkdir -p ".$(dirname "$f")"; cp -L "$f" ".$f"
	done
	lib=$("$exe" -c 'import json, os; print(os.path.dirname(os.path.dirname(json.__file__)))')
	mkdir -p ".$lib"; cp -a "$lib/." ".$lib"; rm -rf ".$lib"/config-* ".$lib/test" ".$lib/site-packages" ".$lib/dist-packages"
	for l in $(ldd "$lib"/lib-dynload/*.so | grep -o '=> /[^ ]*' | cut -c4- | sort -u); do
		mkdir -p ".$(dirname "$l")"; [ -e ".$l" ] || cp -L "$l" ".$l"
	done
	echo "$exe" > exe
`

// coldPython records a start of the interpreter on a cold image and asks what was read into the cache for
// it, by path.
func coldPython(t *testing.T) (c *coldBox, cold tracer.Result, truth map[string]pageSet, argv []string) {
	t.Helper()
	c = newColdBox(t, pythonTree)
	text, err := os.ReadFile(c.lower + "/exe")
	if err != nil {
		t.Fatal(err)
	}
	exe := string(bytes.TrimSpace(text))
	argv = []string{
		exe, "-S", "-c",
		"import json, email.message, http.client, decimal, hashlib, ctypes, subprocess; subprocess.run(['" + exe + "', '-S', '-c', 'import bz2'], check=True)",
	}
	watch := c.watchInsertions(t)
	cold = c.record(t, pivot, argv...)
	return c, cold, c.touched(t, watch.stop(t), c.files(t)), argv
}

// TestRangesOfProgram holds the ranges of a real start, of an interpreter that loads libraries while it
// runs, against what the kernel had to read into a cold cache for it.
func TestRangesOfProgram(t *testing.T) {
	c, cold, truth, argv := coldPython(t)
	sizes := c.files(t)
	paths := slices.Sorted(maps.Keys(truth))
	c.warm(t)
	warm := c.record(t, pivot, argv...)
	for name, r := range map[string]tracer.Result{"cold": cold, "warm": warm} {
		t.Run(name, func(t *testing.T) {
			var sum [3]int
			for _, p := range paths {
				lower, upper := bounds(t, r, p, sizes[p])
				judge(t, p, lower, truth[p], upper)
				for i, set := range []pageSet{lower, truth[p], upper} {
					sum[i] += len(set)
				}
			}
			if sum[1] < 500 || len(r.Trace.Accesses) < 50 {
				t.Errorf("%d pages of %d files were touched; that was no start", sum[1], len(r.Trace.Accesses))
			}
			t.Logf("grade %s: lower bound %d pages, truth %d, upper bound %d", r.Grade, sum[0], sum[1], sum[2])
		})
	}
	if n := len(cold.Trace.Processes); n < 2 {
		t.Errorf("processes %+v, want the first and its child", cold.Trace.Processes)
	}
}

// fdOf opens a file until the test ends.
func fdOf(t *testing.T, name string) int {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return int(f.Fd())
}
