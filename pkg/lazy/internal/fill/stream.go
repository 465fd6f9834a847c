package fill

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

const (
	// decoders is how many units of a stream are decompressed while the next one is read.
	decoders = 2
	// firstRate and firstTrip are assumed of a link that nothing is known of: bytes a second, and the time of a request.
	firstRate = 4 << 20
	firstTrip = 50 * time.Millisecond
	// rateWindow is how long the rate of a stream is measured over.
	rateWindow = 300 * time.Millisecond
)

// stream is what is known of a request that reads a blob front to back. Guarded by Scheduler.mu.
type stream struct {
	pos    int64         // in the blob file
	trip   time.Duration // from the request to its answer
	rate   float64       // bytes a second
	mark   time.Time     // since when rate is measured
	marked int64         // pos then
}

func newStream(pos int64) *stream {
	return &stream{pos: pos, trip: firstTrip, rate: firstRate}
}

// progress notes that n bytes more were read.
func (st *stream) progress(n int, now time.Time) {
	st.pos += int64(n)
	if took := now.Sub(st.mark); took > rateWindow {
		st.rate = max(1, float64(st.pos-st.marked)/took.Seconds())
		st.mark, st.marked = now, st.pos
	}
}

// wait returns how long to wait for the stream to bring u; 0: a request for u alone is sooner, or the stream has passed it. Such a
// request takes a trip and shares the link with the stream, which brings u later all the same: it is made where it saves
// as much as it costs.
func (st *stream) wait(u unit) time.Duration {
	if u.size == 0 || u.off < st.pos-u.size {
		return 0
	}
	seconds := func(n int64) time.Duration { return time.Duration(float64(n) / st.rate * float64(time.Second)) }
	brings := seconds(max(0, u.end()-st.pos))
	own := 2*st.trip + 2*seconds(u.size)
	if brings > own {
		return 0
	}
	return 2*own + 100*time.Millisecond // longer than that, and something is wrong with the stream
}

// begin takes a unit for a stream or a window; nil: it is in the cache, or somebody else has it.
func (b *Blob) begin(u unit, class Class) *flight {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	f := b.flights[u.key()]
	if f == nil {
		if b.ctx.Err() != nil || !b.missing(u.chunks) {
			return nil
		}
		f = b.newFlight(u, class)
	}
	if f.started {
		return nil
	}
	f.started = true
	return f
}

// unfilled returns the units of b that are missing, in stored order.
func (b *Blob) unfilled(v *view) []int {
	var units []int
	sorted, last := true, int64(0)
	for n := range v.count() {
		u := v.unit(n)
		if u.size == 0 || !b.missing(u.chunks) {
			continue
		}
		sorted, last = sorted && u.off >= last, u.off
		units = append(units, n)
	}
	if !sorted {
		slices.SortStableFunc(units, func(x, y int) int { return cmp.Compare(v.unit(x).off, v.unit(y).off) })
	}
	return units
}

// streamAll reads what is missing of b in one request, front to back, until all of it is there. Where the
// stream breaks it goes on, for as long as ctx allows; promised, if not nil, stands for it until it is there; what is corrupt twice is left to those who want it.
func (b *Blob) streamAll(ctx context.Context, promised *stream) error {
	defer b.detach(promised)
	select {
	case b.streaming <- struct{}{}: // one run is enough; then there is nothing left for the next
		defer func() { <-b.streaming }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for attempt := 0; ; {
		v, err := b.prepare(ctx, time.Now().Add(forever), Prefetch)
		progress := false
		if err == nil {
			progress, err = b.streamOnce(ctx, v, promised)
		}
		if err == nil {
			return nil
		}
		if progress {
			attempt = 0
		}
		b.detach(promised)
		if err := b.s.pause(ctx, b, attempt, time.Now().Add(forever), err); err != nil {
			return err
		}
		attempt++
	}
}

// streamOnce makes one request. Without an error everything was seen.
func (b *Blob) streamOnce(ctx context.Context, v *view, promised *stream) (progress bool, err error) {
	units, local := b.divide(v, b.unfilled(v))
	if len(local) > 0 || b.broken(v, units) {
		b.detach(promised)
		slices.Sort(local)
		return false, b.streamAround(ctx, v, units, local)
	}
	if len(units) == 0 {
		return false, nil
	}
	off := v.unit(units[0]).off
	end := off
	for _, n := range units {
		end = max(end, v.unit(n).end())
	}
	st := newStream(off)
	b.attach(st)
	defer b.detach(st)
	began := time.Now()
	rc, err := b.open(ctx, Prefetch, Request{Offset: off, Length: end - off, Stream: true})
	if err != nil {
		return false, err
	}
	defer rc.Close()
	b.s.mu.Lock()
	st.mark, st.marked = time.Now(), off
	trip := st.mark.Sub(began)
	if asked, ok := rc.(interface{ Trip() time.Duration }); ok { // perhaps before we did
		trip = max(trip, asked.Trip())
	}
	st.trip = min(time.Second, max(time.Millisecond, trip))
	b.s.mu.Unlock()

	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(decoders)
	r := &watched{r: rc, b: b, st: st}
	r.refetch = func(w *window) { r.again.Go(func() { b.fetch(ctx, w) }) } // not gctx, which ends with g
	pos := off
	for _, n := range units {
		if gctx.Err() != nil {
			break // the cache fails, or we are to end
		}
		if err = b.streamUnit(gctx, g, r, v.unit(n), &pos); err != nil {
			break
		}
	}
	err = cmp.Or(g.Wait(), err, ctx.Err())
	r.again.Wait()
	return pos > off, err
}

// watched tells a stream's position and rate to those who wait for it.
type watched struct {
	r       io.Reader
	b       *Blob
	st      *stream
	again   sync.WaitGroup  // what was corrupt and is fetched a second time
	refetch func(w *window) // begins that
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	w.b.s.mu.Lock()
	w.st.progress(n, time.Now())
	w.b.s.mu.Unlock()
	return n, err
}

// streamUnit reads u from r and has it decompressed by g.
func (b *Blob) streamUnit(ctx context.Context, g *errgroup.Group, r *watched, u unit, pos *int64) error {
	if u.off < *pos {
		return nil // it lies inside another one: left to those who want it
	}
	begin, err := first(r, u, pos)
	if err != nil {
		return err
	}
	release, err := b.share.hold(ctx, Prefetch, weight(u))
	if err != nil {
		return err
	}
	mem := b.s.scratch.Get().(*scratch) //nolint:forcetypeassert // nothing else is in it
	drop := func() {
		b.s.scratch.Put(mem)
		release()
	}
	// Those who want it find the stream before its bytes are there, and a flight from then on.
	if err := mem.read(r, u, begin, pos); err != nil {
		drop()
		return err
	}
	f := b.begin(u, Prefetch)
	if f == nil {
		drop()
		return nil
	}
	g.Go(func() error {
		err := b.decode(ctx, u, mem, Prefetch)
		drop()
		if err == nil {
			proved(r.r)
		}
		if isCorrupt(err) {
			f.corrupt++
			w := &window{class: Prefetch, flights: []*flight{f}}
			w.off, w.end = extent(w.flights)
			// Not here: it takes memory, which who reads the stream may hold while it waits for us.
			r.refetch(w)
			return nil
		}
		b.s.mu.Lock()
		b.s.finish(f, err)
		b.s.mu.Unlock()
		if _, full := errors.AsType[*cacheError](err); full {
			return err
		}
		return nil
	})
	return nil
}

// attach tells demands of the stream.
func (b *Blob) attach(st *stream) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.stream = st
}

// detach ends that: whoever waits for the stream fetches for itself.
func (b *Blob) detach(st *stream) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	if st == nil || b.stream != st {
		return
	}
	b.stream = nil
	for _, f := range b.flights {
		b.enqueue(f)
	}
	b.s.o.Log.Debug("stream ended", zap.String("blob", b.info.ID), zap.Int64("at", st.pos), zap.Float64("rate", st.rate))
}
