package rafs

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// EncodedChunk is a chunk on its way into a blob, as [Encoder.Encode] or [BlobReader.ReadStored] gives it.
type EncodedChunk struct {
	Digest           Digest // of the uncompressed bytes; not verified here
	Data             []byte // bytes to store
	Compressed       bool   // Data is compressed: it must then be shorter than UncompressedSize
	UncompressedSize uint32 // bytes, 1..chunk size
}

// BlobOptions says how a blob is made. The zero value makes an uncompressed blob
// with BLAKE3 digests and chunks of 1 MiB.
type BlobOptions struct {
	// Compressor is what chunks are compressed with, as the blob table will say; the
	// blob.meta table is compressed with it too.
	Compressor Compressor
	Digester   Digester
	// ChunkSize is the image's chunk size in bytes, a power of two; 0: DefaultChunkSize.
	ChunkSize uint32
	// MarkPrefetch sets blob feature 0x400. Readers before nydus 2.4 refuse an image
	// that has it and none acts on it.
	MarkPrefetch bool
	// Version is that of the image; 0: V6. A V5 blob is nothing but its chunks, one behind the
	// other in the file and in the cache file: its records are in the bootstrap alone.
	Version Version
	// TOC adds the blob.digest section and the table of contents.
	TOC bool
	// ChunkInfoV2 writes 24-byte records, which say of each chunk whether it is compressed; it is implied by
	// CompressorGzip, whose 16-byte records mean something else to nydus, and by BatchSize.
	ChunkInfoV2 bool
	// BatchSize, a power of two from 4 KiB to 16 MiB, makes batches of small chunks: raw chunks below half of it
	// are compressed together, as many as stay below it; 0: no batches. Nydus' own builder takes no batch
	// size above the chunk size. Readers before nydus 2.3 refuse images with batches.
	BatchSize uint32
	// BatchLevel is how batches are compressed.
	BatchLevel Level
}

// v2 tells whether records are of the long form.
func (o *BlobOptions) v2() bool {
	return o.ChunkInfoV2 || o.BatchSize > 0 || o.Compressor == CompressorGzip && o.Version != V5
}

func (o *BlobOptions) check() error {
	o.Version = o.Version.orDefault()
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	switch {
	case !validChunkSize(o.ChunkSize):
		return fmt.Errorf("%w: chunk size %d: want a power of two from %d to %d", ErrInvalid, o.ChunkSize, MinChunkSize, MaxChunkSize)
	case o.BatchSize != 0 && !validChunkSize(o.BatchSize):
		return fmt.Errorf("%w: batch size %d: want a power of two from %d to %d", ErrInvalid, o.BatchSize, MinChunkSize, MaxChunkSize)
	case o.Version != V5 && o.Version != V6:
		return fmt.Errorf("%w: blob of version %v", ErrUnsupported, o.Version)
	case o.Version == V5 && (o.TOC || o.ChunkInfoV2 || o.BatchSize > 0):
		return fmt.Errorf("%w: blob of version %v with a TOC, long chunk records or batches", ErrUnsupported, o.Version)
	case o.v2() && o.BatchSize == 0 && o.Version == V6 && o.ChunkSize > disk.V2CompSizeMask:
		return fmt.Errorf("%w: chunk size %d with long chunk records, which say sizes below it only", ErrUnsupported, o.ChunkSize)
	case o.Digester > DigesterSHA256:
		return fmt.Errorf("%w: %v", ErrUnsupported, o.Digester)
	}
	_, err := NewEncoder(o.Compressor, o.BatchLevel)
	return err
}

// BlobWriter writes one blob, front to back:
//
//	chunk data | tar header image.blob | table, header | tar header blob.meta
//	[ | chunk digests | tar header blob.digest | TOC | tar header rafs.blob.toc ]
//
// It keeps about 100 bytes a chunk in memory, of which [BlobWriter.Extend] shares 64, and one batch. Not safe for concurrent use. After an
// error of the io.Writer every later call returns that error.
type BlobWriter struct {
	tailWriter
	options BlobOptions
	data    hash.Hash // of the chunk data and its tar header, for the TOC; nil without one
	closed  bool

	chunks       chunkIndex // as [BlobWriter.Append] returned them, but for Blob, which others may set
	count        uint32
	table        []byte // blob.meta records of the long form, as they are stored; the short ones are made at the end
	uncompressed uint64
	batches      batchWriter

	inline func(w io.Writer, blob *Blob) error // writes the bootstrap of CloseInline
}

// NewBlobWriter starts a blob. w receives every byte once, in order; nothing is
// written before the first chunk. ErrInvalid for a chunk or batch size that is no power of two
// from MinChunkSize to MaxChunkSize, ErrUnsupported for algorithms and combinations that cannot be written.
func NewBlobWriter(w io.Writer, o BlobOptions) (*BlobWriter, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	b := &BlobWriter{tailWriter: tailWriter{w: w, sum: sha256.New()}, options: o}
	if o.TOC {
		b.data = sha256.New()
	}
	return b, nil
}

// Compressor returns what the blob's chunks are compressed with.
func (b *BlobWriter) Compressor() Compressor { return b.options.Compressor }

// Batches tells whether [BlobWriter.Append] puts a raw chunk of size bytes into a batch, so that
// there is no use in compressing it before.
func (b *BlobWriter) Batches(size uint32) bool { return size < b.options.BatchSize/2 }

// Append stores one chunk, or returns the record of the equal chunk (same digest and
// size) that the blob already has. Chunk.Blob is 0: the caller sets it when it knows
// the blob's place in the image. c.Data is not kept. A raw chunk for which [BlobWriter.Batches] holds
// is stored with others, at the latest by Close.
//
// ErrInvalid when the chunk breaks a limit: its size is 0 or above the chunk size, Data does
// not fit its size, or the blob would pass MaxChunks chunks, 1 TiB stored or 16 TiB uncompressed.
func (b *BlobWriter) Append(c EncodedChunk) (Chunk, error) {
	if chunk, ok, err := b.known(c.Digest, c.UncompressedSize); ok || err != nil {
		return chunk, err
	}
	return b.store(c)
}

// store stores one chunk, whether the blob has an equal one or not.
func (b *BlobWriter) store(c EncodedChunk) (Chunk, error) {
	if err := b.checkAppend(c); err != nil {
		return Chunk{}, err
	}
	switch {
	case !c.Compressed && b.Batches(c.UncompressedSize):
		return b.addToBatch(c)
	case b.options.v2() && len(c.Data) > disk.V2CompSizeMask:
		// A record cannot say that size; a batch can.
		list, err := b.AppendBatch(EncodedBatch{Chunks: []BatchedChunk{{c.Digest, c.UncompressedSize}}, Data: c.Data})
		if err != nil {
			return Chunk{}, err
		}
		return list[0], nil
	}
	if err := b.flushBatch(); err != nil {
		return Chunk{}, err
	}
	r := metaRecord{
		compressedOffset: b.written,
		compressedSize:   uint32(len(c.Data)), //nolint:gosec // at most the chunk size
		compressed:       c.Compressed,
	}
	if err := b.write(c.Data, b.data); err != nil {
		return Chunk{}, err
	}
	return b.keep(r, c.Digest, c.UncompressedSize), nil
}

// known returns the record of a chunk that the blob has. The error is that of a blob that takes no more chunks.
func (b *BlobWriter) known(d Digest, size uint32) (Chunk, bool, error) {
	switch {
	case b.err != nil:
		return Chunk{}, false, b.err
	case b.closed:
		return Chunk{}, false, fmt.Errorf("rafs: append to a closed blob")
	}
	i, ok := b.chunks.find(d, size)
	if !ok {
		return Chunk{}, false, nil
	}
	c := *b.chunks.at(i)
	c.Blob = 0
	return c, true, nil
}

// keep gives a new chunk of which the stored place is known its index and its place in the cache file.
func (b *BlobWriter) keep(r metaRecord, d Digest, size uint32) Chunk {
	r.uncompressedOffset, r.uncompressedSize = b.uncompressed, size
	if b.options.v2() {
		b.table = appendV2(b.table, r)
	}
	if b.options.Version == V5 {
		b.uncompressed += uint64(size)
	} else {
		b.uncompressed += alignUp(uint64(size), disk.BlockSize)
	}
	if r.batch { // the chunk table has no stored place for them, as nydus has it
		r.compressed, r.compressedOffset, r.compressedSize = false, 0, 0
	}
	c := Chunk{
		Digest: d, Compressed: r.compressed, Index: b.count,
		CompressedOffset: r.compressedOffset, CompressedSize: r.compressedSize,
		UncompressedOffset: r.uncompressedOffset, UncompressedSize: r.uncompressedSize,
	}
	b.chunks.add(c)
	b.count++
	return c
}

// Extend is [BlobWriter.AppendAfter] for the next chunk of a file: list has the records of the file's chunks
// before it, and is returned with the new one behind them. It may share memory with the writer: until
// Close nothing but Blob may be changed in it.
func (b *BlobWriter) Extend(list, before []Chunk, c EncodedChunk) ([]Chunk, error) {
	count := b.count
	rec, err := b.AppendAfter(before, c)
	if err != nil {
		return nil, err
	}
	if b.count > count {
		own := b.chunks.tail(len(list) + 1)
		if own != nil && (len(list) == 0 || &own[0] == &list[0]) {
			return own, nil
		}
	}
	return append(list, rec), nil
}

// metaRecords returns the records of blob.meta.
func (b *BlobWriter) metaRecords() []byte {
	if b.options.v2() {
		return b.table
	}
	table := make([]byte, 0, uint64(b.count)*disk.SizeMetaV1)
	for i := range b.count {
		c := b.chunks.at(i)
		table = appendV1(table, metaRecord{
			compressed: c.Compressed, compressedOffset: c.CompressedOffset, compressedSize: c.CompressedSize,
			uncompressedOffset: c.UncompressedOffset, uncompressedSize: c.UncompressedSize,
		})
	}
	return table
}

// chunkDigests returns the content of blob.digest.
func (b *BlobWriter) chunkDigests() []byte {
	p := make([]byte, 0, uint64(b.count)*disk.SizeDigestRecord)
	for i := range b.count {
		p = append(p, b.chunks.at(i).Digest[:]...)
	}
	return p
}

func (b *BlobWriter) checkAppend(c EncodedChunk) error {
	size := uint64(len(c.Data))
	switch {
	case c.UncompressedSize == 0 || c.UncompressedSize > b.options.ChunkSize:
		return fmt.Errorf("%w: chunk of %d bytes: want 1 to %d", ErrInvalid, c.UncompressedSize, b.options.ChunkSize)
	case c.Compressed && (size == 0 || size >= uint64(c.UncompressedSize)):
		return fmt.Errorf("%w: compressed chunk of %d bytes takes %d: want 1 to %d", ErrInvalid, c.UncompressedSize, size, c.UncompressedSize-1)
	case !c.Compressed && size != uint64(c.UncompressedSize):
		return fmt.Errorf("%w: raw chunk of %d bytes takes %d", ErrInvalid, c.UncompressedSize, size)
	case c.Compressed && b.options.Compressor == CompressorNone:
		return fmt.Errorf("%w: compressed chunk in a blob with compressor none", ErrInvalid)
	}
	return b.checkRoom(size, c.UncompressedSize)
}

// checkRoom makes sure that one more chunk fits, with stored bytes.
func (b *BlobWriter) checkRoom(stored uint64, uncompressed uint32) error {
	stored += b.written + uint64(len(b.batches.raw))
	switch {
	case b.count >= MaxChunks:
		return fmt.Errorf("%w: blob with more than %d chunks: use a larger chunk size", ErrInvalid, MaxChunks)
	case stored > maxBlobData:
		return fmt.Errorf("%w: blob data of %d bytes: want at most %d", ErrInvalid, stored, uint64(maxBlobData))
	case b.uncompressed+alignUp(uint64(uncompressed), disk.BlockSize) > disk.MaxBlobExpanded:
		return fmt.Errorf("%w: blob of more than %d uncompressed bytes", ErrInvalid, uint64(disk.MaxBlobExpanded))
	}
	return nil
}

// maxBlobData leaves room for the tables behind the chunks.
const maxBlobData = disk.MaxBlobStored - MaxChunks*(disk.SizeMetaV2+disk.SizeBatchContext+disk.SizeDigestRecord) - 1<<20

// Close writes the tables behind the chunks and returns the blob's description, with
// the sha256 of every byte written as its ID; it does not close the io.Writer.
// ErrNoChunks when nothing was appended: then nothing was written at all. A second
// call is an error.
func (b *BlobWriter) Close() (Blob, error) {
	if b.err != nil {
		return Blob{}, b.err
	}
	if b.closed {
		return Blob{}, fmt.Errorf("rafs: blob closed twice")
	}
	b.closed = true
	b.chunks.slots = nil // the tables take memory too
	if b.count == 0 {
		return Blob{}, ErrNoChunks
	}
	if err := b.flushBatch(); err != nil {
		b.err = err
		return Blob{}, err
	}
	blob := b.describe()
	if err := b.writeTail(&blob); err != nil {
		b.err = err
		return Blob{}, err
	}
	blob.CompressedSize = b.written
	blob.ID = hex.EncodeToString(b.sum.Sum(nil))
	b.chunks, b.table, b.batches = chunkIndex{}, nil, batchWriter{}
	return blob, nil
}

// describe returns what is known of the blob before its tail is written.
func (b *BlobWriter) describe() Blob {
	blob := Blob{
		ChunkSize: b.options.ChunkSize, ChunkCount: b.count, Compressor: b.options.Compressor, Digester: b.options.Digester,
		Features:         disk.FeatureCapTOC,
		UncompressedSize: b.uncompressed,
	}
	if b.options.MarkPrefetch {
		blob.Features |= disk.FeaturePrefetch
	}
	if b.options.Version == V5 {
		if b.options.Compressor == CompressorGzip {
			blob.Features |= disk.FeatureV2 // see extBlobV5
		}
		if b.inline != nil {
			blob.Features |= disk.FeatureTarHeader | disk.FeatureInlinedMeta
		}
		return blob
	}
	blob.Features |= disk.FeatureAligned | disk.FeatureTarHeader
	if b.options.TOC {
		blob.Features |= disk.FeatureTOC | disk.FeatureInlinedDigest
	}
	if b.inline != nil {
		blob.Features |= disk.FeatureInlinedMeta
	}
	if b.options.v2() {
		blob.Features |= disk.FeatureV2
	}
	if b.options.BatchSize > 0 {
		blob.Features |= disk.FeatureBatch
	}
	return blob
}

func (b *BlobWriter) writeTail(blob *Blob) error {
	switch {
	case b.options.Version == V5 && b.inline != nil:
		return b.writeInlineV5(blob)
	case b.options.Version == V5:
		return nil
	}
	dataSize := b.written
	if err := b.write(sectionHeader(disk.SectionData, dataSize), b.data); err != nil {
		return err
	}
	records := b.metaRecords()
	meta := metaContent{table: records, records: uint64(len(records)), contexts: uint32(len(b.batches.contexts))} //nolint:gosec // at most MaxChunks
	for i := range b.batches.contexts {
		meta.table = binary.LittleEndian.AppendUint32(meta.table, b.batches.contexts[i].stored)
		meta.table = binary.LittleEndian.AppendUint32(meta.table, b.batches.contexts[i].raw)
		meta.table = append(meta.table, make([]byte, disk.SizeBatchContext-8)...)
	}
	entries, err := b.writeMeta(blob, meta)
	if err != nil || !b.options.TOC {
		return err
	}
	toc := append([]disk.TOCEntry{{
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionData), Digest: [32]byte(b.data.Sum(nil)),
		CompressedSize: dataSize, UncompressedSize: blob.UncompressedSize,
	}}, entries...)
	digests, err := b.writeDigests(b.chunkDigests())
	if err != nil {
		return err
	}
	toc = append(toc, digests)
	if b.inline != nil {
		e, err := b.writeBootstrap(*blob)
		if err != nil {
			return err
		}
		toc = append(toc, e)
	}
	return b.writeTOC(blob, toc)
}
