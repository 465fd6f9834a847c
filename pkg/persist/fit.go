package persist

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
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

// fitSlack is room for the end line and a line of loss, in bytes.
const fitSlack = 4 << 10

// Fit returns l within the bounds of the native format, and l itself when it is: a file
// with more than [MaxFileRanges] ranges, and each file of a list with more than [MaxRanges],
// gets fewer and longer ones, that still hold every byte. The last accesses, those beyond what
// [MaxLines] and [MaxListSize] leave room for, go, with a loss "limit". What it returns is within the bounds.
func (l *List) Fit() *List {
	total, longest := 0, 0
	for i := range l.Accesses {
		n := len(l.Accesses[i].Ranges)
		total, longest = total+n, max(longest, n)
	}
	lines := max(MaxLines-len(l.Processes)-len(l.cause())-len(l.Command)-32, 0)
	out := l
	if total > MaxRanges || longest > MaxFileRanges {
		most := MaxFileRanges
		if total > MaxRanges {
			most = fileLimit(l.Accesses[:min(len(l.Accesses), lines)])
		}
		changed := *l
		out, changed.Accesses = &changed, slices.Clone(l.Accesses)
		for i := range out.Accesses {
			a := &out.Accesses[i]
			if len(a.Ranges) > most {
				a.Ranges = fitRanges(a.Ranges, most)
			}
		}
	}
	keep := min(len(out.Accesses), lines)
	keep = out.fitting(keep)
	over := len(out.Accesses) - keep
	if over == 0 {
		return out
	}
	cut := *out
	cut.Accesses = slices.Clip(out.Accesses[:keep])
	cut.Losses = append(slices.Clone(l.Losses), trace.Loss{Reason: limitLoss, Count: int64(over), Detail: fmt.Sprintf("the list holds %d files", keep)})
	return &cut
}

// limitLoss is the reason of the loss that [List.Fit] adds.
const limitLoss = "limit"

// cause returns the losses of l without the one that Fit added, last: what it left room for is left room for again.
func (l *List) cause() []trace.Loss {
	if n := len(l.Losses); n > 0 && l.Losses[n-1].Reason == limitLoss {
		return l.Losses[:n-1]
	}
	return l.Losses
}

// fitting returns how many of the first n accesses MaxListSize leaves room for.
func (l *List) fitting(n int) int {
	// A byte takes at most four when it is escaped, a range 60, the numbers of an access 80.
	size := int64(0)
	for i := range l.Accesses[:n] {
		a := &l.Accesses[i]
		size += 80 + 4*int64(len(a.Path)+len(a.Command)) + 60*int64(len(a.Ranges))
	}
	head := &lineWriter{w: bufio.NewWriter(io.Discard), maxLines: MaxLines, maxSize: MaxListSize}
	before := *l
	before.Losses = l.cause()
	before.writeHeader(head)
	room := MaxListSize - head.n - fitSlack
	if size <= room {
		return n
	}
	var b []byte
	for i := range l.Accesses[:n] {
		b = appendAccess(b[:0], &l.Accesses[i])
		if room -= int64(len(b)) + 1; room < 0 {
			return i
		}
	}
	return n
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
