package trace

import (
	"cmp"
	"math"
	"slices"
	"time"
)

const (
	// MergeWindow is the grain of time: neighbouring pages that were touched for the first time
	// in the same window, counted from arming, are one range. A file that is read from start to
	// end is a few ranges then, and a range that was touched much later stays behind what came
	// between.
	MergeWindow = 10 * time.Millisecond
	// MaxPageRanges is how many ranges a [PageSet] holds, at 24 bytes each. A set that outgrows
	// it gives up detail, never pages: neighbours become one range, and then ranges with the
	// smallest gaps between them, which are no longer certain.
	MaxPageRanges = 4096
)

// PageSet folds the page events of one file into disjoint ranges. Whatever order events
// come in, every page has the earliest time at which it was touched, or one less than a
// [MergeWindow] before, and is certain when any of its events was. The zero value is empty and ready; a PageSet is not safe for concurrent use.
type PageSet struct {
	spans []span // by first page, disjoint
}

// span is a run of pages, [first, last]. Page indexes fit: 2^32 pages are 16 TiB, and what
// lies beyond is cut off.
type span struct {
	first, last uint32
	certain     bool
	at          time.Duration
}

// Add notes that the pages first to last, inclusive, were touched at a time after arming;
// certain says that the run asked for each of them. An interval that ends before it begins is
// nothing, a negative time is 0.
func (s *PageSet) Add(first, last uint64, at time.Duration, certain bool) {
	if first > last || first > math.MaxUint32 {
		return
	}
	n := span{uint32(first), uint32(min(last, math.MaxUint32)), certain, max(at, 0)}
	i := s.search(n.first)
	if i < len(s.spans) {
		// What a program reads a second time changes nothing; most events are such.
		if have := s.spans[i]; have.first <= n.first && n.last <= have.last && have.at <= n.at && (have.certain || !certain) {
			return
		}
	}
	s.insert(i, n)
	if len(s.spans) > MaxPageRanges {
		s.Shrink(MaxPageRanges / 2)
	}
}

// search returns the index of the first span that ends at or after a page.
func (s *PageSet) search(page uint32) int {
	i, _ := slices.BinarySearchFunc(s.spans, page, func(h span, p uint32) int { return cmp.Compare(h.last, p) })
	return i
}

// insert puts n in place of what it overlaps, beginning at index i, and adds what those
// spans knew better.
func (s *PageSet) insert(i int, n span) {
	var small [8]span
	fresh := small[:0]
	end, rest, more := i, n, true
	for end < len(s.spans) && s.spans[end].first <= n.last {
		have := s.spans[end]
		end++
		if have.first < rest.first {
			fresh = append(fresh, span{have.first, rest.first - 1, have.certain, have.at})
			have.first = rest.first
		}
		if rest.first < have.first {
			fresh = append(fresh, span{rest.first, have.first - 1, n.certain, n.at})
			rest.first = have.first
		}
		both := span{rest.first, min(rest.last, have.last), have.certain || n.certain, min(have.at, n.at)}
		fresh = append(fresh, both)
		if have.last > both.last {
			fresh = append(fresh, span{both.last + 1, have.last, have.certain, have.at})
		}
		if both.last == rest.last {
			more = false
			break
		}
		rest.first = both.last + 1
	}
	if more {
		fresh = append(fresh, rest)
	}
	// The neighbours on both sides may join.
	if i > 0 && s.spans[i-1].last+1 == fresh[0].first {
		i--
		fresh = slices.Insert(fresh, 0, s.spans[i])
	}
	if end < len(s.spans) && s.spans[end].first == fresh[len(fresh)-1].last+1 {
		fresh = append(fresh, s.spans[end])
		end++
	}
	s.spans = slices.Replace(s.spans, i, end, join(fresh)...)
}

// near says whether two spans that touch are one range: see [MergeWindow].
func near(a, b span) bool { return a.certain == b.certain && a.at/MergeWindow == b.at/MergeWindow }

// join merges adjacent spans in place. A merged span has the earlier time.
func join(spans []span) []span {
	out := spans[:1]
	for _, n := range spans[1:] {
		if last := &out[len(out)-1]; near(*last, n) {
			last.last, last.at = n.last, min(last.at, n.at)
		} else {
			out = append(out, n)
		}
	}
	return out
}

// Shrink gives up detail until there are at most most ranges, or one, at the price that
// [MaxPageRanges] names.
func (s *PageSet) Shrink(most int) {
	most = max(most, 1)
	if len(s.spans) <= most {
		return
	}
	for gap := uint64(0); len(s.spans) > most; gap = gap*2 + 1 {
		out := s.spans[:1]
		for _, n := range s.spans[1:] {
			last := &out[len(out)-1]
			hole := uint64(n.first) - uint64(last.last) - 1
			if hole > gap || (gap == 0 && n.certain != last.certain) {
				out = append(out, n)
				continue
			}
			last.certain = last.certain && n.certain && hole == 0
			last.last, last.at = n.last, min(last.at, n.at)
		}
		s.spans = out
	}
	s.spans = slices.Clone(s.spans) // gives the memory back
}

// Len returns the number of ranges that the set holds.
func (s *PageSet) Len() int { return len(s.spans) }

// First returns the time of the first touch; false when the set is empty.
func (s *PageSet) First() (time.Duration, bool) {
	if len(s.spans) == 0 {
		return 0, false
	}
	first := s.spans[0].at
	for _, h := range s.spans[1:] {
		first = min(first, h.at)
	}
	return first, true
}

// Ranges returns the ranges of a file of size bytes whose pages are pageSize bytes: disjoint,
// inside the file, ordered by first touch and then by offset; never nil. Neighbours that were
// touched within [MergeWindow] and are equally certain are one range, whose time is the earliest of
// its pages. The slice is the caller's. A pageSize below 1 counts as 1.
func (s *PageSet) Ranges(size int64, pageSize int) []Range {
	out := make([]Range, 0, len(s.spans))
	for _, h := range s.spans {
		r, ok := PageRange(h.first, h.last, size, pageSize)
		if !ok {
			break
		}
		r.Elapsed, r.Certain = h.at, h.certain
		out = append(out, r)
	}
	slices.SortStableFunc(out, func(a, b Range) int { return cmp.Compare(a.Elapsed, b.Elapsed) })
	return out
}

// PageRange returns the bytes of the pages first to last, inclusive, of a file of size bytes whose
// pages are pageSize bytes, as far as they are inside the file; false when none is. It knows
// no time and is not certain. A pageSize below 1 counts as 1.
func PageRange(first, last uint32, size int64, pageSize int) (Range, bool) {
	page := int64(max(pageSize, 1))
	if size <= 0 || first > last || int64(first) > (size-1)/page {
		return Range{}, false
	}
	r := Range{Offset: int64(first) * page, Length: size}
	if int64(last) < (size-1)/page {
		r.Length = (int64(last) + 1) * page
	}
	r.Length -= r.Offset
	return r, true
}

// Rest returns what ranges leave out of a file of size bytes, by offset, each at time at and not
// certain; nil when nothing is left. ranges are disjoint and inside the file.
func Rest(ranges []Range, size int64, at time.Duration) []Range {
	byOffset := slices.Clone(ranges)
	slices.SortFunc(byOffset, func(a, b Range) int { return cmp.Compare(a.Offset, b.Offset) })
	var out []Range
	next := int64(0)
	for _, r := range append(byOffset, Range{Offset: size}) {
		if r.Offset > next {
			out = append(out, Range{Offset: next, Length: r.Offset - next, Elapsed: at})
		}
		next = max(next, r.Offset+r.Length)
	}
	return out
}
