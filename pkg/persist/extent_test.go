package persist_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Bytes counted by the functions are those that counting one by one finds.
func TestBytesAgainstCounting(t *testing.T) {
	t.Parallel()
	const size = 60
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 4))
		random := func() []trace.Range {
			if r.IntN(8) == 0 {
				return nil
			}
			out := []trace.Range{}
			for range r.IntN(6) {
				out = append(out, rng(r.Int64N(40), 1+r.Int64N(20), 0, r.IntN(2) == 0))
			}
			return out
		}
		count := func(keep func(at int64) bool) (n int64) {
			for at := range int64(size) {
				if keep(at) {
					n++
				}
			}
			return n
		}
		in := func(ranges []trace.Range, at int64, sure bool) bool {
			for _, x := range ranges {
				if at >= x.Offset && at < x.Offset+x.Length && (x.Certain || !sure) {
					return true
				}
			}
			return ranges == nil && !sure
		}
		a, b := random(), random()
		x := trace.Access{Path: "/x", Size: size, Ranges: a}
		if got, want := persist.Upper(&x), count(func(at int64) bool { return in(a, at, false) }); got != want {
			t.Fatalf("Upper(%v) = %d, want %d", a, got, want)
		}
		if got, want := persist.Lower(&x), count(func(at int64) bool { return in(a, at, true) }); got != want {
			t.Fatalf("Lower(%v) = %d, want %d", a, got, want)
		}
		spans := persist.Disjoint(a)
		for i := 1; i < len(spans); i++ {
			if spans[i-1].Offset+spans[i-1].Length >= spans[i].Offset {
				t.Fatalf("Disjoint(%v) = %v", a, spans)
			}
		}
		if got, want := count(func(at int64) bool { return in(spans, at, false) }), count(func(at int64) bool { return in(a, at, false) }); got != want || (spans == nil) != (a == nil) {
			t.Fatalf("Disjoint(%v) = %v: %d bytes, want %d", a, spans, got, want)
		}
		missing := persist.Missing(a, b, size)
		for at := range int64(size) {
			want := in(a, at, false) && !in(b, at, false)
			if got := missing != nil && in(missing, at, false); got != want {
				t.Fatalf("Missing(%v, %v) = %v: byte %d is in it: %v, want %v", a, b, missing, at, got, want)
			}
		}
	}
}

func TestDisjointOfNonsense(t *testing.T) {
	t.Parallel()
	got := persist.Disjoint([]trace.Range{{Offset: -5, Length: 10}, {Offset: 3}, {Offset: 4, Length: -1}, {Offset: 7, Length: math.MaxInt64}, {Offset: math.MaxInt64, Length: 1}})
	if len(got) != 1 || got[0].Offset != 7 || got[0].Length != math.MaxInt64-7 {
		t.Errorf("Disjoint = %v, want the bytes from 7 on", got)
	}
	if got := persist.Disjoint([]trace.Range{}); got == nil || len(got) != 0 {
		t.Errorf("Disjoint of no range = %#v, want no range and not nil", got)
	}
}
