package rafs

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// sectionHeader returns the 512-byte tar header that follows a section of size bytes.
func sectionHeader(name string, size uint64) []byte {
	h := disk.TarHeader{Type: '0'}
	copy(h.Name[:], name)
	if size <= tarSizeLimit {
		copy(h.Size[:], fmt.Sprintf("%011o", size))
	} else { // GNU's binary form
		h.Size[0] = tarSizeBinary
		binary.BigEndian.PutUint64(h.Size[len(h.Size)-8:], size)
	}
	copy(h.Mtime[:], "00000000000")
	copy(h.Magic[:], "ustar  ")
	copy(h.Checksum[:], "        ") // counts as blanks in its own sum
	var sum int
	for _, c := range appendRecord(nil, &h) {
		sum += int(c)
	}
	copy(h.Checksum[:], fmt.Sprintf("%07o\x00", sum))
	return appendRecord(nil, &h)
}

const (
	tarSizeLimit  = 1<<33 - 1 // the largest size that 11 octal digits can say
	tarSizeBinary = 0x80      // first byte of a size in binary, big-endian
)

// parseSectionHeader returns name and size of a section's tar header.
func parseSectionHeader(p []byte) (name string, size uint64, err error) {
	var h disk.TarHeader
	if _, err := binary.Decode(p, binary.LittleEndian, &h); err != nil {
		return "", 0, invalid("tar header", -1, "length", len(p), disk.TarHeaderSize)
	}
	if !bytes.Equal(h.Magic[:5], []byte("ustar")) {
		return "", 0, invalid("tar header", -1, "magic", fmt.Sprintf("%q", h.Magic[:]), `"ustar  \x00"`)
	}
	if h.Size[0] == tarSizeBinary {
		return cString(h.Name[:]), binary.BigEndian.Uint64(h.Size[len(h.Size)-8:]), nil
	}
	for _, c := range bytes.TrimRight(h.Size[:], "\x00 ") {
		if c < '0' || c > '7' {
			return "", 0, invalid("tar header", -1, "size", fmt.Sprintf("%q", h.Size[:]), "octal digits")
		}
		size = size<<3 | uint64(c-'0')
	}
	return cString(h.Name[:]), size, nil
}

// cString returns p up to its first NUL.
func cString(p []byte) string {
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p)
}

// appendRecord appends the on-disk form of v, a fixed-size record.
func appendRecord(p []byte, v any) []byte {
	p, err := binary.Append(p, binary.LittleEndian, v)
	if err != nil {
		panic("rafs: record of unknown size: " + err.Error())
	}
	return p
}

// parseTOC reads the entries of a blob's table of contents.
func parseTOC(p []byte) ([]disk.TOCEntry, error) {
	if len(p) == 0 || len(p)%disk.SizeTOCEntry != 0 || len(p) > maxTOCSize {
		return nil, invalid("TOC", -1, "length", len(p), fmt.Sprintf("a multiple of %d up to %d", disk.SizeTOCEntry, maxTOCSize))
	}
	entries := make([]disk.TOCEntry, len(p)/disk.SizeTOCEntry)
	if _, err := binary.Decode(p, binary.LittleEndian, entries); err != nil {
		return nil, err
	}
	for i, e := range entries {
		if _, err := tocCompressor(e.Flags); err != nil {
			return nil, invalid(fmt.Sprintf("TOC entry %d", i), int64(i)*disk.SizeTOCEntry, "flags", fmt.Sprintf("%#x", e.Flags), "0x1, 0x2 or 0x4")
		}
	}
	return entries, nil
}

// maxTOCSize is the largest TOC readers take, with its tar header.
const maxTOCSize = 65536

func tocCompressor(flags uint32) (Compressor, error) {
	switch flags {
	case disk.TOCNone:
		return CompressorNone, nil
	case disk.TOCZstd:
		return CompressorZstd, nil
	case disk.TOCLZ4:
		return CompressorLZ4, nil
	}
	return 0, ErrInvalid
}

func tocFlags(c Compressor) uint32 {
	switch c {
	case CompressorZstd:
		return disk.TOCZstd
	case CompressorLZ4:
		return disk.TOCLZ4
	}
	return disk.TOCNone
}
