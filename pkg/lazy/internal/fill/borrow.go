package fill

import (
	"context"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Borrower is a [Cache] that may get chunks from other caches of this node. What it does not get is fetched: it has no
// errors. It is safe for concurrent use.
type Borrower interface {
	// Find reports which of chunks other caches seem to have; nil: none of them.
	Find(chunks []rafs.Chunk) []bool
	// Borrow puts those of chunks into the cache that others have, verified.
	Borrow(ctx context.Context, chunks []rafs.Chunk)
}

// borrowStep is how many units are borrowed at once: readers that want the next one do not wait for more.
const borrowStep = 16

// lent says which units of a view were borrowed, one bit each: no request reads through them for the sake of what lies behind.
type lent struct {
	v    *view
	bits []uint64
}

// note notes that a unit was borrowed; the caller holds s.mu.
func (l *lent) note(v *view, n int) {
	if l.v != v {
		l.v, l.bits = v, nil
	}
	if w := n / 64; w >= len(l.bits) {
		l.bits = append(l.bits, make([]uint64, w+1-len(l.bits))...)
	}
	l.bits[n/64] |= 1 << (n % 64)
}

// has reports whether a unit was borrowed; the caller holds s.mu.
func (l *lent) has(v *view, n int) bool {
	return l.v == v && n/64 < len(l.bits) && l.bits[n/64]>>(n%64)&1 == 1
}

// between reports whether a unit between two was borrowed; the caller holds s.mu.
func (l *lent) between(v *view, from, to int) bool {
	for n := from + 1; n < to && l.v == v; n++ {
		if l.has(v, n) {
			return true
		}
	}
	return false
}

// borrow ends those of flights, begun by the caller, whose chunks other caches have, and returns the rest.
func (b *Blob) borrow(ctx context.Context, flights []*flight) []*flight {
	if b.borrower == nil || len(flights) == 0 {
		return flights
	}
	var want []rafs.Chunk
	for _, f := range flights {
		for i := range f.u.chunks {
			if !b.cache.Ready(f.u.chunks[i]) {
				want = append(want, f.u.chunks[i])
			}
		}
	}
	b.collect(ctx, want)
	v := b.view.Load()
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(flights), func(f *flight) bool {
		if b.missing(f.u.chunks) {
			return false
		}
		if f.u.reader == v.reader {
			b.lent.note(v, f.u.n)
		}
		b.s.finish(f, nil)
		return true
	})
}

// collect borrows chunks that are missing, and counts them.
func (b *Blob) collect(ctx context.Context, want []rafs.Chunk) {
	if len(want) == 0 {
		return
	}
	b.borrower.Borrow(ctx, want)
	b.count(want)
}

// count counts those of chunks that are there by now as reused.
func (b *Blob) count(want []rafs.Chunk) {
	var chunks, bytes int64
	for i := range want {
		if b.cache.Ready(want[i]) {
			chunks++
			bytes += int64(want[i].UncompressedSize)
		}
	}
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.stats.ReusedChunks += chunks
	b.stats.ReusedBytes += bytes
}

// borrowNow borrows what is missing of chunks before the blob's table is there, which says how to fetch them.
func (b *Blob) borrowNow(ctx context.Context, chunks []rafs.Chunk) {
	if b.borrower == nil || b.view.Load().reader != nil {
		return
	}
	b.collect(ctx, slices.DeleteFunc(slices.Clone(chunks), b.cache.Ready))
}

// split makes windows of flights, which are in the order of their places: none has a borrowed unit in its middle, nor one that somebody else has begun
// to get, who may be borrowing it.
func (b *Blob) split(flights []*flight, class Class) (windows []*window) {
	v := b.view.Load()
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	for i := range flights {
		if n := len(windows); n > 0 && !b.lent.between(v, flights[i-1].u.n, flights[i].u.n) && !b.begun(v, flights[i-1].u, flights[i].u) {
			windows[n-1].flights = append(windows[n-1].flights, flights[i])
			continue
		}
		windows = append(windows, &window{class: class, flights: []*flight{flights[i]}})
	}
	for _, w := range windows {
		w.off, w.end = extent(w.flights)
	}
	return windows
}

// begun reports whether somebody else gets a unit between two of a window; the caller holds s.mu.
func (b *Blob) begun(v *view, from, to unit) bool {
	if b.borrower == nil || from.reader != v.reader || to.reader != v.reader || to.off <= from.end() {
		return false
	}
	for n := from.n + 1; n < to.n; n++ {
		if f := b.flights[v.unit(n).key()]; f != nil && f.started {
			return true
		}
	}
	return false
}

// serve borrows what it can of a demand's window and fetches the rest: the first part that somebody waits for. Others go back
// to the queue.
func (b *Blob) serve(ctx context.Context, w *window) {
	if b.borrower == nil {
		b.fetch(ctx, w)
		return
	}
	windows := b.split(b.borrow(ctx, w.flights), w.class)
	if len(windows) == 0 {
		return
	}
	b.s.mu.Lock()
	first := slices.IndexFunc(windows, func(w *window) bool {
		return slices.ContainsFunc(w.flights, func(f *flight) bool { return f.waiters > 0 })
	})
	b.s.mu.Unlock()
	first = max(0, first)
	for i, other := range windows {
		if i != first {
			b.giveBack(other.flights)
		}
	}
	b.fetch(ctx, windows[first])
}

// divide says which units of v other caches seem to have.
func (b *Blob) divide(v *view, units []int) (fetch, local []int) {
	if b.borrower == nil {
		return units, nil
	}
	const step = 1024
	var chunks []rafs.Chunk
	var of []int // which of units
	found := make([]bool, len(units))
	flush := func() {
		for i, yes := range b.borrower.Find(chunks) {
			found[of[i]] = found[of[i]] || yes
		}
		chunks, of = chunks[:0], of[:0]
	}
	for i, n := range units {
		for _, c := range v.unit(n).chunks {
			if !b.cache.Ready(c) {
				chunks, of = append(chunks, c), append(of, i)
			}
		}
		if len(chunks) >= step {
			flush()
		}
	}
	flush()
	for i, n := range units {
		if found[i] {
			local = append(local, n)
		} else {
			fetch = append(fetch, n)
		}
	}
	return fetch, local
}

// lend borrows units of v. What was there no more when it came to it is left.
func (b *Blob) lend(ctx context.Context, v *view, units []int) {
	for part := range slices.Chunk(units, borrowStep) {
		if ctx.Err() != nil {
			return
		}
		var flights []*flight
		for _, n := range part {
			if f := b.begin(v.unit(n), Prefetch); f != nil {
				flights = append(flights, f)
			}
		}
		b.giveBack(b.borrow(ctx, flights))
	}
}

// giveBack gives units up that were begun: those that somebody waits for are queued again, others are left.
func (b *Blob) giveBack(flights []*flight) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	for _, f := range flights {
		f.started, f.queued = false, false
		switch {
		case b.ctx.Err() != nil:
			b.s.finish(f, ErrClosed)
		case f.waiters > 0:
			b.enqueue(f)
		default:
			b.s.finish(f, context.Canceled)
		}
	}
}

// pieces is how many requests are made at once for what lies between borrowed units.
const pieces = 4

// streamAround gets a prefetch blob of which other caches have a part: that is borrowed, in order, while what lies between is
// fetched, in requests that leave it out.
func (b *Blob) streamAround(ctx context.Context, v *view, fetch, local []int) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(pieces + 1)
	g.Go(func() error { b.lend(gctx, v, local); return nil })
	b.fetchRuns(gctx, g, v, fetch, local)
	if err := g.Wait(); err != nil {
		return err
	}
	left := slices.DeleteFunc(local, func(n int) bool { return !b.missing(v.unit(n).chunks) })
	g, gctx = errgroup.WithContext(ctx)
	g.SetLimit(pieces)
	b.fetchRuns(gctx, g, v, left, nil)
	return g.Wait()
}

// fetchRuns has units fetched by g, in order of their places, in requests that leave out those of local, which is ordered.
func (b *Blob) fetchRuns(ctx context.Context, g *errgroup.Group, v *view, fetch, local []int) {
	for len(fetch) > 0 && ctx.Err() == nil {
		first := v.unit(fetch[0])
		units, last := []unit{first}, first
		for _, n := range fetch[1:] {
			u := v.unit(n)
			next, _ := slices.BinarySearch(local, last.n)
			if u.off < last.end() || u.end()-first.off > maxWindow || n < last.n || next < len(local) && local[next] < n {
				break
			}
			units, last = append(units, u), u
		}
		fetch = fetch[len(units):]
		g.Go(func() error { return b.persist(ctx, units, Prefetch) })
	}
}

// broken reports whether a request for all of units would read through borrowed ones.
func (b *Blob) broken(v *view, units []int) bool {
	if b.borrower == nil || len(units) == 0 {
		return false
	}
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return b.lent.between(v, slices.Min(units), slices.Max(units))
}
