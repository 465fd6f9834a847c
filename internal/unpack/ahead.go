package unpack

import (
	"context"
	"iter"
	"runtime"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// maxAhead bounds the bytes that are read and not yet written. A chunk has at most 16 MiB.
const maxAhead = 8 << 20

// maxBatch bounds the bytes, and maxBatchChunks the chunks, that are read in one go where files are small.
const (
	maxBatch       = 256 << 10
	maxBatchChunks = 256
)

// maxKept is the largest chunk whose memory is used again, and maxSpare how many of these memories are kept; images
// have chunks of 1 MiB unless they say otherwise.
const (
	maxKept  = 1 << 20
	maxSpare = 8
)

// ahead reads chunks before they are asked for, several at a time, in the order in which files
// are written. Its read is for one goroutine.
type ahead struct {
	src    func(ctx context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error
	order  chan *batch
	free   chan *batch // that were used
	spare  chan *rafs.ChunkBuffer
	room   *semaphore.Weighted
	cancel context.CancelFunc
	group  *errgroup.Group

	now  *batch           // the one that chunks are taken from
	next int              // its chunk that is read next
	lost bool             // the order was not kept: chunks are read when they are asked for
	own  rafs.ChunkBuffer // for those
}

// batch is chunks that are read one after the other.
type batch struct {
	chunks []rafs.Chunk
	size   int64             // what they hold
	done   chan struct{}     // gets one value when what follows is set
	parts  [][]byte          // the chunks' bytes, as far as there was no error
	err    error             // of the chunk behind these
	slab   []byte            // memory of all parts where there are several
	buffer *rafs.ChunkBuffer // memory of the part where there is one
}

// readAhead begins to read the chunks of src. The caller calls stop.
func readAhead(ctx context.Context, src Source) *ahead {
	ctx, cancel := context.WithCancel(ctx)
	workers := runtime.GOMAXPROCS(0)
	a := &ahead{
		src: src.Read, order: make(chan *batch, 64), free: make(chan *batch, 64), spare: make(chan *rafs.ChunkBuffer, maxSpare),
		room: semaphore.NewWeighted(maxAhead), cancel: cancel, group: &errgroup.Group{},
	}
	jobs := make(chan *batch)
	for range workers {
		a.group.Go(func() error {
			var own rafs.ChunkBuffer // for chunks of at most maxBatch bytes
			for b := range jobs {
				if len(b.chunks) == 1 {
					a.one(ctx, b)
				} else {
					a.several(ctx, b, &own)
				}
				b.done <- struct{}{}
			}
			return nil
		})
	}
	a.group.Go(func() error {
		defer close(jobs)
		defer close(a.order)
		a.plan(ctx, src.Image, jobs)
		return nil
	})
	return a
}

// plan puts the chunks of the image into batches and these into order and jobs, until ctx ends.
func (a *ahead) plan(ctx context.Context, img *rafs.Image, jobs chan<- *batch) {
	b := a.empty()
	send := func() bool {
		if a.room.Acquire(ctx, b.weight()) != nil {
			return false // who stopped this knows why
		}
		for _, to := range []chan<- *batch{a.order, jobs} { // order first: what is read is always in it
			select {
			case to <- b:
			case <-ctx.Done():
				return false
			}
		}
		b = a.empty()
		return true
	}
	for ino := range files(ctx, img) {
		for _, c := range ino.Chunks {
			size := int64(c.UncompressedSize)
			if len(b.chunks) > 0 && (b.size+size > maxBatch || len(b.chunks) == maxBatchChunks) && !send() {
				return
			}
			b.chunks, b.size = append(b.chunks, c), b.size+size
		}
	}
	if len(b.chunks) > 0 {
		send()
	}
}

// empty returns a batch without chunks, one that was used where there is one.
func (a *ahead) empty() *batch {
	select {
	case b := <-a.free:
		b.chunks, b.parts, b.slab = b.chunks[:0], b.parts[:0], b.slab[:0]
		b.size, b.err = 0, nil
		return b
	default:
		return &batch{done: make(chan struct{}, 1)}
	}
}

// weight is what the batch counts for of the room: no less than it keeps.
func (b *batch) weight() int64 { return min(max(b.size, maxBatch), maxAhead) }

// one reads the only chunk of a batch, into memory that [ahead.turn] takes back.
func (a *ahead) one(ctx context.Context, b *batch) {
	select {
	case b.buffer = <-a.spare:
	default:
		b.buffer = new(rafs.ChunkBuffer)
	}
	if b.err = a.src(ctx, b.chunks[0], b.buffer); b.err == nil {
		b.parts = append(b.parts, b.buffer.Raw)
	}
}

// several reads the chunks of a batch one after the other.
func (a *ahead) several(ctx context.Context, b *batch, own *rafs.ChunkBuffer) {
	if b.slab == nil {
		b.slab = make([]byte, 0, maxBatch)
	}
	for _, c := range b.chunks {
		if b.err = a.src(ctx, c, own); b.err != nil {
			return
		}
		// Should it grow, the parts before it stay where they are.
		b.slab = append(b.slab, own.Raw...)
		b.parts = append(b.parts, b.slab[len(b.slab)-len(own.Raw):])
	}
}

// read returns the bytes of c, valid until the next call.
func (a *ahead) read(ctx context.Context, c rafs.Chunk) ([]byte, error) {
	if !a.lost {
		if a.now == nil || a.next == len(a.now.chunks) {
			if err := a.turn(ctx); err != nil {
				return nil, err
			}
		}
		if b := a.now; b != nil && b.chunks[a.next] == c {
			if a.next == len(b.parts) {
				return nil, b.err
			}
			a.next++
			return b.parts[a.next-1], nil
		}
		a.lost = true
		a.cancel()
	}
	err := a.src(ctx, c, &a.own)
	return a.own.Raw, err
}

// turn goes on to the next batch; there is none behind the last.
func (a *ahead) turn(ctx context.Context) error {
	if b := a.now; b != nil {
		if b.buffer != nil && b.size <= maxKept {
			select {
			case a.spare <- b.buffer:
			default:
			}
		}
		b.buffer = nil
		select {
		case a.free <- b:
		default:
		}
	}
	a.now, a.next = <-a.order, 0
	if a.now == nil {
		return nil
	}
	select {
	case <-a.now.done:
		a.room.Release(a.now.weight())
		return nil
	case <-ctx.Done():
		a.now = nil
		return ctx.Err()
	}
}

// stop ends reading ahead and waits for it.
func (a *ahead) stop() {
	a.cancel()
	_ = a.group.Wait() // none of them fails
}

// files yields the regular files of a tree once each, in the order in which Tar and Dir write them, until
// ctx ends: a tree that is no tree has no end.
func files(ctx context.Context, img *rafs.Image) iter.Seq[*rafs.Inode] {
	return func(yield func(*rafs.Inode) bool) {
		seen := map[*rafs.Inode]bool{}
		for _, ino := range Entries(img) {
			if ctx.Err() != nil {
				return
			}
			if ino.Mode&typeMask != typeFile || seen[ino] {
				continue
			}
			seen[ino] = true
			if !yield(ino) {
				return
			}
		}
	}
}
