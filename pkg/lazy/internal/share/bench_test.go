package share_test

import (
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// BenchmarkCollect collects caches that nobody uses, with all that is said of them in the index: what a look costs that removes nothing, and what
// it costs to remove one, which is durable when it is done.
func BenchmarkCollect(b *testing.B) {
	const caches = 100
	of := make([]int, 100)
	for i := range of {
		of[i] = i
	}
	var look, remove time.Duration
	n := 0
	for b.Loop() {
		r := &rig{t: b, dir: b.TempDir()}
		r.open()
		for i := range caches {
			r.fill(i+1, share.ScopePublic, of...)
		}
		must(b, r.share.Close())
		began := time.Now()
		c, err := r.store.Collect(b.Context(), store.Policy{Limit: 1 << 40}, store.Live{})
		must(b, err)
		look += time.Since(began)
		if len(c.Removed) != 0 {
			b.Fatalf("%+v, want nothing removed", c)
		}
		began = time.Now()
		c, err = r.store.Collect(b.Context(), store.Policy{Limit: 1}, store.Live{})
		must(b, err)
		remove += time.Since(began)
		if len(c.Removed) != caches {
			b.Fatalf("%+v, want all removed", c)
		}
		n += caches
		r.close()
	}
	b.ReportMetric(float64(look.Microseconds())/float64(n), "look-µs")
	b.ReportMetric(float64(remove.Microseconds())/float64(n), "remove-µs")
}
