package persist

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// MaxRanges is how many ranges [List.Fit] leaves in a list. They take at most 60 bytes each, a
// million some 30 MB.
const MaxRanges = 1 << 20

// fitRanges returns ranges with at most most elements in the order of their first touch, as
// they are where they fit: else those with the least room between them are joined, which
// makes an upper bound of what is between.
func fitRanges(ranges []trace.Range, most int) []trace.Range {
	if len(ranges) <= most {
		return ranges
	}
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b trace.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	gap := func(i int) int64 { return max(0, sorted[i].Offset-sorted[i-1].Offset-sorted[i-1].Length) }
	order := make([]int, 0, len(sorted)-1)
	for i := 1; i < len(sorted); i++ {
		order = append(order, i)
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Or(cmp.Compare(gap(a), gap(b)), cmp.Compare(a, b)) })
	join := make([]bool, len(sorted))
	for _, i := range order[:len(sorted)-max(most, 1)] {
		join[i] = true
	}
	out := sorted[:1]
	for i := 1; i < len(sorted); i++ {
		r := sorted[i]
		last := &out[len(out)-1]
		if !join[i] {
			out = append(out, r)
			continue
		}
		end := max(last.Offset+last.Length, r.Offset+r.Length)
		last.Certain = last.Certain && r.Certain && r.Offset <= last.Offset+last.Length
		last.Length, last.Elapsed = end-last.Offset, min(last.Elapsed, r.Elapsed)
	}
	slices.SortFunc(out, func(a, b trace.Range) int {
		return cmp.Or(cmp.Compare(a.Elapsed, b.Elapsed), cmp.Compare(a.Offset, b.Offset))
	})
	return slices.Clip(out)
}

// Fit returns l within the bounds of the native format, and l itself when it is: a file
// with more than [MaxFileRanges] ranges, and each file of a list with more than [MaxRanges],
// gets fewer and longer ones, that still hold every byte. Accesses beyond what [MaxLines]
// leaves room for go, with a loss "limit".
func (l *List) Fit() *List {
	total, longest := 0, 0
	for i := range l.Accesses {
		n := len(l.Accesses[i].Ranges)
		total, longest = total+n, max(longest, n)
	}
	room := MaxLines - len(l.Processes) - len(l.Losses) - len(l.Command) - 32
	if total <= MaxRanges && longest <= MaxFileRanges && len(l.Accesses) <= room {
		return l
	}
	out := *l
	out.Accesses = slices.Clone(l.Accesses)
	if over := len(out.Accesses) - max(room, 0); over > 0 {
		out.Accesses = out.Accesses[:max(room, 0)]
		out.Losses = append(slices.Clone(l.Losses), trace.Loss{Reason: "limit", Count: int64(over), Detail: fmt.Sprintf("the list holds %d files", room)})
	}
	most := MaxFileRanges
	if total > MaxRanges {
		most = fileLimit(out.Accesses)
	}
	for i := range out.Accesses {
		a := &out.Accesses[i]
		if len(a.Ranges) > most {
			a.Ranges = fitRanges(a.Ranges, most)
		}
	}
	return &out
}

// fileLimit returns the largest number of ranges of a file with which all files have at
// most MaxRanges, or one each.
func fileLimit(accesses []trace.Access) int {
	least, most := 1, MaxFileRanges
	for least < most {
		try := (least + most + 1) / 2
		total := 0
		for i := range accesses {
			total += min(len(accesses[i].Ranges), try)
		}
		if total <= MaxRanges {
			least = try
		} else {
			most = try - 1
		}
	}
	return least
}
