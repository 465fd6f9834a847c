package persist

import (
	"cmp"
	"container/heap"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Policy says what of its runs a profile stands for: the least share of the complete runs,
// 0 to 1, that have to have touched a byte.
type Policy float64

// The two ends of [Policy].
const (
	Union        Policy = 0 // what one run of any kind touched
	Intersection Policy = 1 // what every complete run touched
)

// File is one file of a profile.
type File struct {
	// Access has the median first touch of the runs that touched the file, every way in which
	// it was touched, its largest size, and the ranges that the policy asks for: each with the
	// median of its first touches, and certain when it is so in as many runs as the policy
	// wants. Its PID is 0 and its Command empty.
	trace.Access
	// Runs is how many complete runs touched the file, Lossy how many with losses did.
	Runs, Lossy int
	// Weight is the share of the complete runs that touched the file, 0 to 1; of all runs where
	// none is complete.
	Weight float64
}

// counted returns how many runs a share is taken of, and whether l is one of them: the
// complete ones, and all where none is complete.
func (p *Profile) counted() (n int, counts func(l *List) bool) {
	if n = p.Complete(); n > 0 {
		return n, (*List).Complete
	}
	return len(p.Runs), func(*List) bool { return true }
}

// Files returns the files that policy asks for, ordered by their median first touch, then
// by the median of their places in the runs, then by path. Where no run is complete, a
// policy takes its share of all runs. Memory and time are bounded by the runs' accesses and ranges.
func (p *Profile) Files(policy Policy) []File {
	total, counts := p.counted()
	need := 1
	if policy > Union {
		// A share of 0.3 of 10 runs is 3 runs, whatever 0.3 × 10 is in binary.
		need = max(1, int(math.Ceil(float64(policy)*float64(total)-1e-9)))
	}
	m := merger{total: total, need: need, any: policy <= Union}
	byPath := map[string]int{}
	var touches [][]touch
	for _, r := range p.Runs {
		accesses := once(r.List.Accesses)
		for i := range accesses {
			a := &accesses[i]
			at, ok := byPath[a.Path]
			if !ok {
				at = len(touches)
				byPath[a.Path] = at
				touches = append(touches, nil)
			}
			touches[at] = append(touches[at], touch{a, i, counts(r.List), r.List.Complete()})
		}
	}
	type placed struct {
		File
		place int
	}
	var found []placed
	for _, of := range touches {
		if f, place, ok := m.file(of); ok {
			found = append(found, placed{f, place})
		}
	}
	slices.SortFunc(found, func(a, b placed) int {
		return cmp.Or(cmp.Compare(a.Elapsed, b.Elapsed), cmp.Compare(a.place, b.place), cmp.Compare(a.Path, b.Path))
	})
	out := make([]File, len(found))
	for i := range found {
		out[i] = found[i].File
	}
	return out
}

// touch is what one run knows of a file.
type touch struct {
	access   *trace.Access
	place    int  // in the run's list
	counts   bool // for the policy's share
	complete bool
}

// merger makes one file of what the runs know of it.
type merger struct {
	total int  // runs that count
	need  int  // counted runs that have to have touched a byte
	any   bool // one run of any kind is enough

	edges []edge // scratch, as is sweep
	sweep sweep
}

func (m *merger) enough(counted, all int) bool { return counted >= m.need || m.any && all > 0 }

func (m *merger) file(of []touch) (f File, place int, ok bool) {
	counted := 0
	var elapsed []time.Duration
	var places []int
	for _, t := range of {
		if t.counts {
			counted++
		}
		if t.complete {
			f.Runs++
		} else {
			f.Lossy++
		}
		f.How |= t.access.How
		f.Size = max(f.Size, t.access.Size)
		elapsed = append(elapsed, t.access.Elapsed)
		places = append(places, t.place)
	}
	if !m.enough(counted, len(of)) {
		return File{}, 0, false
	}
	f.Path, f.Weight = of[0].access.Path, float64(counted)/float64(m.total)
	f.Elapsed = median(elapsed)
	f.Ranges = m.ranges(of)
	return f, median(places), true
}

// median returns the lower median, which is one of the values; s is sorted.
func median[T cmp.Ordered](s []T) T {
	slices.Sort(s)
	return s[(len(s)-1)/2]
}

// edge is where a range of a run begins or ends.
type edge struct {
	at    int64
	begin bool
	touch int // index of the run's touch
	r     trace.Range
}

// wholeRange is a whole file: no file is as long.
func wholeRange(a *trace.Access) trace.Range {
	return trace.Range{Length: math.MaxInt64, Elapsed: a.Elapsed}
}

// ranges returns the bytes of a file that the policy asks for, in order of their median
// first touch; nil when that is the whole file.
func (m *merger) ranges(of []touch) []trace.Range {
	edges := m.edges[:0]
	for i, t := range of {
		in := t.access.Ranges
		if in == nil {
			in = []trace.Range{wholeRange(t.access)}
		}
		for _, r := range in {
			edges = append(edges, edge{r.Offset, true, i, r}, edge{r.Offset + r.Length, false, i, r})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Compare(a.at, b.at) })
	m.edges = edges
	sweep := &m.sweep
	sweep.reset(of)
	out := []trace.Range{}
	for i := 0; i < len(edges); {
		at := edges[i].at
		for ; i < len(edges) && edges[i].at == at; i++ {
			sweep.pass(&edges[i])
		}
		if i == len(edges) || !m.enough(sweep.counted, sweep.all) {
			continue
		}
		r := trace.Range{Offset: at, Length: edges[i].at - at, Elapsed: sweep.elapsed(at), Certain: m.enough(sweep.sureCounted, sweep.sure)}
		if n := len(out) - 1; n >= 0 && out[n].Offset+out[n].Length == at && out[n].Elapsed == r.Elapsed && out[n].Certain == r.Certain {
			out[n].Length += r.Length
			continue
		}
		out = append(out, r)
	}
	if whole(out) {
		return nil
	}
	out = fitRanges(out, MaxFileRanges)
	slices.SortFunc(out, func(a, b trace.Range) int {
		return cmp.Or(cmp.Compare(a.Elapsed, b.Elapsed), cmp.Compare(a.Offset, b.Offset))
	})
	return out
}

// whole reports whether ranges, which are sorted by offset, hold every byte that a file can have.
func whole(ranges []trace.Range) bool {
	var end int64
	for _, r := range ranges {
		if r.Offset != end {
			return false
		}
		end += r.Length
	}
	return end == math.MaxInt64
}

// sweep knows which runs touched the byte that it stands at.
type sweep struct {
	of    []touch
	open  []opened        // by touch
	times []time.Duration // scratch

	all, counted      int // runs that touched the byte
	sure, sureCounted int // of which certain
}

// opened are the ranges of one run that hold a byte: they may overlap, as lists may come from anywhere.
type opened struct {
	n, sure int
	byTime  firstTouches
}

// firstTouches is a heap of ranges' begins, the first touch at its top. Those that ended are taken out when
// they come there.
type firstTouches []*edge

func (h firstTouches) Len() int           { return len(h) }
func (h firstTouches) Less(i, j int) bool { return h[i].r.Elapsed < h[j].r.Elapsed }
func (h firstTouches) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *firstTouches) Push(e any)        { *h = append(*h, e.(*edge)) }
func (h *firstTouches) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	*h = (*h)[:last]
	return e
}

// reset makes the sweep stand before the first byte of another file.
func (s *sweep) reset(of []touch) {
	for len(s.open) < len(of) {
		s.open = append(s.open, opened{})
	}
	for i := range s.open {
		s.open[i] = opened{byTime: s.open[i].byTime[:0]}
	}
	s.of, s.all, s.counted, s.sure, s.sureCounted = of, 0, 0, 0, 0
}

// pass takes note of a range's begin or end. It keeps e until the next reset.
func (s *sweep) pass(e *edge) {
	o := &s.open[e.touch]
	had, sure := o.n > 0, o.sure > 0
	d := 1
	if e.begin {
		heap.Push(&o.byTime, e)
	} else {
		d = -1
	}
	o.n += d
	if e.r.Certain {
		o.sure += d
	}
	s.count(&s.all, &s.counted, e.touch, had, o.n > 0)
	s.count(&s.sure, &s.sureCounted, e.touch, sure, o.sure > 0)
}

func (s *sweep) count(all, counted *int, touch int, before, after bool) {
	d := 0
	switch {
	case after && !before:
		d = 1
	case before && !after:
		d = -1
	}
	*all += d
	if s.of[touch].counts {
		*counted += d
	}
}

// elapsed returns the median of the runs' first touches of the byte at at, where all edges were passed; a
// range without a time was touched at an unknown time after the file was.
func (s *sweep) elapsed(at int64) time.Duration {
	s.times = s.times[:0]
	for i := range s.open {
		o := &s.open[i]
		if o.n == 0 {
			o.byTime = o.byTime[:0]
			continue
		}
		for o.byTime[0].r.Offset+o.byTime[0].r.Length <= at {
			heap.Pop(&o.byTime)
		}
		first := o.byTime[0].r.Elapsed
		if first == 0 {
			first = s.of[i].access.Elapsed
		}
		s.times = append(s.times, first)
	}
	return median(s.times)
}

// List returns the access list that the profile stands for under policy, which can be
// given wherever a list can. What all runs agree on is kept; Started is the first run's,
// Duration the longest, Grade the least exact, and Engine has the parts of all runs' engines: it is
// empty only where no run was recorded. The list has the losses of all runs when
// none is complete, else none: what a run with losses adds to complete ones is no less true.
func (p *Profile) List(policy Policy) *List {
	out := &List{}
	files := p.Files(policy)
	out.Accesses = make([]trace.Access, len(files))
	for i := range files {
		out.Accesses[i] = files[i].Access
	}
	for i, r := range p.Runs {
		l := r.List
		out.agree(l, i == 0)
		if !l.Started.IsZero() && (out.Started.IsZero() || l.Started.Before(out.Started)) {
			out.Started = l.Started
		}
		out.Duration = max(out.Duration, l.Duration)
		out.Skipped = max(out.Skipped, l.Skipped)
		out.Events = max(out.Events, l.Events)
		if p.Complete() > 0 {
			continue
		}
		for _, x := range l.Losses {
			x.Detail = fmt.Sprintf("run %.19s: %s", r.ID, x.Detail)
			out.Losses = append(out.Losses, x)
		}
	}
	return out
}

// agree keeps of l what the lists before it have too.
func (l *List) agree(next *List, first bool) {
	if first {
		l.Reference, l.Digest, l.Platform, l.Command = next.Reference, next.Digest, next.Platform, slices.Clone(next.Command)
		l.Name, l.Namespace, l.Engine, l.Grade, l.End = next.Name, next.Namespace, next.Engine, next.Grade, next.End
		return
	}
	for _, f := range []struct {
		have *string
		next string
	}{
		{&l.Reference, next.Reference},
		{&l.Digest, next.Digest},
		{&l.Platform, next.Platform},
		{&l.Name, next.Name},
		{&l.Namespace, next.Namespace},
		{&l.End, next.End},
	} {
		if *f.have != f.next {
			*f.have = ""
		}
	}
	if !slices.Equal(l.Command, next.Command) {
		l.Command = nil
	}
	l.Engine = bothEngines(l.Engine, next.Engine)
	if slices.Index(grades, next.Grade) > slices.Index(grades, l.Grade) {
		l.Grade = next.Grade
	}
}

// bothEngines names what recorded one run or the other: the sorted parts of both names. An engine is more than a
// name: the paths of a list without one are taken for a person's, and may be patterns.
func bothEngines(a, b string) string {
	if a == b || b == "" {
		return a
	}
	if a == "" {
		return b
	}
	parts := slices.Concat(strings.Split(a, "+"), strings.Split(b, "+"))
	slices.Sort(parts)
	return strings.Join(slices.Compact(parts), "+")
}

// grades are those of [List.Grade], the most exact first; an unknown one is more exact than all.
var grades = []string{GradeExact, GradeFaultAround, GradeRange, GradeFile}
