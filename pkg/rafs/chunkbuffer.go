package rafs

import (
	"context"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// ChunkBuffer is a chunk that [BlobReader.ReadInto] has read, and memory for the next one. The zero value is
// ready. Not safe for concurrent use.
type ChunkBuffer struct {
	Raw    []byte // uncompressed, verified
	Stored []byte // as stored, the same array where it is not compressed; nil for chunks of batches and gzip streams

	raw, stored []byte // memory
}

// grown returns n bytes of what *p has, or of more, with [decodeSlack] bytes behind them.
func grown(p *[]byte, n int) []byte {
	if cap(*p) < n+decodeSlack {
		*p = make([]byte, n+decodeSlack)
	}
	return (*p)[: n : n+decodeSlack]
}

// ReadInto is [BlobReader.ReadChunk] with memory that is used again, and with what is stored beside what it
// decompresses to: both are of one read. The content of buf is valid until its next use.
func (b *BlobReader) ReadInto(ctx context.Context, c Chunk, buf *ChunkBuffer) error {
	err := b.load(ctx, c, buf)
	if err != nil {
		return fmt.Errorf("read chunk %d of blob %s: %w", c.Index, short(b.blob.ID), err)
	}
	return b.verify(&c, buf.Raw)
}

// verify compares the digest of a chunk's bytes.
func (b *BlobReader) verify(c *Chunk, p []byte) error {
	if b.blob.Features&disk.FeatureTarfs != 0 && c.Digest == (Digest{}) {
		return nil
	}
	if got := b.blob.Digester.Sum(p); got != c.Digest {
		return &FormatError{
			Class: ErrDigest, Section: fmt.Sprintf("chunk %d of blob %s", c.Index, short(b.blob.ID)),
			Offset: clampOffset(c.CompressedOffset), Field: b.blob.Digester.String(), Got: got, Want: c.Digest,
		}
	}
	return nil
}

// load reads and decompresses a chunk.
func (b *BlobReader) load(ctx context.Context, c Chunk, buf *ChunkBuffer) (err error) {
	buf.Raw, buf.Stored = nil, nil
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.UncompressedSize == 0 || c.UncompressedSize > b.blob.ChunkSize {
		return invalid("chunk", -1, "size", c.UncompressedSize, fmt.Sprintf("1 to %d", b.blob.ChunkSize))
	}
	if b.blob.placedByMeta() {
		r, err := b.record(c)
		switch {
		case err != nil:
			return err
		case r.batch:
			buf.Raw, err = b.readBatched(r)
			return err
		case r.zran:
			buf.Raw, err = b.readZran(r)
			return err
		}
		// The chunk table of such images is not trusted for places: see blob.meta.
		c.CompressedOffset, c.CompressedSize, c.Compressed = r.compressedOffset, r.compressedSize, r.compressed
	}
	if err := b.checkRange(c.CompressedOffset, c.CompressedSize, maxCompressed(b.blob.ChunkSize)); err != nil {
		return err
	}
	stored := grown(&buf.stored, int(c.CompressedSize))
	if err := readFull(b.r, stored, c.CompressedOffset); err != nil {
		return err
	}
	return b.decodeStored(&c, stored, buf)
}

// decodeStored fills buf with the chunk that is stored as stored.
func (b *BlobReader) decodeStored(c *Chunk, stored []byte, buf *ChunkBuffer) (err error) {
	buf.Raw, buf.Stored = stored, stored
	if !c.Compressed {
		if uint32(len(stored)) != c.UncompressedSize { //nolint:gosec // a chunk
			return invalid("chunk", clampOffset(c.CompressedOffset), "stored size of a raw chunk", len(stored), c.UncompressedSize)
		}
		return nil
	}
	buf.Raw, err = b.decoder.decodeTo(grown(&buf.raw, int(c.UncompressedSize)), b.blob.Compressor, stored)
	return err
}

// run is a number of chunks that are stored so near that one read gets all of them.
type run struct {
	chunks   []Chunk
	from, to uint64 // in the blob; to is 0 for a chunk that is read on its own
}

// maxRun and runGap bound the bytes of a run and those between two of its chunks.
const (
	maxRun = 1 << 20
	runGap = 64 << 10
)

// nextRun takes a run from the front of chunks, which is not empty.
func (b *BlobReader) nextRun(chunks []Chunk) (run, []Chunk) {
	alone := func(c *Chunk) bool {
		return b.blob.placedByMeta() || b.checkRange(c.CompressedOffset, c.CompressedSize, maxRun) != nil
	}
	r := run{chunks: chunks[:1]}
	if alone(&chunks[0]) {
		return r, chunks[1:]
	}
	r.from, r.to = chunks[0].CompressedOffset, storedEnd(&chunks[0])
	n := 1
	for ; n < len(chunks); n++ {
		c := &chunks[n]
		if alone(c) || c.CompressedOffset < r.to || c.CompressedOffset-r.to > runGap || storedEnd(c)-r.from > maxRun {
			break
		}
		r.to = storedEnd(c)
	}
	r.chunks = chunks[:n]
	return r, chunks[n:]
}

// runReader reads runs with memory of its own.
type runReader struct {
	span   []byte
	buffer ChunkBuffer
}

// read reads and verifies the chunks of r and tells each the outcome. An error of each ends it.
func (rr *runReader) read(ctx context.Context, b *BlobReader, r run, each func(size int, err error) error) error {
	span := []byte(nil)
	if len(r.chunks) > 1 {
		span = grown(&rr.span, int(r.to-r.from)) //nolint:gosec // at most maxRun
		if readFull(b.r, span, r.from) != nil {
			span = nil // one by one, to say which cannot be read
		}
	}
	for i := range r.chunks {
		c := &r.chunks[i]
		var err error
		if span == nil || ctx.Err() != nil {
			err = b.ReadInto(ctx, *c, &rr.buffer)
		} else if err = rr.decode(b, c, span[c.CompressedOffset-r.from:][:c.CompressedSize]); err == nil {
			err = b.verify(c, rr.buffer.Raw)
		}
		if err := each(len(rr.buffer.Raw), err); err != nil {
			return err
		}
	}
	return nil
}

func (rr *runReader) decode(b *BlobReader, c *Chunk, stored []byte) error {
	if c.UncompressedSize == 0 || c.UncompressedSize > b.blob.ChunkSize {
		return b.ReadInto(context.Background(), *c, &rr.buffer) // which says what is wrong
	}
	if err := b.decodeStored(c, stored, &rr.buffer); err != nil {
		return fmt.Errorf("read chunk %d of blob %s: %w", c.Index, short(b.blob.ID), err)
	}
	return nil
}
