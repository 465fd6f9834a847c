package tracer_test

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMappedElsewhere holds that no touch is silent because the kernel has the page ready: all files are cached, and
// mapped with every page present by another process, as where many containers run of one image. Each process
// has page tables of its own, so that it faults on its own.
func TestMappedElsewhere(t *testing.T) {
	const size = 3<<20 + 123 // large folios, where the filesystem has them
	setup := "cp " + workload(t) + " program; " + knownFiles(size)
	boxes := map[string]func(t *testing.T) *box{
		"disk":  func(t *testing.T) *box { return newDiskBox(t, knownFiles(size)) },
		"EROFS": func(t *testing.T) *box { return &newColdBox(t, setup).box },
	}
	for name, newBox := range boxes {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			for _, way := range append([]string{"none"}, knownWays...) {
				present(t, b.lower+"/k/"+way)
			}
			args, truth := knownCalls(size)
			r := b.record(t, pivot, append([]string{"/program", "ranges", "pread:/k/none:0:0"}, args...)...)
			if !r.Trace.Complete() {
				t.Errorf("losses %+v", r.Trace.Losses)
			}
			if a, ok := find(r, "/k/none"); !ok || a.Ranges == nil || len(a.Ranges) > 0 {
				t.Errorf("a file of which nothing was read: %+v, listed %v; want empty ranges", a, ok)
			}
			for _, way := range knownWays {
				lower, upper := bounds(t, r, "/k/"+way, size)
				for p := range lower {
					if !truth[way][p] {
						t.Errorf("%s: page %d is certain and was not touched", way, p)
					}
				}
				for p := range truth[way] {
					if !upper[p] {
						t.Errorf("%s: page %d was touched and is missing", way, p)
					}
				}
				t.Logf("%s: lower bound %d pages, truth %d, upper bound %d", way, len(lower), len(truth[way]), len(upper))
			}
		})
	}
}

// present maps a file, until the test ends, with all its pages.
func present(t *testing.T, file string) {
	t.Helper()
	fd := fdOf(t, file)
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(fd, 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	vec := make([]byte, pagesOf(st.Size()))
	if err := mincore(b, vec); err != nil {
		t.Fatal(err)
	}
	for i, v := range vec {
		if v&1 == 0 {
			t.Fatalf("%s: page %d is not cached", file, i)
		}
	}
	t.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			t.Error(err)
		}
	})
}
