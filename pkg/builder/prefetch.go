package builder

import (
	"context"
	"fmt"
	"hash/maphash"
	"slices"
	"sort"

	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// prefetchPlan says what the prefetch blob is to hold. It is pure data.
type prefetchPlan struct {
	chunks []rafs.Chunk  // one per digest, in the order of the list
	inodes []*rafs.Inode // regular files with data, in the order of the list, each once
	before []uint64      // pairs of indexes of chunks that some file has in a row, the second<<32 | the first; sorted, each once
	stats  PrefetchStats

	missing []string // the first of the listed paths that are not in the image, at most MaxMissingPaths
	copies  *copies  // chunks of the blob that are stored as in the source
}

// follow finds which chunks of the plan follow each other in files. Its time and memory grow with the chunks of the
// files, however many different ones a chunk follows.
func (p *prefetchPlan) follow(ctx context.Context, files []*rafs.Inode) error {
	planned := make(map[rafs.Digest]uint64, len(p.chunks))
	for i := range p.chunks {
		planned[p.chunks[i].Digest] = uint64(i)
	}
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.before = appendPairs(p.before, f.Chunks, planned)
	}
	slices.Sort(p.before)
	p.before = slices.Clip(slices.Compact(p.before))
	return nil
}

// appendPairs appends the pairs of planned chunks that follow each other in list.
func appendPairs(pairs []uint64, list []rafs.Chunk, planned map[rafs.Digest]uint64) []uint64 {
	var first uint64
	ok := false
	for i := range list {
		second, found := planned[list[i].Digest]
		// Holes repeat one pair many times.
		if pair := second<<32 | first; ok && found && (len(pairs) == 0 || pairs[len(pairs)-1] != pair) {
			pairs = append(pairs, pair)
		}
		first, ok = second, found
	}
	return pairs
}

// ahead calls yield with the index of every chunk that some file has in front of chunk i.
func (p *prefetchPlan) ahead(i int, yield func(first int)) {
	n, _ := slices.BinarySearch(p.before, uint64(i)<<32)           //nolint:gosec // an index of chunks
	for ; n < len(p.before) && p.before[n]>>32 == uint64(i); n++ { //nolint:gosec // an index of chunks
		yield(int(p.before[n] & (1<<32 - 1)))
	}
}

// touched reports whether one of spans overlaps [off, off+length); nil is the whole file. Spans
// are disjoint and sorted: a file may have a quarter of a million of them, and as many chunks.
func touched(spans []trace.Range, off, length int64) bool {
	if spans == nil {
		return true
	}
	i := sort.Search(len(spans), func(i int) bool { return spans[i].Offset+spans[i].Length > off })
	return i < len(spans) && spans[i].Offset < off+length
}

// copyJob reads one chunk of a layer's blob, verified, and makes it ready for the prefetch blob.
type copyJob struct {
	ctx   context.Context //nolint:containedctx // a unit of work of one call
	src   *rafs.BlobReader
	index int // of the plan's chunks
	chunk rafs.Chunk
	best  bool // compress anew

	blob   *rafs.BlobWriter // the prefetch blob
	copies *copies
	read   rafs.ChunkBuffer
	buf    []byte

	out     rafs.EncodedChunk
	recoded bool
	sum     uint64 // of what is stored, when it is the source's
	copied  bool   // it is
	err     error
	done    chan struct{}
}

func (j *copyJob) run(enc *rafs.Encoder) {
	defer func() { j.done <- struct{}{} }()
	j.err = j.encode(enc)
}

func (j *copyJob) encode(enc *rafs.Encoder) error {
	c := j.chunk
	if err := j.src.ReadInto(j.ctx, c, &j.read); err != nil {
		return err
	}
	raw := j.read.Raw
	j.out = rafs.EncodedChunk{Digest: c.Digest, Compressed: c.Compressed, UncompressedSize: c.UncompressedSize}
	j.recoded, j.copied = false, false
	// What another compressor made, a dictionary's perhaps, or a batch is of no use in this blob.
	foreign := j.src.Blob().Compressor != j.blob.Compressor() || j.src.Blob().Features&dependentBlob != 0
	if j.blob.Batches(c.UncompressedSize) { // the writer compresses it
		j.out.Data, j.out.Compressed = raw, false
		return nil
	}
	if j.best || foreign {
		data, compressed, err := enc.Encode(j.buf, raw)
		if err != nil {
			return err
		}
		if foreign && !compressed {
			j.out.Data, j.out.Compressed = raw, false
			return nil
		}
		if compressed && (foreign || len(data) < int(c.CompressedSize)) {
			j.recoded = true
			j.buf = data
			j.out.Data, j.out.Compressed = data, true
			return nil
		}
	}
	// What was read decompresses to what the digest says: the same bytes need no such proof again.
	j.out.Data, j.copied = j.read.Stored, true
	j.sum = maphash.Bytes(j.copies.seed, j.out.Data)
	return nil
}

// copies are chunks whose stored bytes were verified before they were written.
type copies struct {
	seed maphash.Seed
	sums map[rafs.Digest]uint64 // of the stored bytes
}

func newCopies() *copies { return &copies{seed: maphash.MakeSeed(), sums: map[rafs.Digest]uint64{}} }

// verify reads a chunk back. A copy must be what was written, anything else must have its
// digest. No copies: nil.
func (s *copies) verify(ctx context.Context, r *rafs.BlobReader, c rafs.Chunk, buf *rafs.ChunkBuffer) error {
	// In blobs with batches a chunk may be a part of one.
	if s != nil && r.Blob().Features&dependentBlob == 0 {
		if sum, ok := s.sums[c.Digest]; ok {
			err := r.ReadStoredInto(ctx, c, buf)
			if err == nil && maphash.Bytes(s.seed, buf.Stored) != sum {
				err = fmt.Errorf("%w: chunk %d of blob %s is stored with other bytes than were written", ErrDigest, c.Index, r.Blob().ID)
			}
			return err
		}
	}
	return r.ReadInto(ctx, c, buf)
}

// writeChunks appends the plan's chunks to w in order and returns their new records by
// digest. open gives the blob that a chunk's number means.
func (p *prefetchPlan) writeChunks(ctx context.Context, pool *pool, w *rafs.BlobWriter, best bool, open func(blob uint16) (*rafs.BlobReader, error), progress func(done int64)) (map[rafs.Digest]rafs.Chunk, error) {
	records := make(map[rafs.Digest]rafs.Chunk, len(p.chunks))
	p.copies = newCopies()
	var done int64
	commit := func(j *copyJob) error {
		err := p.commit(ctx, j, w, records)
		if err == nil {
			done += int64(j.chunk.UncompressedSize)
			progress(done)
		}
		return err
	}
	// A ring of jobs: each is committed before its slot is used again. Chunks take unequal times: behind one that takes long, the
	// others go on.
	ring := make([]*copyJob, 2*pool.workers)
	for i, c := range p.chunks {
		slot := &ring[i%len(ring)]
		if *slot == nil {
			*slot = &copyJob{ctx: ctx, best: best, blob: w, copies: p.copies, done: make(chan struct{}, 1)}
		} else if err := commit(*slot); err != nil {
			return nil, err
		}
		src, err := open(c.Blob)
		if err != nil {
			return nil, err
		}
		(*slot).src, (*slot).index, (*slot).chunk = src, i, c
		select {
		case pool.jobs <- *slot:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	for i := range ring {
		// The oldest first, which is what the next chunk would have replaced.
		if j := ring[(len(p.chunks)+i)%len(ring)]; j != nil {
			if err := commit(j); err != nil {
				return nil, err
			}
		}
	}
	p.stats.Chunks = len(p.chunks)
	return records, nil
}

// commit waits for j, appends its chunk to w and puts the new record into records.
func (p *prefetchPlan) commit(ctx context.Context, j *copyJob, w *rafs.BlobWriter, records map[rafs.Digest]rafs.Chunk) error {
	select {
	case <-j.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if j.err != nil {
		return fmt.Errorf("copy chunk %x: %w", j.chunk.Digest[:8], j.err)
	}
	var before []rafs.Chunk
	p.ahead(j.index, func(first int) {
		if rec, ok := records[p.chunks[first].Digest]; ok {
			before = append(before, rec)
		}
	})
	rec, err := w.AppendAfter(before, j.out)
	if err != nil {
		return fmt.Errorf("write blob: %w", err)
	}
	records[j.chunk.Digest] = rec
	if j.recoded {
		p.stats.Recoded++
	}
	if j.copied {
		p.copies.sums[j.chunk.Digest] = j.sum
	}
	return nil
}
