package persist

import (
	"math"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Upper returns the bytes of a file that a run may have touched, each counted once: those of
// all its ranges, or of the whole file, as far as its size is known.
func Upper(a *trace.Access) int64 {
	if a.Ranges == nil {
		return a.Size
	}
	return sum(union(a.Ranges))
}

// Lower returns the bytes of a file that a run is known to have touched, each counted once.
// Ranges that are not marked certain, and files without ranges, count for nothing.
func Lower(a *trace.Access) int64 {
	var sure []trace.Range
	for _, r := range a.Ranges {
		if r.Certain {
			sure = append(sure, r)
		}
	}
	return sum(union(sure))
}

// Disjoint returns the bytes of ranges as ranges that neither overlap nor touch, sorted by
// offset, without times and bounds. Ranges with a negative offset or no length are left out,
// an end beyond 2^63-1 is cut off. Nil, the whole file, stays nil.
func Disjoint(ranges []trace.Range) []trace.Range {
	if ranges == nil {
		return nil
	}
	valid := make([]trace.Range, 0, len(ranges))
	for _, r := range ranges {
		if r.Length = min(r.Length, math.MaxInt64-max(r.Offset, 0)); r.Offset >= 0 && r.Length > 0 {
			valid = append(valid, r)
		}
	}
	return union(valid)
}

// sum returns the bytes of disjoint ranges.
func sum(ranges []trace.Range) int64 {
	var n int64
	for _, r := range ranges {
		n += r.Length
	}
	return n
}

// Missing returns the bytes of a that are not in b, in the order of their offsets; nil stands
// for the whole file of size bytes.
func Missing(a, b []trace.Range, size int64) []trace.Range {
	if b == nil {
		return nil
	}
	if a == nil {
		if size <= 0 {
			return nil
		}
		a = []trace.Range{{Length: size}}
	}
	have, out := union(b), []trace.Range(nil)
	for _, r := range union(a) {
		at, end := r.Offset, r.Offset+r.Length
		for len(have) > 0 && at < end {
			h := have[0]
			hEnd := h.Offset + h.Length
			if hEnd <= at {
				have = have[1:]
				continue
			}
			if h.Offset >= end {
				break
			}
			if h.Offset > at {
				out = append(out, trace.Range{Offset: at, Length: h.Offset - at})
			}
			at = hEnd
		}
		if at < end {
			out = append(out, trace.Range{Offset: at, Length: end - at})
		}
	}
	return out
}
