package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Where a header has what seal and owner look at.
const (
	offBlob    = 24
	offBodySum = sizeHeader - 12
)

// seal returns p with right sums, so that what is behind them is looked at too.
func seal(p []byte) []byte {
	p = bytes.Clone(p)
	if len(p) >= sizeHeader {
		binary.LittleEndian.PutUint32(p[offBodySum:], crc32.Checksum(p[sizeHeader:], castagnoli))
		binary.LittleEndian.PutUint32(p[offHeaderSum:], crc32.Checksum(p[:offHeaderSum], castagnoli))
	}
	return p
}

// owner returns the blob that p says to be of.
func owner(p []byte) (blob [32]byte) {
	if len(p) >= sizeHeader {
		copy(blob[:], p[offBlob:])
	}
	return blob
}

func encoded(t testing.TB, magic [8]byte, records int, size uint64, blob [32]byte, v any) []byte {
	t.Helper()
	body, err := binary.Append(nil, binary.LittleEndian, v)
	must(t, err)
	p, err := encode(header{Magic: magic, Records: uint32(records), Size: size, Blob: blob}, body)
	must(t, err)
	return p
}

// FuzzTable reads any bytes as a chunk table. One that is taken can be written again, holds chunks as an image has them, and
// is what its halves are merged to.
func FuzzTable(f *testing.F) {
	b, chunks := numbered(5, 3*BlockSize)
	recs, err := records(chunks, b.UncompressedSize)
	must(f, err)
	whole := encoded(f, magicChunks, len(recs), b.UncompressedSize, identity(b), recs)
	f.Add(whole, false)
	f.Add(whole[:len(whole)-1], false)
	f.Add(encoded(f, magicChunks, 0, 0, identity(b), []chunkRecord{}), false)
	for _, r := range []chunkRecord{
		{Offset: 1<<64 - BlockSize, Size: BlockSize},
		{Offset: 1 << 63, Size: 1},
		{Size: rafs.MaxChunkSize + 1},
		{Size: BlockSize, Flags: 1 << 31},
	} {
		f.Add(encoded(f, magicChunks, 1, 1<<30, identity(b), []chunkRecord{r}), true)
	}
	f.Fuzz(func(t *testing.T, p []byte, sealed bool) {
		if sealed {
			p = seal(p)
		}
		size, recs, err := parseTable(p, owner(p))
		if err != nil {
			if size != 0 || recs != nil || !errors.Is(err, errCorrupt) {
				t.Fatalf("parseTable = %d, %d records, %v", size, len(recs), err)
			}
			return
		}
		again := encoded(t, magicChunks, len(recs), size, owner(p), recs)
		if size2, recs2, err := parseTable(again, owner(p)); err != nil || size2 != size || !slices.Equal(recs2, recs) {
			t.Fatalf("written again: %d bytes and %d records, %v; want %d and %d", size2, len(recs2), err, size, len(recs))
		}
		var chunks []rafs.Chunk
		var halves [2][]chunkRecord
		for i := range recs {
			chunks = append(chunks, recs[i].chunk())
			halves[i%2] = append(halves[i%2], recs[i])
		}
		if got, err := records(chunks, size); err != nil || !slices.Equal(got, recs) {
			t.Errorf("records of the chunks = %+v, %v, want %+v", got, err, recs)
		}
		if got, added, err := merge(halves[0], halves[1]); err != nil || added != (len(halves[1]) > 0) || !slices.Equal(got, recs) {
			t.Errorf("merge of halves = %+v, %v, %v, want %+v", got, added, err, recs)
		}
		v := newView(nil, recs, int(size/BlockSize+63)/64)
		var needed int64
		for _, w := range v.need {
			needed += int64(bits.OnesCount64(w))
		}
		if needed != v.total || v.total > int64(size/BlockSize) || !covered(v.need, recs) {
			t.Errorf("view needs %d blocks, %d bits, of %d bytes", v.total, needed, size)
		}
	})
}

// FuzzReady reads any bytes as ready bits. Those that are taken can be written again and lie within the data.
func FuzzReady(f *testing.F) {
	b, _ := numbered(100, BlockSize)
	words := []uint64{1<<64 - 1, 1<<36 - 1}
	whole := encoded(f, magicReady, 2, b.UncompressedSize, identity(b), words)
	f.Add(whole, false, b.UncompressedSize, int64(b.UncompressedSize))
	f.Add(whole, false, b.UncompressedSize, int64(b.UncompressedSize)-1)
	f.Add(whole[:len(whole)-8], true, b.UncompressedSize, int64(b.UncompressedSize))
	f.Add(encoded(f, magicReady, 0, b.UncompressedSize, identity(b), []uint64{}), false, b.UncompressedSize, int64(0))
	f.Fuzz(func(t *testing.T, p []byte, sealed bool, size uint64, length int64) {
		if length < 0 {
			return // no file is
		}
		if sealed {
			p = seal(p)
		}
		words, err := parseReady(p, owner(p), size, length)
		if err != nil {
			if words != nil || !errors.Is(err, errCorrupt) {
				t.Fatalf("parseReady = %d words, %v", len(words), err)
			}
			return
		}
		again := encoded(t, magicReady, len(words), size, owner(p), words)
		if got, err := parseReady(again, owner(p), size, length); err != nil || !slices.Equal(got, words) {
			t.Fatalf("written again: %x, %v, want %x", got, err, words)
		}
		for i, w := range words {
			if end := uint64(i*64+bits.Len64(w)) * BlockSize; w != 0 && (end > size || end > uint64(length)) {
				t.Errorf("word %d is %#x: up to byte %d of %d, in a file of %d", i, w, end, size, length)
			}
		}
		if max := (size/BlockSize + 63) / 64; uint64(len(words)) > max {
			t.Errorf("%d words, want at most %d for %d bytes", len(words), max, size)
		}
	})
}

// TestStateFileOfAnotherLength has files that are longer than their headers say: none of it is read.
func TestStateFileOfAnotherLength(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer func() { must(t, root.Close()) }()
	b, _ := numbered(1, BlockSize)
	for name, p := range map[string][]byte{
		"chunks": encoded(t, magicChunks, 0, b.UncompressedSize, identity(b), []chunkRecord{}),
		"ready":  encoded(t, magicReady, 1<<32-1, b.UncompressedSize, identity(b), []uint64{}),
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), p, 0o600))
		must(t, os.Truncate(filepath.Join(dir, name), 1<<40)) // more than any memory
	}
	if _, _, err := readTable(root, identity(b)); !errors.Is(err, errCorrupt) {
		t.Errorf("readTable = %v, want %v", err, errCorrupt)
	}
	if _, err := readReady(root, identity(b), b.UncompressedSize, BlockSize); !errors.Is(err, errCorrupt) {
		t.Errorf("readReady = %v, want %v", err, errCorrupt)
	}
}
