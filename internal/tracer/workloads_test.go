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
// another one with everything cached, as no two runs of these programs touch quite the same.
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
			cold := c.record(t, pivotProc, img.Command()...)
			truth, sizes := make(map[string]pageSet), c.files(t)
			pages, dropped := 0, 0
			for p, size := range sizes {
				truth[p] = c.cached(t, p, size)
				lower, upper := bounds(t, cold, p, size)
				// A page that nothing maps any longer, as a written copy of it is mapped, the kernel may drop.
				for page := range lower {
					if !truth[p][page] {
						dropped++
						truth[p][page] = true
					}
				}
				pages += len(truth[p])
				judge(t, p, lower, truth[p], upper)
			}
			if dropped*50 > pages {
				t.Errorf("%d of %d pages are certain and not cached", dropped, pages)
			}
			t.Logf("%d certain pages are not cached", dropped)
			if pages < 2000 || len(cold.Trace.Accesses) < 20 {
				t.Errorf("%d pages of %d files were touched; that was no start", pages, len(cold.Trace.Accesses))
			}
			c.warm(t)
			warm := c.record(t, pivotProc, img.Command()...)
			for run, r := range map[string]tracer.Result{"cold": cold, "warm": warm} {
				var lower, covered, upper int
				for p, size := range sizes {
					l, u := bounds(t, r, p, size)
					lower, upper = lower+len(l), upper+len(u)
					for page := range truth[p] {
						if u[page] {
							covered++
						}
					}
				}
				t.Logf("%s, grade %s: lower bound %d pages, truth %d, of which %d in the upper bound of %d", run, r.Grade, lower, pages, covered, upper)
				if covered*1000 < pages*990 {
					t.Errorf("%s: %d of %d pages are listed", run, covered, pages)
				}
			}
		})
	}
}
