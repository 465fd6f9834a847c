package rafs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// BlobReader reads chunks of one blob file. Safe for concurrent use. It holds no
// descriptor of its own: whoever opened the file closes it, after the last read.
type BlobReader struct {
	r       io.ReaderAt
	blob    Blob
	decoder decoder

	metaOnce sync.Once
	meta     *metaTable
	metaErr  error

	mu        sync.Mutex // guards the last batch
	batch     []byte     // uncompressed; nil: none yet
	batchAt   uint32     // its index
	batchHits int64      // how often it was used, for tests
}

// OpenBlob returns a reader of the blob file r that b describes. It reads nothing yet.
// ErrUnsupported for blobs that do not hold chunks of their own: gzip with random access (ZRAN),
// tarfs, external and encrypted ones.
func OpenBlob(r io.ReaderAt, b Blob) (*BlobReader, error) {
	const cannot = disk.FeatureZran | disk.FeatureTarfs | disk.FeatureExternal | disk.FeatureEncrypted
	if b.Features&cannot != 0 {
		return nil, unsupported("blob "+short(b.ID), -1, "features", fmt.Sprintf("%#x", b.Features), fmt.Sprintf("no bit of %#x", cannot))
	}
	if b.Features&disk.FeatureBatch != 0 && b.Features&disk.FeatureSeparate != 0 {
		return nil, unsupported("blob "+short(b.ID), -1, "features", fmt.Sprintf("%#x", b.Features), "batch data with its table")
	}
	if err := b.checkAny("blob "+short(b.ID), -1, b.ChunkSize); err != nil {
		return nil, err
	}
	return &BlobReader{r: r, blob: b}, nil
}

// Blob returns the description the reader was opened with.
func (b *BlobReader) Blob() Blob { return b.blob }

// ReadChunk returns the c.UncompressedSize bytes of chunk c, verified against c.Digest.
// The slice is the caller's. ErrDigest when the bytes differ, ErrInvalid when c lies outside the
// blob or does not decompress to its size, ctx.Err() when cancelled before the read.
// For chunks of a batch the whole batch is read, and the last one is kept.
func (b *BlobReader) ReadChunk(ctx context.Context, c Chunk) ([]byte, error) {
	p, err := b.readChunk(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("read chunk %d of blob %s: %w", c.Index, short(b.blob.ID), err)
	}
	if got := b.blob.Digester.Sum(p); got != c.Digest {
		return nil, &FormatError{
			Class: ErrDigest, Section: fmt.Sprintf("chunk %d of blob %s", c.Index, short(b.blob.ID)),
			Offset: clampOffset(c.CompressedOffset), Field: b.blob.Digester.String(), Got: got, Want: c.Digest,
		}
	}
	return p, nil
}

func (b *BlobReader) readChunk(ctx context.Context, c Chunk) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.UncompressedSize == 0 || c.UncompressedSize > b.blob.ChunkSize {
		return nil, invalid("chunk", -1, "size", c.UncompressedSize, fmt.Sprintf("1 to %d", b.blob.ChunkSize))
	}
	if b.blob.Features&disk.FeatureBatch != 0 {
		r, err := b.record(c)
		if err != nil {
			return nil, err
		}
		if r.batch {
			return b.readBatched(r)
		}
		// The chunk table of batch images is not trusted for places: see blob.meta.
		c.CompressedOffset, c.CompressedSize, c.Compressed = r.compressedOffset, r.compressedSize, r.compressed
	}
	stored, err := b.readRange(c.CompressedOffset, c.CompressedSize)
	if err != nil {
		return nil, err
	}
	if !c.Compressed {
		if uint32(len(stored)) != c.UncompressedSize { //nolint:gosec // a chunk
			return nil, invalid("chunk", clampOffset(c.CompressedOffset), "stored size of a raw chunk", len(stored), c.UncompressedSize)
		}
		return stored, nil
	}
	return b.decoder.decode(b.blob.Compressor, stored, int(c.UncompressedSize))
}

// record returns the blob.meta record of c after comparing what both say.
func (b *BlobReader) record(c Chunk) (metaRecord, error) {
	t, err := b.table()
	if err != nil {
		return metaRecord{}, err
	}
	if c.Index >= t.count {
		return metaRecord{}, invalid("chunk", -1, "index", c.Index, fmt.Sprintf("below %d", t.count))
	}
	if err := t.check(c.Index); err != nil {
		return metaRecord{}, err
	}
	r := t.record(c.Index)
	if r.uncompressedOffset != c.UncompressedOffset || r.uncompressedSize != c.UncompressedSize {
		return metaRecord{}, invalid(fmt.Sprintf("blob.meta record %d", c.Index), -1, "uncompressed offset and size",
			[2]uint64{r.uncompressedOffset, uint64(r.uncompressedSize)}, [2]uint64{c.UncompressedOffset, uint64(c.UncompressedSize)})
	}
	return r, nil
}

func (b *BlobReader) readBatched(r metaRecord) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.batch == nil || b.batchAt != r.batchIndex {
		c := b.meta.batches[r.batchIndex]
		stored, err := b.readRange(r.compressedOffset, c.CompressedSize)
		if err != nil {
			return nil, err
		}
		if c.CompressedSize != c.UncompressedSize { // equal sizes: stored as it is
			if stored, err = b.decoder.decode(b.blob.Compressor, stored, int(c.UncompressedSize)); err != nil {
				return nil, err
			}
		}
		b.batch, b.batchAt = stored, r.batchIndex
	}
	b.batchHits++
	// checkBatch has made sure that the chunk lies inside.
	return append([]byte(nil), b.batch[r.batchOffset:][:r.uncompressedSize]...), nil
}

// ReadStored returns the c.CompressedSize bytes of c as they are stored, for copying
// them into another blob of the same compressor; they are not verified. The slice is
// the caller's. ErrUnsupported for chunks of a batch, which are not stored on their own.
func (b *BlobReader) ReadStored(ctx context.Context, c Chunk) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if b.blob.Features&disk.FeatureBatch != 0 {
		r, err := b.record(c)
		if err != nil {
			return nil, err
		}
		if r.batch {
			return nil, unsupported(fmt.Sprintf("chunk %d of blob %s", c.Index, short(b.blob.ID)), -1, "stored form", "part of a batch", nil)
		}
		c.CompressedOffset, c.CompressedSize = r.compressedOffset, r.compressedSize
	}
	p, err := b.readRange(c.CompressedOffset, c.CompressedSize)
	if err != nil {
		return nil, fmt.Errorf("read chunk %d of blob %s: %w", c.Index, short(b.blob.ID), err)
	}
	return p, nil
}

// readRange reads stored bytes of the data section.
func (b *BlobReader) readRange(offset uint64, size uint32) ([]byte, error) {
	end := b.blob.dataEnd()
	if size == 0 || offset > end || uint64(size) > end-offset || size > maxCompressed(b.blob.ChunkSize) {
		return nil, invalid("chunk", clampOffset(offset), "stored size", size, fmt.Sprintf("an end of at most %d", end))
	}
	return readExactly(b.r, offset, uint64(size))
}

// readExactly reads size bytes at offset; the caller bounds size.
func readExactly(r io.ReaderAt, offset, size uint64) ([]byte, error) {
	p := make([]byte, size)
	n, err := r.ReadAt(p, clampOffset(offset))
	if uint64(n) == size { //nolint:gosec // not negative
		return p, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("read %d bytes at %d: %w", size, offset, err)
}

// table reads blob.meta once.
func (b *BlobReader) table() (*metaTable, error) {
	b.metaOnce.Do(func() {
		if b.meta, b.metaErr = b.readMeta(); b.metaErr != nil {
			b.metaErr = fmt.Errorf("blob.meta: %w", b.metaErr)
		}
	})
	return b.meta, b.metaErr
}

func (b *BlobReader) readMeta() (*metaTable, error) {
	m := &b.blob
	if m.Features&disk.FeatureSeparate != 0 {
		return nil, unsupported("blob "+short(m.ID), -1, "blob.meta", "in another blob", nil)
	}
	// A record has at most 24 bytes and a batch 40; a table compresses far less than that.
	limit := uint64(m.ChunkCount) * (disk.SizeMetaV2 + disk.SizeBatchContext)
	if m.MetaUncompressed > limit {
		return nil, invalid("blob "+short(m.ID), -1, "ci_uncompressed_size", m.MetaUncompressed, fmt.Sprintf("at most %d", limit))
	}
	if m.MetaUncompressed > 1<<20 && m.MetaUncompressed/maxMetaRatio > m.MetaCompressed {
		return nil, invalid("blob "+short(m.ID), -1, "ci_uncompressed_size", m.MetaUncompressed, fmt.Sprintf("at most %d times ci_compressed_size", maxMetaRatio))
	}
	if m.MetaOffset+m.MetaCompressed+disk.SizeMetaHeader > m.CompressedSize {
		return nil, invalid("blob "+short(m.ID), -1, "end of blob.meta", m.MetaOffset+m.MetaCompressed+disk.SizeMetaHeader, fmt.Sprintf("at most %d", m.CompressedSize))
	}
	// The header comes first: it proves that the file is there and as long as it says.
	header, err := readExactly(b.r, m.MetaOffset+m.MetaCompressed, disk.SizeMetaHeader)
	if err != nil {
		return nil, err
	}
	stored, err := readExactly(b.r, m.MetaOffset, m.MetaCompressed)
	if err != nil {
		return nil, err
	}
	table, err := b.decoder.decode(m.MetaCompressor, stored, int(m.MetaUncompressed)) //nolint:gosec // bounded above
	if err != nil {
		return nil, err
	}
	return parseMeta(*m, table, header)
}

// maxMetaRatio bounds what a blob.meta table is believed to compress to.
const maxMetaRatio = 1024
