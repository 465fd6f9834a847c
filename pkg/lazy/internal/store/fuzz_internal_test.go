package store

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// FuzzStateFiles parses state files whose checksums are right, whatever is in them.
func FuzzStateFiles(f *testing.F) {
	b, chunks := numbered(3, 5000)
	recs, err := records(chunks, b.UncompressedSize)
	if err != nil {
		f.Fatal(err)
	}
	body, err := binary.Append(nil, binary.LittleEndian, recs)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(3), b.UncompressedSize, body, true)
	f.Add(uint32(2), b.UncompressedSize, body, true)
	f.Add(uint32(1), b.UncompressedSize, []byte{0xff, 0, 0, 0, 0, 0, 0, 0}, false)
	f.Add(uint32(1), b.UncompressedSize, []byte{0x3f, 0, 0, 0, 0, 0, 0, 0}, false)
	f.Add(uint32(0), uint64(0), []byte(nil), false)
	id := identity(b)
	f.Fuzz(func(t *testing.T, count uint32, size uint64, body []byte, isTable bool) {
		h := header{Magic: magicReady, Records: count, Size: size, Blob: id}
		if isTable {
			h.Magic = magicChunks
		}
		p, err := encode(h, body)
		if err != nil {
			t.Fatal(err)
		}
		var again []byte
		if isTable {
			gotSize, recs, err := parseTable(p, id)
			if err != nil {
				if recs != nil || gotSize != 0 {
					t.Errorf("parseTable = %d, %d records with error %v", gotSize, len(recs), err)
				}
				return
			}
			v := newView(&table{}, recs, int(size/BlockSize/64)+1) // what is accepted fits
			if v.total*BlockSize > int64(size) {
				t.Errorf("%d blocks are needed in %d bytes", v.total, size)
			}
			again, err = binary.Append(nil, binary.LittleEndian, recs)
			if err != nil {
				t.Fatal(err)
			}
		} else {
			words, err := parseReady(p, id, size, int64(b.UncompressedSize))
			if err != nil {
				if words != nil {
					t.Errorf("parseReady = %d words with error %v", len(words), err)
				}
				return
			}
			for _, w := range words {
				again = binary.LittleEndian.AppendUint64(again, w)
			}
		}
		if !bytes.Equal(again, body) {
			t.Errorf("parsed and written again: %x, want %x", again, body)
		}
	})
}
