package rafs

import (
	"bytes"
	"context"
	"io"
	"testing"
)

// farAway is a file that is all hole up to begin.
type farAway struct {
	begin int64
	data  []byte
	read  int64
}

func (f *farAway) ReadAt(p []byte, off int64) (int, error) {
	f.read += int64(len(p))
	if off < f.begin {
		clear(p[:min(int64(len(p)), f.begin-off)])
		if off+int64(len(p)) <= f.begin {
			return len(p), nil
		}
		n, err := f.ReadAt(p[f.begin-off:], f.begin)
		return int(f.begin-off) + n, err
	}
	return bytes.NewReader(f.data).ReadAt(p, off-f.begin)
}

// TestFarOffsets writes and reads chunks behind 4 GiB, behind what a tar header says in octal digits, and near the limit of 1 TiB.
func TestFarOffsets(t *testing.T) {
	t.Parallel()
	for _, begin := range []uint64{4<<30 - 1, 9 << 30, 1<<40 - 2<<30} {
		for _, batch := range []uint32{0, 8192} {
			var out bytes.Buffer
			w, err := NewBlobWriter(&out, BlobOptions{Compressor: CompressorZstd, ChunkSize: 8192, TOC: true, BatchSize: batch})
			if err != nil {
				t.Fatal(err)
			}
			w.written = begin // as if so many bytes had been written
			if batch == 0 {
				w.uncompressed = 1<<44 - 1<<20
			}
			var chunks []Chunk
			var contents [][]byte
			for i := range 5 {
				p := bytes.Repeat([]byte{byte(i), 7, byte(i * i)}, 100<<i)
				if w.Batches(uint32(len(p))) != (batch != 0 && len(p) < 4096) {
					t.Errorf("Batches(%d) with %d", len(p), batch)
				}
				c, err := w.Append(EncodedChunk{Digest: DigesterBLAKE3.Sum(p), Data: p, UncompressedSize: uint32(len(p))})
				if err != nil {
					t.Fatal(err)
				}
				chunks, contents = append(chunks, c), append(contents, p)
			}
			b, err := w.Close()
			if err != nil {
				t.Fatal(err)
			}
			file := &farAway{begin: int64(begin), data: out.Bytes()}
			r, err := OpenBlob(file, b)
			if err != nil {
				t.Fatal(err)
			}
			for i, c := range chunks {
				if batch == 0 && c.CompressedOffset < begin {
					t.Errorf("chunk %d at %d, want at least %d", i, c.CompressedOffset, begin)
				}
				if p, err := r.ReadChunk(context.Background(), c); err != nil || !bytes.Equal(p, contents[i]) {
					t.Errorf("chunk %d behind %d = %d bytes, %v", i, begin, len(p), err)
				}
			}
			if batch == 0 { // V1 records hold offsets of the cache file, too
				table, err := r.table()
				if err != nil {
					t.Fatal(err)
				}
				for i, c := range chunks {
					if err := table.compare(c); err != nil {
						t.Errorf("record %d: %v", i, err)
					}
				}
			}
			if _, err := readTOC(file, uint64(file.begin)+uint64(len(file.data)), b); err != nil {
				t.Error(err)
			}
		}
	}
	w, err := NewBlobWriter(io.Discard, BlobOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w.written = 1<<40 - 1
	if _, err := w.Append(EncodedChunk{Data: []byte{1}, UncompressedSize: 1}); err == nil {
		t.Error("Append behind the limit succeeded")
	}
}

// TestReadsLittle counts what reading one chunk takes: its stored bytes, or its batch's and the table.
func TestReadsLittle(t *testing.T) {
	t.Parallel()
	for _, batch := range []uint32{0, 64 << 10} {
		var out bytes.Buffer
		w, err := NewBlobWriter(&out, BlobOptions{ChunkSize: 16 << 10, BatchSize: batch})
		if err != nil {
			t.Fatal(err)
		}
		var chunks []Chunk
		for i := range 100 {
			p := bytes.Repeat([]byte{byte(i)}, 16<<10)
			c, err := w.Append(EncodedChunk{Digest: DigesterBLAKE3.Sum(p), Data: p, UncompressedSize: uint32(len(p))})
			if err != nil {
				t.Fatal(err)
			}
			chunks = append(chunks, c)
		}
		b, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		file := &farAway{data: out.Bytes()}
		r, err := OpenBlob(file, b)
		if err != nil {
			t.Fatal(err)
		}
		if file.read != 0 {
			t.Errorf("OpenBlob reads %d bytes", file.read)
		}
		want := int64(16 << 10)
		if batch > 0 { // three chunks: a batch stays below its size
			want = 3*16<<10 + int64(b.MetaCompressed) + 4096
		}
		if _, err := r.ReadChunk(context.Background(), chunks[50]); err != nil || file.read != want {
			t.Errorf("batch %d: %d bytes read for a chunk, %v, want %d", batch, file.read, err, want)
		}
	}
}
