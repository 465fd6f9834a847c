package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	// maxUnit bounds the stored bytes of a unit, which are held in memory. A chunk has at most 16 MiB; gzip contexts are
	// as long as their writer made them, 1 to 2 MiB usually.
	maxUnit = 64 << 20

	// maxTable bounds a blob.meta table: 16 million chunks of 24 bytes.
	maxTable = 512 << 20
)

// Blob is one blob that is being filled. Safe for concurrent use.
type Blob struct {
	s        *Scheduler
	share    *Share
	info     rafs.Blob
	cache    Cache
	borrower Borrower // the cache, if it is one
	opened   time.Time
	ctx      context.Context //nolint:containedctx // its life: what it fetches belongs to several waiters
	cancel   context.CancelCauseFunc
	work     sync.WaitGroup // requests that are on the way

	preparing chan struct{} // holds one while somebody reads the table
	streaming chan struct{} // holds one while a run streams the blob
	view      atomic.Pointer[view]
	paced     atomic.Int32 // tracks that somebody may touch, see Touched

	// Guarded by s.mu:
	sources []*origin
	flights map[int64]*flight // by the key of their units, until they are done
	queue   []*flight         // demands that nobody has begun, and some that somebody has
	running int               // workers of demands
	stream  *stream           // the stream that is reading this blob
	tracks  []*track          // who reads front to back, the one that came last at the end
	aheads  int               // requests for them that run and nobody asked for
	asked   map[int64]int     // requests of demands so far, by the part of the blob file, of crowd bytes, that they began in
	listed  map[uint64]bool   // uncompressed offsets of chunks that a prefetch table names
	whole   bool              // this is a prefetch blob: all of it is listed
	over    bool              // what was to be prefetched of this blob's image is there, or failed
	stats   Stats
	misses  []Miss
	lent    lent
}

// Open adds a blob: its chunks that the image uses, in any order, go from src to cache. The caller closes it before it closes
// either. It asks for nothing yet. Errors are those of [rafs.OpenBlob] for blobs that cannot be read.
// It has a share of the memory of its own: see [Share].
func (s *Scheduler) Open(cache Cache, src Source, info rafs.Blob, chunks []rafs.Chunk) (*Blob, error) {
	return s.Share().Open(cache, src, info, chunks)
}

func (s *Scheduler) open(h *Share, cache Cache, src Source, info rafs.Blob, chunks []rafs.Chunk) (*Blob, error) {
	b := &Blob{
		s: s, share: h, info: info, cache: cache, sources: []*origin{newOrigin(src)}, opened: time.Now(),
		preparing: make(chan struct{}, 1), streaming: make(chan struct{}, 1), flights: map[int64]*flight{}, asked: map[int64]int{},
	}
	reader, err := s.reader(info, &span{})
	if err != nil {
		return nil, err
	}
	v := &view{chunks: inOrder(slices.Clone(chunks))}
	if !info.PlacedByMeta() {
		v.reader = reader
	}
	b.view.Store(v)
	b.borrower, _ = cache.(Borrower)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	b.ctx, b.cancel = context.WithCancelCause(s.ctx)
	s.blobs[b] = true
	return b, nil
}

// reader opens info over table, with the decompressor of all blobs. Its data come from elsewhere.
func (s *Scheduler) reader(info rafs.Blob, table io.ReaderAt) (*rafs.BlobReader, error) {
	var r *rafs.BlobReader
	var err error
	if _, separate := info.MetaBlob(); separate {
		r, err = rafs.OpenSeparateBlob(&span{}, table, info)
	} else {
		r, err = rafs.OpenBlob(table, info)
	}
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.decoder == nil {
		s.decoder = r
	}
	r.ShareDecoder(s.decoder)
	return r, nil
}

// errLate is returned when the table is being asked for, without success, for longer than somebody waits.
var errLate = errors.New("the source gave nothing in time")

// ID returns the blob's id.
func (b *Blob) ID() string { return b.info.ID }

// AddSource adds another place that has the blob, asked when those before fail.
func (b *Blob) AddSource(src Source) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.sources = append(slices.Clip(b.sources), newOrigin(src))
}

// Close is [Blob.End], and returns when the channel is closed: a source that ignores the end of its context keeps it waiting.
func (b *Blob) Close() { <-b.End() }

// End ends what is being fetched: whoever waits gets [ErrClosed]. The channel is closed when nothing uses the cache or the source any more;
// until then they stay open.
func (b *Blob) End() <-chan struct{} {
	b.cancel(ErrClosed)
	b.s.mu.Lock()
	delete(b.s.blobs, b)
	for _, f := range b.flights {
		if !f.started {
			b.s.finish(f, ErrClosed)
		}
	}
	b.s.mu.Unlock()
	return after(b.work.Wait)
}

// after returns a channel that is closed when wait has returned.
func after(wait func()) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		wait()
	}()
	return done
}

// Extend adds chunks of the same blob that another image uses.
func (b *Blob) Extend(ctx context.Context, chunks []rafs.Chunk) error {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	old := b.view.Load()
	v := &view{chunks: inOrder(slices.Concat(old.chunks, chunks)), reader: old.reader}
	if len(v.chunks) == len(old.chunks) {
		return nil
	}
	if v.reader != nil && b.info.PlacedByMeta() {
		if err := v.place(ctx); err != nil {
			return err
		}
	}
	b.view.Store(v)
	return nil
}

// Chunks returns the chunks that images use, by offset, without fields that say whose they are. Nobody may change them.
func (b *Blob) Chunks() []rafs.Chunk { return b.view.Load().chunks }

// Complete reports whether every chunk that an image uses is in the cache.
func (b *Blob) Complete() bool { return !b.missing(b.view.Load().chunks) }

// prepare returns the view with its units, which for some blobs takes reading a table. It gives up at the deadline, and, with errElsewhere, when the chunks
// of want, of which there may be none, came from elsewhere meanwhile.
func (b *Blob) prepare(ctx context.Context, deadline time.Time, class Class, want ...rafs.Chunk) (*view, error) {
	if v := b.view.Load(); v.reader != nil {
		return v, nil
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case b.preparing <- struct{}{}:
	case <-timer.C:
		return nil, fmt.Errorf("table of blob %s: %w", b.info.ID, errLate)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-b.ctx.Done():
		return nil, context.Cause(b.ctx)
	}
	defer func() { <-b.preparing }()
	if v := b.view.Load(); v.reader != nil {
		return v, nil
	}
	corrupt := 0
	for attempt := 0; ; attempt++ {
		reader, err := b.readTable(ctx, class, corrupt > 0)
		if err == nil {
			return b.complete(ctx, reader)
		}
		err = fmt.Errorf("table of blob %s: %w", b.info.ID, err)
		if isCorrupt(err) {
			if corrupt++; corrupt > 1 {
				return nil, err
			}
			continue
		}
		if b.elsewhere(ctx, want, err) {
			return nil, errElsewhere
		}
		if err := b.s.pause(ctx, b, attempt, deadline, err); err != nil {
			return nil, err
		}
	}
}

// complete gives the view its reader and units.
func (b *Blob) complete(ctx context.Context, reader *rafs.BlobReader) (*view, error) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	v := &view{chunks: b.view.Load().chunks, reader: reader}
	if err := v.place(ctx); err != nil {
		return nil, err
	}
	b.view.Store(v)
	return v, nil
}

// forget drops the table that reader has read: what it says leads to wrong bytes.
func (b *Blob) forget(reader *rafs.BlobReader) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	if v := b.view.Load(); v.reader == reader {
		b.view.Store(&view{chunks: v.chunks})
	}
}

// readTable reads the blob.meta table.
func (b *Blob) readTable(ctx context.Context, class Class, suspect bool) (*rafs.BlobReader, error) {
	off, n := b.info.MetaRange()
	if n == 0 || n > maxTable || off > 1<<62 {
		return nil, fmt.Errorf("%w: blob.meta of %d bytes at %d", rafs.ErrUnsupported, n, off)
	}
	rc, err := b.open(ctx, class, Request{Offset: int64(off), Length: int64(n), Meta: true, Suspect: suspect})
	if err != nil {
		return nil, err
	}
	p, err := io.ReadAll(io.LimitReader(rc, int64(n)))
	if err = errors.Join(err, rc.Close()); err != nil {
		return nil, err
	}
	if uint64(len(p)) != n {
		return nil, io.ErrUnexpectedEOF
	}
	table := &span{off: int64(off), p: p}
	base, err := b.s.reader(b.info, table)
	if err != nil {
		return nil, err
	}
	reader, err := base.Over(&span{}) // reads the table
	if err != nil {
		return nil, err
	}
	table.p = nil // parsed
	return reader, nil
}

// missing reports whether one of chunks is not in the cache.
func (b *Blob) missing(chunks []rafs.Chunk) bool {
	return slices.ContainsFunc(chunks, func(c rafs.Chunk) bool { return !b.cache.Ready(c) })
}

// isCorrupt tells bytes that are not what they should be, which another copy of them may be.
func isCorrupt(err error) bool {
	return errors.Is(err, rafs.ErrDigest) || errors.Is(err, rafs.ErrInvalid)
}

// span is a part of a file that is in memory.
type span struct {
	off int64
	p   []byte
}

// ReadAt implements io.ReaderAt; what the span does not have ends it.
func (s *span) ReadAt(p []byte, off int64) (int, error) {
	at := off - s.off
	if at < 0 || at >= int64(len(s.p)) {
		return 0, io.EOF
	}
	n := copy(p, s.p[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
