package rafs

import (
	"crypto/sha256"
	"fmt"
	"io"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// refTable is the blob.meta table that a [RefBuilder] makes.
type refTable struct {
	options      RefOptions
	seen         chunkIndex
	count        uint32
	digests      []byte // blob.digest content, with TOC only
	contexts     []*refContext
	scratch      Scratch // has the windows of contexts
	dicts        int64   // bytes of them
	table        []byte
	uncompressed uint64

	inline func(w io.Writer, blob *Blob) error // writes the bootstrap of CloseInline
}

func (t *refTable) init(o RefOptions) {
	t.options = o
	if t.scratch = o.Scratch; t.scratch == nil {
		t.scratch = &memoryScratch{}
	}
}

// chunk returns the chunk table's entry for record i.
func (t *refTable) chunk(i uint32, d Digest) Chunk {
	m := metaTable{records: t.table, size: disk.SizeMetaV2}
	r := m.record(i)
	return Chunk{
		Digest: d, Compressed: r.compressed, Index: i,
		CompressedOffset: r.compressedOffset, CompressedSize: r.compressedSize,
		UncompressedOffset: r.uncompressedOffset, UncompressedSize: r.uncompressedSize,
	}
}

// refMisread reports whether nydusd would read next, in a file behind prev, from a wrong place of its cache: it takes the two for
// one piece when next is stored at prev's end or up to readGap behind it. Such are
// chunks that lie behind each other in the cache file too; all others must not look so.
func refMisread(prev, next *Chunk) bool {
	end := storedEnd(prev)
	return next.CompressedOffset >= end && next.CompressedOffset-end <= readGap &&
		next.UncompressedOffset != alignUp(prev.UncompressedOffset+uint64(prev.UncompressedSize), disk.BlockSize)
}

func anyRefMisread(before []Chunk, next *Chunk) bool {
	return slices.ContainsFunc(before, func(prev Chunk) bool { return refMisread(&prev, next) })
}

// append adds a record, unless there is one of an equal chunk that does behind those before it.
func (t *refTable) append(before []Chunk, p RefPlace, d Digest) (Chunk, error) {
	// Records of raw chunks say the truth. Where chunks are no longer than the gap, a chunk behind an equal one
	// could be near that one's place, and look like more of it: those get a record each.
	shared := p.context != nil || t.options.ChunkSize > readGap
	if i, ok := t.seen.find(d, p.size); ok && shared {
		if c := t.chunk(i, d); !anyRefMisread(before, &c) {
			return c, nil
		}
	}
	r := metaRecord{
		uncompressedOffset: t.uncompressed, uncompressedSize: p.size,
		compressedOffset: uint64(p.begin.in), compressedSize: p.size, //nolint:gosec // not negative
	}
	if err := t.checkRoom(p, r); err != nil {
		return Chunk{}, err
	}
	t.uncompressed += alignUp(uint64(p.size), disk.BlockSize)
	if c := p.context; c != nil {
		if err := t.use(c); err != nil {
			return Chunk{}, err
		}
		c.in, c.out = max(c.in, p.in), max(c.out, p.out)
		r.compressed, r.zran = true, true
		r.batchIndex = uint32(c.index)                    //nolint:gosec // at most MaxChunks
		r.batchOffset = uint32(p.begin.out - c.start.Out) //nolint:gosec // checked by End
		t.hint(&r, before, p)
	}
	index := t.seen.add(Chunk{Digest: d, UncompressedSize: p.size})
	t.count++
	t.table = appendV2(t.table, r)
	if t.options.TOC {
		t.digests = append(t.digests, d[:]...)
	}
	return t.chunk(index, d), nil
}

// hint says where in the layer the bytes are from which a chunk is decompressed. Readers do not read from there, but
// guess by it what to read together: 24 bits may be too few for the size, and a chunk may have to look as if
// it began before the end of one that it follows.
func (t *refTable) hint(r *metaRecord, before []Chunk, p RefPlace) {
	for i := range before {
		c := Chunk{CompressedOffset: r.compressedOffset, UncompressedOffset: r.uncompressedOffset}
		if refMisread(&before[i], &c) {
			r.compressedOffset = min(r.compressedOffset, storedEnd(&before[i])-1)
		}
	}
	r.compressedSize = uint32(min(uint64(p.in)-r.compressedOffset, disk.V2CompSizeMask)) //nolint:gosec // bounded
}

// checkRoom makes sure that one more chunk fits.
func (t *refTable) checkRoom(p RefPlace, r metaRecord) error {
	switch {
	case t.count >= MaxChunks:
		return fmt.Errorf("%w: blob with more than %d chunks: use a larger chunk size", ErrInvalid, MaxChunks)
	case r.compressedOffset > disk.MaxBlobStored-MaxChunkSize:
		return fmt.Errorf("%w: layer of more than %d bytes", ErrInvalid, uint64(disk.MaxBlobStored))
	case t.uncompressed+alignUp(uint64(p.size), disk.BlockSize) > disk.MaxBlobExpanded:
		return fmt.Errorf("%w: blob of more than %d uncompressed bytes", ErrInvalid, uint64(disk.MaxBlobExpanded))
	case p.context == nil && p.size > disk.V2CompSizeMask:
		return fmt.Errorf("%w: raw chunk of %d bytes in a layer that is referred to: use a smaller chunk size", ErrUnsupported, p.size)
	}
	return nil
}

// use gives a context its number when its first chunk is stored: there are never more contexts than chunks. Its
// window is written away.
func (t *refTable) use(c *refContext) error {
	if c.index >= 0 {
		return nil
	}
	n, err := t.scratch.Write(c.window)
	if err == nil && n != len(c.window) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("put a dictionary by: %w", err)
	}
	c.index, c.dictAt, c.dict = len(t.contexts), t.dicts, uint32(n) //nolint:gosec // at most 32 KiB
	t.dicts += int64(n)
	t.contexts = append(t.contexts, c)
	c.window = nil
	return nil
}

// write writes the table's file and completes b, which has the layer's ID and size.
func (t *refTable) write(w io.Writer, b *Blob) error {
	if t.count == 0 && t.inline == nil {
		return ErrNoChunks
	}
	t.seen = chunkIndex{} // the tables take memory too
	b.ChunkSize, b.ChunkCount = t.options.ChunkSize, t.count
	b.Compressor, b.Digester = CompressorGzip, t.options.Digester
	b.Features |= disk.FeatureAligned | disk.FeatureV2 | disk.FeatureSeparate | disk.FeatureCapTOC
	if t.options.TOC {
		b.Features |= disk.FeatureTarHeader | disk.FeatureTOC | disk.FeatureInlinedDigest
	}
	if t.inline != nil {
		b.Features |= disk.FeatureInlinedMeta
	}
	b.UncompressedSize = t.uncompressed
	tail := tailWriter{w: w, sum: sha256.New()}
	if err := t.writeSections(&tail, b); err != nil {
		return err
	}
	b.MetaBlobDigest, b.MetaBlobSize = Digest(tail.sum.Sum(nil)), tail.written
	return nil
}

// writeSections writes all that is in the file.
func (t *refTable) writeSections(tail *tailWriter, b *Blob) error {
	var toc []disk.TOCEntry
	if t.count > 0 {
		meta, err := t.meta()
		if err != nil {
			return err
		}
		if toc, err = tail.writeMeta(b, meta); err != nil || !t.options.TOC {
			return err
		}
		digests, err := tail.writeDigests(t.digests)
		if err != nil {
			return err
		}
		toc = append(toc, digests)
	}
	boot, err := t.writeInline(tail, b)
	if err != nil {
		return err
	}
	return tail.writeTOC(b, append(toc, boot...))
}

// meta returns the table, which is gone from t then.
func (t *refTable) meta() (metaContent, error) {
	m := metaContent{records: uint64(len(t.table)), contexts: uint32(len(t.contexts))} //nolint:gosec // at most MaxChunks
	m.table = append(make([]byte, 0, len(t.table)+len(t.contexts)*disk.SizeZranContext), t.table...)
	t.table = nil
	for _, c := range t.contexts {
		m.table = appendRecord(m.table, &disk.ZranContext{
			InOffset: uint64(c.start.In), OutOffset: uint64(c.start.Out), //nolint:gosec // not negative
			InSize: uint32(c.in - c.start.In), OutSize: uint32(c.out - c.start.Out), //nolint:gosec // checked by End
			DictOffset: uint64(c.dictAt), DictSize: c.dict, //nolint:gosec // not negative
			Byte: c.start.Prev, Bits: uint8(c.start.Bits), //nolint:gosec // at most 7
		})
	}
	t.contexts = nil
	big := &bigMeta{head: m.table, scratch: t.scratch, dicts: t.dicts}
	if big.size() > bigTable && t.dicts > 0 {
		m.big = big
		return m, nil
	}
	at := len(m.table)
	m.table = append(m.table, make([]byte, t.dicts)...)
	if err := readFull(t.scratch, m.table[at:], 0); err != nil {
		return metaContent{}, fmt.Errorf("dictionaries: %w", err)
	}
	return m, nil
}
