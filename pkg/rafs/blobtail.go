package rafs

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// tailWriter writes a blob file front to back: what lies behind the chunk data, and counts and hashes all of it.
// After an error of the io.Writer every later call returns that error.
type tailWriter struct {
	w       io.Writer
	sum     hash.Hash // of every byte written
	written uint64
	err     error
}

// write writes p; also takes it too, when it is not nil.
func (t *tailWriter) write(p []byte, also hash.Hash) error {
	if t.err != nil {
		return t.err
	}
	n, err := t.w.Write(p)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		t.err = fmt.Errorf("write blob at byte %d: %w", t.written, err)
		return t.err
	}
	t.sum.Write(p)
	if also != nil {
		also.Write(p)
	}
	t.written += uint64(len(p))
	return nil
}

// writeSection writes a section and the tar header that names it.
func (t *tailWriter) writeSection(name string, content []byte) error {
	if err := t.write(content, nil); err != nil {
		return err
	}
	return t.write(sectionHeader(name, uint64(len(content))), nil)
}

// metaContent is an uncompressed blob.meta table.
type metaContent struct {
	table    []byte // records, then contexts and dictionaries
	records  uint64 // bytes of the records
	contexts uint32 // batch or ZRAN
}

// writeMeta writes the blob.meta section, with a tar header behind it if the blob has such, notes its place in blob
// and returns its TOC entries.
func (t *tailWriter) writeMeta(blob *Blob, m metaContent) ([]disk.TOCEntry, error) {
	compressor := blob.Compressor
	if compressor == CompressorGzip { // which a TOC entry cannot say
		compressor = CompressorZstd
	}
	enc, err := NewEncoder(compressor, LevelDefault)
	if err != nil {
		return nil, err
	}
	stored, compressed, err := enc.Encode(nil, m.table)
	if err != nil {
		return nil, err
	}
	blob.MetaCompressor = CompressorNone
	if compressed {
		blob.MetaCompressor = compressor
	}
	blob.MetaOffset, blob.MetaCompressed, blob.MetaUncompressed = t.written, uint64(len(stored)), uint64(len(m.table))
	h := disk.MetaHeader{
		Magic: disk.MetaMagic, Magic2: disk.MetaMagic, Features: blob.Features,
		Compressor: uint32(blob.MetaCompressor), Entries: blob.ChunkCount, Offset: blob.MetaOffset,
		CompressedSize: blob.MetaCompressed, UncompressedSize: blob.MetaUncompressed,
	}
	if blob.Features&(disk.FeatureBatch|disk.FeatureZran) != 0 {
		h.ContextOffset, h.ContextSize, h.ContextCount = m.records, uint64(len(m.table))-m.records, m.contexts
	}
	header := appendRecord(nil, &h)
	if err := t.write(stored, nil); err != nil {
		return nil, err
	}
	headerOffset := t.written
	if err := t.write(header, nil); err != nil {
		return nil, err
	}
	if blob.Features&disk.FeatureTarHeader != 0 {
		if err := t.write(sectionHeader(disk.SectionMeta, blob.MetaCompressed+disk.SizeMetaHeader), nil); err != nil {
			return nil, err
		}
	}
	return []disk.TOCEntry{{
		Flags: tocFlags(blob.MetaCompressor), Name: tocName(disk.SectionMeta), Digest: sha256.Sum256(m.table),
		Offset: blob.MetaOffset, CompressedSize: blob.MetaCompressed, UncompressedSize: blob.MetaUncompressed,
	}, {
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionMetaHeader), Digest: sha256.Sum256(header),
		Offset: headerOffset, CompressedSize: disk.SizeMetaHeader, UncompressedSize: disk.SizeMetaHeader,
	}}, nil
}

// writeDigests writes the blob.digest section and returns its TOC entry.
func (t *tailWriter) writeDigests(digests []byte) (disk.TOCEntry, error) {
	e := disk.TOCEntry{
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionDigest), Digest: sha256.Sum256(digests),
		Offset: t.written, CompressedSize: uint64(len(digests)), UncompressedSize: uint64(len(digests)),
	}
	return e, t.writeSection(disk.SectionDigest, digests)
}

// writeTOC writes the table of contents, the last section.
func (t *tailWriter) writeTOC(blob *Blob, toc []disk.TOCEntry) error {
	entries := appendRecord(nil, toc)
	header := sectionHeader(disk.SectionTOC, uint64(len(entries)))
	blob.TOCDigest = sha256.Sum256(slices.Concat(entries, header))
	blob.TOCSize = uint32(len(entries) + len(header)) //nolint:gosec // at most five entries
	return t.writeSection(disk.SectionTOC, entries)
}

func tocName(s string) (name [16]byte) {
	copy(name[:], s)
	return name
}
