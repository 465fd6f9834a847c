package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// MaxWorkers is the most Workers that [Options] and [OptimizeOptions] may ask for; more than CPUs only take memory.
const MaxWorkers = 1024

// settleWorkers returns the number of workers that n asks for.
func settleWorkers(n int) (int, error) {
	switch {
	case n < 0 || n > MaxWorkers:
		return 0, fmt.Errorf("%w: %d workers, want 0 to %d", ErrUnsupported, n, MaxWorkers)
	case n == 0:
		return min(runtime.GOMAXPROCS(0), MaxWorkers), nil
	}
	return n, nil
}

// pool runs jobs on a fixed number of workers, each with an encoder of its own. All methods
// are safe for concurrent use. It ends when its context does.
type pool struct {
	jobs    chan job
	workers int
}

// job is a unit of work; the worker sends on done when it is finished.
type job interface {
	run(enc *rafs.Encoder)
}

// startPool starts n workers in g, which end when jobs is closed or ctx ends.
func startPool(ctx context.Context, g *errgroup.Group, n int, c rafs.Compressor, level rafs.Level) (*pool, error) {
	p := &pool{jobs: make(chan job, n), workers: n}
	for range n {
		enc, err := rafs.NewEncoder(c, level)
		if err != nil {
			close(p.jobs)
			return nil, err
		}
		g.Go(func() error {
			for {
				select {
				case j, ok := <-p.jobs:
					if !ok {
						return nil
					}
					j.run(enc)
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		})
	}
	return p, nil
}

// close lets the workers end when all jobs are done. No job may be submitted afterwards.
func (p *pool) close() { close(p.jobs) }

// batch is a run of chunks that one worker encodes: many small files or one large chunk.
// Batches are recycled; they are what bounds the memory of a conversion.
type batch struct {
	digester rafs.Digester
	dict     *dict
	together uint32 // smaller chunks are compressed with others, by the blob's writer
	raw      []byte // filled in order; the array has the batch size
	out      []byte // encoded chunks; the array is large enough for all
	pieces   []piece
	matches  []rafs.Match // of the pieces; as many bytes as raw
	err      error
	done     chan struct{} // one token per run
}

// piece is one chunk of a batch.
type piece struct {
	ino    *rafs.Inode
	off, n int // bytes of raw
	first  int // of the batch's matches; those of the next piece begin where its own end
	chunk  rafs.EncodedChunk
	known  *rafs.Chunk    // the dictionary's chunk; nil: chunk is to be stored
	place  *rafs.RefPlace // where the chunk is in the layer, when it stays there
	zero   *zeroChunk     // what the chunk is, instead of bytes of raw
}

func newBatch(size int, d rafs.Digester, dict *dict, together uint32) *batch {
	return &batch{
		digester: d,
		dict:     dict,
		together: together,
		raw:      make([]byte, 0, size),
		matches:  make([]rafs.Match, 0, size/matchSize),
		// What no compressor exceeds, lz4's bound being the largest.
		out:  make([]byte, 0, size+size/255+64),
		done: make(chan struct{}, 1),
	}
}

func (b *batch) reset() {
	b.raw, b.out, b.pieces, b.matches, b.err = b.raw[:0], b.out[:0], b.pieces[:0], b.matches[:0], nil
}

// matchSize is the size of a rafs.Match in bytes.
const matchSize = 8

// matchesOf returns what is known of piece i.
func (b *batch) matchesOf(i int) []rafs.Match {
	end := len(b.matches)
	if i+1 < len(b.pieces) {
		end = b.pieces[i+1].first
	}
	return b.matches[b.pieces[i].first:end]
}

// run digests and compresses the pieces.
func (b *batch) run(enc *rafs.Encoder) {
	defer func() { b.done <- struct{}{} }()
	for i := range b.pieces {
		p := &b.pieces[i]
		var sum rafs.Digest
		if p.zero != nil {
			sum = p.zero.sum()
		} else {
			sum = b.digester.Sum(b.raw[p.off : p.off+p.n])
		}
		if known, ok := b.dict.find(sum, p.n); ok {
			p.known = &known
			continue
		}
		if b.err = b.encode(enc, i, sum); b.err != nil {
			return
		}
	}
}

// encode makes the chunk of piece i as it is to be stored, in the batch's own array where there is room.
func (b *batch) encode(enc *rafs.Encoder, i int, sum rafs.Digest) error {
	p := &b.pieces[i]
	var src []byte
	if p.zero != nil {
		src = p.zero.raw
	} else {
		src = b.raw[p.off : p.off+p.n]
	}
	p.chunk = rafs.EncodedChunk{Digest: sum, Data: src, UncompressedSize: uint32(p.n)} //nolint:gosec // at most the chunk size
	if p.chunk.UncompressedSize < b.together {
		return nil
	}
	if p.zero != nil {
		var err error
		p.chunk.Data, p.chunk.Compressed, err = p.zero.encode(enc)
		return err
	}
	tail := b.out[len(b.out):]
	data, compressed, err := enc.EncodeMatches(tail, src, b.matchesOf(i))
	if err != nil {
		return err
	}
	if compressed && len(data) <= cap(tail) {
		b.out = b.out[:len(b.out)+len(data)]
	}
	p.chunk.Data, p.chunk.Compressed = data, compressed
	return nil
}

// chunker cuts files into chunks, hands them to the pool in batches, and appends the
// encoded chunks to the layer's blob in the order of the files. It is the dataSink of one
// layer: writeFile and close belong to one goroutine, commit to another.
type chunker struct {
	pool      *pool
	chunkSize int
	digester  rafs.Digester
	layer     uint16 // Chunk.Blob until the image's blobs are numbered
	blob      *rafs.BlobWriter
	ref       *rafs.RefBuilder // instead of blob, when the chunks stay in the layer
	dict      *dict
	known     int           // chunks that the dictionary has; commit counts
	encoder   *rafs.Encoder // of commit, for chunks that the dictionary has in vain; made when first needed
	together  uint32        // smaller chunks go into batches of the blob

	stream *layerStream // what the tar is read from; nil: nothing is known of its bytes
	place  func() int64 // how many bytes of the tar were read; nil: that is not known, and holes are read as data
	zero   *zeroChunk   // of holes; made when first needed

	free  chan *batch // batches that any layer may fill; their number is the bound
	order chan *batch // batches in the order of the layer, for commit
	cur   *batch      // being filled

	flushed func() // told after each batch, by the goroutine of writeFile; may be nil
}

// minBatch makes batches of small chunks worth the handing over.
const minBatch = 1 << 20

// newBatches returns the batches of a conversion with so many workers and layers at once:
// one for each worker, and for each layer one being filled and one being committed.
// They are nil, to be made when first needed: a small image needs one.
func newBatches(workers, layers int) chan *batch {
	n := workers + 2*layers
	free := make(chan *batch, n)
	for range n {
		free <- nil
	}
	return free
}

func newChunker(p *pool, free chan *batch, o Options, dict *dict, layer uint16, blob *rafs.BlobWriter) *chunker {
	return &chunker{
		pool: p, chunkSize: int(o.ChunkSize), digester: o.Digester, layer: layer, blob: blob, dict: dict, together: o.BatchSize / 2,
		free: free, order: make(chan *batch, cap(free)),
	}
}

// writeFile reads size bytes from r and sends them on their way into ino.Chunks.
func (c *chunker) writeFile(ctx context.Context, ino *rafs.Inode, r io.Reader, size int64) error {
	for size > 0 {
		n := int(min(size, int64(c.chunkSize)))
		if c.cur != nil && (cap(c.cur.raw)-len(c.cur.raw) < n || len(c.cur.pieces) >= maxPieces) {
			if err := c.flush(ctx); err != nil {
				return err
			}
		}
		if c.cur == nil {
			if err := c.next(ctx); err != nil {
				return err
			}
		}
		if err := c.readPiece(ino, r, n); err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}

// readPiece reads n bytes into the current batch, as one chunk.
func (c *chunker) readPiece(ino *rafs.Inode, r io.Reader, n int) error {
	b, off, place := c.cur, len(c.cur.raw), int64(0)
	if c.ref != nil {
		at, err := c.readRefPiece(r, b.raw[off:off+n])
		if err != nil {
			return cutOff(err)
		}
		b.raw = b.raw[:off+n]
		b.pieces = append(b.pieces, piece{ino: ino, off: off, n: n, first: len(b.matches), place: at})
		return nil
	}
	if c.stream != nil {
		place = c.stream.place()
		c.stream.log.keep(place)
	}
	hole, err := readHoles(r, b.raw[off:off+n], c.place)
	if err != nil {
		return cutOff(err)
	}
	if hole && n == c.chunkSize {
		if c.zero == nil {
			c.zero = newZeroChunk(n, c.digester)
		}
		b.pieces = append(b.pieces, piece{ino: ino, off: off, n: n, first: len(b.matches), zero: c.zero})
		return nil
	}
	b.raw = b.raw[:off+n]
	b.pieces = append(b.pieces, piece{ino: ino, off: off, n: n, first: len(b.matches)})
	// Holes of a sparse file are no bytes of the tar.
	if c.stream != nil && c.stream.place()-place == int64(n) {
		b.matches = c.stream.log.appendTo(b.matches, n)
	}
	return nil
}

// cutOff says of an end where more should come what it is.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// next waits for a free batch.
func (c *chunker) next(ctx context.Context) error {
	select {
	case b := <-c.free:
		if b == nil {
			b = newBatch(max(c.chunkSize, minBatch), c.digester, c.dict, c.together)
		}
		b.reset()
		c.cur = b
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// flush hands the current batch over.
func (c *chunker) flush(ctx context.Context) error {
	b := c.cur
	c.cur = nil
	select {
	case c.pool.jobs <- b:
	case <-ctx.Done():
		return ctx.Err()
	}
	c.order <- b // never blocks: it holds all batches there are
	if c.flushed != nil {
		c.flushed()
	}
	return nil
}

// close hands over what is left. commit ends after that.
func (c *chunker) close(ctx context.Context) error {
	defer close(c.order)
	if c.cur != nil && len(c.cur.pieces) > 0 {
		return c.flush(ctx)
	}
	return nil
}

// commit appends batches to the blob until close or an error.
func (c *chunker) commit(ctx context.Context) error {
	for {
		var b *batch
		select {
		case b = <-c.order:
		case <-ctx.Done():
			return ctx.Err()
		}
		if b == nil {
			return nil
		}
		select {
		case <-b.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if b.err != nil {
			return b.err
		}
		for i := range b.pieces {
			p := &b.pieces[i]
			if err := c.setApart(b, i); err != nil {
				return fmt.Errorf("compress chunk: %w", err)
			}
			if err := c.store(p); err != nil {
				return fmt.Errorf("write blob: %w", err)
			}
			p.ino, p.chunk.Data, p.known, p.place, p.zero = nil, nil, nil, nil, nil
		}
		c.free <- b // never blocks: it has room for all batches there are
	}
}

// setApart has the chunk of piece i stored although the dictionary has it, where that one would be misread behind the
// chunk before it in the file. Which chunk that is only commit knows, so that the workers have not compressed this one.
func (c *chunker) setApart(b *batch, i int) error {
	p := &b.pieces[i]
	n := len(p.ino.Chunks)
	if p.known == nil || n == 0 || !rafs.Misread(&p.ino.Chunks[n-1], p.known) {
		return nil
	}
	if c.encoder == nil {
		var err error
		if c.encoder, err = rafs.NewEncoder(c.blob.Compressor(), rafs.LevelDefault); err != nil {
			return err
		}
	}
	sum := p.known.Digest
	p.known = nil
	return b.encode(c.encoder, i, sum)
}

// store stores p's chunk, unless the dictionary has it, and gives its inode the record.
func (c *chunker) store(p *piece) error {
	list := p.ino.Chunks
	if p.known != nil {
		c.known++
		p.ino.Chunks = append(list, *p.known)
		return nil
	}
	var before []rafs.Chunk
	if n := len(list); n > 0 && list[n-1].Blob == c.layer {
		before = list[n-1:]
	}
	if c.ref != nil {
		rec, err := c.ref.AppendAfter(before, *p.place, p.chunk.Digest)
		if err != nil {
			return err
		}
		list = append(list, rec)
	} else {
		var err error
		if list, err = c.blob.Extend(list, before, p.chunk); err != nil {
			return err
		}
	}
	list[len(list)-1].Blob = c.layer
	p.ino.Chunks = list
	return nil
}
