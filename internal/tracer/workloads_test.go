package tracer_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/tracer"
	images "github.com/headstart-oci/headstart/internal/workload"
)

// TestRangesOfWorkloads holds the ranges of real starts, of programs that load and map large files in ways of their
// own, against what the kernel had to read into a cold cache: page by page for the same run, and in sum for
// others with everything cached, as no two runs of these programs touch quite the same.
func TestRangesOfWorkloads(t *testing.T) {
	if testing.Short() {
		t.Skip("large images")
	}
	for _, name := range []images.Name{images.Node, images.JDK} {
		t.Run(string(name), func(t *testing.T) {
			img, err := images.Build(t.Context(), name, images.Options{Log: os.Stderr})
			if errors.Is(err, images.ErrUnavailable) && os.Getenv("REQUIRE_TOOLS") != "1" {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			var setup strings.Builder
			for _, l := range img.Manifest.Layers {
				setup.WriteString("tar -xzf " + filepath.Join(img.Dir, "blobs", l.Digest.Algorithm().String(), l.Digest.Encoded()) + "; ")
			}
			c := newColdBox(t, setup.String()+"mknod -m 666 dev/urandom c 1 9; mknod -m 666 dev/random c 1 8")
			watch := c.watchInsertions(t)
			cold := c.record(t, pivotProc, img.Command()...)
			inserted, sizes := watch.stop(t), c.files(t)
			truth := c.touched(t, inserted, sizes)
			pages := 0
			for p, size := range sizes {
				lower, upper := bounds(t, cold, p, size)
				pages += len(truth[p])
				judge(t, p, lower, truth[p], upper)
			}
			if pages < 2000 || len(cold.Trace.Accesses) < 20 {
				t.Errorf("%d pages of %d files were touched; that was no start", pages, len(cold.Trace.Accesses))
			}
			c.warm(t)
			const attempts = 3
			for n := 1; ; n++ {
				warm := c.record(t, pivotProc, img.Command()...)
				covered := covers(t, warm, truth, sizes)
				t.Logf("warm, grade %s: %d of %d pages are in the upper bound", warm.Grade, covered, pages)
				if covered*1000 >= pages*990 {
					break
				}
				if n == attempts {
					t.Fatalf("%d of %d pages are listed, want 99 %% in one of %d runs", covered, pages, n)
				}
			}
		})
	}
}

// covers counts the touched pages that are in the upper bound of a trace.
func covers(t *testing.T, r tracer.Result, touched map[string]pageSet, sizes map[string]int64) int {
	t.Helper()
	covered := 0
	for p, size := range sizes {
		_, upper := bounds(t, r, p, size)
		for page := range touched[p] {
			if upper[page] {
				covered++
			}
		}
	}
	return covered
}
