package fill

import (
	"context"
	"errors"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Asker is a [Cache] that may have others fetch chunks that the sources of a blob did not give. What it does not get is asked of those
// again: it has no errors. It is safe for concurrent use, and does not take longer than readers have patience.
type Asker interface {
	// Elsewhere puts those of chunks into the cache that others can get, verified.
	Elsewhere(ctx context.Context, chunks []rafs.Chunk)
}

// errElsewhere ends what is not needed any more: the chunks came from elsewhere.
var errElsewhere = errors.New("the chunks came from elsewhere")

// elsewhere has others asked for what is missing of chunks, after the sources failed with err, and reports whether all of them are there.
func (b *Blob) elsewhere(ctx context.Context, chunks []rafs.Chunk, err error) bool {
	asker, ok := b.cache.(Asker)
	_, ours := errors.AsType[*cacheError](err)
	if !ok || ours || ctx.Err() != nil || len(chunks) == 0 {
		return false
	}
	want := slices.DeleteFunc(slices.Clone(chunks), b.cache.Ready)
	asker.Elsewhere(ctx, want)
	b.count(want)
	return !b.missing(chunks)
}

// rescue ends those flights of w that others could get after its request failed with err. What nobody waits for waits for its own sources: for those who are
// asked it is a demand.
func (b *Blob) rescue(ctx context.Context, w *window, err error) {
	var want []rafs.Chunk
	b.s.mu.Lock()
	for _, f := range w.flights {
		if f.waiters > 0 {
			want, f.asked = append(want, f.u.chunks...), true
		}
	}
	b.s.mu.Unlock()
	b.elsewhere(ctx, want, err)
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	w.flights = slices.DeleteFunc(w.flights, func(f *flight) bool {
		if b.missing(f.u.chunks) {
			return false
		}
		b.s.finish(f, nil)
		return true
	})
}
