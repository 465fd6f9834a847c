package rafs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

func encoders(t testing.TB) map[string]func() *rafs.Encoder {
	m := map[string]func() *rafs.Encoder{}
	for _, c := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd} {
		for _, l := range []rafs.Level{rafs.LevelDefault, rafs.LevelBest} {
			m[fmt.Sprintf("%v-%v", c, l)] = func() *rafs.Encoder {
				e, err := rafs.NewEncoder(c, l)
				must(t, err)
				return e
			}
		}
	}
	return m
}

// TestEncodeDependsOnTheChunkAlone is what lets workers share chunks in any way.
func TestEncodeDependsOnTheChunkAlone(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 1))
	var chunks [][]byte
	for _, n := range []int{1, 2, 63, 64, 65, 255, 256, 257, 1000, 4096, 65536, 65537, 1 << 17, 1<<17 + 1, 1 << 20, 1<<20 + 1, 3 << 20, 5 << 20} {
		for range 4 {
			chunks = append(chunks, content(r, n))
		}
	}
	for name, make := range encoders(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			used := make()
			want := map[int][]byte{}
			for _, i := range rand.New(rand.NewPCG(2, 2)).Perm(len(chunks)) {
				out, compressed, err := make().Encode(nil, chunks[i])
				must(t, err)
				if compressed != (len(out) < len(chunks[i])) || len(out) > len(chunks[i]) {
					t.Errorf("Encode(%d bytes) = %d bytes, compressed %v", len(chunks[i]), len(out), compressed)
				}
				if !compressed && &out[0] != &chunks[i][0] {
					t.Error("raw chunk was copied")
				}
				want[i] = out
			}
			var dst []byte
			for range 2 {
				for _, i := range rand.New(rand.NewPCG(3, 3)).Perm(len(chunks)) {
					out, _, err := used.Encode(dst, chunks[i])
					must(t, err)
					if !bytes.Equal(out, want[i]) {
						t.Errorf("chunk %d of %d bytes depends on what was encoded before", i, len(chunks[i]))
					}
				}
			}
		})
	}
}

func TestEncodeZstdFrame(t *testing.T) {
	t.Parallel()
	enc, err := rafs.NewEncoder(rafs.CompressorZstd, rafs.LevelDefault)
	must(t, err)
	dec, err := zstd.NewReader(nil)
	must(t, err)
	defer dec.Close()
	for _, n := range []int{300, 4096, 1 << 20, 5 << 20, 40 << 20} { // the last: a table of 2.6 million chunks
		src := bytes.Repeat(benchmarkText(min(n, 1<<20)), max(1, n>>20))
		out, compressed, err := enc.Encode(nil, src)
		must(t, err)
		if got, err := dec.DecodeAll(out, nil); err != nil || !bytes.Equal(got, src) {
			t.Errorf("%d bytes decode to %d, %v", n, len(got), err)
		}
		var h zstd.Header
		must(t, h.Decode(out))
		if !compressed || !h.SingleSegment || !h.HasFCS || h.FrameContentSize != uint64(len(src)) || h.HasCheckSum || h.DictionaryID != 0 {
			t.Errorf("frame of %d bytes: %+v, want a single segment with size, without checksum", n, h)
		}
	}
}

func TestNewEncoderRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		c rafs.Compressor
		l rafs.Level
	}{{17, rafs.LevelDefault}, {rafs.CompressorZstd, 5}} {
		if e, err := rafs.NewEncoder(c.c, c.l); !errors.Is(err, rafs.ErrUnsupported) || e != nil {
			t.Errorf("NewEncoder(%v, %v) = %v, %v, want ErrUnsupported", c.c, c.l, e, err)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for _, c := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorGzip, rafs.CompressorZstd} {
		if got, err := rafs.ParseCompressor(c.String()); got != c || err != nil {
			t.Errorf("ParseCompressor(%q) = %v, %v", c.String(), got, err)
		}
	}
	for _, d := range []rafs.Digester{rafs.DigesterBLAKE3, rafs.DigesterSHA256} {
		if got, err := rafs.ParseDigester(d.String()); got != d || err != nil {
			t.Errorf("ParseDigester(%q) = %v, %v", d.String(), got, err)
		}
	}
	if _, err := rafs.ParseCompressor("brotli"); err == nil {
		t.Error("ParseCompressor(brotli) succeeded")
	}
	if _, err := rafs.ParseDigester("md5"); err == nil {
		t.Error("ParseDigester(md5) succeeded")
	}
	if got := rafs.DigesterBLAKE3.Sum(nil).String(); got[:12] != "af1349b9f5f9" { // rafs-format, test vectors
		t.Errorf("blake3 of nothing = %s", got)
	}
	if got := rafs.DigesterSHA256.Sum(nil).String(); got[:12] != "e3b0c44298fc" {
		t.Errorf("sha256 of nothing = %s", got)
	}
}

// BenchmarkEncode reports bytes out per byte in as "ratio".
func BenchmarkEncode(b *testing.B) {
	src := benchmarkText(1 << 20)
	for name, make := range encoders(b) {
		b.Run(name, func(b *testing.B) {
			e := make()
			var dst []byte
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			var n int
			for b.Loop() {
				out, compressed, err := e.Encode(dst, src)
				must(b, err)
				if compressed {
					dst = out
				}
				n = len(out)
			}
			b.ReportMetric(float64(n)/float64(len(src)), "ratio")
		})
	}
}

// benchmarkText makes bytes that compress about as source text does.
func benchmarkText(n int) []byte {
	r := rand.New(rand.NewPCG(5, 5))
	words := make([][]byte, 3000)
	for i := range words {
		words[i] = randomBytes(r, 2+r.IntN(9))
		for j := range words[i] {
			words[i][j] = 'a' + words[i][j]%26
		}
	}
	p := make([]byte, 0, n+16)
	for len(p) < n {
		p = append(append(p, words[int(r.ExpFloat64()*400)%len(words)]...), " \n;="[r.IntN(4)])
	}
	return p[:n]
}

func BenchmarkReadChunk(b *testing.B) {
	for _, c := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd} {
		b.Run(c.String(), func(b *testing.B) {
			build := newBuilder(b, combo{compressor: c, chunkSize: 1 << 20})
			f := build.file("f", 0, benchmarkText(1<<20))
			s := build.build()
			r, err := s.reader(build.img.Blobs[0])
			must(b, err)
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			for b.Loop() {
				_, err := r.ReadChunk(context.Background(), f.Chunks[0])
				must(b, err)
			}
		})
	}
}
