package persist_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Ranges of one run may overlap: each byte has the first touch of those that hold it, and is certain when
// one of them is. Compared with a look at every byte.
func TestProfileOverlap(t *testing.T) {
	t.Parallel()
	const size = 64
	r := rand.New(rand.NewPCG(3, 3))
	for range 200 {
		var runs []*persist.List
		for i := range 1 + r.IntN(4) {
			a := trace.Access{Path: "/f", Elapsed: 1, Size: size, Ranges: []trace.Range{}}
			for range r.IntN(12) {
				at := r.Int64N(size)
				a.Ranges = append(a.Ranges, rng(at, 1+r.Int64N(size-at), time.Duration(r.IntN(9)), r.IntN(2) == 0))
			}
			runs = append(runs, runAt(i, a))
		}
		p := profileOf(t, runs...)
		for policy, need := range map[persist.Policy]int{persist.Union: 1, 0.5: (len(p.Runs) + 1) / 2, persist.Intersection: len(p.Runs)} {
			var want, got [size]trace.Range
			for at := range int64(size) {
				var times []time.Duration
				sure := 0
				for _, run := range p.Runs {
					first, holds, certain := time.Duration(math.MaxInt64), false, false
					for _, x := range run.List.Accesses[0].Ranges {
						if x.Offset <= at && at < x.Offset+x.Length {
							first, holds, certain = min(first, x.Elapsed), true, certain || x.Certain
						}
					}
					if !holds {
						continue
					}
					if first == 0 {
						first = 1 // the file's
					}
					times = append(times, first)
					if certain {
						sure++
					}
				}
				if len(times) >= need {
					slices.Sort(times)
					want[at] = rng(at, 1, times[(len(times)-1)/2], sure >= need)
				}
			}
			for _, f := range p.Files(policy) {
				for _, x := range f.Ranges {
					for at := x.Offset; at < x.Offset+x.Length; at++ {
						if got[at].Length != 0 {
							t.Fatalf("byte %d is in two ranges of %v", at, f.Ranges)
						}
						got[at] = rng(at, 1, x.Elapsed, x.Certain)
					}
				}
			}
			if got != want {
				t.Fatalf("policy %v of %v: got %v, want %v", policy, runs, got, want)
			}
		}
	}
}

// A hundred thousand ranges that all overlap are no more work than as many that do not: a sweep over them that
// looks at each open one takes minutes.
func TestProfileOverlapMuch(t *testing.T) {
	t.Parallel()
	const n = 1 << 17
	a := trace.Access{Path: "/f", Elapsed: 1, Size: 1 << 30}
	for i := range int64(n) {
		a.Ranges = append(a.Ranges, rng(i, 2*n-2*i, time.Duration(1+i), i%3 == 0))
	}
	got := profileOf(t, runAt(1, a)).Files(persist.Union)
	// The range that was touched first holds all the others; it is certain, and so is every byte.
	if len(got) != 1 || !slices.Equal(got[0].Ranges, []trace.Range{rng(0, 2*n, 1, true)}) {
		t.Errorf("%d files, ranges %.200v", len(got), got[0].Ranges)
	}
}
