package rafs

import (
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// BatchedChunk is a chunk of an [EncodedBatch].
type BatchedChunk struct {
	Digest           Digest // of the uncompressed bytes; not verified here
	UncompressedSize uint32 // bytes, 1..chunk size
}

// EncodedBatch is several chunks that were compressed as one, for [BlobWriter.AppendBatch].
type EncodedBatch struct {
	Chunks     []BatchedChunk // in the order of their bytes, each once
	Data       []byte         // bytes to store
	Compressed bool           // Data is compressed: it must then be shorter than all chunks together
}

// batchWriter gathers chunks until they make a batch.
type batchWriter struct {
	encoder  *Encoder
	raw      []byte // of the open batch
	out      []byte // scratch
	contexts []batchSizes
}

// batchSizes are those of one batch, in bytes.
type batchSizes struct{ stored, raw uint32 }

// addToBatch puts a raw chunk into the open batch, or into a new one where it does not fit. Its record is
// complete at once: the batch will begin where the stored bytes end.
func (b *BlobWriter) addToBatch(c EncodedChunk) (Chunk, error) {
	if len(b.batches.raw)+len(c.Data) >= int(b.options.BatchSize) {
		if err := b.flushBatch(); err != nil {
			return Chunk{}, err
		}
	}
	r := metaRecord{
		compressedOffset: b.written, compressed: true, batch: true,
		batchIndex:  uint32(len(b.batches.contexts)), //nolint:gosec // at most MaxChunks
		batchOffset: uint32(len(b.batches.raw)),      //nolint:gosec // below the batch size
	}
	b.batches.raw = append(b.batches.raw, c.Data...)
	return b.keep(r, c.Digest, c.UncompressedSize), nil
}

// flushBatch compresses and writes the open batch.
func (b *BlobWriter) flushBatch() error {
	raw := b.batches.raw
	if len(raw) == 0 {
		return nil
	}
	if b.batches.encoder == nil {
		var err error
		if b.batches.encoder, err = NewEncoder(b.options.Compressor, b.options.BatchLevel); err != nil {
			return err
		}
	}
	data, compressed, err := b.batches.encoder.Encode(b.batches.out, raw)
	if err != nil {
		return err
	}
	if compressed {
		b.batches.out = data
	}
	b.batches.raw = raw[:0]
	return b.writeBatch(data, len(raw))
}

func (b *BlobWriter) writeBatch(data []byte, raw int) error {
	if err := b.write(data, b.data); err != nil {
		return err
	}
	b.batches.contexts = append(b.batches.contexts, batchSizes{uint32(len(data)), uint32(raw)}) //nolint:gosec // at most MaxChunkSize
	return nil
}

// AppendBatch stores several chunks that were compressed as one, and returns their records in order; for a chunk
// that the blob has already the earlier record, so that its bytes in the batch are wasted. A batch of
// which every chunk is known is not stored. The errors are those of [BlobWriter.Append], and ErrUnsupported
// for a blob without a batch size. Batches may be as large as MaxChunkSize.
func (b *BlobWriter) AppendBatch(e EncodedBatch) ([]Chunk, error) {
	if b.options.BatchSize == 0 {
		return nil, fmt.Errorf("%w: batch for a blob without a batch size", ErrUnsupported)
	}
	list := make([]Chunk, len(e.Chunks))
	isNew := make([]bool, len(e.Chunks))
	var total uint64
	fresh := 0
	for i, c := range e.Chunks {
		if c.UncompressedSize == 0 || c.UncompressedSize > b.options.ChunkSize {
			return nil, fmt.Errorf("%w: chunk of %d bytes: want 1 to %d", ErrInvalid, c.UncompressedSize, b.options.ChunkSize)
		}
		total += uint64(c.UncompressedSize)
		chunk, ok, err := b.known(c.Digest, c.UncompressedSize)
		if err != nil {
			return nil, err
		}
		if list[i], isNew[i] = chunk, !ok; !ok {
			fresh++
		}
	}
	size := uint64(len(e.Data))
	switch {
	case total > MaxChunkSize:
		return nil, fmt.Errorf("%w: batch of %d bytes: want at most %d", ErrInvalid, total, MaxChunkSize)
	case e.Compressed && (size == 0 || size >= total || b.options.Compressor == CompressorNone) || !e.Compressed && size != total:
		return nil, fmt.Errorf("%w: batch of %d bytes takes %d, compressed: %v with %v", ErrInvalid, total, size, e.Compressed, b.options.Compressor)
	case fresh == 0:
		return list, nil
	}
	if err := b.checkRoom(size, uint32(min(total+uint64(fresh)*disk.BlockSize, 1<<31))); err != nil {
		return nil, err
	}
	if b.count+uint32(fresh) > MaxChunks {
		return nil, fmt.Errorf("%w: blob with more than %d chunks: use a larger chunk size", ErrInvalid, MaxChunks)
	}
	if err := b.flushBatch(); err != nil {
		return nil, err
	}
	r := metaRecord{compressedOffset: b.written, compressed: true, batch: true, batchIndex: uint32(len(b.batches.contexts))} //nolint:gosec // at most MaxChunks
	if err := b.writeBatch(e.Data, int(total)); err != nil {
		return nil, err
	}
	for i, c := range e.Chunks {
		if isNew[i] {
			chunk, twice, _ := b.known(c.Digest, c.UncompressedSize)
			if !twice {
				chunk = b.keep(r, c.Digest, c.UncompressedSize)
			}
			list[i] = chunk
		}
		r.batchOffset += c.UncompressedSize
	}
	return list, nil
}
