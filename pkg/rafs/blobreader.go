package rafs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
	"github.com/headstart-oci/headstart/pkg/rafs/internal/inflate"
)

// BlobReader reads chunks of one blob file. Safe for concurrent use. It holds no
// descriptor of its own: whoever opened the file closes it, after the last read.
type BlobReader struct {
	r        io.ReaderAt
	metaFile io.ReaderAt // the file that holds blob.meta; r, except for SEPARATE blobs
	blob     Blob
	decoder  *decoder

	metaOnce sync.Once
	meta     *metaTable
	metaErr  error

	mu        sync.Mutex // guards the last batch
	batch     []byte     // uncompressed; nil: none yet
	batchAt   batchPlace // which it is
	batchHits int64      // how often it was used, for tests

	zran    zranCursors
	scratch Scratch // of dictionaries; nil: memory
	dicts   func() ([]byte, error)
}

// OpenBlob returns a reader of the blob file r that b describes. It reads nothing yet.
// ErrUnsupported for external and encrypted blobs, and for SEPARATE ones, whose table is in a second
// file: see [OpenSeparateBlob] and [OpenBlobFrom].
func OpenBlob(r io.ReaderAt, b Blob) (*BlobReader, error) {
	if b.Features&disk.FeatureSeparate != 0 {
		return nil, unsupported("blob "+short(b.ID), -1, "features", fmt.Sprintf("%#x", b.Features), "data and its table in one file")
	}
	return openBlob(r, r, b)
}

// OpenSeparateBlob is [OpenBlob] for blobs whose data and table are two files: data is the one named b.ID, for
// instance the gzip layer of an OCI image, meta the one that [Blob.MetaBlob] names.
func OpenSeparateBlob(data, meta io.ReaderAt, b Blob) (*BlobReader, error) {
	if b.Features&disk.FeatureSeparate == 0 {
		return nil, invalid("blob "+short(b.ID), -1, "features", fmt.Sprintf("%#x", b.Features), "SEPARATE")
	}
	return openBlob(data, meta, b)
}

// OpenBlobFrom opens the file of b with open and, for a SEPARATE blob, the file of its table too, and returns
// the reader. The caller closes what open opened, after the last read and when this fails.
func OpenBlobFrom(open func(b Blob) (io.ReaderAt, error), b Blob) (*BlobReader, error) {
	data, err := open(b)
	if err != nil {
		return nil, err
	}
	metaBlob, separate := b.MetaBlob()
	if !separate {
		return OpenBlob(data, b)
	}
	meta, err := open(metaBlob)
	if err != nil {
		return nil, fmt.Errorf("table of blob %s: %w", short(b.ID), err)
	}
	return OpenSeparateBlob(data, meta, b)
}

// MetaBlob returns the file that holds the blob.meta table of a SEPARATE blob: its ID and CompressedSize (0: not
// known) are set. separate is false when the table is in the blob itself.
func (b *Blob) MetaBlob() (meta Blob, separate bool) {
	if b.Features&disk.FeatureSeparate == 0 {
		return *b, false
	}
	return Blob{ID: b.MetaBlobDigest.String(), CompressedSize: b.MetaBlobSize}, true
}

func openBlob(data, meta io.ReaderAt, b Blob) (*BlobReader, error) {
	section := "blob " + short(b.ID)
	const cannot = disk.FeatureExternal | disk.FeatureEncrypted
	if b.Features&cannot != 0 {
		return nil, unsupported(section, -1, "features", fmt.Sprintf("%#x", b.Features), fmt.Sprintf("no bit of %#x", cannot))
	}
	batch, zran, separate := b.Features&disk.FeatureBatch != 0, b.Features&disk.FeatureZran != 0, b.Features&disk.FeatureSeparate != 0
	if batch && separate || zran && !separate {
		return nil, unsupported(section, -1, "features", fmt.Sprintf("%#x", b.Features), "batch data with its table, ZRAN with its table apart")
	}
	if err := b.checkAny(section, -1, b.ChunkSize); err != nil {
		return nil, err
	}
	r := &BlobReader{r: data, metaFile: meta, blob: b, decoder: new(decoder)}
	r.dicts = sync.OnceValues(r.readDictionaries)
	return r, nil
}

// Blob returns the description the reader was opened with.
func (b *BlobReader) Blob() Blob { return b.blob }

// ReadChunk returns the c.UncompressedSize bytes of chunk c, verified against c.Digest.
// The slice is the caller's. ErrDigest when the bytes differ, ErrInvalid when c lies outside the
// blob or does not decompress to its size, ctx.Err() when cancelled before the read.
// For chunks of a batch the whole batch is read, and the last one is kept. For chunks in a gzip layer (ZRAN) the layer
// is decompressed from the chunk's context on; ascending reads go on where the last one ended. The
// data of tarfs images have no digests: they are returned as they are.
func (b *BlobReader) ReadChunk(ctx context.Context, c Chunk) ([]byte, error) {
	var buf ChunkBuffer
	if err := b.ReadInto(ctx, c, &buf); err != nil {
		return nil, err
	}
	return buf.Raw, nil
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

// batchPlace is what tells a batch: its records say where it is stored, and of records apart from each other nobody has
// compared that.
type batchPlace struct {
	index  uint32
	offset uint64
}

func (b *BlobReader) readBatched(r metaRecord) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if at := (batchPlace{r.batchIndex, r.compressedOffset}); b.batch == nil || b.batchAt != at {
		c := b.meta.batches[r.batchIndex]
		stored, err := b.readRange(r.compressedOffset, c.CompressedSize, MaxChunkSize)
		if err != nil {
			return nil, err
		}
		if c.CompressedSize != c.UncompressedSize { // equal sizes: stored as it is
			if stored, err = b.decoder.decode(b.blob.Compressor, stored, int(c.UncompressedSize)); err != nil {
				return nil, err
			}
		}
		b.batch, b.batchAt = stored, at
	}
	b.batchHits++
	// checkBatch has made sure that the chunk lies inside.
	return append([]byte(nil), b.batch[r.batchOffset:][:r.uncompressedSize]...), nil
}

// ReadStored returns the c.CompressedSize bytes of c as they are stored, for copying
// them into another blob of the same compressor; they are not verified. The slice is
// the caller's. ErrUnsupported for chunks of a batch or of a gzip layer, which are not stored on their own.
func (b *BlobReader) ReadStored(ctx context.Context, c Chunk) ([]byte, error) {
	var buf ChunkBuffer
	if err := b.ReadStoredInto(ctx, c, &buf); err != nil {
		return nil, err
	}
	return buf.Stored, nil
}

// ReadStoredInto is [BlobReader.ReadStored] with memory that is used again: buf.Stored is what was read, valid until the
// next use of buf, and buf.Raw nil.
func (b *BlobReader) ReadStoredInto(ctx context.Context, c Chunk, buf *ChunkBuffer) error {
	buf.Raw, buf.Stored = nil, nil
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.blob.placedByMeta() {
		r, err := b.record(c)
		if err != nil {
			return err
		}
		if r.batch || r.zran {
			return unsupported(fmt.Sprintf("chunk %d of blob %s", c.Index, short(b.blob.ID)), -1, "stored form", "part of a batch or of a gzip stream", nil)
		}
		c.CompressedOffset, c.CompressedSize = r.compressedOffset, r.compressedSize
	}
	err := b.checkRange(c.CompressedOffset, c.CompressedSize, maxCompressed(b.blob.ChunkSize))
	if err == nil {
		stored := grown(&buf.stored, int(c.CompressedSize))
		if err = readFull(b.r, stored, c.CompressedOffset); err == nil {
			buf.Stored = stored
			return nil
		}
	}
	return fmt.Errorf("read chunk %d of blob %s: %w", c.Index, short(b.blob.ID), err)
}

// readRange reads stored bytes of the data section, at most limit.
func (b *BlobReader) readRange(offset uint64, size, limit uint32) ([]byte, error) {
	if err := b.checkRange(offset, size, limit); err != nil {
		return nil, err
	}
	return readExactly(b.r, offset, uint64(size))
}

// checkRange makes sure that stored bytes lie in the data section and are at most limit.
func (b *BlobReader) checkRange(offset uint64, size, limit uint32) error {
	end := b.blob.dataEnd()
	if size == 0 || offset > end || uint64(size) > end-offset || size > limit {
		return invalid("chunk", clampOffset(offset), "stored size", size, fmt.Sprintf("an end of at most %d", end))
	}
	return nil
}

// readExactly reads size bytes at offset; the caller bounds size.
func readExactly(r io.ReaderAt, offset, size uint64) ([]byte, error) {
	p := make([]byte, size)
	if err := readFull(r, p, offset); err != nil {
		return nil, err
	}
	return p, nil
}

// readFull fills p from offset.
func readFull(r io.ReaderAt, p []byte, offset uint64) error {
	n, err := r.ReadAt(p, clampOffset(offset))
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), offset, err)
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

// maxDictionaries bounds the bytes of all dictionaries of a ZRAN table, which may be compressed to very little, by the layer: a
// context with a dictionary begins at the earliest [refContextIn] bytes of it, or [refContextOut] decompressed bytes, behind the
// one before. The layer has no more bytes than its reader, where that knows. What is little memory may be in any case.
func (b *BlobReader) maxDictionaries() uint64 {
	const little = 64 << 20
	layer := min(b.blob.CompressedSize, disk.MaxBlobStored)
	if size, ok := sizeOf(b.r); ok {
		layer = min(layer, size)
	}
	contexts := layer/refContextIn + layer*maxDeflateRatio/refContextOut + 1
	return max(little, contexts*inflate.WindowSize)
}

// maxMetaRatio bounds what a blob.meta table is believed to compress to.
const maxMetaRatio = 1024
