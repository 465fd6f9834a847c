package tracefs

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func TestGaps(t *testing.T) {
	const a, b = 11, 12 // threads
	const max = math.MaxUint64
	type step struct {
		kind        Kind
		pid         int32
		first, last uint64
		want        string
	}
	for name, steps := range map[string][]step{
		"brought by itself":      {{Insert, a, 0, 0, ""}, {Insert, a, 1, 1, ""}, {Wait, a, 0, 0, ""}, {Read, a, 1, 1, "0-0"}, {Read, a, 1, 1, ""}},
		"nothing":                {{Insert, a, 0, 3, ""}, {Wait, a, 0, 0, ""}, {Read, a, 0, 3, ""}, {Read, a, 9, 9, ""}},
		"over what was cached":   {{Insert, a, 0, 1, ""}, {Insert, a, 3, 5, ""}, {Wait, a, 0, 0, ""}, {Read, a, 4, 5, "0-3"}},
		"over what was read":     {{Read, a, 2, 2, ""}, {Insert, a, 0, 1, ""}, {Insert, a, 3, 5, ""}, {Wait, a, 0, 0, ""}, {Wait, a, 0, 0, ""}, {Read, a, 4, 5, "0-3"}},
		"found":                  {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Read, a, 20, 21, ""}, {Read, a, 10, 11, ""}},
		"asked for before":       {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Wait, a, 0, 0, ""}, {Read, a, 20, 31, "2-19"}},
		"waited before":          {{Insert, a, 0, 31, ""}, {Wait, a, 0, 0, ""}, {Read, a, 0, 1, ""}, {Read, a, 20, 21, ""}},
		"others wait":            {{Insert, a, 0, 31, ""}, {Read, a, 0, 1, ""}, {Wait, b, 0, 0, ""}, {Read, a, 20, 21, ""}, {Read, b, 25, 26, "0-24"}},
		"two windows":            {{Insert, a, 0, 31, ""}, {Read, a, 0, 7, ""}, {Insert, a, 32, 63, ""}, {Read, a, 8, 15, ""}, {Wait, a, 0, 0, ""}, {Read, a, 40, 50, "16-39"}},
		"asked for meanwhile":    {{Insert, a, 0, 31, ""}, {Read, a, 0, 7, ""}, {Insert, a, 32, 63, ""}, {Read, a, 12, 15, ""}},
		"into what it asked for": {{Insert, a, 0, 31, ""}, {Read, a, 0, 7, ""}, {Wait, a, 0, 0, ""}, {Insert, a, 32, 63, ""}, {Wait, a, 0, 0, ""}, {Read, a, 40, 47, "8-39"}},
		"one read":               {{Insert, b, 0, 63, ""}, {Read, a, 20, 40, ""}, {Wait, a, 0, 0, ""}, {Read, a, 31, 40, ""}},
		"in a row":               {{Insert, a, 8, 15, ""}, {Read, a, 4, 11, ""}, {Wait, a, 0, 0, ""}, {Read, a, 12, 19, ""}},
		"back":                   {{Insert, b, 0, 63, ""}, {Read, a, 40, 47, ""}, {Wait, a, 0, 0, ""}, {Read, a, 30, 37, "0-29"}},
		"far":                    {{Insert, b, 0, 1 << 20, ""}, {Read, b, 0, 7, ""}, {Wait, a, 0, 0, ""}, {Read, a, 1 << 20, 1 << 20, "1047552-1048575"}},
		"a fault's":              {{Fault, a, 5, 5, ""}, {Insert, a, 0, 15, ""}, {Around, a, 0, 15, ""}, {Read, a, 9, 9, ""}},
		"waits for others":       {{Insert, a, 100, 101, ""}, {Wait, a, 0, 0, ""}, {Read, a, 100, 101, ""}, {Wait, a, 0, 0, ""}, {Insert, a, 500, 501, ""}, {Wait, a, 0, 0, ""}, {Read, a, 500, 501, ""}},
		"a fault that is over":   {{Fault, a, 3, 3, ""}, {Insert, a, 0, 7, ""}, {Read, a, 1, 1, ""}, {Wait, a, 0, 0, ""}, {Insert, a, 500, 501, ""}, {Read, a, 501, 501, "500-500"}},
		"asked for in advance":   {{Insert, a, 0, 1 << 20, ""}, {Read, a, 1 << 19, 1 << 19, ""}, {Insert, a, 1 << 21, 1 << 22, ""}, {Wait, a, 0, 0, ""}, {Read, a, 3 << 20, 3 << 20, fmt.Sprint(3<<20-gapMost, "-", 3<<20-1)}},
		"the last page":          {{Insert, a, max - 1, max, ""}, {Insert, a, 0, 1, ""}, {Wait, a, 0, 0, ""}, {Read, a, max, max, fmt.Sprint(uint64(max-1), "-", uint64(max-1))}},
	} {
		g := Gaps{Waits: true}
		for i, s := range steps {
			span, ok := g.Note(&Event{Kind: s.kind, PID: s.pid, Device: 7, Inode: 5, First: s.first, Last: s.last, Time: int64(i) * 3 * gapTime})
			g.Note(&Event{Kind: Insert, PID: 9, Device: 7, Inode: 6, First: s.first, Last: s.last}) // others are others
			g.Note(&Event{Kind: Insert, PID: 9, Device: 8, Inode: 5, First: s.first, Last: s.last})
			got := ""
			if ok {
				got = fmt.Sprintf("%d-%d", span.First, span.Last)
			}
			if got != s.want {
				t.Errorf("%s: step %d, %s of %d to %d: gap %q, want %q", name, i, s.kind, s.first, s.last, got, s.want)
			}
		}
	}
	for name, c := range map[string]struct { // who does not sleep
		before []Event
		time   int64
		gap    bool
	}{
		"read ahead":              {[]Event{{Kind: Insert, First: 2, Last: 31}}, 2 * gapTime, true},
		"long ago":                {[]Event{{Kind: Insert, First: 2, Last: 31}}, 2*gapTime + 1, false},
		"and read":                {[]Event{{Kind: Insert, First: 2, Last: 31}, {Kind: Read, PID: b, First: 2, Last: 31}}, 1, false},
		"for itself":              {[]Event{{Kind: Insert, PID: a, First: 20, Last: 31}}, 1, false},
		"in between":              {[]Event{{Kind: Insert, PID: b, First: 2, Last: 19}, {Kind: Insert, PID: a, First: 20, Last: 31}}, 1, true},
		"from another file":       {[]Event{{Kind: Insert, PID: a, First: 20, Last: 31}, {Kind: Insert, PID: a, Inode: 1, Last: 9}, {Kind: Read, PID: a, Inode: 1, Last: 9}}, 1, false},
		"after somebody else":     {[]Event{{Kind: Insert, First: 2, Last: 31}, {Kind: Read, PID: b, Last: 1}}, 1, true},
		"beside somebody else":    {[]Event{{Kind: Insert, First: 2, Last: 31}, {Kind: Read, PID: b, First: 40, Last: 41}}, 1, true},
		"where nothing came":      {[]Event{{Kind: Insert, First: 20, Last: 31}, {Kind: Insert, First: 60, Last: 61}}, 1, true},
		"for a fault":             {[]Event{{Kind: Fault, PID: b, First: 20}, {Kind: Insert, PID: b, First: 2, Last: 31}}, 1, false},
		"a generation ago":        {[]Event{{Kind: Insert, First: 2, Last: 31}, {Kind: Insert, First: 500, Last: 500, Time: gapTime + 1}}, gapTime + 1, true},
		"two generations ago":     {[]Event{{Kind: Insert, First: 2, Last: 31}, {Kind: Insert, First: 500, Last: 500, Time: gapTime + 1}, {Kind: Insert, First: 600, Last: 600, Time: 2*gapTime + 2}}, 2*gapTime + 2, false},
		"not what was on its way": {[]Event{{Kind: Insert, First: 2, Last: 19}}, 1, false},
	} {
		g := Gaps{Waits: true}
		g.Note(&Event{Kind: Insert, PID: a, Last: 1})
		g.Note(&Event{Kind: Read, PID: a, Last: 1})
		for _, e := range c.before {
			g.Note(&e)
		}
		if got, ok := g.Note(&Event{Kind: Read, PID: a, First: 20, Last: 31, Time: c.time}); ok != c.gap || ok && got != (Span{First: 2, Last: 19}) {
			t.Errorf("awake, %s: gap %v, %t, want %t", name, got, ok, c.gap)
		}
	}
	g := Gaps{}
	g.Note(&Event{Kind: Insert, PID: a, Last: 31})
	g.Note(&Event{Kind: Read, PID: a, Last: 1})
	if got, ok := g.Note(&Event{Kind: Read, PID: a, First: 9, Last: 9}); !ok || got != (Span{First: 2, Last: 8}) {
		t.Errorf("without waits: gap %v, %t, want 2 to 8", got, ok)
	}
}

// cache is a model of how the kernel reads a file through its page cache.
type cache struct {
	*rand.Rand
	cached, ready, touched []bool // by page
	gaps                   Gaps
	found                  []bool // by page: in an event or a gap
	alone                  bool   // one thread reads, and on
}

func (c *cache) note(e Event) {
	gap, ok := c.gaps.Note(&e)
	for p := gap.First; ok && p <= gap.Last; p++ {
		c.found[p] = true
	}
	for p := e.First; e.Kind == Read && p <= e.Last; p++ {
		c.found[p] = true
	}
}

// ahead asks for those of n pages that are not cached.
func (c *cache) ahead(pid int32, page, n int) {
	for p := page; p < min(page+n, len(c.cached)); p++ {
		if !c.cached[p] {
			c.cached[p] = true
			c.note(Event{Kind: Insert, PID: pid, First: uint64(p), Last: uint64(p)})
		}
	}
}

// read is filemap_read, with what comes from storage while it goes on.
func (c *cache) read(pid int32, first, end int) {
	for pos := first; pos < end; {
		for p := range c.cached {
			c.ready[p] = c.ready[p] || c.cached[p] && c.IntN(4) == 0
		}
		if !c.cached[pos] {
			c.ahead(pid, pos, max(end-pos, 1+c.IntN(32)))
			continue // it takes its time
		}
		next := pos
		for next < min(end, pos+31) && c.cached[next] && c.ready[next] {
			next++
		}
		waits := next < min(end, pos+31) && c.cached[next]
		if c.IntN(6) == 0 { // there is a mark
			c.ahead(pid, next+c.IntN(8), 32)
		}
		if waits {
			if !c.alone || c.IntN(8) > 0 { // it comes before the thread sleeps
				c.note(Event{Kind: Wait, PID: pid})
			}
			c.ready[next] = true
			for ; pos < next; pos++ {
				c.touched[pos] = true // unsaid
			}
			continue
		}
		c.note(Event{Kind: Read, PID: pid, First: uint64(pos), Last: uint64(end - 1)})
		for ; pos < next; pos++ {
			c.touched[pos] = true
		}
	}
}

// TestGapsOfModel holds what is found against what a model of the kernel touched.
func TestGapsOfModel(t *testing.T) {
	const pages = 800
	r := rand.New(rand.NewPCG(3, 4))
	much := 0
	for round := range 2000 {
		c := &cache{Rand: r, gaps: Gaps{Waits: round%4 > 0}}
		for _, s := range []*[]bool{&c.cached, &c.ready, &c.touched, &c.found} {
			*s = make([]bool, pages)
		}
		threads := 1 + r.Int32N(2)
		warm := threads == 1 && r.IntN(2) == 0
		for p := range pages {
			c.cached[p] = warm && r.IntN(10) == 0
			c.ready[p] = c.cached[p]
		}
		skip, each := r.IntN(3)*r.IntN(40), 1+r.IntN(90)
		c.alone = threads == 1 && skip == 0
		back, vary := 3, r.IntN(2) == 0
		if vary {
			back = 0
		}
		for pos := 0; pos < pages; {
			end := min(pos+each, pages)
			if vary {
				end = min(pos+1+r.IntN(each), pages)
			}
			c.read(1+r.Int32N(threads), pos, end)
			pos = end + r.IntN(skip+1)
			if !warm && back > 0 && r.IntN(10) == 0 {
				pos = max(0, pos-r.IntN(200))
				back--
			}
		}
		for p := range pages {
			if c.touched[p] && !c.found[p] {
				t.Fatalf("round %d: page %d was read by %d threads, warm %t, each %d, skip %d, and not found", round, p, threads, warm, each, skip)
			}
			if !c.touched[p] && c.found[p] {
				much++
			}
		}
	}
	if t.Logf("%d of %d pages too many", much, 2000*pages); much > 2000*pages/5 {
		t.Error("that is not what readers who skip pages account for")
	}
}

// TestGapsForget holds that neither many files nor many places of one, nor many threads, take memory without bound, and that what came last is known.
func TestGapsForget(t *testing.T) {
	const events, recent = 4 * gapRuns, gapFileRuns / 4
	for name, at := range map[string]func(i uint64) Event{
		"files":  func(i uint64) Event { return Event{Inode: i, First: 10} },
		"places": func(i uint64) Event { return Event{First: 10 + 4*i} },
		"down":   func(i uint64) Event { return Event{First: 10 + 4*(events-i)} },
		"both":   func(i uint64) Event { return Event{Inode: i % 99, First: 10 + 4*i} },
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
		found := 0
		for i := uint64(events - recent); i < events; i++ {
			e := at(i)
			e.Kind, e.First, e.PID = Read, e.First+1, int32(i)
			e.Last = e.First
			if got, ok := g.Note(&e); ok && got.First == at(i).First {
				found++
			}
		}
		if found < recent/2 {
			t.Errorf("%s: of the last %d reads %d have a gap", name, recent, found)
		}
	}
	g := Gaps{Waits: true}
	for pid := range int32(2*gapThreads + 1) {
		g.Note(&Event{Kind: Wait, PID: pid})
	}
	if len(g.threads) > gapThreads {
		t.Errorf("%d threads are known, want %d at most", len(g.threads), gapThreads)
	}
	// Of one that is forgotten it is not known whether it has waited.
	g.Note(&Event{Kind: Insert, PID: 2, Inode: 1, First: 100, Last: 100})
	if got, ok := g.Note(&Event{Kind: Read, PID: 1, Inode: 1, First: 9, Last: 9}); !ok || got != (Span{First: 0, Last: 8}) {
		t.Errorf("a forgotten thread: gap %v, %t, want 0 to 8", got, ok)
	}
}

// TestGapsEverySecond holds the same for what is read ahead and then read here and there.
func TestGapsEverySecond(t *testing.T) {
	const files, pages = 200, 1 << 13
	g := Gaps{Waits: true}
	for f := range uint64(files) {
		for p := uint64(0); p < pages; p += 64 {
			g.Note(&Event{Kind: Insert, PID: 1, Inode: f, First: p, Last: p + 63})
		}
	}
	most := 0
	for p := uint64(0); p < pages; p += 2 {
		for f := range uint64(files) {
			g.Note(&Event{Kind: Read, PID: 1, Inode: f, First: p, Last: p, Time: 3 * gapTime})
		}
		spans := 0
		for _, f := range g.files {
			spans += f.len()
			most = max(most, len(f.fresh))
		}
		if p%256 == 0 && (spans != g.runs || spans > gapRuns || most > gapFileRuns) {
			t.Fatalf("page %d: %d spans, %d counted, %d in one set, want %d and %d at most", p, spans, g.runs, most, gapRuns, gapFileRuns)
		}
	}
}

// TestGapsGiveBack holds that a file whose runs became one keeps no memory for the many.
func TestGapsGiveBack(t *testing.T) {
	var g Gaps
	for i := range uint64(gapFileRuns) {
		g.Note(&Event{Kind: Insert, First: 2 * i, Last: 2 * i})
	}
	g.Note(&Event{Kind: Insert, First: 0, Last: 2 * gapFileRuns})
	g.Note(&Event{Kind: Read, First: 0, Last: 2 * gapFileRuns})
	if p := g.files[gapFile{}]; len(p.runs) != 1 || cap(p.runs) > 20 || len(p.fresh) > 0 || cap(p.fresh) > 20 || g.runs != 1 {
		t.Errorf("%d runs, room for %d and %d, %d counted; want one", len(p.runs), cap(p.runs), cap(p.fresh), g.runs)
	}
}
