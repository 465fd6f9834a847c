package fill

import (
	"slices"
	"time"
)

// track is a place up to which somebody reads a blob front to back. Several programs, or one that reads several files at once, make several.
type track struct {
	end   int64 // of its last request, in the blob file
	ahead int64 // how far the next one goes
	runs  bool  // one request has followed another
	v     *view // whose unit last is
	last  int   // unit of that request

	// from and to are what is fetched before anybody asks for it, in the blob's uncompressed address space: who touches it has the
	// next part fetched. Nothing, when they are the same.
	from, to uint64
}

const (
	// maxTracks is how many are known of a blob; the one that was not followed for longest goes.
	maxTracks = 8
	// aheadFrom is the length of requests from which on somebody reads front to back: the fourth, after 896 KiB. What is fetched for
	// nothing is at most 1 MiB then, the next request, and the trip of each is not waited for.
	aheadFrom = 1 << 20
	// maxAheads is how many requests that nobody asked for run at once for a blob.
	maxAheads = 2
)

// follow returns the track that a request of a demand at off goes on with, or a new one; the caller holds s.mu.
func (b *Blob) follow(off int64) *track {
	at := slices.IndexFunc(b.tracks, func(t *track) bool { return off >= t.end && off-t.end <= b.s.o.Near })
	var t *track
	switch {
	case at >= 0:
		t = b.tracks[at]
		b.tracks = slices.Delete(b.tracks, at, at+1)
		t.runs = true
		t.ahead = min(2*t.ahead, max(maxAhead, b.s.o.Ahead))
	case len(b.tracks) == maxTracks:
		t = b.tracks[0]
		b.tracks = slices.Delete(b.tracks, 0, 1)
		b.pace(t, 0, 0)
		*t = track{ahead: b.s.o.Ahead}
	default:
		t = &track{ahead: b.s.o.Ahead}
	}
	b.tracks = append(b.tracks, t) // the last one is the newest
	return t
}

// followed notes what w, a request of t, has become, and goes on behind it when t is somebody who reads front to back; the caller
// holds s.mu.
func (b *Blob) followed(t *track, v *view, w *window) {
	t.end, t.v, t.last = w.end, v, w.flights[len(w.flights)-1].u.n
	b.pace(t, 0, 0)
	if t.runs && t.ahead >= aheadFrom {
		b.readAhead(t)
	}
}

// pace sets what of t is to be touched; the caller holds s.mu.
func (b *Blob) pace(t *track, from, to uint64) {
	if t.from < t.to {
		b.paced.Add(-1)
	}
	if t.from, t.to = from, to; from < to {
		b.paced.Add(1)
	}
}

// Touched says that somebody reads [off, off+n), which is in the cache. Where that was fetched ahead of him, the next part is. It
// costs next to nothing.
func (b *Blob) Touched(off, n int64) {
	if b.paced.Load() == 0 || off < 0 || n <= 0 || n > 1<<62-off {
		return
	}
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	for _, t := range b.tracks {
		if uint64(off) < t.to && uint64(off+n) > t.from {
			b.s.lastDemand = time.Now() // somebody is at work, though he does not wait
			b.readAhead(t)
			return
		}
	}
}

// readAhead fetches what follows t; the caller holds s.mu. There is none where a list is at work, which knows better. While readers wait
// for what nobody has begun, or too much is on its way, it is left to the next one who touches what is there.
func (b *Blob) readAhead(t *track) {
	if b.aheads >= maxAheads || len(b.queue) > 0 {
		return
	}
	b.pace(t, 0, 0)
	v := b.view.Load()
	if b.ctx.Err() != nil || b.s.isFull() || t.v != v || b.stream != nil || b.s.prefetching > 0 {
		return
	}
	w := &window{class: Ahead}
	n := t.last + 1
	for ; n < v.count(); n++ {
		u := v.unit(n)
		if len(w.flights) == 0 && u.size > 0 && (u.off < t.end || u.off-t.end > maxAhead) { // he will hardly come here next
			return
		}
		f := b.flights[u.key()]
		if u.size == 0 || f != nil && f.started || !b.missing(u.chunks) {
			continue
		}
		if len(w.flights) == 0 {
			w.off, w.end = u.off, u.off
		}
		if gap := u.off - w.end; gap < 0 || gap > b.s.o.Near || len(w.flights) > 0 && u.end()-w.off > t.ahead {
			break
		}
		if f == nil {
			f = b.newFlight(u, Ahead)
		}
		f.started = true
		w.flights, w.end = append(w.flights, f), u.end()
	}
	if len(w.flights) == 0 {
		return
	}
	first, last := w.flights[0].u, w.flights[len(w.flights)-1].u
	end := last.chunks[len(last.chunks)-1]
	b.pace(t, first.chunks[0].UncompressedOffset, end.UncompressedOffset+uint64(end.UncompressedSize))
	t.end, t.last = w.end, last.n
	b.aheads++
	b.work.Go(func() {
		for _, part := range b.split(b.borrow(b.ctx, w.flights), w.class) {
			b.fetch(b.ctx, part)
		}
		b.s.mu.Lock()
		b.aheads--
		b.s.mu.Unlock()
	})
}
