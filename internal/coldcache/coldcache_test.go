package coldcache_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/coldcache"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestRefine reads two pages of a file that is not cached, on the filesystem of the temporary directory.
func TestRefine(t *testing.T) {
	page := int64(os.Getpagesize())
	root := t.TempDir()
	name := filepath.Join(root, "f")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := 20*page - 5
	if _, err := f.Write(bytes.Repeat([]byte("x"), int(size))); err != nil {
		t.Fatal(err)
	}
	err = errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM))
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &st, 0); err != nil {
		testenv.Kernel(t, "cachestat(2) (Linux 6.5)", err)
	}
	var on unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &on); err != nil {
		t.Fatal(err)
	}
	if on.Type == unix.TMPFS_MAGIC {
		t.Skip("the temporary directory is on tmpfs, whose pages are the file")
	}
	if st.Cache != 0 {
		t.Fatalf("%d pages are cached of a file that was synced and not read", st.Cache)
	}
	for _, p := range []int64{3, 4, 19} {
		if _, err := f.ReadAt(make([]byte, 1), p*page); err != nil {
			t.Fatal(err)
		}
	}
	sure := trace.Range{Offset: 10 * page, Length: page, Elapsed: 5, Certain: true} // nobody asks whether that is cached
	accesses := []trace.Access{
		{Path: "/f", How: trace.Opened | trace.Read, Size: size, Ranges: []trace.Range{
			{Offset: 0, Length: 8 * page, Elapsed: 7}, sure, {Offset: 11 * page, Length: 2 * page, Elapsed: 8}, {Offset: 16 * page, Length: size - 16*page, Elapsed: 9},
		}},
		{Path: "/gone", How: trace.Opened, Ranges: []trace.Range{}},
		{Path: "/f", How: trace.Runtime | trace.Opened | trace.Read, Size: size},
	}
	exact, err := coldcache.Refine(root, accesses)
	want := []trace.Range{
		{Offset: 3 * page, Length: 2 * page, Elapsed: 7, Certain: true}, sure, {Offset: 19 * page, Length: page - 5, Elapsed: 9, Certain: true},
	}
	if err != nil || !exact || !cmp.Equal(accesses[0].Ranges, want) {
		t.Errorf("Refine() = %t, %v and the ranges differ by\n%s", exact, err, cmp.Diff(want, accesses[0].Ranges))
	}
	whole := []trace.Access{{Path: "/f", How: trace.Opened | trace.Read, Size: size}}
	if exact, err := coldcache.Refine(root, whole); err != nil || exact || whole[0].Ranges != nil {
		t.Errorf("Refine() of a whole file = %t, %v, %+v; want it as it was, and not exact", exact, err, whole)
	}
}

// TestRefineErrors asks for files that are not there.
func TestRefineErrors(t *testing.T) {
	root := t.TempDir()
	accesses := []trace.Access{{Path: "/none", Ranges: []trace.Range{{Length: 5}}}}
	if exact, err := coldcache.Refine(root, accesses); !errors.Is(err, os.ErrNotExist) || exact || len(accesses[0].Ranges) != 1 {
		t.Errorf("Refine() = %t, %v, %+v; want no such file, and the access as it was", exact, err, accesses)
	}
	if exact, err := coldcache.Refine(filepath.Join(root, "none"), nil); !errors.Is(err, os.ErrNotExist) || exact {
		t.Errorf("Refine() without a root = %t, %v; want no such file", exact, err)
	}
}
