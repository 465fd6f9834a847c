package rafs

import (
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// refTable is the blob.meta table that a [RefBuilder] makes.
type refTable struct {
	options      RefOptions
	seen         map[chunkKey]uint32
	chunks       []Chunk // without digests, which digests holds
	digests      []byte
	contexts     []*refContext
	table        []byte
	uncompressed uint64
}

func (t *refTable) init(o RefOptions) { t.options, t.seen = o, map[chunkKey]uint32{} }

// append adds a record, unless there is one of an equal chunk.
func (t *refTable) append(p RefPlace, d Digest) (Chunk, error) {
	key := chunkKey{d, p.size}
	if i, ok := t.seen[key]; ok {
		c := t.chunks[i]
		c.Digest = d
		return c, nil
	}
	index := uint32(len(t.chunks)) //nolint:gosec // at most MaxChunks
	r := metaRecord{
		uncompressedOffset: t.uncompressed, uncompressedSize: p.size,
		compressedOffset: uint64(p.begin.in), compressedSize: p.size, //nolint:gosec // not negative
	}
	t.uncompressed += alignUp(uint64(p.size), disk.BlockSize)
	switch {
	case index >= MaxChunks:
		return Chunk{}, fmt.Errorf("%w: blob with more than %d chunks: use a larger chunk size", ErrInvalid, MaxChunks)
	case r.compressedOffset > disk.MaxBlobStored-MaxChunkSize:
		return Chunk{}, fmt.Errorf("%w: layer of more than %d bytes", ErrInvalid, uint64(disk.MaxBlobStored))
	case t.uncompressed > disk.MaxBlobExpanded:
		return Chunk{}, fmt.Errorf("%w: blob of more than %d uncompressed bytes", ErrInvalid, uint64(disk.MaxBlobExpanded))
	case p.context == nil && p.size > disk.V2CompSizeMask:
		return Chunk{}, fmt.Errorf("%w: raw chunk of %d bytes in a layer that is referred to: use a smaller chunk size", ErrUnsupported, p.size)
	}
	if c := p.context; c != nil {
		t.use(c)
		c.in, c.out = max(c.in, p.in), max(c.out, p.out)
		r.compressed, r.zran = true, true
		// What a record says of the compressed bytes helps readers to guess; 24 bits may be too few for it.
		r.compressedSize = uint32(min(p.in-p.begin.in, disk.V2CompSizeMask)) //nolint:gosec // bounded
		r.batchIndex = uint32(c.index)                                       //nolint:gosec // at most MaxChunks
		r.batchOffset = uint32(p.begin.out - c.start.Out)                    //nolint:gosec // checked by End
	}
	t.seen[key] = index
	t.table = appendV2(t.table, r)
	t.digests = append(t.digests, d[:]...)
	chunk := Chunk{
		Compressed: r.compressed, Index: index,
		CompressedOffset: r.compressedOffset, CompressedSize: r.compressedSize,
		UncompressedOffset: r.uncompressedOffset, UncompressedSize: r.uncompressedSize,
	}
	t.chunks = append(t.chunks, chunk)
	chunk.Digest = d
	return chunk, nil
}

// use gives a context its number when its first chunk is stored: there are never more contexts than chunks.
func (t *refTable) use(c *refContext) {
	if c.index < 0 {
		c.index = len(t.contexts)
		t.contexts = append(t.contexts, c)
	}
}

// write writes the table's file and completes b, which has the layer's ID and size.
func (t *refTable) write(w io.Writer, b *Blob) error {
	if len(t.chunks) == 0 {
		return ErrNoChunks
	}
	b.ChunkSize, b.ChunkCount = t.options.ChunkSize, uint32(len(t.chunks)) //nolint:gosec // at most MaxChunks
	b.Compressor, b.Digester = CompressorGzip, t.options.Digester
	b.Features |= disk.FeatureAligned | disk.FeatureV2 | disk.FeatureSeparate | disk.FeatureCapTOC
	if t.options.TOC {
		b.Features |= disk.FeatureTarHeader | disk.FeatureTOC | disk.FeatureInlinedDigest
	}
	b.UncompressedSize = t.uncompressed
	meta := metaContent{table: t.table, records: uint64(len(t.table)), contexts: uint32(len(t.contexts))} //nolint:gosec // at most MaxChunks
	var dicts uint64
	for _, c := range t.contexts {
		meta.table = appendRecord(meta.table, &disk.ZranContext{
			InOffset: uint64(c.start.In), OutOffset: uint64(c.start.Out), //nolint:gosec // not negative
			InSize: uint32(c.in - c.start.In), OutSize: uint32(c.out - c.start.Out), //nolint:gosec // checked by End
			DictOffset: dicts, DictSize: uint32(len(c.window)), //nolint:gosec // at most 32 KiB
			Byte: c.start.Prev, Bits: uint8(c.start.Bits), //nolint:gosec // at most 7
		})
		dicts += uint64(len(c.window))
	}
	for _, c := range t.contexts {
		meta.table = append(meta.table, c.window...)
	}
	tail := tailWriter{w: w, sum: sha256.New()}
	entries, err := tail.writeMeta(b, meta)
	if err == nil && t.options.TOC {
		var digests disk.TOCEntry
		if digests, err = tail.writeDigests(t.digests); err == nil {
			err = tail.writeTOC(b, append(entries, digests))
		}
	}
	if err != nil {
		return err
	}
	b.MetaBlobDigest, b.MetaBlobSize = Digest(tail.sum.Sum(nil)), tail.written
	return nil
}
