package rafs

import (
	"io"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// Over returns a reader of the same blob that reads chunk data from data: what somebody has at hand of the
// blob file, each byte at its offset there. It shares b's blob.meta table, which it reads now where it says
// where chunks are (batches, ZRAN), and b's decompressor, but neither the last batch nor decompressors at rest: those are
// of bytes that data had. Errors are those of that table. Safe for concurrent use, as the readers it returns are.
func (b *BlobReader) Over(data io.ReaderAt) (*BlobReader, error) {
	over := &BlobReader{r: data, metaFile: b.metaFile, blob: b.blob, decoder: b.decoder, scratch: b.scratch, dicts: b.dicts}
	if b.blob.placedByMeta() {
		over.metaOnce.Do(func() { over.meta, over.metaErr = b.table() })
		if over.metaErr != nil {
			return nil, over.metaErr
		}
	}
	return over, nil
}

// ShareDecoder makes b use the decompressor of other, so that the readers of many blobs take the memory of one.
// It is called before the first read of b.
func (b *BlobReader) ShareDecoder(other *BlobReader) { b.decoder = other.decoder }

// PlacedByMeta reports whether blob.meta, and not the bootstrap, says where in the blob chunks are: their
// [BlobReader.StoredRange] takes reading that table.
func (b *Blob) PlacedByMeta() bool { return b.placedByMeta() }

// MetaRange returns where in the file that [Blob.MetaBlob] names the blob.meta table and its header lie; length is 0
// when there is none.
func (b *Blob) MetaRange() (offset, length uint64) {
	if !b.hasMeta() {
		return 0, 0
	}
	return b.MetaOffset, b.MetaCompressed + disk.SizeMetaHeader
}
