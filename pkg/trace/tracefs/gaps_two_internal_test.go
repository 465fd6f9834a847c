package tracefs

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// TestGapsOfTwo is TestGaps for threads that do something with two files, or whose pages others brought.
func TestGapsOfTwo(t *testing.T) {
	const a, b = 11, 12 // threads
	const e, in = 5, 6  // files, of which in lies below e
	const second = int64(1e9)
	wait := Event{Kind: Wait, PID: a}
	ins := func(pid int32, f, first, last uint64) Event {
		return Event{Kind: Insert, PID: pid, Inode: f, First: first, Last: last}
	}
	read := func(pid int32, f, first, last uint64) Event {
		return Event{Kind: Read, PID: pid, Inode: f, First: first, Last: last}
	}
	fault := func(f, page uint64) Event { return Event{Kind: Fault, PID: a, Inode: f, First: page} }
	below := func(page uint64) []Event { return []Event{ins(a, in, page, page), wait, read(a, in, page, page)} }
	join := func(parts ...any) (out []Event) {
		for _, p := range parts {
			if one, ok := p.(Event); ok {
				out = append(out, one)
			} else {
				out = append(out, p.([]Event)...)
			}
		}
		return out
	}
	at := func(ev Event, time int64) Event { ev.Time = time; return ev }
	for name, tt := range map[string]struct {
		events []Event
		want   string // of the last one
	}{
		"one file below":              {join(ins(a, e, 0, 3), read(a, e, 0, 0), ins(a, e, 100, 103), below(10), wait, read(a, e, 100, 100)), ""},
		"one file below, twice":       {join(ins(a, e, 0, 3), read(a, e, 0, 0), ins(a, e, 100, 103), below(10), below(50), wait, read(a, e, 100, 100)), ""},
		"passed over above a file":    {join(ins(a, e, 0, 31), below(10), below(50), read(a, e, 5, 31)), "0-4"},
		"slept before what is below":  {join(ins(b, e, 0, 31), wait, ins(a, e, 32, 63), below(5), read(a, e, 1, 20)), "0-0"},
		"metadata, then its own":      {join(wait, ins(a, e, 64, 95), wait, read(a, e, 64, 90)), ""},
		"others', read on":            {join(read(a, e, 0, 9), wait, ins(a, e, 64, 95), wait, read(a, e, 64, 90)), "10-63"},
		"others', then ours":          {join(ins(b, e, 64, 95), wait, read(a, e, 64, 90)), "0-63"},
		"its own alone":               {join(ins(a, e, 64, 95), wait, read(a, e, 64, 90)), ""},
		"others', two in turn":        {join(ins(b, e, 900, 900), read(a, e, 0, 199), read(a, in, 0, 9), wait, read(a, e, 210, 210)), "200-209"},
		"others brought it":           {join(ins(a, e, 0, 3), wait, read(a, e, 0, 3), wait, read(a, e, 9, 9)), "4-8"},
		"others brought it, awake":    {join(ins(a, e, 0, 3), wait, read(a, e, 0, 3), read(a, e, 9, 9)), ""},
		"others brought all":          {join(wait, read(a, e, 9, 9)), ""},
		"nothing came lately":         {join(ins(a, e, 0, 3), wait, read(a, e, 0, 3), wait, at(read(a, e, 9, 9), second)), ""},
		"others' is far":              {join(ins(a, e, 0, 3), wait, read(a, e, 0, 3), wait, read(a, e, 5+gapForeign, 5+gapForeign)), ""},
		"after a fault":               {join(ins(a, e, 0, 3), read(a, e, 0, 0), fault(e, 310), ins(a, e, 290, 321), wait, ins(a, e, 900, 900), wait, read(a, e, 900, 900)), ""},
		"metadata below":              {join(wait, ins(a, in, 7, 7), wait, ins(a, e, 0, 3), wait, read(a, e, 0, 0), ins(a, e, 100, 103), wait, read(a, e, 100, 100), ins(a, e, 200, 203), wait, read(a, e, 200, 200)), ""},
		"metadata below, warm":        {join(wait, ins(a, in, 7, 7), wait, ins(a, e, 0, 511), wait, read(a, e, 0, 0), at(read(a, e, 300, 300), 3600*second), at(read(a, e, 500, 500), 7200*second)), ""},
		"slept after what it brought": {join(ins(a, e, 0, 252), ins(a, in, 0, 63), wait, read(a, in, 0, 63), wait, ins(a, e, 253, 316), at(ins(a, in, 64, 100), second), wait, at(read(a, in, 64, 100), second+second/10), at(read(a, e, 72, 168), second+second/10)), "0-71"},
		"slept for others below":      {join(read(a, e, 0, 299), ins(a, e, 400, 463), wait, ins(a, e, 464, 527), ins(a, in, 0, 9), wait, read(a, in, 0, 9), read(a, e, 331, 500)), "300-330"},
		"three in turn":               {join(ins(b, e, 900, 900), read(a, e, 0, 499), read(a, in, 0, 9), read(a, 8, 0, 9), wait, read(a, e, 510, 520)), "500-509"},
		"after a fault long ago":      {join(fault(e, 3), at(ins(a, e, 0, 63), second), at(read(a, e, 0, 4), second), at(read(a, e, 10, 20), second)), "5-9"},
		"of an older thread":          {join(wait, read(a, e, 0, 9), wait, Event{Kind: Fork, PID: b, Other: a}, read(a, e, 20, 20)), ""},
		"mapped meanwhile":            {join(wait, Event{Kind: Around, PID: a, Inode: in}, read(a, e, 9, 9)), ""},
		"one long read":               {join(ins(a, e, 0, 511), read(a, e, 0, 511), ins(a, e, 512, 4607), wait, wait, read(a, e, 4000, 4607)), "512-3999"},
		"one long read, all asked":    {join(ins(a, e, 0, 4607), read(a, e, 0, 511), wait, read(a, e, 4000, 4607)), "512-3999"},
		"over a hole":                 {join(ins(a, e, 0, 9), read(a, e, 0, 9), ins(a, e, 100+gapForeign, 300), wait, read(a, e, 250, 300)), fmt.Sprint(100+gapForeign, "-249")},
		"before what was asked for":   {join(ins(a, e, 40, 40), ins(a, e, 39, 39), ins(a, e, 38, 38), read(a, e, 40, 40)), ""},
		"asked for long ago":          {join(ins(a, e, 0, 2000), at(read(a, e, 1500, 1500), 3600*second)), ""},
		"an old page":                 {join(ins(a, e, 0, 31), read(a, e, 0, 0), ins(b, e, 900, 931), at(ins(b, e, 90_000, 90_000), 3600*second), at(read(a, e, 910, 910), 3600*second)), ""},
	} {
		g := Gaps{Waits: true}
		got := ""
		for _, ev := range tt.events {
			got = ""
			if span, ok := g.Note(&ev); ok {
				got = fmt.Sprintf("%d-%d", span.First, span.Last)
			}
		}
		if got != tt.want {
			t.Errorf("%s: gap %q, want %q", name, got, tt.want)
		}
	}
}

// TestGapsOfRandom holds that few pages are listed of a file that is read here and there, where nothing is ever passed over: each record has a page that
// says what it is, and its data right behind. The kernel reads ahead behind reads that go on: twice as much (mm/readahead.c get_init_ra_size).
func TestGapsOfRandom(t *testing.T) {
	const pages = 10_000
	r := rand.New(rand.NewPCG(5, 6))
	g := Gaps{Waits: true}
	var cached, touched, gap [pages]bool
	time := int64(0)
	for range 1000 {
		at, n := uint64(r.IntN(pages-64)), uint64(1+r.IntN(8))
		for i, span := range []Span{{First: at, Last: at}, {First: at + 1, Last: at + n}} {
			time += 1e6
			if !cached[span.First] {
				for p := span.First; p < span.First+uint64(i)*(2*n+2) || p <= span.Last; p++ {
					if !cached[p] {
						cached[p] = true
						g.Note(&Event{Kind: Insert, PID: 1, First: p, Last: p, Time: time})
					}
				}
				g.Note(&Event{Kind: Wait, PID: 1})
			}
			if got, ok := g.Note(&Event{Kind: Read, PID: 1, First: span.First, Last: span.Last, Time: time}); ok {
				for p := got.First; p <= got.Last; p++ {
					gap[p] = true
				}
			}
			for p := span.First; p <= span.Last; p++ {
				touched[p] = true
			}
		}
	}
	read, much := 0, 0
	for p := range touched {
		if touched[p] {
			read++
		} else if gap[p] {
			much++
		}
	}
	if t.Logf("%d pages were read, %d besides are listed", read, much); much*3 > read {
		t.Error("want a third more at most")
	}
}
