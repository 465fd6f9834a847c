package rafs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
)

// FuzzRefBuilder refers to any bytes as a layer: what was read of it while the table was made is read again through the table.
func FuzzRefBuilder(f *testing.F) {
	_, _, layer := tinyRef(f)
	f.Add(layer, uint16(100))
	f.Add(append(bytes.Clone(layer), layer...), uint16(4000))
	f.Add([]byte("a plain tar, or nearly"), uint16(3))
	f.Fuzz(func(t *testing.T, layer []byte, size uint16) {
		rb, err := NewRefBuilder(bytes.NewReader(layer), RefOptions{ChunkSize: 4096})
		if err != nil {
			return
		}
		n := uint32(size)%4096 + 1
		var chunks []Chunk
		for rb.Offset() < 1<<20 {
			if rb.Begin(n) != nil {
				break
			}
			p := make([]byte, n)
			got, err := io.ReadFull(rb, p)
			if got == 0 {
				break
			}
			place, endErr := rb.End()
			if endErr != nil {
				break
			}
			c, appendErr := rb.Append(place, DigesterBLAKE3.Sum(p[:got]))
			if appendErr != nil {
				t.Fatal(appendErr)
			}
			if chunks = append(chunks, c); err != nil {
				break
			}
		}
		var table bytes.Buffer
		b, err := rb.Close(&table)
		if err != nil {
			if table.Len() > 0 || len(chunks) == 0 != errors.Is(err, ErrNoChunks) && !errors.Is(err, ErrInvalid) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("Close = %v with %d chunks and %d bytes written", err, len(chunks), table.Len())
			}
			return
		}
		r, err := OpenSeparateBlob(bytes.NewReader(layer), bytes.NewReader(table.Bytes()), b)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chunks {
			if _, err := r.ReadChunk(context.Background(), c); err != nil {
				t.Fatalf("chunk %d of %d: %v", c.Index, len(chunks), err)
			}
		}
	})
}

func FuzzInspectBlob(f *testing.F) {
	for _, p := range tinyImages(f) {
		f.Add(p[1])
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		info, err := InspectBlob(bytes.NewReader(p), int64(len(p)))
		if (info == nil) != (err != nil) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("InspectBlob = %+v, %v", info, err)
		}
		if err != nil {
			return
		}
		for _, s := range info.Sections {
			if s.Offset > uint64(len(p)) || s.Size > uint64(len(p))-s.Offset {
				t.Errorf("section %+v of %d bytes", s, len(p))
			}
		}
	})
}
