package tracefs

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func TestGaps(t *testing.T) {
	const none = "none"
	type step struct {
		kind        Kind
		first, last uint64
		want        string
	}
	for name, steps := range map[string][]step{
		"the first page of two": {{Insert, 0, 0, none}, {Insert, 1, 1, none}, {Read, 1, 1, "0-0"}, {Read, 1, 1, none}},
		"nothing":               {{Insert, 0, 3, none}, {Read, 0, 3, none}, {Read, 2, 3, none}, {Read, 9, 9, none}},
		"in the midst":          {{Insert, 0, 31, none}, {Read, 0, 7, none}, {Read, 12, 15, "8-11"}, {Read, 16, 23, none}, {Read, 31, 40, "24-30"}},
		"asked for behind":      {{Insert, 0, 31, none}, {Read, 0, 255, none}, {Insert, 32, 63, none}, {Read, 40, 255, "32-39"}},
		"runs that meet":        {{Insert, 4, 5, none}, {Insert, 0, 1, none}, {Read, 5, 5, "4-4"}, {Insert, 2, 4, none}, {Read, 3, 3, "0-2"}, {Read, 4, 9, none}},
		"others between":        {{Insert, 0, 1, none}, {Fault, 1, 1, none}, {Around, 0, 15, none}, {Read, 1, 1, "0-0"}},
		"cached before":         {{Insert, 8, 15, none}, {Read, 4, 11, none}, {Read, 14, 20, "12-13"}},
		"more than one":         {{Insert, 0, 1, none}, {Insert, 4, 5, none}, {Insert, 8, 9, none}, {Read, 1, 8, "0-0"}, {Read, 9, 9, none}},
		"the last page":         {{Insert, math.MaxUint64 - 1, math.MaxUint64, none}, {Insert, 0, 1, none}, {Read, math.MaxUint64, math.MaxUint64, fmt.Sprint(uint64(math.MaxUint64-1), "-", uint64(math.MaxUint64-1))}},
	} {
		var g Gaps
		for i, s := range steps {
			span, ok := g.Note(&Event{Kind: s.kind, Device: 7, Inode: 5, First: s.first, Last: s.last})
			g.Note(&Event{Kind: s.kind, Device: 7, Inode: 6, First: 3}) // others are others
			g.Note(&Event{Kind: s.kind, Device: 8, Inode: 5, First: 3})
			got := none
			if ok {
				got = fmt.Sprintf("%d-%d", span.First, span.Last)
			}
			if got != s.want {
				t.Errorf("%s: step %d, %s of %d to %d: gap %s, want %s", name, i, s.kind, s.first, s.last, got, s.want)
			}
		}
	}
}

// TestGapsRandom holds against a model that has a mark for each page: what came and was neither read nor before something that was.
func TestGapsRandom(t *testing.T) {
	const pages = 64
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var g Gaps
		var model [pages]bool
		for range 100 {
			first := r.Uint64N(pages)
			last := min(first+r.Uint64N(9), pages-1)
			if r.IntN(2) == 0 {
				g.Note(&Event{Kind: Insert, First: first, Last: last})
				for p := first; p <= last; p++ {
					model[p] = true
				}
				continue
			}
			want, has := Span{First: first}, false
			if model[first] {
				for want.First > 0 && model[want.First-1] {
					want.First--
				}
				want.Last, has = first-1, want.First < first
			}
			for p := want.First; p <= last; p++ {
				model[p] = false
			}
			got, ok := g.Note(&Event{Kind: Read, First: first, Last: last})
			if ok != has || ok && got != want {
				t.Fatalf("before %d to %d: %v, %t, want %v, %t", first, last, got, ok, want, has)
			}
		}
		var left [pages]bool
		n := 0
		for _, runs := range g.files {
			n += len(runs)
			for _, r := range runs {
				for p := r.first; p <= r.last; p++ {
					if left[p] {
						t.Fatalf("page %d is in two runs: %v", p, runs)
					}
					left[p] = true
				}
			}
		}
		if left != model || n != g.runs || (n == 0) != (len(g.files) == 0) {
			t.Fatalf("%d runs of %d files, %d counted: pages %t, want %t", n, len(g.files), g.runs, left, model)
		}
	}
}

// TestGapsWaits holds that a read which did not wait, nor brought what it begins with into the cache, has no gap before it, and that
// what it leaves out is found where a later one waits.
func TestGapsWaits(t *testing.T) {
	const a, b = 11, 12 // threads
	type step struct {
		kind        Kind
		pid         int32
		first, last uint64
		want        string
	}
	for name, steps := range map[string][]step{
		"brought by itself":   {{Insert, a, 0, 0, ""}, {Insert, a, 1, 1, ""}, {Read, a, 1, 1, "0-0"}},
		"found":               {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Read, a, 20, 21, ""}, {Read, a, 10, 11, ""}},
		"waited for":          {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Wait, a, 0, 0, ""}, {Read, a, 20, 31, "2-19"}},
		"waited for later":    {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Read, a, 20, 21, ""}, {Wait, a, 0, 0, ""}, {Read, a, 30, 40, "2-29"}},
		"waited before":       {{Insert, a, 0, 31, ""}, {Wait, a, 0, 0, ""}, {Read, a, 0, 1, ""}, {Read, a, 20, 21, ""}},
		"others wait":         {{Insert, a, 0, 31, ""}, {Read, b, 0, 1, ""}, {Read, a, 0, 1, ""}, {Wait, b, 0, 0, ""}, {Read, a, 20, 21, ""}, {Read, b, 25, 26, "2-24"}},
		"over two windows":    {{Insert, a, 0, 31, ""}, {Read, a, 0, 7, ""}, {Insert, a, 32, 63, ""}, {Read, a, 8, 15, ""}, {Wait, a, 0, 0, ""}, {Read, a, 40, 50, "16-39"}},
		"asked for meanwhile": {{Insert, a, 0, 31, ""}, {Read, a, 0, 7, ""}, {Insert, a, 32, 63, ""}, {Read, a, 12, 15, ""}},
		"a thread not known":  {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Read, b, 9, 9, "2-8"}},
	} {
		g := Gaps{Waits: true}
		for i, s := range steps {
			got := ""
			if span, ok := g.Note(&Event{Kind: s.kind, PID: s.pid, First: s.first, Last: s.last}); ok {
				got = fmt.Sprintf("%d-%d", span.First, span.Last)
			}
			if got != s.want {
				t.Errorf("%s: step %d, %s of %d to %d: gap %q, want %q", name, i, s.kind, s.first, s.last, got, s.want)
			}
		}
	}
	g := Gaps{Waits: true}
	for pid := range int32(2*gapThreads + 1) {
		g.Note(&Event{Kind: Wait, PID: pid})
	}
	if len(g.threads) > gapThreads {
		t.Errorf("%d threads are known, want %d at most", len(g.threads), gapThreads)
	}
}

// TestGapsForget holds that neither many files nor many places of one take memory without bound, and that what came last is known.
func TestGapsForget(t *testing.T) {
	const events, recent = 4 * gapRuns, gapAge - 1
	for name, at := range map[string]func(i uint64) Event{
		"files":  func(i uint64) Event { return Event{Inode: i, First: 10} },
		"places": func(i uint64) Event { return Event{First: 10 + 4*i} },
		"down":   func(i uint64) Event { return Event{First: 10 + 4*(events-i)} },
		"grow":   func(i uint64) Event { return Event{Inode: i % (gapRuns + 9), First: 10 + i/(gapRuns+9)} },
	} {
		var g Gaps
		for i := range uint64(events) {
			e := at(i)
			e.Kind, e.Last = Insert, e.First+1
			g.Note(&e)
			if g.runs > gapRuns || len(g.files) > g.runs {
				t.Fatalf("%s: %d runs of %d files after %d events, want %d at most", name, g.runs, len(g.files), i+1, gapRuns)
			}
		}
		for i := uint64(events - recent); i < events; i++ {
			e := at(i)
			e.Kind, e.First = Read, e.First+1
			e.Last = e.First
			if got, ok := g.Note(&e); !ok || got.Last != e.First-1 {
				t.Fatalf("%s: before read %d of %d: %v, %t, want page %d at least", name, i, events, got, ok, e.First-1)
			}
		}
	}
}
