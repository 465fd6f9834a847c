package rafs

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// TestRuns reads chunks in runs, as Check does: each chunk once, whatever its place, and a
// broken one does no harm to its neighbours.
func TestRuns(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	var file bytes.Buffer
	w, err := NewBlobWriter(&file, BlobOptions{Compressor: CompressorLZ4})
	if err != nil {
		t.Fatal(err)
	}
	enc, err := NewEncoder(CompressorLZ4, LevelDefault)
	if err != nil {
		t.Fatal(err)
	}
	var chunks []Chunk
	var contents [][]byte
	for i := range 200 {
		p := bytes.Repeat([]byte{byte(i), byte(r.Uint32())}, 1+r.IntN(1<<r.IntN(18)))
		if i%3 == 0 {
			for j := range p {
				p[j] = byte(r.Uint32())
			}
		}
		data, compressed, err := enc.Encode(nil, p)
		if err != nil {
			t.Fatal(err)
		}
		c, err := w.Append(EncodedChunk{Digest: DigesterBLAKE3.Sum(p), Data: data, Compressed: compressed, UncompressedSize: uint32(len(p))})
		if err != nil {
			t.Fatal(err)
		}
		chunks, contents = append(chunks, c), append(contents, p)
	}
	blob, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	stored := file.Bytes()
	stored[chunks[77].CompressedOffset] ^= 0xff
	chunks[50].CompressedOffset = 1 << 39
	b, err := OpenBlob(bytes.NewReader(stored), blob)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	var rr runReader
	runs, at := 0, 0
	for rest := chunks; len(rest) > 0; runs++ {
		var next run
		next, rest = b.nextRun(rest)
		if len(next.chunks) > 1 && next.to-next.from > maxRun {
			t.Errorf("run of %d bytes", next.to-next.from)
		}
		err := rr.read(ctx, b, next, func(size int, err error) error {
			switch bad := at == 77 || at == 50; {
			case bad != (err != nil):
				t.Errorf("chunk %d: %v", at, err)
			case bad && !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrDigest):
				t.Errorf("chunk %d: %v, want ErrInvalid or ErrDigest", at, err)
			case !bad && (size != len(contents[at]) || !bytes.Equal(rr.buffer.Raw, contents[at])):
				t.Errorf("chunk %d: %d bytes, want those of %d that were written", at, size, len(contents[at]))
			}
			at++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if at != len(chunks) || runs > len(chunks)/2 {
		t.Errorf("%d chunks in %d runs, want %d in fewer than half as many", at, runs, len(chunks))
	}
	var buf ChunkBuffer
	for i, c := range chunks[100:] {
		if err := b.ReadInto(ctx, c, &buf); err != nil || !bytes.Equal(buf.Raw, contents[100+i]) || !bytes.Equal(buf.Stored, stored[c.CompressedOffset:][:c.CompressedSize]) {
			t.Errorf("ReadInto(%d) = %v, or other bytes", c.Index, err)
		}
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	next, _ := b.nextRun(chunks[100:])
	if err := rr.read(canceled, b, next, func(_ int, err error) error { return err }); !errors.Is(err, context.Canceled) {
		t.Errorf("read with a context that ended = %v", err)
	}
}

// TestDecodeExactly decodes frames that hold more or fewer bytes than are wanted, with and without their size in the
// header: the slack that a decoder may write to makes none of them right, and bytes behind it stay what they are.
func TestDecodeExactly(t *testing.T) {
	t.Parallel()
	text := []byte(strings.Repeat("headstart ", 4000))
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, 9, 1000, 39000} {
		for _, k := range []int{-1, 0, 1, decodeSlack - 1, decodeSlack, decodeSlack + 1, 900} {
			var stream bytes.Buffer
			encoder.Reset(&stream)
			if _, err := encoder.Write(text[:n+k]); err != nil {
				t.Fatal(err)
			}
			if err := encoder.Flush(); err != nil { // what is flushed has no size in its header
				t.Fatal(err)
			}
			if err := encoder.Close(); err != nil {
				t.Fatal(err)
			}
			for name, frame := range map[string][]byte{"sized": encoder.EncodeAll(text[:n+k], nil), "stream": stream.Bytes()} {
				var d decoder
				memory := bytes.Repeat([]byte{0xa5}, n+decodeSlack+64)
				got, err := d.decodeTo(memory[:n:n+decodeSlack], CompressorZstd, frame)
				if k == 0 && (err != nil || !bytes.Equal(got, text[:n])) || k != 0 && !errors.Is(err, ErrInvalid) {
					t.Errorf("%s frame of %d bytes as %d: %d bytes, %v", name, n+k, n, len(got), err)
				}
				if behind := memory[n+decodeSlack:]; bytes.Count(behind, []byte{0xa5}) != len(behind) {
					t.Errorf("%s frame of %d bytes as %d: wrote behind the slack", name, n+k, n)
				}
			}
		}
	}
}

// TestReadStoredInto reads chunks as they are stored, again and again in the same memory, and one that lies outside.
func TestReadStoredInto(t *testing.T) {
	var file bytes.Buffer
	w, err := NewBlobWriter(&file, BlobOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var chunks []Chunk
	for i := range 3 {
		p := bytes.Repeat([]byte{byte(i)}, 5000*(3-i))
		c, err := w.Append(EncodedChunk{Digest: DigesterBLAKE3.Sum(p), Data: p, UncompressedSize: uint32(len(p))})
		if err != nil {
			t.Fatal(err)
		}
		chunks = append(chunks, c)
	}
	blob, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	b, err := OpenBlob(bytes.NewReader(file.Bytes()), blob)
	if err != nil {
		t.Fatal(err)
	}
	var buf ChunkBuffer
	allocs := testing.AllocsPerRun(5, func() {
		for i, c := range chunks {
			if err := b.ReadStoredInto(t.Context(), c, &buf); err != nil {
				t.Fatal(err)
			}
			if len(buf.Stored) != 5000*(3-i) || buf.Stored[0] != byte(i) || buf.Raw != nil {
				t.Fatalf("chunk %d: %d stored bytes, %d raw", i, len(buf.Stored), len(buf.Raw))
			}
		}
	})
	if allocs > 0 {
		t.Errorf("%v allocations a run, want none once the memory is there", allocs)
	}
	chunks[0].CompressedOffset = 1 << 39
	if err := b.ReadStoredInto(t.Context(), chunks[0], &buf); !errors.Is(err, ErrInvalid) || buf.Stored != nil {
		t.Errorf("a chunk outside: %d bytes, %v", len(buf.Stored), err)
	}
}
