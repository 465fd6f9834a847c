package rafs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// BlobFileInfo is what a blob file says of itself, without a bootstrap; it marshals to JSON. Offsets are bytes from
// the beginning of the file.
type BlobFileInfo struct {
	Size     int64         `json:"size"`
	Sections []SectionInfo `json:"sections"` // in order of place; what no table explains is "data"
	Meta     *MetaInfo     `json:"blob_meta,omitempty"`
	TOC      []TOCInfo     `json:"toc,omitempty"`
}

// MetaInfo is the header of a blob.meta table.
type MetaInfo struct {
	Offset           uint64     `json:"offset"` // of the header
	Features         uint32     `json:"features"`
	FeatureNames     []string   `json:"feature_names"`
	Compressor       Compressor `json:"ci_compressor"`
	Chunks           uint32     `json:"ci_entries"`
	TableOffset      uint64     `json:"ci_offset"`
	TableSize        uint64     `json:"ci_compressed_size"`
	UncompressedSize uint64     `json:"ci_uncompressed_size"`
	Contexts         uint32     `json:"ci_zran_count"` // batches, or places where decompression can begin
	ContextOffset    uint64     `json:"ci_zran_offset"`
	ContextSize      uint64     `json:"ci_zran_size"`
}

// TOCInfo is an entry of the table of contents.
type TOCInfo struct {
	Name             string     `json:"name"`
	Compressor       Compressor `json:"compressor"`
	Digest           Digest     `json:"sha256"`
	Offset           uint64     `json:"offset"`
	CompressedSize   uint64     `json:"compressed_size"`
	UncompressedSize uint64     `json:"uncompressed_size"`
}

// InspectBlob reads the tables at the end of a blob file of size bytes, as far as there are any: the blobs of v5 images and the
// layers that an image refers to have none, and are all "data". Nothing is decompressed and no digest
// compared: that is what [Check] does. ErrInvalid for tables that reach out of the file.
func InspectBlob(r io.ReaderAt, size int64) (*BlobFileInfo, error) {
	info := &BlobFileInfo{Size: size}
	end := uint64(max(size, 0))
	for end >= disk.TarHeaderSize {
		p, err := readExactly(r, end-disk.TarHeaderSize, disk.TarHeaderSize)
		if err != nil {
			return nil, fmt.Errorf("inspect blob: %w", err)
		}
		name, length, ok := sectionAt(p)
		if !ok || length > end-disk.TarHeaderSize {
			break
		}
		from := end - disk.TarHeaderSize - length
		if err := info.section(r, name, from, length); err != nil {
			return nil, fmt.Errorf("inspect blob: %w", err)
		}
		end = from
	}
	if len(info.Sections) == 0 && end >= disk.SizeMetaHeader { // without tar headers the table is just the end
		if err := info.section(r, disk.SectionMeta, 0, end); err != nil {
			return nil, fmt.Errorf("inspect blob: %w", err)
		}
		if info.Meta == nil {
			info.Sections = nil
		} else {
			end = min(end, info.Meta.TableOffset)
			info.Sections = []SectionInfo{{disk.SectionMeta, end, uint64(size) - end, uint64(info.Meta.Chunks)}} //nolint:gosec // not negative
		}
	}
	if end > 0 {
		info.Sections = append(info.Sections, SectionInfo{Name: "data", Size: end, Entries: 1})
	}
	slices.Reverse(info.Sections)
	return info, nil
}

// sectionAt returns what the tar header p says, if it is one of a blob's.
func sectionAt(p []byte) (name string, size uint64, ok bool) {
	name, size, err := parseSectionHeader(p)
	if err != nil || !bytes.Equal(p, sectionHeader(name, size)) {
		return "", 0, false
	}
	switch name {
	case disk.SectionData, disk.SectionMeta, disk.SectionDigest, disk.SectionBootstrap, disk.SectionTOC:
		return name, size, true
	}
	return "", 0, false
}

// section notes a section and reads what it says.
func (i *BlobFileInfo) section(r io.ReaderAt, name string, from, size uint64) error {
	s := SectionInfo{Name: name, Offset: from, Size: size, Entries: 1}
	switch name {
	case disk.SectionTOC:
		if size > maxTOCSize {
			return invalid("TOC", clampOffset(from), "length", size, fmt.Sprintf("at most %d", maxTOCSize))
		}
		p, err := readExactly(r, from, size)
		if err != nil {
			return err
		}
		entries, err := parseTOC(p)
		if err != nil {
			return err
		}
		s.Entries = uint64(len(entries))
		for _, e := range entries {
			c, err := tocCompressor(e.Flags)
			if err != nil {
				return err
			}
			i.TOC = append(i.TOC, TOCInfo{cString(e.Name[:]), c, e.Digest, e.Offset, e.CompressedSize, e.UncompressedSize})
		}
	case disk.SectionDigest:
		s.Entries = size / disk.SizeDigestRecord
	case disk.SectionMeta:
		if err := i.meta(r, from, size); err != nil {
			return err
		}
		if i.Meta != nil {
			s.Entries = uint64(i.Meta.Chunks)
		}
	}
	i.Sections = append(i.Sections, s)
	return nil
}

// meta reads the header at the end of a blob.meta section, if there is one.
func (i *BlobFileInfo) meta(r io.ReaderAt, from, size uint64) error {
	if size < disk.SizeMetaHeader {
		return nil
	}
	at := from + size - disk.SizeMetaHeader
	p, err := readExactly(r, at, disk.SizeMetaHeader)
	if err != nil {
		return err
	}
	var h disk.MetaHeader
	if _, err := binary.Decode(p, binary.LittleEndian, &h); err != nil {
		return err
	}
	if h.Magic != disk.MetaMagic || h.Magic2 != disk.MetaMagic {
		return nil
	}
	if h.Offset > at || h.CompressedSize > at-h.Offset {
		return invalid("blob.meta header", clampOffset(at), "place of the table", [2]uint64{h.Offset, h.CompressedSize}, fmt.Sprintf("an end of at most %d", at))
	}
	i.Meta = &MetaInfo{
		Offset: at, Features: h.Features, FeatureNames: names(uint64(h.Features), featureNames), Compressor: Compressor(h.Compressor),
		Chunks: h.Entries, TableOffset: h.Offset, TableSize: h.CompressedSize, UncompressedSize: h.UncompressedSize,
		Contexts: h.ContextCount, ContextOffset: h.ContextOffset, ContextSize: h.ContextSize,
	}
	return nil
}
