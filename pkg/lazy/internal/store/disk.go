package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// errCorrupt is returned for bytes of a state file that this package did not write.
var errCorrupt = errors.New("corrupt state file")

const (
	// BlockSize is the unit of readiness in bytes: EROFS reads whole blocks, and the
	// chunks of v6 images begin at them.
	BlockSize = 4096
	// maxBlocks bounds a data file, to 256 GiB, and by that the memory for its bits.
	maxBlocks = 1 << 26
	// diskVersion is the version of both headers.
	diskVersion = 1
)

var (
	magicChunks = [8]byte{'h', 's', 'c', 'h', 'u', 'n', 'k', 's'}
	magicReady  = [8]byte{'h', 's', 'r', 'e', 'a', 'd', 'y', 0}
	castagnoli  = crc32.MakeTable(crc32.Castagnoli)
)

// header begins "chunks" and "ready", little-endian. Behind it come Records records, or
// Records words of 64 bits.
type header struct {
	Magic    [8]byte
	Version  uint32
	Records  uint32
	Size     uint64   // of the data file when complete, bytes
	Blob     [32]byte // SHA-256 of the blob's id, digester and compressor
	Changed  int64    // of "ready": when the data file was changed last before it was written, ns since 1970; 0: unknown
	Reserved [52]byte
	BodySum  uint32 // CRC32C of what follows the header
	_        uint32
	Sum      uint32 // CRC32C of the header before this field
}

// chunkRecord is one chunk, ordered by Offset, little-endian.
type chunkRecord struct {
	Offset       uint64 // uncompressed, bytes
	StoredOffset uint64 // compressed, bytes in the blob file
	Size         uint32 // uncompressed, bytes
	StoredSize   uint32 // compressed, bytes
	Index        uint32
	Flags        uint32 // flagCompressed, flagBatch
	Digest       [32]byte
}

// Sizes in bytes; TestSizes holds them against binary.Size.
const (
	sizeHeader      = 128
	sizeChunkRecord = 64
	offHeaderSum    = sizeHeader - 4
)

// Bits of chunkRecord.Flags.
const (
	flagCompressed = 0x1
	flagBatch      = 0x2
)

// identity is what must be the same of two images that share a data file.
func identity(b rafs.Blob) [32]byte {
	return sha256.Sum256(fmt.Appendf(nil, "%s %d %d", b.ID, b.Digester, b.Compressor))
}

func record(c rafs.Chunk) chunkRecord {
	r := chunkRecord{
		Offset: c.UncompressedOffset, StoredOffset: c.CompressedOffset, Size: c.UncompressedSize,
		StoredSize: c.CompressedSize, Index: c.Index, Digest: c.Digest,
	}
	if c.Compressed {
		r.Flags |= flagCompressed
	}
	if c.Batch {
		r.Flags |= flagBatch
	}
	return r
}

func (r *chunkRecord) chunk() rafs.Chunk {
	return rafs.Chunk{
		Digest: r.Digest, Compressed: r.Flags&flagCompressed != 0, Batch: r.Flags&flagBatch != 0, Index: r.Index,
		CompressedOffset: r.StoredOffset, UncompressedOffset: r.Offset, CompressedSize: r.StoredSize, UncompressedSize: r.Size,
	}
}

// first and end are the blocks that the chunk covers, half-open.
func (r *chunkRecord) first() uint64 { return r.Offset / BlockSize }

func (r *chunkRecord) end() uint64 { return (r.Offset + uint64(r.Size) + BlockSize - 1) / BlockSize }

// encode returns the file of h and body; it fills in the sums.
func encode(h header, body []byte) ([]byte, error) {
	h.Version, h.BodySum = diskVersion, crc32.Checksum(body, castagnoli)
	out, err := binary.Append(make([]byte, 0, sizeHeader+len(body)), binary.LittleEndian, &h)
	if err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint32(out[offHeaderSum:], crc32.Checksum(out[:offHeaderSum], castagnoli))
	return append(out, body...), nil
}

// readState reads a file whose records have size bytes. It takes no more memory than the file's
// header asks for: errCorrupt when the file is of another length.
func readState(dir *os.Root, name string, size int64) (_ []byte, err error) {
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var h header
	if err := binary.Read(io.NewSectionReader(f, 0, sizeHeader), binary.LittleEndian, &h); err != nil {
		return nil, fmt.Errorf("%s: %w: %d bytes: %w", name, errCorrupt, info.Size(), err)
	}
	if want := sizeHeader + int64(h.Records)*size; h.Records > maxBlocks || info.Size() != want {
		return nil, fmt.Errorf("%s: %w: %d bytes, want %d of %d records", name, errCorrupt, info.Size(), want, h.Records)
	}
	p := make([]byte, info.Size())
	_, err = io.ReadFull(f, p)
	return p, err
}

// decode returns the header and the body of a file whose records have size bytes; errConflict
// when it is sound and of another blob.
func decode(p []byte, magic [8]byte, blob [32]byte, size uint64) (header, []byte, error) {
	var h header
	if len(p) < sizeHeader {
		return header{}, nil, fmt.Errorf("%w: %d bytes, want at least %d", errCorrupt, len(p), sizeHeader)
	}
	if _, err := binary.Decode(p, binary.LittleEndian, &h); err != nil {
		return header{}, nil, fmt.Errorf("%w: %w", errCorrupt, err)
	}
	body := p[sizeHeader:]
	switch {
	case h.Magic != magic:
		return header{}, nil, fmt.Errorf("%w: magic %q, want %q", errCorrupt, h.Magic, magic)
	case h.Version != diskVersion:
		return header{}, nil, fmt.Errorf("%w: version %d, want %d", errCorrupt, h.Version, diskVersion)
	case h.Sum != crc32.Checksum(p[:offHeaderSum], castagnoli):
		return header{}, nil, fmt.Errorf("%w: header checksum %#x, want %#x", errCorrupt, h.Sum, crc32.Checksum(p[:offHeaderSum], castagnoli))
	case h.Blob != blob:
		return header{}, nil, fmt.Errorf("%w: file of another blob", errConflict)
	case h.Size%BlockSize != 0 || h.Size/BlockSize > maxBlocks:
		return header{}, nil, fmt.Errorf("%w: size %d", errCorrupt, h.Size)
	case uint64(len(body)) != uint64(h.Records)*size:
		return header{}, nil, fmt.Errorf("%w: %d bytes of records, want %d", errCorrupt, len(body), uint64(h.Records)*size)
	case h.BodySum != crc32.Checksum(body, castagnoli):
		return header{}, nil, fmt.Errorf("%w: checksum %#x, want %#x", errCorrupt, crc32.Checksum(body, castagnoli), h.BodySum)
	}
	return h, body, nil
}

// decodeRecords decodes records that were checked as a whole.
func decodeRecords(p []byte) ([]chunkRecord, error) {
	out := make([]chunkRecord, len(p)/sizeChunkRecord)
	if err := binary.Read(bytes.NewReader(p), binary.LittleEndian, out); err != nil {
		return nil, fmt.Errorf("%w: %w", errCorrupt, err)
	}
	return out, nil
}
