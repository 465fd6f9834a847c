package rafs

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"slices"

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
}

// BlobWriter writes one blob, front to back:
//
//	chunk data | tar header image.blob | table, header | tar header blob.meta
//	[ | chunk digests | tar header blob.digest | TOC | tar header rafs.blob.toc ]
//
// It keeps about 100 bytes a chunk in memory. Not safe for concurrent use. After an
// error of the io.Writer every later call returns that error.
type BlobWriter struct {
	w       io.Writer
	options BlobOptions
	sum     hash.Hash // of every byte written
	data    hash.Hash // of the chunk data and its tar header, for the TOC; nil without one
	written uint64
	err     error
	closed  bool

	seen         map[chunkKey]uint32 // index of the chunk
	records      []disk.MetaV1
	offsets      []uint64 // uncompressed ones of V5, which the records cannot say
	digests      []byte   // blob.digest content, with TOC only
	uncompressed uint64

	inline func(w io.Writer, blob *Blob) error // writes the bootstrap of CloseInline
}

type chunkKey struct {
	digest Digest
	size   uint32
}

// NewBlobWriter starts a blob. w receives every byte once, in order; nothing is
// written before the first chunk. ErrInvalid for a chunk size that is no power of two
// from MinChunkSize to MaxChunkSize, ErrUnsupported for algorithms that cannot be written.
func NewBlobWriter(w io.Writer, o BlobOptions) (*BlobWriter, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	if !validChunkSize(o.ChunkSize) {
		return nil, fmt.Errorf("%w: chunk size %d: want a power of two from %d to %d", ErrInvalid, o.ChunkSize, MinChunkSize, MaxChunkSize)
	}
	if _, err := NewEncoder(o.Compressor, LevelDefault); err != nil {
		return nil, err
	}
	if o.Version = o.Version.orDefault(); o.Version != V5 && o.Version != V6 || o.Version == V5 && o.TOC {
		return nil, fmt.Errorf("%w: blob of version %v, with a TOC: %v", ErrUnsupported, o.Version, o.TOC)
	}
	if o.Digester > DigesterSHA256 {
		return nil, fmt.Errorf("%w: %v", ErrUnsupported, o.Digester)
	}
	b := &BlobWriter{w: w, options: o, sum: sha256.New(), seen: map[chunkKey]uint32{}}
	if o.TOC {
		b.data = sha256.New()
	}
	return b, nil
}

// Compressor returns what the blob's chunks are compressed with.
func (b *BlobWriter) Compressor() Compressor { return b.options.Compressor }

// Append stores one chunk, or returns the record of the equal chunk (same digest and
// size) that the blob already has. Chunk.Blob is 0: the caller sets it when it knows
// the blob's place in the image. c.Data is not kept.
//
// ErrInvalid when the chunk breaks a limit: its size is 0 or above the chunk size, Data does
// not fit its size, or the blob would pass MaxChunks chunks, 1 TiB stored or 16 TiB uncompressed.
func (b *BlobWriter) Append(c EncodedChunk) (Chunk, error) {
	if b.err != nil {
		return Chunk{}, b.err
	}
	if b.closed {
		return Chunk{}, fmt.Errorf("rafs: append to a closed blob")
	}
	key := chunkKey{c.Digest, c.UncompressedSize}
	if i, ok := b.seen[key]; ok {
		r := decodeV1(b.records[i])
		if b.options.Version == V5 {
			r.uncompressedOffset = b.offsets[i]
		}
		return b.chunk(i, r, c.Digest), nil
	}
	if err := b.checkAppend(c); err != nil {
		return Chunk{}, err
	}
	r := metaRecord{
		uncompressedOffset: b.uncompressed,
		uncompressedSize:   c.UncompressedSize,
		compressedOffset:   b.written,
		compressedSize:     uint32(len(c.Data)), //nolint:gosec // at most the chunk size
		compressed:         c.Compressed,
	}
	if err := b.write(c.Data, b.data); err != nil {
		return Chunk{}, err
	}
	index := uint32(len(b.records)) //nolint:gosec // at most MaxChunks
	chunk := b.chunk(index, r, c.Digest)
	b.seen[key] = index
	b.records = append(b.records, encodeV1(chunk))
	if b.options.TOC {
		b.digests = append(b.digests, c.Digest[:]...)
	}
	if b.options.Version == V5 {
		b.offsets = append(b.offsets, b.uncompressed)
		b.uncompressed += uint64(c.UncompressedSize)
		return chunk, nil
	}
	b.uncompressed += alignUp(uint64(c.UncompressedSize), disk.BlockSize)
	return chunk, nil
}

func (b *BlobWriter) chunk(index uint32, r metaRecord, d Digest) Chunk {
	return Chunk{
		Digest: d, Compressed: r.compressed, Index: index,
		CompressedOffset: r.compressedOffset, CompressedSize: r.compressedSize,
		UncompressedOffset: r.uncompressedOffset, UncompressedSize: r.uncompressedSize,
	}
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
	case len(b.records) >= MaxChunks:
		return fmt.Errorf("%w: blob with more than %d chunks: use a larger chunk size", ErrInvalid, MaxChunks)
	case b.written+size > maxBlobData:
		return fmt.Errorf("%w: blob data of %d bytes: want at most %d", ErrInvalid, b.written+size, uint64(maxBlobData))
	case b.uncompressed+alignUp(uint64(c.UncompressedSize), disk.BlockSize) > disk.MaxBlobExpanded:
		return fmt.Errorf("%w: blob of more than %d uncompressed bytes", ErrInvalid, uint64(disk.MaxBlobExpanded))
	}
	return nil
}

// maxBlobData leaves room for the tables behind the chunks.
const maxBlobData = disk.MaxBlobStored - MaxChunks*(disk.SizeMetaV1+disk.SizeDigestRecord) - 1<<20

func (b *BlobWriter) write(p []byte, also hash.Hash) error {
	n, err := b.w.Write(p)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		b.err = fmt.Errorf("write blob at byte %d: %w", b.written, err)
		return b.err
	}
	b.sum.Write(p)
	if also != nil {
		also.Write(p)
	}
	b.written += uint64(len(p))
	return nil
}

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
	if len(b.records) == 0 {
		return Blob{}, ErrNoChunks
	}
	blob := Blob{
		ChunkSize: b.options.ChunkSize, ChunkCount: uint32(len(b.records)), //nolint:gosec // at most MaxChunks
		Compressor: b.options.Compressor, Digester: b.options.Digester,
		Features:         disk.FeatureAligned | disk.FeatureCapTOC | disk.FeatureTarHeader,
		UncompressedSize: b.uncompressed,
	}
	if b.options.MarkPrefetch {
		blob.Features |= disk.FeaturePrefetch
	}
	if b.options.TOC {
		blob.Features |= disk.FeatureTOC | disk.FeatureInlinedDigest
	}
	if b.inline != nil {
		blob.Features |= disk.FeatureInlinedMeta
	}
	if b.options.Version == V5 {
		blob.Features = blob.Features&disk.FeaturePrefetch | disk.FeatureCapTOC
	} else if err := b.writeTail(&blob); err != nil {
		b.err = err
		return Blob{}, err
	}
	blob.CompressedSize = b.written
	blob.ID = hex.EncodeToString(b.sum.Sum(nil))
	b.seen, b.records, b.digests = nil, nil, nil
	return blob, nil
}

func (b *BlobWriter) writeTail(blob *Blob) error {
	dataSize := b.written
	if err := b.write(sectionHeader(disk.SectionData, dataSize), b.data); err != nil {
		return err
	}
	meta, err := b.writeMeta(blob)
	if err != nil || !b.options.TOC {
		return err
	}
	toc := []disk.TOCEntry{{
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionData), Digest: [32]byte(b.data.Sum(nil)),
		CompressedSize: dataSize, UncompressedSize: blob.UncompressedSize,
	}}
	toc = append(toc, meta...)
	toc = append(toc, disk.TOCEntry{
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionDigest), Digest: sha256.Sum256(b.digests),
		Offset: b.written, CompressedSize: uint64(len(b.digests)), UncompressedSize: uint64(len(b.digests)),
	})
	if err := b.writeSection(disk.SectionDigest, b.digests); err != nil {
		return err
	}
	if b.inline != nil {
		e, err := b.writeBootstrap(*blob)
		if err != nil {
			return err
		}
		toc = append(toc, e)
	}
	return b.writeTOC(blob, toc)
}

// writeTOC writes the table of contents, the last section.
func (b *BlobWriter) writeTOC(blob *Blob, toc []disk.TOCEntry) error {
	entries := appendRecord(nil, toc)
	header := sectionHeader(disk.SectionTOC, uint64(len(entries)))
	blob.TOCDigest = sha256.Sum256(slices.Concat(entries, header))
	blob.TOCSize = uint32(len(entries) + len(header)) //nolint:gosec // four entries
	return b.writeSection(disk.SectionTOC, entries)
}

// writeMeta writes the blob.meta section and returns its TOC entries.
func (b *BlobWriter) writeMeta(blob *Blob) ([]disk.TOCEntry, error) {
	table := make([]byte, 0, len(b.records)*disk.SizeMetaV1)
	for _, r := range b.records {
		table = binary.LittleEndian.AppendUint64(table, r.Uncompressed)
		table = binary.LittleEndian.AppendUint64(table, r.Compressed)
	}
	enc, err := NewEncoder(b.options.Compressor, LevelDefault)
	if err != nil {
		return nil, err
	}
	stored, compressed, err := enc.Encode(nil, table)
	if err != nil {
		return nil, err
	}
	if compressed {
		blob.MetaCompressor = b.options.Compressor
	}
	blob.MetaOffset, blob.MetaCompressed, blob.MetaUncompressed = b.written, uint64(len(stored)), uint64(len(table))
	header := appendRecord(nil, &disk.MetaHeader{
		Magic: disk.MetaMagic, Magic2: disk.MetaMagic, Features: blob.Features,
		Compressor: uint32(blob.MetaCompressor), Entries: blob.ChunkCount, Offset: blob.MetaOffset,
		CompressedSize: blob.MetaCompressed, UncompressedSize: blob.MetaUncompressed,
	})
	if err := b.write(stored, nil); err != nil {
		return nil, err
	}
	headerOffset := b.written
	if err := b.write(header, nil); err != nil {
		return nil, err
	}
	if err := b.write(sectionHeader(disk.SectionMeta, blob.MetaCompressed+disk.SizeMetaHeader), nil); err != nil {
		return nil, err
	}
	return []disk.TOCEntry{{
		Flags: tocFlags(blob.MetaCompressor), Name: tocName(disk.SectionMeta), Digest: sha256.Sum256(table),
		Offset: blob.MetaOffset, CompressedSize: blob.MetaCompressed, UncompressedSize: blob.MetaUncompressed,
	}, {
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionMetaHeader), Digest: sha256.Sum256(header),
		Offset: headerOffset, CompressedSize: disk.SizeMetaHeader, UncompressedSize: disk.SizeMetaHeader,
	}}, nil
}

// writeSection writes a section and the tar header that names it.
func (b *BlobWriter) writeSection(name string, content []byte) error {
	if err := b.write(content, nil); err != nil {
		return err
	}
	return b.write(sectionHeader(name, uint64(len(content))), nil)
}

func tocName(s string) (name [16]byte) {
	copy(name[:], s)
	return name
}
