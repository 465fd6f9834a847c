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
	table    []byte   // records, then contexts and dictionaries
	records  uint64   // bytes of the records
	contexts uint32   // batch or ZRAN
	big      *bigMeta // in place of table
}

// writeMeta writes the blob.meta section, with a tar header behind it if the blob has such, notes its place in blob
// and returns its TOC entries.
func (t *tailWriter) writeMeta(blob *Blob, m metaContent) ([]disk.TOCEntry, error) {
	compressor := blob.Compressor
	if compressor == CompressorGzip { // which a TOC entry cannot say
		compressor = CompressorZstd
	}
	blob.MetaOffset = t.written
	size, sum, compressed, err := t.writeTable(compressor, m)
	if err != nil {
		return nil, err
	}
	blob.MetaCompressor = CompressorNone
	if compressed {
		blob.MetaCompressor = compressor
	}
	blob.MetaCompressed, blob.MetaUncompressed = t.written-blob.MetaOffset, size
	h := disk.MetaHeader{
		Magic: disk.MetaMagic, Magic2: disk.MetaMagic, Features: blob.Features,
		Compressor: uint32(blob.MetaCompressor), Entries: blob.ChunkCount, Offset: blob.MetaOffset,
		CompressedSize: blob.MetaCompressed, UncompressedSize: blob.MetaUncompressed,
	}
	if blob.Features&(disk.FeatureBatch|disk.FeatureZran) != 0 {
		h.ContextOffset, h.ContextSize, h.ContextCount = m.records, size-m.records, m.contexts
	}
	header := appendRecord(nil, &h)
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
		Flags: tocFlags(blob.MetaCompressor), Name: tocName(disk.SectionMeta), Digest: sum,
		Offset: blob.MetaOffset, CompressedSize: blob.MetaCompressed, UncompressedSize: blob.MetaUncompressed,
	}, {
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionMetaHeader), Digest: sha256.Sum256(header),
		Offset: headerOffset, CompressedSize: disk.SizeMetaHeader, UncompressedSize: disk.SizeMetaHeader,
	}}, nil
}

// writeTable writes a table, compressed where that is smaller, and returns its uncompressed size and digest.
func (t *tailWriter) writeTable(compressor Compressor, m metaContent) (size uint64, sum Digest, compressed bool, err error) {
	if m.big != nil { // only those of gzip layers, whose compressor is zstd
		h := sha256.New()
		stored, n, compressed, err := m.big.compress(h)
		if err == nil {
			err = t.copyFrom(stored, n)
		}
		return uint64(m.big.size()), Digest(h.Sum(nil)), compressed, err //nolint:gosec // not negative
	}
	enc, err := NewEncoder(compressor, LevelDefault)
	if err != nil {
		return 0, Digest{}, false, err
	}
	stored, compressed, err := enc.Encode(nil, m.table)
	if err != nil {
		return 0, Digest{}, false, err
	}
	return uint64(len(m.table)), sha256.Sum256(m.table), compressed, t.write(stored, nil)
}

// copyFrom writes the n bytes of r.
func (t *tailWriter) copyFrom(r io.Reader, n int64) error {
	buf := make([]byte, 256<<10)
	for n > 0 {
		p := buf[:min(n, int64(len(buf)))]
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("read back what was put by: %w", err)
		}
		if err := t.write(p, nil); err != nil {
			return err
		}
		n -= int64(len(p))
	}
	return nil
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
