package index_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
)

// mappedPages returns how much of the mapping of a file is in this process' page tables, in bytes: Rss in proc_pid_smaps(5), kB.
func mappedPages(t *testing.T, path string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	found, sum, of := false, int64(0), false
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "-") && strings.Contains(strings.Fields(line)[0], "-") {
			of = strings.HasSuffix(strings.TrimSpace(line), path)
			found = found || of
		}
		var kb int64
		if n, _ := fmt.Sscanf(line, "Rss: %d kB", &kb); n == 1 && of {
			sum += kb << 10
		}
	}
	if !found {
		t.Fatalf("%s is not mapped", path)
	}
	return sum
}

// However many chunks the index has, little of its file counts as memory of the process.
func TestRelieve(t *testing.T) {
	t.Parallel()
	chunks := 400_000
	if testing.Short() {
		chunks = 150_000
	}
	path := filepath.Join(t.TempDir(), "index")
	x := open(t, path)
	const caches = 10
	for i := range caches {
		if err := x.Add(fmt.Sprint("cache", i), entries(i*chunks/caches, (i+1)*chunks/caches), 1); err != nil {
			t.Fatal(err)
		}
	}
	if x.Size() < 16<<20 {
		t.Fatalf("%d chunks take %d bytes; want enough for a bound to be seen", chunks, x.Size())
	}
	most, found := int64(0), 0
	for n := range 2000 {
		if err := x.Lookup([]index.Key{key(n * 7919 % chunks)}, func(int, []index.Place) bool { found++; return true }); err != nil {
			t.Fatal(err)
		}
		if n%32 == 31 { // of any 32 calls, one relieves
			most = max(most, mappedPages(t, path))
		}
	}
	if found != 2000 {
		t.Errorf("%d of 2000 chunks were found", found)
	}
	// A look-up reads a page of each of some four levels, and the kernel maps 64 KiB around each.
	if limit := int64(32 * 4 * (64 << 10)); most > limit || most >= x.Size() {
		t.Errorf("%d bytes of a file of %d are mapped, want at most %d", most, x.Size(), limit)
	}
	t.Logf("%d chunks, %d bytes; at most %d bytes mapped", chunks, x.Size(), most)
}
