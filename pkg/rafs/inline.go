package rafs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// PlaceholderID stands for the id of a blob in the bootstrap that the blob itself holds: it
// is the hash of both. Whoever merges such bootstraps puts the id in its place.
// Source: rafs-format.md 1.5, "Placeholder ids".
var PlaceholderID = strings.Repeat("x", 64)

// maxInline bounds a bootstrap inside a blob: that of millions of files.
const maxInline = 1 << 30

// CloseInline is [BlobWriter.Close] of a layer's blob that also holds the layer's bootstrap, as
// `nydus-image create --blob-inline-meta` makes it; with BlobOptions.TOC, which V6 wants and V5 cannot have,
// as with `--features blob-toc`. bootstrap writes it, given the blob's description with [PlaceholderID] and the size
// up to the bootstrap; blob is nil when there are no chunks, which is no error here. The
// blob that is returned has the real id, and the size and TOC of the whole.
func (b *BlobWriter) CloseInline(bootstrap func(w io.Writer, blob *Blob) error) (Blob, error) {
	if !b.options.TOC && b.options.Version != V5 {
		return Blob{}, fmt.Errorf("%w: a bootstrap in a blob without TOC", ErrUnsupported)
	}
	b.inline = bootstrap
	blob, err := b.Close()
	if !errors.Is(err, ErrNoChunks) {
		return blob, err
	}
	blob = Blob{ChunkSize: b.options.ChunkSize, Compressor: b.options.Compressor, Digester: b.options.Digester}
	e, err := b.writeBootstrap(Blob{})
	if err == nil && b.options.TOC {
		err = b.writeTOC(&blob, []disk.TOCEntry{e})
	}
	if err != nil {
		b.err = err
		return Blob{}, err
	}
	blob.CompressedSize, blob.ID = b.written, hex.EncodeToString(b.sum.Sum(nil))
	return blob, nil
}

// writeInlineV5 ends a blob of V5 that holds a bootstrap: the tar header of its chunks, and the bootstrap.
func (b *BlobWriter) writeInlineV5(blob *Blob) error {
	if err := b.write(sectionHeader(disk.SectionData, b.written), nil); err != nil {
		return err
	}
	_, err := b.writeBootstrap(*blob)
	return err
}

// writeBootstrap writes the bootstrap's section, zstd where that is smaller and a TOC says so, and returns its TOC entry.
func (b *BlobWriter) writeBootstrap(blob Blob) (disk.TOCEntry, error) {
	var inner *Blob
	if blob.ChunkCount > 0 {
		blob.ID, blob.CompressedSize = PlaceholderID, b.written
		inner = &blob
	}
	var boot bytes.Buffer
	if err := b.inline(&boot, inner); err != nil {
		return disk.TOCEntry{}, fmt.Errorf("bootstrap of the blob: %w", err)
	}
	if !b.options.TOC {
		return disk.TOCEntry{}, b.writeSection(disk.SectionBootstrap, boot.Bytes())
	}
	return b.writeBoot(boot.Bytes())
}

// writeBoot writes the section of a bootstrap, compressed where that is smaller, and returns its TOC entry.
func (t *tailWriter) writeBoot(boot []byte) (disk.TOCEntry, error) {
	enc, err := NewEncoder(CompressorZstd, LevelDefault)
	if err != nil {
		return disk.TOCEntry{}, err
	}
	stored, compressed, err := enc.Encode(nil, boot)
	if err != nil {
		return disk.TOCEntry{}, err
	}
	e := disk.TOCEntry{
		Flags: tocFlags(CompressorNone), Name: tocName(disk.SectionBootstrap), Digest: sha256.Sum256(boot),
		Offset: t.written, CompressedSize: uint64(len(stored)), UncompressedSize: uint64(len(boot)),
	}
	if compressed {
		e.Flags = tocFlags(CompressorZstd)
	}
	return e, t.writeSection(disk.SectionBootstrap, stored)
}

// CloseInline is [RefBuilder.Close] for a file that also holds the layer's bootstrap, as `nydus-image create --type targz-ref
// --blob-inline-meta --features blob-toc` makes it; it wants RefOptions.TOC. bootstrap writes it, given the
// description of the layer; blob is nil when no chunk is in the layer, which is no error here: the file has the bootstrap alone then,
// and what is returned has the layer's ID and size, and no chunks.
func (b *RefBuilder) CloseInline(w io.Writer, bootstrap func(w io.Writer, blob *Blob) error) (Blob, error) {
	if !b.options.TOC {
		return Blob{}, fmt.Errorf("%w: a bootstrap in a file without TOC", ErrUnsupported)
	}
	b.writer.inline = bootstrap
	return b.Close(w)
}

// writeInline writes the bootstrap that goes with the table, if there is one.
func (t *refTable) writeInline(tail *tailWriter, b *Blob) ([]disk.TOCEntry, error) {
	if t.inline == nil {
		return nil, nil
	}
	var inner *Blob
	if b.ChunkCount > 0 {
		blob := *b
		inner = &blob
	}
	var boot bytes.Buffer
	if err := t.inline(&boot, inner); err != nil {
		return nil, fmt.Errorf("bootstrap of the blob: %w", err)
	}
	e, err := tail.writeBoot(boot.Bytes())
	return []disk.TOCEntry{e}, err
}

// SetTOC gives b the digest and size of the table of contents at the end of the file r of size bytes, which holds b's tables, as
// the bootstrap in the file cannot say them. Nothing is done for a blob whose features know of no TOC; ErrInvalid when the file has none.
func (b *Blob) SetTOC(r io.ReaderAt, size int64) error {
	if b.Features&disk.FeatureTOC == 0 {
		return nil
	}
	entries, err := readTOC(r, uint64(max(size, 0)), Blob{ID: b.ID}) // not negative
	if err != nil {
		return err
	}
	length := uint64(len(entries))*disk.SizeTOCEntry + disk.TarHeaderSize
	p, err := readExactly(r, uint64(size)-length, length) //nolint:gosec // readTOC found it there
	if err != nil {
		return err
	}
	b.TOCDigest, b.TOCSize = sha256.Sum256(p), uint32(length) //nolint:gosec // at most maxTOCSize
	return nil
}

// ReadInline returns the bootstrap that the blob r of size bytes holds, verified where the
// blob has a TOC. ErrNoBootstrap when it holds none; ErrInvalid and ErrDigest for what is wrong with it.
func ReadInline(r io.ReaderAt, size int64) ([]byte, error) {
	end := uint64(max(size, 0)) // not negative
	for range 16 {              // sections of a blob: there are five
		if end < disk.TarHeaderSize {
			break
		}
		header, err := readExactly(r, end-disk.TarHeaderSize, disk.TarHeaderSize)
		if err != nil {
			return nil, err
		}
		name, length, err := parseSectionHeader(header)
		if err != nil {
			break // chunk data, or no blob with sections
		}
		end -= disk.TarHeaderSize
		if length > end {
			return nil, invalid("blob section "+name, clampOffset(end), "length", length, fmt.Sprintf("at most %d", end))
		}
		end -= length
		switch name {
		case disk.SectionTOC:
			entries, err := readTOC(r, uint64(size), Blob{}) //nolint:gosec // not negative
			if err != nil {
				return nil, err
			}
			return inlineOf(r, uint64(size), entries) //nolint:gosec // not negative
		case disk.SectionBootstrap:
			if length > maxInline {
				return nil, invalid("bootstrap of the blob", clampOffset(end), "length", length, fmt.Sprintf("at most %d", maxInline))
			}
			return readExactly(r, end, length)
		}
	}
	return nil, ErrNoBootstrap
}

// inlineOf reads the bootstrap that a TOC names.
func inlineOf(r io.ReaderAt, size uint64, entries []disk.TOCEntry) ([]byte, error) {
	for _, e := range entries {
		if cString(e.Name[:]) != disk.SectionBootstrap {
			continue
		}
		section := "bootstrap of the blob"
		if !inside([2]uint64{e.Offset, e.CompressedSize}, size) || e.UncompressedSize > maxInline {
			return nil, invalid(section, -1, "place and size", [3]uint64{e.Offset, e.CompressedSize, e.UncompressedSize}, fmt.Sprintf("inside %d bytes, at most %d", size, maxInline))
		}
		if e.UncompressedSize/maxMetaRatio > e.CompressedSize {
			return nil, invalid(section, -1, "size", e.UncompressedSize, fmt.Sprintf("at most %d times %d", maxMetaRatio, e.CompressedSize))
		}
		compressor, err := tocCompressor(e.Flags)
		if err != nil {
			return nil, err
		}
		if compressor == CompressorNone && e.CompressedSize != e.UncompressedSize {
			return nil, invalid(section, -1, "stored size", e.CompressedSize, fmt.Sprintf("%d: it is not compressed", e.UncompressedSize))
		}
		p, err := readExactly(r, e.Offset, e.CompressedSize)
		if err != nil {
			return nil, err
		}
		if compressor != CompressorNone {
			var d decoder
			if p, err = d.decode(compressor, p, int(e.UncompressedSize)); err != nil {
				return nil, err
			}
		}
		if got := sha256.Sum256(p); got != e.Digest {
			return nil, &FormatError{Class: ErrDigest, Section: section, Offset: clampOffset(e.Offset), Field: "sha256", Got: Digest(got), Want: Digest(e.Digest)}
		}
		return p, nil
	}
	return nil, ErrNoBootstrap
}
