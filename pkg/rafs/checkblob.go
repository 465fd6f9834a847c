package rafs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// sections checks the table of contents behind a blob and, with Data, the digest of every section.
func (c *checker) sections(ctx context.Context, b Blob, r io.ReaderAt) error {
	size, ok := sizeOf(r)
	if !ok || b.Features&disk.FeatureTOC == 0 {
		return nil
	}
	entries, err := readTOC(r, size, b)
	if err != nil {
		return c.add(err)
	}
	for i, e := range entries {
		misplaced := checkEntryPlace(e, b, size)
		if slices.ContainsFunc(entries[:i], func(other disk.TOCEntry) bool { return other.Name == e.Name }) {
			// Hundreds of entries fit that all name the whole blob.
			misplaced = invalid(fmt.Sprintf("TOC entry %q of %s", cString(e.Name[:]), short(b.ID)), -1, "number of entries of the name", "more", 1)
		}
		if err := c.add(misplaced); err != nil {
			return err
		}
		if misplaced != nil || !c.options.Data {
			continue // what is not inside the file is not to be read
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.add(checkEntryDigest(ctx, e, b, r)); err != nil {
			return err
		}
	}
	return nil
}

// readTOC reads the table of contents at the end of a blob file and compares it with
// what the blob table says of it.
func readTOC(r io.ReaderAt, size uint64, b Blob) ([]disk.TOCEntry, error) {
	section := "TOC of " + short(b.ID)
	if size < disk.TarHeaderSize {
		return nil, invalid(section, -1, "file size", size, fmt.Sprintf("at least %d", disk.TarHeaderSize))
	}
	header, err := readExactly(r, size-disk.TarHeaderSize, disk.TarHeaderSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", section, err)
	}
	name, length, err := parseSectionHeader(header)
	switch at := clampOffset(size - disk.TarHeaderSize); {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", section, err)
	case name != disk.SectionTOC:
		return nil, invalid(section, at, "section name", fmt.Sprintf("%q", name), disk.SectionTOC)
	case length > maxTOCSize || length > size-disk.TarHeaderSize:
		return nil, invalid(section, at, "length", length, fmt.Sprintf("at most %d", maxTOCSize))
	}
	p, err := readExactly(r, size-disk.TarHeaderSize-length, length)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", section, err)
	}
	if b.TOCSize != 0 && uint64(b.TOCSize) != length+disk.TarHeaderSize {
		return nil, invalid(section, -1, "length with its header", length+disk.TarHeaderSize, b.TOCSize)
	}
	if got := Digest(sha256.Sum256(append(p[:length:length], header...))); b.TOCDigest != (Digest{}) && got != b.TOCDigest {
		return nil, &FormatError{Class: ErrDigest, Section: section, Offset: clampOffset(size - disk.TarHeaderSize - length), Field: "sha256", Got: got, Want: b.TOCDigest}
	}
	return parseTOC(p)
}

// dataEntryPlace returns where a section's stored content is. Old files give image.blob an
// offset that is no use; it is always at 0.
func dataEntryPlace(e disk.TOCEntry) (offset, size uint64) {
	if cString(e.Name[:]) == disk.SectionData {
		return 0, e.CompressedSize
	}
	return e.Offset, e.CompressedSize
}

func checkEntryPlace(e disk.TOCEntry, b Blob, size uint64) error {
	offset, length := dataEntryPlace(e)
	name := cString(e.Name[:])
	section := fmt.Sprintf("TOC entry %q of %s", name, short(b.ID))
	if !inside([2]uint64{offset, length}, size) && (name != disk.SectionData || b.Features&disk.FeatureSeparate == 0) {
		return invalid(section, -1, "place", [2]uint64{offset, length}, fmt.Sprintf("inside %d bytes", size))
	}
	var got, want [3]uint64
	switch name {
	case disk.SectionData:
		if b.Features&disk.FeatureSeparate != 0 { // the data are elsewhere; nydus-image 2.2 writes junk here
			return nil
		}
		got, want = [3]uint64{length, e.UncompressedSize}, [3]uint64{b.dataEnd(), b.UncompressedSize}
	case disk.SectionMeta:
		got, want = [3]uint64{offset, length, e.UncompressedSize}, [3]uint64{b.MetaOffset, b.MetaCompressed, b.MetaUncompressed}
	case disk.SectionMetaHeader:
		got, want = [3]uint64{offset, length, e.UncompressedSize}, [3]uint64{b.MetaOffset + b.MetaCompressed, disk.SizeMetaHeader, disk.SizeMetaHeader}
	case disk.SectionDigest:
		digests := uint64(b.ChunkCount) * disk.SizeDigestRecord
		got, want = [3]uint64{length, e.UncompressedSize}, [3]uint64{digests, digests}
	}
	if got != want {
		return invalid(section, -1, "offset and sizes", got, want)
	}
	return nil
}

// maxSection bounds the sections that are held in memory, in bytes, stored and decompressed: the tables of a
// hundred million chunks.
const maxSection = 4 << 30

// checkEntryDigest hashes a section as its entry, which [checkEntryPlace] has passed, wants it.
func checkEntryDigest(ctx context.Context, e disk.TOCEntry, b Blob, r io.ReaderAt) error {
	section := fmt.Sprintf("TOC entry %q of %s", cString(e.Name[:]), short(b.ID))
	offset, length := dataEntryPlace(e)
	sum := sha256.New()
	compressor, err := tocCompressor(e.Flags)
	if cString(e.Name[:]) == disk.SectionData && b.Features&disk.FeatureSeparate != 0 {
		return nil
	}
	switch {
	case err != nil:
		return err
	case cString(e.Name[:]) == disk.SectionData: // as stored, with its tar header
		err = hashRange(ctx, sum, r, offset, length+disk.TarHeaderSize)
	case compressor == CompressorNone:
		err = hashRange(ctx, sum, r, offset, length)
	case e.UncompressedSize > 1<<20 && e.UncompressedSize/maxMetaRatio > length:
		err = invalid(section, -1, "uncompressed size", e.UncompressedSize, fmt.Sprintf("at most %d times the stored size", maxMetaRatio))
	case e.UncompressedSize > maxSection || length > e.UncompressedSize+e.UncompressedSize/64+1<<16: // no compressor adds that much
		err = invalid(section, -1, "stored and uncompressed size", [2]uint64{length, e.UncompressedSize}, fmt.Sprintf("at most %d, the first no larger", uint64(maxSection)))
	case e.UncompressedSize > bigTable && compressor == CompressorZstd:
		var t *tableReader
		if t, err = newTableReader(io.NewSectionReader(r, clampOffset(offset), clampOffset(length)), compressor, e.UncompressedSize); err == nil {
			_, err = io.Copy(sum, t)
			t.Close()
		}
	default:
		var p []byte
		if p, err = readExactly(r, offset, length); err == nil {
			p, err = new(decoder).decode(compressor, p, int(e.UncompressedSize))
		}
		sum.Write(p)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", section, err)
	}
	if got := Digest(sum.Sum(nil)); got != e.Digest {
		return &FormatError{Class: ErrDigest, Section: section, Offset: clampOffset(offset), Field: "sha256", Got: got, Want: Digest(e.Digest)}
	}
	return nil
}

// hashRange adds size bytes of r to sum. A size of all bits reads to the end.
func hashRange(ctx context.Context, sum hash.Hash, r io.ReaderAt, offset, size uint64) error {
	buf := make([]byte, min(size, 1<<20))
	for size > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.ReadAt(buf[:min(size, uint64(len(buf)))], clampOffset(offset))
		sum.Write(buf[:n])
		offset, size = offset+uint64(n), size-uint64(n) //nolint:gosec // not negative
		switch {
		case size == 0:
		case errors.Is(err, io.EOF):
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		case n == 0:
			return io.ErrNoProgress
		}
	}
	return nil
}

// checkBlobID compares the hash of the blob file with its id. Blobs with a blob.digest section made by nydus-image are
// named by a hash that leaves that section's content out.
func checkBlobID(ctx context.Context, b Blob, r io.ReaderAt) error {
	want, ok := parseID(b.ID)
	size, known := sizeOf(r)
	if !ok || !known {
		return nil
	}
	whole, parts := sha256.New(), sha256.New()
	both := hash.Hash(teeHash{whole, parts})
	skipFrom, skipTo := digestSection(r, size, b)
	if skipFrom == skipTo {
		both, parts = whole, whole
	}
	for _, part := range []struct {
		from, to uint64
		sum      hash.Hash
	}{
		{0, skipFrom, both},
		{skipFrom, skipTo, whole},
		{skipTo, size, both},
	} {
		if err := hashRange(ctx, part.sum, r, part.from, part.to-part.from); err != nil {
			return fmt.Errorf("hash blob %s: %w", short(b.ID), err)
		}
	}
	if Digest(whole.Sum(nil)) != want && Digest(parts.Sum(nil)) != want {
		return &FormatError{Class: ErrDigest, Section: "blob " + short(b.ID), Offset: -1, Field: "sha256 of the file", Got: Digest(whole.Sum(nil)), Want: want}
	}
	return nil
}

// parseID returns the digest that a blob id is; ids given by hand may be anything.
func parseID(id string) (d Digest, ok bool) {
	p, err := hex.DecodeString(id)
	return d, err == nil && copy(d[:], p) == len(p) && len(p) == len(d)
}

// digestSection returns where the content of blob.digest lies; an empty range when there is none.
func digestSection(r io.ReaderAt, size uint64, b Blob) (from, to uint64) {
	if b.Features&disk.FeatureTOC == 0 {
		return 0, 0
	}
	b.TOCSize, b.TOCDigest = 0, Digest{}
	entries, err := readTOC(r, size, b)
	if err != nil {
		return 0, 0
	}
	for _, e := range entries {
		if cString(e.Name[:]) == disk.SectionDigest && inside([2]uint64{e.Offset, e.CompressedSize}, size) {
			return e.Offset, e.Offset + e.CompressedSize
		}
	}
	return 0, 0
}

// teeHash feeds two hashes.
type teeHash [2]hash.Hash

func (t teeHash) Write(p []byte) (int, error) {
	t[0].Write(p)
	return t[1].Write(p)
}

func (t teeHash) Sum(p []byte) []byte { return t[0].Sum(p) }
func (t teeHash) Reset()              { t[0].Reset(); t[1].Reset() }
func (t teeHash) Size() int           { return t[0].Size() }
func (t teeHash) BlockSize() int      { return t[0].BlockSize() }
