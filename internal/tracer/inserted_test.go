package tracer_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// insertions is a trace instance of the test's own that has the kernel write down, as text, each page that enters
// the page cache for one filesystem. What a cold image is asked for is in it for good, while a machine may
// take the pages themselves back at any moment (DAMON, balloons).
type insertions struct{ dir string }

// watchInsertions begins to write down what enters the page cache for the filesystem of a box's image.
func (c *coldBox) watchInsertions(t *testing.T) *insertions {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(c.lower, &st); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	mount(t, "tracefs", root, "tracefs", "")
	w := &insertions{dir: filepath.Join(root, "instances", fmt.Sprintf("truth-%d", os.Getpid()))}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Rmdir(w.dir); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Errorf("remove the trace instance: %v", err)
		}
	})
	const event = "events/filemap/mm_filemap_add_to_page_cache/"
	dev := uint64(unix.Major(st.Dev))<<20 | uint64(unix.Minor(st.Dev)) // as the kernel keeps it: include/linux/kdev_t.h
	for _, set := range [][2]string{
		{"buffer_size_kb", "8192"},
		{event + "filter", fmt.Sprintf("s_dev == %d", dev)},
		{event + "enable", "1"},
	} {
		if err := os.WriteFile(filepath.Join(w.dir, set[0]), []byte(set[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// stop ends the writing down, removes the instance and returns the pages that entered the page cache, by inode number.
func (w *insertions) stop(t *testing.T) map[uint64]pageSet {
	t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, "tracing_on"), []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	stats, err := filepath.Glob(filepath.Join(w.dir, "per_cpu/cpu*/stats"))
	if err != nil || len(stats) == 0 {
		t.Fatalf("statistics of the trace instance: %v, %v", stats, err)
	}
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "\noverrun: 0\n") {
			t.Fatalf("the test's own trace lost something:\n%s", text)
		}
	}
	f, err := os.Open(filepath.Join(w.dir, "trace"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	pages := make(map[uint64]pageSet)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		ino, first, count, err := insertion(lines.Text())
		if err != nil {
			t.Fatal(err)
		}
		if pages[ino] == nil {
			pages[ino] = make(pageSet)
		}
		for p := first; p < first+count; p++ {
			pages[ino][p] = true
		}
	}
	if err := errors.Join(lines.Err(), f.Close(), unix.Rmdir(w.dir)); err != nil {
		t.Fatal(err)
	}
	return pages
}

// insertion reads a line such as "… mm_filemap_add_to_page_cache: dev 0:52 ino 2f pfn=0x1f ofs=4096 order=0".
func insertion(line string) (ino uint64, first, count int64, err error) {
	_, text, ok := strings.Cut(line, " ino ")
	if !ok {
		return 0, 0, 0, fmt.Errorf("no insertion: %q", line)
	}
	var pfn uint64
	var offset int64
	var order uint
	if _, err := fmt.Sscanf(text, "%x pfn=0x%x ofs=%d order=%d", &ino, &pfn, &offset, &order); err != nil {
		return 0, 0, 0, fmt.Errorf("%q: %w", line, err)
	}
	return ino, offset / int64(os.Getpagesize()), 1 << order, nil
}

// touched returns the pages of each file of the image that insertions name, for files of these sizes.
func (c *coldBox) touched(t *testing.T, inserted map[uint64]pageSet, sizes map[string]int64) map[string]pageSet {
	t.Helper()
	truth := make(map[string]pageSet)
	for p, size := range sizes {
		var st unix.Stat_t
		if err := unix.Lstat(c.lower+p, &st); err != nil {
			t.Fatal(err)
		}
		truth[p] = make(pageSet)
		for page := range inserted[st.Ino] {
			if page >= pagesOf(size) {
				t.Fatalf("%s: page %s entered the cache, of a file of %d bytes", p, strconv.FormatInt(page, 10), size)
			}
			truth[p][page] = true
		}
	}
	return truth
}
