package tracefs

import "slices"

// gapSet holds pages: disjoint spans, in order, not adjacent, gapFileRuns at most.
type gapSet []Span

// firstEnding returns the index of the first run that ends at or behind a page.
func firstEnding(runs []Span, page uint64) int {
	i, _ := slices.BinarySearchFunc(runs, page, func(r Span, p uint64) int {
		if r.Last < p {
			return -1
		}
		return 1
	})
	return i
}

// add adds pages. Where there are too many runs then, it keeps these pages alone.
func (s *gapSet) add(first, last uint64) {
	n := Span{First: first, Last: last}
	i := firstEnding(*s, max(first, 1)-1)
	end := i
	for end < len(*s) && ((*s)[end].First <= n.Last || (*s)[end].First-n.Last == 1) {
		n.First, n.Last = min(n.First, (*s)[end].First), max(n.Last, (*s)[end].Last)
		end++
	}
	if *s = slices.Replace(*s, i, end, n); len(*s) > gapFileRuns {
		*s = gapSet{n}
	}
	s.shrink()
}

// remove takes pages out. Where there are too many runs then, it takes all out.
func (s *gapSet) remove(first, last uint64) {
	i := firstEnding(*s, first)
	var left [2]Span
	n, end := 0, i
	for ; end < len(*s) && (*s)[end].First <= last; end++ {
		r := (*s)[end]
		if r.First < first {
			left[n] = Span{First: r.First, Last: first - 1}
			n++
		}
		if r.Last > last {
			left[n] = Span{First: last + 1, Last: r.Last}
			n++
		}
	}
	if i == end {
		return
	}
	if *s = slices.Replace(*s, i, end, left[:n]...); len(*s) > gapFileRuns {
		*s = nil
	}
	s.shrink()
}

// shrink gives memory back.
func (s *gapSet) shrink() {
	if cap(*s) > 4*len(*s)+16 {
		*s = slices.Clone(*s)
	}
}

// has reports whether a page is there.
func (s gapSet) has(page uint64) bool {
	i := firstEnding(s, page)
	return i < len(s) && s[i].First <= page
}

// start returns the first page of the run that a page is in, which is there.
func (s gapSet) start(page uint64) uint64 { return s[firstEnding(s, page)].First }

// next returns the first page that is there at or behind a page, behind which there is one.
func (s gapSet) next(page uint64) uint64 { return max(page, s[firstEnding(s, page)].First) }

// reach returns how far down one can go from a page, to low at most, over pages that are there and holes of so many at most.
func (s gapSet) reach(page, low, hole uint64) uint64 {
	for i := firstEnding(s, page); page > low; i-- {
		if i < len(s) && s[i].First < page {
			page = max(s[i].First, low)
		}
		before := low // what lies behind the run before
		if i > 0 {
			before = max(low, s[i-1].Last+1)
		}
		if page-before > hole {
			break
		}
		page = before
	}
	return page
}
