package index_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
)

// BenchmarkLookup looks single chunks up, each in a call of its own, in an index of HEADSTART_BENCH_CHUNKS chunks, 100,000 by default: half of
// them are there. It reports the median and the 99th percentile, and the resident memory of the process: its own, and that of the files it maps, which
// is page cache that the kernel takes back when it wants it. `go run ./internal/bench -rows cas` runs it with 5,000,000.
func BenchmarkLookup(b *testing.B) {
	chunks := 100_000
	if s := os.Getenv("HEADSTART_BENCH_CHUNKS"); s != "" {
		var err error
		if chunks, err = strconv.Atoi(s); err != nil || chunks < 1 {
			b.Fatalf("HEADSTART_BENCH_CHUNKS=%s: want a number above 0", s)
		}
	}
	x, err := index.Open(filepath.Join(b.TempDir(), "index"), index.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := x.Close(); err != nil {
			b.Error(err)
		}
	}()
	// In the order of their keys: in a random one, as caches are filled, the same takes several times as long.
	list := entries(0, chunks)
	slices.SortFunc(list, func(x, y index.Entry) int {
		if x.Digester != y.Digester {
			return int(x.Digester) - int(y.Digester)
		}
		if x.Size != y.Size {
			return int(x.Size) - int(y.Size)
		}
		return bytes.Compare(x.Digest[:], y.Digest[:])
	})
	for i := range list {
		list[i].Offset = int64(i) * 4096
	}
	began := time.Now()
	if err := x.Add("cache", list, 1); err != nil {
		b.Fatal(err)
	}
	b.Logf("%d chunks added in %v, %d bytes on disk", chunks, time.Since(began).Round(time.Millisecond), x.Size())
	took := make([]time.Duration, 0, 1<<20)
	n, found := 0, 0
	for b.Loop() {
		n++
		keys := []index.Key{key((n*7919 + n/chunks) % (2 * chunks))}
		t := time.Now()
		err := x.Lookup(keys, func(int, []index.Place) bool { found++; return true })
		if d := time.Since(t); len(took) < cap(took) {
			took = append(took, d)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	if n > 1000 && (found < n/3 || found > 2*n/3) {
		b.Error(errors.New("half of the chunks should be there"), found, n)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "median-ns")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
	anon, file := resident(b)
	b.ReportMetric(float64(anon>>20), "anon-MiB")
	b.ReportMetric(float64(file>>20), "file-MiB")
}

// resident returns the resident memory of this process in bytes. Source: RssAnon and RssFile in proc_pid_status(5), kB.
func resident(b *testing.B) (anon, file int64) {
	b.Helper()
	runtime.GC()
	debug.FreeOSMemory()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "RssAnon: %d kB", &kb); n == 1 {
			anon = kb << 10
		} else if n, _ := fmt.Sscanf(line, "RssFile: %d kB", &kb); n == 1 {
			file = kb << 10
		}
	}
	if anon == 0 || file == 0 {
		b.Fatalf("no resident memory in %s", text)
	}
	return anon, file
}
