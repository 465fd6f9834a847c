package fill

import (
	"context"
	"time"

	"go.uber.org/zap"
)

// Pauses before the rest is looked at again for what it did not get.
const (
	restSoon  = 50 * time.Millisecond
	restAgain = 30 * time.Second // and no more often while nothing comes
)

// rests fetches the rest of all blobs, until there is none or the run ends. What failed, whatever it was, is tried again: a disk was full, a
// credential was old, or a file was away. So is what was corrupt, and what was on its way to a reader.
func (r *Run) rests() {
	wait := time.Duration(0) // none before the first pass
	last := 0                // chunks that were missing
	for {
		left, missing := r.left()
		if missing != last {
			last, wait = missing, min(wait, restSoon)
		}
		if len(left) == 0 && r.finish() {
			return
		}
		if wait > 0 && r.later(wait) != nil {
			return
		}
		for _, b := range left {
			err := r.rest(b)
			if r.ctx.Err() != nil {
				return
			}
			if err != nil && wait == 0 {
				r.s.o.Log.Warn("background fetch goes on later", zap.String("blob", b.info.ID), zap.Error(err))
			}
		}
		wait = min(max(restSoon, 4*wait), restAgain)
	}
}

// left returns the blobs that are not complete, and how many of their chunks are missing.
func (r *Run) left() (blobs []*Blob, missing int) {
	for _, b := range r.plan.Blobs {
		if b == nil || b.ctx.Err() != nil {
			continue
		}
		before := missing
		for _, c := range b.view.Load().chunks {
			if !b.cache.Ready(c) {
				missing++
			}
		}
		if missing > before {
			blobs = append(blobs, b)
		}
	}
	return blobs, missing
}

// finish ends the rest, unless it was to look again.
func (r *Run) finish() bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	again := r.again
	r.again, r.over = false, !again
	return !again
}

// Again has the rest look for what is missing, for chunks that were taken out of the cache. false: the run is over, or about to be,
// and another one has to be started.
func (r *Run) Again() bool {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.again = !r.over && r.ctx.Err() == nil
	return r.again
}

// rest fetches what is missing of b once, window by window, while nobody waits for anything.
func (r *Run) rest(b *Blob) error {
	for next := 0; ; {
		v, err := b.prepare(r.ctx, time.Now().Add(forever), Rest)
		if err != nil {
			return err
		}
		var units []unit
		if units, next = b.nextRest(v, next, r.plan.Rate); len(units) == 0 {
			if b.info.PlacedByMeta() && !b.Complete() { // what is corrupt may be so because of the table
				b.forget(v.reader)
			}
			return nil
		}
		first, last := units[0], units[len(units)-1]
		if err := r.allowed(last.end() - first.off); err != nil {
			return err
		}
		if err := b.persist(r.ctx, units, Rest); err != nil {
			return err
		}
	}
}

// later waits for d or the end of the run.
func (r *Run) later(d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// persist is fetchUnits until it succeeds or fails for good.
func (b *Blob) persist(ctx context.Context, units []unit, class Class) error {
	for attempt := 0; ; attempt++ {
		err := b.fetchUnits(ctx, units, class)
		if err == nil {
			return nil
		}
		if err := b.s.pause(ctx, b, attempt, time.Now().Add(forever), err); err != nil {
			return err
		}
	}
}

// nextRest returns missing units that one request gets, from unit from on, and where to go on behind them.
func (b *Blob) nextRest(v *view, from int, rate int64) (units []unit, next int) {
	window := int64(1 << 20) // short: a reader may come
	if rate > 0 {
		window = min(window, max(64<<10, rate/2))
	}
	var first, last unit
	n := from
	for ; n < v.count(); n++ {
		u := v.unit(n)
		if u.size == 0 || !b.missing(u.chunks) {
			continue
		}
		if len(units) > 0 && (u.off < last.end() || u.off-last.end() > b.s.o.Near || u.end()-first.off > window) {
			break
		}
		if len(units) == 0 {
			first = u
		}
		units, last = append(units, u), u
	}
	return units, n
}

// allowed waits until n bytes of the rest may be asked for.
func (r *Run) allowed(n int64) error {
	if err := r.s.calmed(r.ctx, r.plan.Background == BackgroundIdle); err != nil {
		return err
	}
	if r.plan.Rate <= 0 {
		return nil
	}
	now := time.Now()
	if wait := r.rateNext.Sub(now); wait > 0 {
		if err := r.later(wait); err != nil {
			return err
		}
		now = r.rateNext
	}
	r.rateNext = now.Add(time.Duration(float64(n) / float64(r.plan.Rate) * float64(time.Second)))
	return nil
}

// calmed waits until nobody waits for anything and no list is being fetched, with idle: for a while. A source that is down makes
// readers wait for long; those of others need not wait for them: after some time it returns anyhow.
func (s *Scheduler) calmed(ctx context.Context, idle bool) error {
	began := time.Now()
	for {
		s.mu.Lock()
		busy, calm, left := s.demands > 0 || s.prefetching > 0, s.calm, time.Duration(0)
		if idle {
			left = s.o.Idle - time.Since(s.lastDemand)
		}
		s.mu.Unlock()
		if !busy && left <= 0 || !idle && time.Since(began) > patience {
			return nil
		}
		wait := patience
		if !busy {
			wait = left
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-calm:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
		timer.Stop()
	}
}
