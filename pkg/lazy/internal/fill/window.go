package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// window is what one request fetches: [off, end) of the blob file, with the units of flights in it, in order.
type window struct {
	class    Class
	flights  []*flight
	off, end int64
	ahead    int64 // how long it may get by what nobody waits for
}

// cacheError is an error of the cache: asking for the bytes again does not help.
type cacheError struct{ err error }

func (e *cacheError) Error() string { return "cache: " + e.err.Error() }
func (e *cacheError) Unwrap() error { return e.err }

// fetch ends every flight of w. Those of demands are tried until they succeed or their time is over, others once; what is
// corrupt is fetched a second time.
func (b *Blob) fetch(ctx context.Context, w *window) {
	for attempt := 0; ; attempt++ {
		err := b.attempt(ctx, w)
		if len(w.flights) == 0 {
			return
		}
		if err == nil { // what is left was corrupt
			w.off, w.end = extent(w.flights)
			attempt = -1
			continue
		}
		if b.rescue(ctx, w, err); len(w.flights) == 0 {
			return
		}
		if w.class != Demand {
			if b.end(w, err) {
				return
			}
			continue
		}
		var until time.Time
		b.s.mu.Lock()
		for _, f := range w.flights {
			if f.until.After(until) {
				until = f.until
			}
		}
		b.s.mu.Unlock()
		if err := b.s.pause(ctx, b, attempt, until, err); err != nil && b.end(w, err) {
			return
		}
		w.off, w.end = extent(w.flights)
	}
}

// end gives the flights of w up and reports whether that is all of them: w keeps those that somebody came to wait for after others were
// asked.
func (b *Blob) end(w *window, err error) bool {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	w.flights = slices.DeleteFunc(w.flights, func(f *flight) bool {
		if f.waiters > 0 && !f.asked {
			return false
		}
		b.s.finish(f, err)
		return true
	})
	if len(w.flights) == 0 {
		return true
	}
	w.off, w.end = extent(w.flights)
	return false
}

// extent is the part of the blob file that the units of flights take.
func extent(flights []*flight) (off, end int64) {
	off = flights[0].u.off
	for _, f := range flights {
		off, end = min(off, f.u.off), max(end, f.u.end())
	}
	return off, end
}

// attempt makes the request of w and ends the flights whose units come; w keeps the others. A nil error says that what
// is left came and was corrupt.
func (b *Blob) attempt(ctx context.Context, w *window) error {
	var rc io.ReadCloser
	if w.end > w.off {
		var err error
		r := Request{Offset: w.off, Length: w.end - w.off, Suspect: w.flights[0].corrupt > 0}
		if rc, err = b.open(ctx, w.class, r); err != nil {
			return err
		}
		defer rc.Close()
	}
	pos := w.off
	var again []*flight
	for i, f := range w.flights {
		err := b.load(ctx, rc, w.class, f.u, &pos)
		if isStream(err) {
			w.flights = append(again, w.flights[i:]...)
			return err
		}
		if isCorrupt(err) && f.corrupt == 0 {
			f.corrupt++
			again = append(again, f)
			continue
		}
		if err == nil {
			proved(rc)
		}
		b.s.mu.Lock()
		b.s.finish(f, err)
		b.s.mu.Unlock()
	}
	w.flights = again
	return nil
}

// streamError is an error of the stream of a request, in contrast to one of what came.
type streamError struct{ err error }

func (e *streamError) Error() string { return e.err.Error() }
func (e *streamError) Unwrap() error { return e.err }

func isStream(err error) bool {
	_, ok := errors.AsType[*streamError](err)
	return ok
}

// load reads u from rc, which is at *pos, and puts its chunks into the cache.
func (b *Blob) load(ctx context.Context, rc io.Reader, class Class, u unit, pos *int64) error {
	begin, err := first(rc, u, pos)
	if err != nil {
		return &streamError{err}
	}
	release, err := b.share.hold(ctx, class, weight(u))
	if err != nil {
		return &streamError{err}
	}
	defer release()
	mem := b.s.scratch.Get().(*scratch) //nolint:forcetypeassert // nothing else is in it
	defer b.s.scratch.Put(mem)
	if err := mem.read(rc, u, begin, pos); err != nil {
		return &streamError{err}
	}
	return b.decode(ctx, u, mem, class)
}

// first waits for the first of u's stored bytes from r, which is at *pos, before u or at it, and returns it. There is none when the size
// of u is 0.
func first(r io.Reader, u unit, pos *int64) (b [1]byte, err error) {
	if u.size == 0 {
		return b, nil
	}
	if u.off < *pos {
		return b, fmt.Errorf("%w: a unit at %d behind %d", rafs.ErrInvalid, u.off, *pos)
	}
	if err := skip(r, u.off, pos); err != nil {
		return b, err
	}
	n, err := io.ReadFull(r, b[:])
	*pos += int64(n)
	return b, short(err)
}

// read fills the scratch with the stored bytes of u from r: b, which came first, and the rest.
func (m *scratch) read(r io.Reader, u unit, b [1]byte, pos *int64) error {
	if int64(cap(m.stored)) < u.size {
		m.stored = make([]byte, u.size)
	}
	m.stored = m.stored[:u.size]
	got := copy(m.stored, b[:])
	n, err := io.ReadFull(r, m.stored[got:])
	*pos += int64(n)
	return short(err)
}

// skip reads r from *pos to off.
func skip(r io.Reader, off int64, pos *int64) error {
	n, err := io.CopyN(io.Discard, r, off-*pos)
	*pos += n
	return short(err)
}

// short makes an error of a stream that ends too soon.
func short(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// decode verifies the chunks of u, whose stored bytes are in mem, and puts them into the cache. One that is corrupt does not
// keep the others from it.
func (b *Blob) decode(ctx context.Context, u unit, mem *scratch, class Class) error {
	over, err := u.reader.Over(&span{off: u.off, p: mem.stored})
	if err != nil {
		return err
	}
	var faults error
	chunks := 0
	for _, c := range u.chunks {
		if b.cache.Ready(c) {
			continue
		}
		if err := over.ReadInto(ctx, c, &mem.chunk); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if !isCorrupt(err) && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)) {
				err = fmt.Errorf("%w: %w", rafs.ErrInvalid, err) // it wants bytes that are not its own
			}
			faults = errors.Join(faults, err)
			continue
		}
		if err := b.s.noteFull(b.cache.Put(c, mem.chunk.Raw)); err != nil {
			return &cacheError{err}
		}
		chunks++
	}
	b.s.mu.Lock()
	b.stats.of(class).Chunks += int64(chunks)
	if faults != nil {
		b.stats.Corrupt++
	}
	b.s.mu.Unlock()
	if faults != nil {
		b.s.o.Log.Warn("corrupt data", zap.String("blob", b.info.ID), zap.Int64("offset", u.off), zap.Int64("length", u.size), zap.Error(faults))
	}
	return faults
}
