package fill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Background is what is done about chunks that no list names and nobody wants yet.
type Background uint8

// The policies.
const (
	BackgroundIdle Background = iota // they are fetched while nobody has waited for anything for a while
	BackgroundFull                   // they are fetched as soon as nobody waits and all lists are done
	BackgroundNone                   // they are left
)

// ParseBackground reads "none", "idle" or "full"; anything else is an error.
func ParseBackground(s string) (Background, error) {
	for _, b := range []Background{BackgroundIdle, BackgroundFull, BackgroundNone} {
		if s == b.String() {
			return b, nil
		}
	}
	return 0, fmt.Errorf("background %q: want none, idle or full", s)
}

// String returns the name that ParseBackground reads.
func (b Background) String() string {
	switch b {
	case BackgroundIdle:
		return "idle"
	case BackgroundFull:
		return "full"
	case BackgroundNone:
		return "none"
	default:
		return "unknown"
	}
}

// Plan is what a mount fetches by itself.
type Plan struct {
	// Blobs are the blobs of the image, at their index in its table.
	Blobs []*Blob
	// Stream is the index of the prefetch blob, which is read front to back; -1: there is none.
	Stream int
	// Table are the chunks of the files of the prefetch table, see [TableChunks]. With a prefetch blob, which is the list then, they come
	// after it, when nobody has waited for anything for [Options].Idle, and do not count as listed.
	Table []rafs.Chunk
	// Background says what to do about the rest.
	Background Background
	// Rate bounds the stored bytes a second of the rest; 0: no bound.
	Rate int64
	// Listed, if not nil, is called when the list is done, which is the prefetch blob, or the table where there is none: before the rest.
	Listed func()
}

// TableChunks returns the chunks of the files in the prefetch table of img, in its order, each once; of a directory, those of
// all files below. A table that names the root says nothing about the order of a start, and gives nil: the rest is for [Plan].Background.
func TableChunks(img *rafs.Image) []rafs.Chunk {
	type key struct {
		blob  uint16
		index uint32
	}
	var list []rafs.Chunk
	seen := map[key]bool{}
	for _, top := range img.Prefetch {
		if top == img.Root {
			return nil
		}
		below := rafs.Image{Root: top}
		_ = below.Walk(func(_ string, ino *rafs.Inode) error {
			for _, c := range ino.Chunks {
				if k := (key{c.Blob, c.Index}); !seen[k] {
					seen[k] = true
					list = append(list, c)
				}
			}
			return nil
		}) // its error is that of the function
	}
	return list
}

// Run carries out a plan.
type Run struct {
	s        *Scheduler
	cancel   context.CancelCauseFunc
	listed   chan struct{} // closed when the lists are done
	done     chan struct{}
	plan     Plan
	promised *stream         // what readers are told to wait for before the request is made
	ctx      context.Context //nolint:containedctx // its life
	over     bool            // it looks for nothing any more; guarded by s.mu
	again    bool            // it is to look again; guarded by s.mu
	rateNext time.Time       // when the next bytes of the rest may be asked for; of the one goroutine that does
}

// Start begins with p. The caller closes the run, before the blobs. Errors on the way are logged: what could not be prefetched is
// fetched when it is wanted.
func (s *Scheduler) Start(p Plan) *Run {
	r := &Run{s: s, plan: p, listed: make(chan struct{}), done: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancelCause(s.ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		close(r.listed)
		close(r.done)
		return r
	}
	r.mark()
	s.runs.Go(r.run)
	return r
}

// Listed is closed when the prefetch blob is done, or the table where there is none, as far as it can be.
func (r *Run) Listed() <-chan struct{} { return r.listed }

// Done is closed when the run is over.
func (r *Run) Done() <-chan struct{} { return r.done }

// Close is [Run.End], and returns when the channel is closed.
func (r *Run) Close() { <-r.End() }

// End ends the run. The channel, that of [Run.Done], is closed when it makes no requests any more.
func (r *Run) End() <-chan struct{} {
	r.cancel(ErrClosed)
	return r.done
}

// mark notes which chunks the lists name; the caller holds s.mu.
func (r *Run) mark() {
	r.s.prefetching++
	if b := r.blob(r.plan.Stream); b != nil {
		b.whole = true
		if b.stream == nil {
			r.promised = newStream(0) // about to be asked for
			b.stream = r.promised
		}
		return
	}
	for i := range r.plan.Table {
		c := &r.plan.Table[i]
		if b := r.blob(int(c.Blob)); b != nil {
			if b.listed == nil {
				b.listed = map[uint64]bool{}
			}
			b.listed[c.UncompressedOffset] = true
		}
	}
}

func (r *Run) blob(n int) *Blob {
	if n < 0 || n >= len(r.plan.Blobs) {
		return nil
	}
	return r.plan.Blobs[n]
}

func (r *Run) run() {
	defer close(r.done)
	list, behind := r.table, func() error { return nil }
	if b := r.blob(r.plan.Stream); b != nil {
		list, behind = func() error { return b.streamAll(r.ctx, r.promised) }, r.tableBehind
	}
	err := list()
	r.s.mu.Lock()
	r.s.prefetching--
	r.s.stir()
	for _, b := range r.plan.Blobs {
		if b != nil {
			b.over = true
		}
	}
	r.s.mu.Unlock()
	close(r.listed)
	if r.plan.Listed != nil {
		r.plan.Listed()
	}
	err = errors.Join(err, behind())
	if err != nil && r.ctx.Err() == nil {
		r.s.o.Log.Warn("prefetch ended early", zap.Error(err))
	}
	r.plan.Table = nil
	if r.plan.Background != BackgroundNone && r.ctx.Err() == nil {
		r.rests()
	}
	r.s.mu.Lock()
	r.over = true
	r.s.mu.Unlock()
}

// tableBehind fetches the files of the table behind a prefetch blob: they have all that it left out, because the start does not read it. So
// that comes when nobody has waited for anything for a while, or after some time: the source of others may be down for long.
func (r *Run) tableBehind() error {
	began := time.Now()
	for len(r.plan.Table) > 0 {
		r.s.mu.Lock()
		since := r.s.lastDemand
		if r.s.demands > 0 {
			since = time.Now()
		}
		r.s.mu.Unlock()
		if since.Before(began) {
			since = began
		}
		left := min(r.s.o.Idle-time.Since(since), patience-time.Since(began))
		if left <= 0 {
			return r.table()
		}
		if err := r.later(left); err != nil {
			return err
		}
	}
	return nil
}

// patience is how long demands hold up what nobody waits for: those of a source that is down do so for long.
const patience = 5 * time.Second

// forever is how long a run tries: until it is closed.
const forever = 1 << 62

// tableStep is how many stored bytes of the prefetch table are put in the order of their places.
const tableStep = 8 << 20

// table fetches the files of the prefetch table, in steps.
func (r *Run) table() error {
	g, ctx := errgroup.WithContext(r.ctx)
	g.SetLimit(prefetchRequests)
	var step []*wanted
	var size int64
	var errs []error
	flush := func() {
		slices.SortStableFunc(step, func(x, y *wanted) int {
			return cmp.Or(cmp.Compare(x.blob, y.blob), cmp.Compare(x.u.off, y.u.off))
		})
		for len(step) > 0 {
			var units []unit
			b := r.blob(step[0].blob)
			end := step[0].u.off
			n := 0
			for ; n < len(step); n++ {
				w := step[n]
				if n > 0 && (w.blob != step[0].blob || w.u.off-end > r.s.o.Near || w.u.end()-step[0].u.off > maxWindow) {
					break
				}
				if n > 0 && w.u.key() == step[n-1].u.key() {
					continue
				}
				units, end = append(units, w.u), max(end, w.u.end())
			}
			step = step[n:]
			g.Go(func() error { return b.persist(ctx, units, Table) })
		}
		step, size = nil, 0
	}
	for i := range r.plan.Table {
		c := &r.plan.Table[i]
		b := r.blob(int(c.Blob))
		if b == nil || b.cache.Ready(*c) {
			continue
		}
		v, err := b.prepare(ctx, time.Now().Add(forever), Table)
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			errs = append(errs, err) // this blob cannot be read, others can
			continue
		}
		at, ok := v.index(c)
		if !ok {
			continue
		}
		w := &wanted{blob: int(c.Blob), u: v.unit(v.unitOf(at))}
		step = append(step, w)
		if size += w.u.size; size >= tableStep {
			flush()
		}
	}
	flush()
	return errors.Join(append(errs, g.Wait())...)
}

// wanted is a unit of some blob.
type wanted struct {
	blob int
	u    unit
}

// fetchUnits fetches units that lie near each other, those that nobody else has.
func (b *Blob) fetchUnits(ctx context.Context, units []unit, class Class) error {
	var failed []error
	w := &window{class: class}
	for _, u := range units {
		if f := b.begin(u, class); f != nil {
			w.flights = append(w.flights, f)
		}
	}
	if len(w.flights) == 0 {
		return nil
	}
	for _, w := range b.split(b.borrow(ctx, w.flights), class) {
		flights := slices.Clone(w.flights)
		b.fetch(ctx, w)
		for _, f := range flights {
			if err := f.err; err != nil && !isCorrupt(err) {
				failed = append(failed, err)
			}
		}
	}
	return errors.Join(failed...)
}
