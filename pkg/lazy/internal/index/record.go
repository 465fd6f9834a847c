package index

import (
	"encoding/binary"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// version is that of the file: another one is not read.
const version = 1

// Sizes of records in bytes; all numbers are big-endian, so that keys sort by their fields.
const (
	sizeKey   = 1 + 4 + 32 // digester, size, digest
	sizePlace = 4 + 4      // cache, block
	sizeCache = 1 + 8      // flags, known; the name follows
	sizeList  = 4 + 8      // cache, sequence
)

const (
	blockSize = 4096 // places are counted in blocks: chunks of caches begin at them
	// maxPlaces bounds the places of one chunk: as many copies as anybody will ask for.
	maxPlaces = 4
	// maxOffset is the first offset that has no number.
	maxOffset = int64(1) << 32 * blockSize
	flagDying = 0x1 // of a cache: its entries are being removed
)

// Key is what a chunk is.
type Key struct {
	Digester rafs.Digester
	Size     uint32 // uncompressed, bytes
	Digest   rafs.Digest
}

// KeyOf returns the key of a chunk whose digest d made.
func KeyOf(d rafs.Digester, c *rafs.Chunk) Key { return Key{d, c.UncompressedSize, c.Digest} }

func (k *Key) append(p []byte) []byte {
	p = append(p, byte(k.Digester)) //nolint:gosec // two are known
	p = binary.BigEndian.AppendUint32(p, k.Size)
	return append(p, k.Digest[:]...)
}

func parseKey(p []byte) (k Key, err error) {
	if len(p) != sizeKey {
		return k, fmt.Errorf("%w: key of %d bytes, want %d", ErrBroken, len(p), sizeKey)
	}
	k.Digester, k.Size = rafs.Digester(p[0]), binary.BigEndian.Uint32(p[1:])
	copy(k.Digest[:], p[5:])
	return k, nil
}

// Place is where the bytes of a chunk are.
type Place struct {
	Cache  string // name of its directory
	Offset int64  // in its data file, bytes
}

// Entry is a chunk of a cache.
type Entry struct {
	Key
	Offset int64 // in the data file, bytes; a multiple of 4096 below 2^44
}

// place is a [Place] in the file.
type place struct{ cache, block uint32 }

func (p place) append(b []byte) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, p.cache), p.block)
}

func parsePlaces(p []byte) ([]place, error) {
	if len(p)%sizePlace != 0 || len(p) > maxPlaces*sizePlace {
		return nil, fmt.Errorf("%w: places of %d bytes, want at most %d of %d", ErrBroken, len(p), maxPlaces, sizePlace)
	}
	out := make([]place, 0, maxPlaces)
	for ; len(p) > 0; p = p[sizePlace:] {
		out = append(out, place{binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])})
	}
	return out, nil
}

// cache is what is known of a cache.
type cache struct {
	id    uint32
	name  string
	dying bool
	known uint64
}

func (c *cache) value() []byte {
	flags := byte(0)
	if c.dying {
		flags |= flagDying
	}
	return append(binary.BigEndian.AppendUint64([]byte{flags}, c.known), c.name...)
}

func parseCache(k, v []byte) (*cache, error) {
	if len(k) != 4 || len(v) < sizeCache || v[0]&^flagDying != 0 {
		return nil, fmt.Errorf("%w: cache of %d and %d bytes", ErrBroken, len(k), len(v))
	}
	return &cache{id: binary.BigEndian.Uint32(k), name: string(v[sizeCache:]), dying: v[0]&flagDying != 0, known: binary.BigEndian.Uint64(v[1:])}, nil
}
