package trace_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/trace"
)

const page = 4096

func pages(first, n int64, at time.Duration, certain bool) trace.Range {
	return trace.Range{Offset: first * page, Length: n * page, Elapsed: at, Certain: certain}
}

func TestPageSet(t *testing.T) {
	const ms = time.Millisecond
	type add struct {
		first, last uint64
		at          time.Duration
		certain     bool
	}
	tests := map[string]struct {
		adds []add
		size int64
		want []trace.Range
	}{
		"nothing":            {size: 10 * page, want: []trace.Range{}},
		"one page":           {[]add{{3, 3, ms, true}}, 10 * page, []trace.Range{pages(3, 1, ms, true)}},
		"no pages":           {[]add{{3, 2, ms, true}}, 10 * page, []trace.Range{}},
		"order of touch":     {[]add{{7, 7, ms, true}, {1, 1, 30 * ms, true}}, 10 * page, []trace.Range{pages(7, 1, ms, true), pages(1, 1, 30*ms, true)}},
		"sequential":         {[]add{{0, 1, ms, true}, {2, 3, 2 * ms, true}, {4, 5, 3 * ms, true}}, 10 * page, []trace.Range{pages(0, 6, ms, true)}},
		"backwards":          {[]add{{4, 5, ms, true}, {2, 3, 2 * ms, true}, {0, 1, 3 * ms, true}}, 10 * page, []trace.Range{pages(0, 6, ms, true)}},
		"too far in time":    {[]add{{0, 1, ms, true}, {2, 3, 50 * ms, true}}, 10 * page, []trace.Range{pages(0, 2, ms, true), pages(2, 2, 50*ms, true)}},
		"again":              {[]add{{0, 1, ms, true}, {0, 1, 50 * ms, true}, {0, 1, 60 * ms, false}}, 10 * page, []trace.Range{pages(0, 2, ms, true)}},
		"fault in a window":  {[]add{{0, 15, ms, false}, {4, 4, 30 * ms, true}}, 16 * page, []trace.Range{pages(0, 4, ms, false), pages(4, 1, ms, true), pages(5, 11, ms, false)}},
		"window on a fault":  {[]add{{4, 4, ms, true}, {0, 15, 2 * ms, false}}, 16 * page, []trace.Range{pages(4, 1, ms, true), pages(0, 4, 2*ms, false), pages(5, 11, 2*ms, false)}},
		"earlier, reordered": {[]add{{0, 3, 30 * ms, true}, {1, 2, ms, false}}, 16 * page, []trace.Range{pages(1, 2, ms, true), pages(0, 1, 30*ms, true), pages(3, 1, 30*ms, true)}},
		"clipped":            {[]add{{0, 99, ms, true}}, page + 1, []trace.Range{{Offset: 0, Length: page + 1, Elapsed: ms, Certain: true}}},
		"beyond the end":     {[]add{{2, 3, ms, true}}, 2 * page, []trace.Range{}},
		"empty file":         {[]add{{0, 0, ms, true}}, 0, []trace.Range{}},
		"huge":               {[]add{{0, 1<<63 - 1, ms, true}, {1 << 40, 1 << 41, ms, true}}, 2 * page, []trace.Range{pages(0, 2, ms, true)}},
		"negative time":      {[]add{{0, 0, -ms, true}}, page, []trace.Range{pages(0, 1, 0, true)}},
		"bridges":            {[]add{{0, 0, ms, true}, {2, 2, ms, true}, {4, 4, ms, false}, {0, 5, ms, true}}, 8 * page, []trace.Range{pages(0, 6, ms, true)}},
	}
	for name, tt := range tests {
		var s trace.PageSet
		for _, a := range tt.adds {
			s.Add(a.first, a.last, a.at, a.certain)
		}
		if diff := cmp.Diff(tt.want, s.Ranges(tt.size, page)); diff != "" {
			t.Errorf("%s: Ranges (-want +got):\n%s", name, diff)
		}
	}
}

// model is a PageSet page by page.
type model map[uint64]struct {
	at      time.Duration
	certain bool
}

func (m model) add(first, last uint64, at time.Duration, certain bool) {
	for p := first; p <= last; p++ {
		have, ok := m[p]
		if !ok {
			have.at = at
		}
		have.at, have.certain = min(have.at, at), have.certain || certain
		m[p] = have
	}
}

// check compares ranges with the model: the same pages, each once and as certain, and none
// earlier than its range, or later than its range's window.
func (m model) check(t *testing.T, got []trace.Range, size int64) {
	t.Helper()
	seen := make(map[uint64]bool)
	var before time.Duration
	for i, r := range got {
		if r.Offset < 0 || r.Length <= 0 || r.Offset+r.Length > size || r.Offset%page != 0 || r.Elapsed < before {
			t.Fatalf("range %d: %+v after %v in a file of %d bytes", i, r, before, size)
		}
		before = r.Elapsed
		for p := uint64(r.Offset / page); p <= uint64((r.Offset+r.Length-1)/page); p++ {
			have, ok := m[p]
			if !ok || seen[p] || have.certain != r.Certain || have.at < r.Elapsed || have.at/trace.MergeWindow != r.Elapsed/trace.MergeWindow {
				t.Fatalf("page %d: touched %v, seen before %v, %+v; in range %+v", p, ok, seen[p], have, r)
			}
			seen[p] = true
		}
	}
	for p := range m {
		if !seen[p] && int64(p)*page < size {
			t.Fatalf("page %d is missing", p)
		}
	}
}

// FuzzPageSet holds a set against a map of pages: six bytes are one event.
func FuzzPageSet(f *testing.F) {
	f.Add([]byte{0, 16, 0, 1, 0, 3, 1, 1, 1, 0, 9, 9}, uint16(40))
	f.Fuzz(func(t *testing.T, b []byte, tail uint16) {
		var s trace.PageSet
		m := make(model)
		for ; len(b) >= 6; b = b[6:] {
			first, n := uint64(b[0]), uint64(b[1]%32)
			at := time.Duration(b[2])<<8*time.Millisecond/64 + time.Duration(b[3])*time.Millisecond/64
			s.Add(first, first+n, at, b[4]&1 == 1)
			m.add(first, first+n, at, b[4]&1 == 1)
		}
		size := 100*page + int64(tail)
		m.check(t, s.Ranges(size, page), size)
		if first, ok := s.First(); ok {
			for p, have := range m {
				if have.at < first {
					t.Fatalf("First() = %v, page %d at %v", first, p, have.at)
				}
			}
		} else if len(m) > 0 {
			t.Fatal("set is empty")
		}
	})
}

// TestPageSetRandom is the same with many pages and events in the order of time.
func TestPageSetRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		var s trace.PageSet
		m := make(model)
		var at time.Duration
		for range 2000 {
			first, n := r.Uint64N(3000), r.Uint64N(20)
			at += time.Duration(r.IntN(int(time.Millisecond)))
			certain := r.IntN(2) == 0
			s.Add(first, first+n, at, certain)
			m.add(first, first+n, at, certain)
		}
		size := int64(3000)*page - 17
		got := s.Ranges(size, page)
		m.check(t, got, size)
		rest := trace.Rest(got, size, time.Hour)
		all := slices.Concat(got, rest)
		slices.SortFunc(all, func(a, b trace.Range) int { return int(a.Offset - b.Offset) })
		var end int64
		for _, h := range all {
			if h.Offset != end {
				t.Fatalf("ranges and rest: %+v after %d", h, end)
			}
			end += h.Length
		}
		if end != size {
			t.Fatalf("ranges and rest end at %d of %d", end, size)
		}
	}
}

// TestPageSetBound holds that a set stays small, and misses no page, whatever comes in.
func TestPageSetBound(t *testing.T) {
	for name, step := range map[string]uint64{"adjacent": 1, "gaps of one": 2, "gaps of sixteen": 17} {
		var s trace.PageSet
		const n = 10 * trace.MaxPageRanges
		for i := range uint64(n) {
			at := time.Duration(i) * time.Second // nothing joins by itself
			s.Add(i*step, i*step, at, i%3 > 0)
			if s.Len() > trace.MaxPageRanges {
				t.Fatalf("%s: %d ranges after %d events", name, s.Len(), i)
			}
		}
		covered := make([]bool, n*step)
		var certain int
		for _, r := range s.Ranges(1<<40, page) {
			for p := r.Offset / page; p < (r.Offset+r.Length)/page; p++ {
				if covered[p] {
					t.Fatalf("%s: page %d twice", name, p)
				}
				covered[p] = true
				if r.Certain {
					certain++
					if uint64(p)%step != 0 || uint64(p)/step%3 == 0 {
						t.Fatalf("%s: page %d is certain", name, p)
					}
				}
			}
		}
		for i := range uint64(n) {
			if !covered[i*step] {
				t.Fatalf("%s: page %d is missing", name, i*step)
			}
		}
	}
}

func BenchmarkPageSet(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	for b.Loop() {
		var s trace.PageSet
		for i := range 1000 {
			first := r.Uint64N(100_000)
			s.Add(first, first+15, time.Duration(i)*time.Millisecond, false)
		}
	}
}
