package rafs

import (
	"context"
	"fmt"
)

// StoredRange returns where in the blob file the bytes lie that reading c takes: its own, or
// those of the whole batch or gzip context (ZRAN) that it is a part of. For such blobs it reads
// blob.meta. Errors are those of [BlobReader.ReadChunk]; the chunk's bytes themselves are not read.
func (b *BlobReader) StoredRange(ctx context.Context, c Chunk) (offset, length uint64, err error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	if !b.blob.placedByMeta() {
		return c.CompressedOffset, uint64(c.CompressedSize), nil
	}
	r, err := b.record(c)
	if err != nil {
		return 0, 0, fmt.Errorf("place of chunk %d of blob %s: %w", c.Index, short(b.blob.ID), err)
	}
	switch {
	case r.batch:
		return r.compressedOffset, uint64(b.meta.batches[r.batchIndex].CompressedSize), nil
	case r.zran:
		z := &b.meta.zran[r.batchIndex]
		return z.InOffset, uint64(z.InSize), nil
	}
	return r.compressedOffset, uint64(r.compressedSize), nil
}
