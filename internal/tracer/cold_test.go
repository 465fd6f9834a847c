package tracer_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// TestColdReads reads all of files that are not cached, which are read ahead meanwhile, a lot of them at a time: of a read that has to wait in its midst
// the kernel tells only what follows.
func TestColdReads(t *testing.T) {
	const size = 48<<20 + 4097
	ways := []struct {
		op   string
		each int
	}{{"pread", 1 << 20}, {"pread", 300_000}, {"pread", size}, {"preadv", 2 << 20}, {"sendfile", 1 << 20}}
	script := "for i in "
	for i := range ways {
		script += strconv.Itoa(i) + " "
	}
	b := newDiskBox(t, script+"; do head -c "+strconv.Itoa(size)+" /dev/urandom > s/$i; done")
	args := []string{"/program", "ranges"}
	for i, w := range ways {
		drop(t, filepath.Join(b.lower, "s", strconv.Itoa(i)))
		for off := 0; off < size; off += w.each {
			args = append(args, fmt.Sprintf("%s:/s/%d:%d:%d", w.op, i, off, min(w.each, size-off)))
		}
	}
	r := b.record(t, pivot, args...)
	for i, w := range ways {
		lower, upper := bounds(t, r, "/s/"+strconv.Itoa(i), size)
		missing := pagesOf(size) - int64(len(upper))
		if missing > 0 || int64(len(lower)) < pagesOf(size)/2 {
			t.Errorf("%s of %d bytes: of %d pages %d are missing, %d are certain", w.op, w.each, pagesOf(size), missing, len(lower))
		}
		t.Logf("%s of %d bytes: %d pages, %d of them passed over", w.op, w.each, len(upper), len(upper)-len(lower))
	}
}

// drop takes a file out of the page cache.
func drop(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // read only
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	var cached unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &cached, 0); err == nil && cached.Cache > 0 {
		t.Fatalf("%d pages of %s are still cached", cached.Cache, name)
	}
}
