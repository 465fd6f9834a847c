package fill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Scheduler decides what is fetched when, for all blobs of a daemon. Safe for concurrent use.
type Scheduler struct {
	o       Options
	ctx     context.Context //nolint:containedctx // its life: what it fetches belongs to several waiters
	cancel  context.CancelCauseFunc
	runs    sync.WaitGroup
	memory  pool
	full    atomic.Int64 // until when the disk counts as full, since began
	scratch sync.Pool    // *scratch

	mu          sync.Mutex // guards what follows, and parts of Blob, flight, stream and Run
	closed      bool
	blobs       map[*Blob]bool
	decoder     *rafs.BlobReader // whose decompressor all share
	demands     int              // flights that somebody waits for
	prefetching int              // runs that are at their lists
	calm        chan struct{}    // closed when demands and prefetching may have become 0
	lastDemand  time.Time
}

// scratch is memory that is used again.
type scratch struct {
	stored []byte
	chunk  rafs.ChunkBuffer
}

// New returns a scheduler. The caller closes it.
func New(o Options) *Scheduler {
	o = o.settle()
	s := &Scheduler{o: o, blobs: map[*Blob]bool{}, calm: make(chan struct{}), memory: newPool(o.Memory / 2)}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.scratch.New = func() any { return new(scratch) }
	return s
}

// Close is [Scheduler.End], and returns when the channel is closed.
func (s *Scheduler) Close() { <-s.End() }

// End ends everything. The channel is closed when nothing runs any more. Blobs and runs need not be closed before.
func (s *Scheduler) End() <-chan struct{} {
	s.mu.Lock()
	s.closed = true
	blobs := make([]*Blob, 0, len(s.blobs))
	for b := range s.blobs {
		blobs = append(blobs, b)
	}
	s.mu.Unlock()
	s.cancel(ErrClosed)
	return after(func() {
		for _, b := range blobs {
			b.Close()
		}
		s.runs.Wait()
	})
}

// flight is a unit on its way, or about to be.
type flight struct {
	b       *Blob
	u       unit
	class   Class
	started bool      // somebody fetches it
	queued  bool      // a worker is going to
	counted bool      // in Scheduler.demands
	waiters int       // calls of Ensure
	asked   bool      // others were asked for its chunks, for those waiters
	until   time.Time // when a demand is given up
	corrupt int       // how often what came was not right
	done    chan struct{}
	err     error // once done
}

// finish ends f; the caller holds s.mu.
func (s *Scheduler) finish(f *flight, err error) {
	select {
	case <-f.done:
		return
	default:
	}
	f.started, f.err = true, err
	delete(f.b.flights, f.u.key())
	if f.counted {
		s.demands--
		s.lastDemand = time.Now()
		s.stir()
	}
	close(f.done)
}

// stir wakes who waits for calm; the caller holds s.mu.
func (s *Scheduler) stir() {
	if s.demands == 0 || s.prefetching == 0 {
		close(s.calm)
		s.calm = make(chan struct{})
	}
}

// demand makes f one that somebody waits for; the caller holds s.mu.
func (s *Scheduler) demand(f *flight, until time.Time) {
	if !f.counted {
		f.counted = true
		s.demands++
	}
	if until.After(f.until) {
		f.until = until
	}
}

// Ensure returns nil when [off, off+n) of the blob's uncompressed address space is in the cache; it fetches what is missing. Else it returns
// why not: [ErrRange], [ErrClosed], the cause of ctx, an error of the cache, [rafs.ErrDigest] or [rafs.ErrInvalid] for bytes that were not
// right twice, or the source's error when that is final or went on for [Options].Limit; a deadline of ctx bounds what a source does
// that neither fails nor goes on. Such an error is that of this call alone: the next one tries again.
func (b *Blob) Ensure(ctx context.Context, off, n int64) error {
	v := b.view.Load()
	lo, hi := v.find(off, n)
	if lo == hi {
		return fmt.Errorf("%w: blob %s: [%d, +%d)", ErrRange, b.info.ID, off, n)
	}
	b.Touched(off, n)
	chunks := v.chunks[lo:hi]
	if !b.missing(chunks) {
		return nil
	}
	began := time.Now()
	err := b.ensure(ctx, chunks, began.Add(b.s.o.Limit))
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.stats.Waits++
	b.stats.Waited += time.Since(began)
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) { // else who asked has it from elsewhere, or asks another daemon
		b.stats.Failed++
		b.s.o.Log.Warn("a read failed", zap.String("blob", b.info.ID), zap.Int64("offset", off), zap.Int64("length", n), zap.Error(err))
	}
	return err
}

func (b *Blob) ensure(ctx context.Context, chunks []rafs.Chunk, until time.Time) error {
	reread := !b.info.PlacedByMeta()
	if b.borrowNow(ctx, chunks); !b.missing(chunks) {
		return nil
	}
	if err := b.reserve(chunks); err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		v, err := b.prepare(ctx, until, Demand, chunks...)
		if errors.Is(err, errElsewhere) {
			return nil
		}
		if err != nil {
			return err
		}
		stale := false // somebody fetched with a table that was dropped
		for _, f := range b.want(v, chunks, until) {
			err = errors.Join(err, b.await(ctx, f))
			stale = stale || f.u.reader != v.reader
		}
		switch {
		case !b.missing(chunks): // whatever happened to others of their units
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case b.ctx.Err() != nil:
			return context.Cause(b.ctx)
		case attempt < 8 && (errors.Is(err, ErrClosed) || errors.Is(err, context.Canceled)):
			continue // a run fetched it, of a mount that went meanwhile
		case err == nil && attempt > 2: // once more may be for chunks that were added to a unit on its way
			return fmt.Errorf("blob %s: chunks from %d on did not stay in the cache", b.info.ID, chunks[0].Index)
		case err != nil && isCorrupt(err) && stale && attempt < 8:
			continue
		case err != nil && isCorrupt(err) && !reread:
			reread = true // its table has no digest of its own: that may be what is wrong
			b.forget(v.reader)
			continue
		case err != nil && (isCorrupt(err) || !b.retry(err).Again || time.Now().After(until)):
			return err
		}
		if err != nil { // of somebody who had less patience
			if err := b.s.pause(ctx, b, attempt, until, err); err != nil {
				return err
			}
		}
	}
}

// want returns the flights of what is missing of chunks, which lie side by side, and makes those that there are none of.
func (b *Blob) want(v *view, chunks []rafs.Chunk, until time.Time) []*flight {
	var flights []*flight
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	at, ok := v.index(&chunks[0])
	if b.ctx.Err() != nil || !ok {
		return nil
	}
	last := chunks[len(chunks)-1].UncompressedOffset
	for n := v.unitOf(at); n < v.count(); n++ {
		u := v.unit(n)
		if u.chunks[0].UncompressedOffset > last {
			break
		}
		lack := slices.IndexFunc(u.chunks, func(c rafs.Chunk) bool {
			return c.UncompressedOffset >= chunks[0].UncompressedOffset && c.UncompressedOffset <= last && !b.cache.Ready(c)
		})
		if lack < 0 {
			continue
		}
		f := b.flights[u.key()]
		if f == nil {
			f = b.newFlight(u, Demand)
			if b.stream == nil || b.stream.wait(u) == 0 {
				b.enqueue(f)
			}
			b.miss(&u.chunks[lack], f.queued)
		}
		b.s.demand(f, until)
		f.waiters++
		flights = append(flights, f)
	}
	return flights
}

// newFlight makes a flight; the caller holds s.mu.
func (b *Blob) newFlight(u unit, class Class) *flight {
	f := &flight{b: b, u: u, class: class, done: make(chan struct{})}
	b.flights[u.key()] = f
	return f
}

// enqueue hands f to a worker; the caller holds s.mu.
func (b *Blob) enqueue(f *flight) {
	if f.queued || f.started {
		return
	}
	f.queued = true
	b.queue = append(b.queue, f)
	if b.running < b.s.o.Requests {
		b.running++
		b.work.Go(b.worker)
	}
}

// await returns the outcome of f. Where it is a stream's to bring, but that takes too long, it is fetched.
func (b *Blob) await(ctx context.Context, f *flight) error {
	b.s.mu.Lock()
	var late <-chan time.Time
	if !f.queued && !f.started {
		patience := time.Duration(0)
		if b.stream != nil {
			patience = b.stream.wait(f.u)
		}
		timer := time.NewTimer(patience)
		defer timer.Stop()
		late = timer.C
	}
	b.s.mu.Unlock()
	defer b.leave(f)
	for {
		select {
		case <-f.done:
			return f.err
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-b.ctx.Done(): // who fetches it may take no notice
			return context.Cause(b.ctx)
		case <-late:
			late = nil
			b.s.mu.Lock()
			b.enqueue(f)
			b.s.mu.Unlock()
		}
	}
}

// leave is called when a call of Ensure waits for f no more. What nobody waits for and nobody has begun is not fetched.
func (b *Blob) leave(f *flight) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	if f.waiters--; f.waiters == 0 && !f.started {
		b.s.finish(f, context.Canceled)
	}
}

// worker fetches what is queued until nothing is.
func (b *Blob) worker() {
	for {
		w := b.next()
		if w == nil {
			return
		}
		b.serve(b.ctx, w)
	}
}

// next takes the oldest demand and makes a window of it and what lies near; nil: there is none, and the worker ends.
func (b *Blob) next() *window {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	for len(b.queue) > 0 {
		f := b.queue[0]
		b.queue = b.queue[1:]
		if f.started {
			continue
		}
		return b.around(b.view.Load(), f)
	}
	b.queue = nil
	b.running--
	return nil
}

// around makes a window of f, demands that wait beside it, and a little of what follows, or else of what lies before it.
func (b *Blob) around(v *view, f *flight) *window {
	w := &window{class: Demand, flights: []*flight{f}, off: f.u.off, end: f.u.end()}
	f.started = true
	at, ok := v.index(&f.u.chunks[0])
	if f.u.size == 0 || !ok || v.reader != f.u.reader {
		return w
	}
	t := b.follow(f.u.off)
	w.ahead = max(t.ahead, b.crowded(f.u.off))
	for n := v.unitOf(at) + 1; n < v.count(); n++ {
		if !b.take(w, v.unit(n), true) {
			break
		}
	}
	for n := v.unitOf(at) - 1; n >= 0; n-- {
		if !b.take(w, v.unit(n), false) {
			break
		}
	}
	slices.SortFunc(w.flights, func(x, y *flight) int { return cmp.Compare(x.u.off, y.u.off) })
	b.followed(t, v, w)
	return w
}

// crowded returns how far a request at off goes because of others near it, and counts it.
func (b *Blob) crowded(off int64) int64 {
	at := off / crowd
	near := b.asked[at] + (b.asked[at-1]+b.asked[at+1])/2
	b.asked[at]++
	if near == 0 {
		return 0
	}
	return min(b.s.o.Ahead<<min(near, 10), maxCrowd)
}

// take extends w by u, behind it or before it, when that is wanted or cheap; false: what comes next is too far.
func (b *Blob) take(w *window, u unit, behind bool) bool {
	gap := u.off - w.end
	if !behind {
		gap = w.off - u.end()
	}
	length := w.end - w.off + gap + u.size
	if gap < 0 || gap > b.s.o.Near || length > maxWindow || u.size == 0 {
		return false
	}
	f := b.flights[u.key()]
	cheap := b.stream == nil && !b.s.isFull() && (behind && length <= w.ahead || length <= b.s.o.Ahead) // what lies before a demand makes it wait
	if f == nil && b.lent.has(b.view.Load(), u.n) {
		return false // a request would read through it
	}
	if f != nil && f.started || f == nil && (!cheap || !b.missing(u.chunks)) {
		return true // there may be wanted ones beyond it
	}
	if f == nil {
		f = b.newFlight(u, Demand)
	}
	f.started = true
	w.flights = append(w.flights, f)
	w.off, w.end = min(w.off, u.off), max(w.end, u.end())
	return true
}

// retry asks the source about err.
func (b *Blob) retry(err error) Retry {
	if _, ours := errors.AsType[*cacheError](err); ours {
		return Retry{}
	}
	if errors.Is(err, errRemoved) || errors.Is(err, errSlow) {
		return Retry{Again: true}
	}
	b.s.mu.Lock()
	sources := b.sources
	b.s.mu.Unlock()
	var r Retry
	for _, o := range sources {
		if one := o.src.Retry(err); one.Again {
			if r = one; one.After == 0 {
				break
			}
		}
	}
	return r
}

// pause waits before another attempt; it returns err when there should be none: it is final, or the deadline would pass.
func (s *Scheduler) pause(ctx context.Context, b *Blob, attempt int, deadline time.Time, err error) error {
	r := b.retry(err)
	if !r.Again || r.Most > 0 && attempt >= r.Most || ctx.Err() != nil || b.ctx.Err() != nil {
		return errors.Join(err, context.Cause(ctx), context.Cause(b.ctx))
	}
	wait := max(r.After, s.o.Backoff<<min(attempt, 3))
	if left := time.Until(deadline); wait > left {
		return fmt.Errorf("blob %s: given up after %v: %w", b.info.ID, s.o.Limit, err)
	}
	s.mu.Lock()
	b.stats.Retries++
	s.mu.Unlock()
	s.o.Log.Debug("fetch again", zap.String("blob", b.info.ID), zap.Int("attempt", attempt+1), zap.Duration("wait", wait), zap.Error(err))
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-b.ctx.Done():
		return context.Cause(b.ctx)
	}
}
