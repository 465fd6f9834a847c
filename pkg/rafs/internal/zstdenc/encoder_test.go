package zstdenc_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/zstdenc"
)

func decoder(t testing.TB) *zstd.Decoder {
	t.Helper()
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// data makes n bytes of a kind: text, noise, a mix with long repetitions, runs, few symbols.
func data(r *rand.Rand, n int) []byte {
	b := make([]byte, 0, n+4096)
	symbols := 1 + r.IntN(1<<r.IntN(9))
	for len(b) < n {
		switch r.IntN(5) {
		case 0: // a repetition
			if len(b) == 0 {
				continue
			}
			back := 1 + r.IntN(len(b))
			for range r.IntN(1 << r.IntN(12)) {
				b = append(b, b[len(b)-back])
			}
		case 1: // a run
			b = append(b, bytes.Repeat([]byte{byte(r.IntN(256))}, r.IntN(300))...)
		default:
			for range r.IntN(64) {
				b = append(b, byte(r.IntN(symbols)))
			}
		}
	}
	return b[:n]
}

// known finds matches of src as a deflate encoder might: greedy, at most 258 bytes, at most 32 KiB back.
func known(src []byte) (matches []zstdenc.Match) {
	last := map[[4]byte]int{}
	for i := 0; i+4 <= len(src); {
		key := [4]byte(src[i:])
		at, ok := last[key]
		last[key] = i
		n := 0
		for ok && i-at <= 32768 && n < 258 && i+n < len(src) && src[at+n] == src[i+n] {
			n++
		}
		if n < 4 {
			i++
			continue
		}
		matches = append(matches, zstdenc.Match{Pos: uint32(i), Length: uint16(n), Back: uint16(i - at)})
		i += n
	}
	return matches
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	dec := decoder(t)
	r := rand.New(rand.NewPCG(1, 2))
	var e zstdenc.Encoder // one for all: nothing may leak from one frame to the next
	sizes := []int{
		0, 1, 2, 3, 4, 7, 8, 9, 10, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 65535, 65536, 65791, 65792, 65793,
		128<<10 - 1, 128 << 10, 128<<10 + 1, 256 << 10, 1<<20 - 1, 1 << 20, 3<<20 + 5,
	}
	for i := range 600 {
		n := r.IntN(1 << r.IntN(19))
		if i < 2*len(sizes) {
			n = sizes[i/2]
		}
		src := data(r, n)
		var matches []zstdenc.Match
		if i%2 == 1 {
			matches = known(src)
		}
		out := e.Encode([]byte("before"), src, matches)
		frame, ok := bytes.CutPrefix(out, []byte("before"))
		if !ok {
			t.Fatalf("case %d: what dst held is gone", i)
		}
		if most := n + 13 + 3*(n>>17); len(frame) > most {
			t.Errorf("case %d: frame of %d bytes for %d, at most %d", i, len(frame), n, most)
		}
		got, err := dec.DecodeAll(frame, nil)
		if err != nil || !bytes.Equal(got, src) {
			t.Fatalf("case %d: %d bytes, %d matches: decoded to %d bytes: %v", i, n, len(matches), len(got), err)
		}
		var fresh zstdenc.Encoder
		if again := fresh.Encode(nil, src, matches); !bytes.Equal(again, frame) {
			t.Errorf("case %d: the frame depends on what was encoded before", i)
		}
		if testing.Short() && i%5 != 0 {
			continue // it is slow, the more under the race detector
		}
		deep := e.EncodeDeep(nil, src)
		if got, err := dec.DecodeAll(deep, nil); err != nil || !bytes.Equal(got, src) || len(deep) > n+13+3*(n>>17) {
			t.Fatalf("case %d: %d bytes by a deep search, a frame of %d: decoded to %d: %v", i, n, len(deep), len(got), err)
		}
		if again := fresh.EncodeDeep(nil, src); !bytes.Equal(again, deep) {
			t.Errorf("case %d: the frame of a deep search depends on what was encoded before", i)
		}
		if again := fresh.Encode(nil, src, matches); !bytes.Equal(again, frame) {
			t.Errorf("case %d: the frame depends on what was encoded before", i)
		}
	}
}

// TestLargest fills the offset codes: a repetition of what is 16 MiB back.
func TestLargest(t *testing.T) {
	t.Parallel()
	r := rand.NewChaCha8([32]byte{1})
	src := make([]byte, zstdenc.MaxSize)
	if _, err := r.Read(src); err != nil {
		t.Fatal(err)
	}
	copy(src[len(src)-1000:], src[:1000])
	var e zstdenc.Encoder
	for range 3 { // the tables are cleared in between
		out := e.Encode(nil, src, nil)
		got, err := decoder(t).DecodeAll(out, nil)
		if err != nil || !bytes.Equal(got, src) {
			t.Fatalf("decoded to %d bytes: %v", len(got), err)
		}
	}
	if testing.Short() {
		src = src[:2<<20] // beyond what chains know
	}
	out := e.EncodeDeep(nil, src)
	if got, err := decoder(t).DecodeAll(out, nil); err != nil || !bytes.Equal(got, src) {
		t.Fatalf("by a deep search, decoded to %d bytes: %v", len(got), err)
	}
	defer func() {
		if recover() == nil {
			t.Error("Encode of more than MaxSize did not panic")
		}
	}()
	e.Encode(nil, make([]byte, zstdenc.MaxSize+1), nil)
}

// TestWrongMatches gives matches that are no repetitions, overlap, or lie outside: the frame
// decodes to the chunk all the same.
func TestWrongMatches(t *testing.T) {
	t.Parallel()
	dec := decoder(t)
	r := rand.New(rand.NewPCG(3, 4))
	var e zstdenc.Encoder
	for i := range 300 {
		src := data(r, 1+r.IntN(1<<r.IntN(19)))
		matches := known(src)
		for j := range matches {
			switch r.IntN(6) {
			case 0:
				matches[j].Back = uint16(r.IntN(1 << 16))
			case 1:
				matches[j].Length = uint16(r.IntN(1 << 16))
			case 2:
				matches[j].Pos = uint32(r.IntN(2 * len(src)))
			}
		}
		got, err := dec.DecodeAll(e.Encode(nil, src, matches), nil)
		if err != nil || !bytes.Equal(got, src) {
			t.Fatalf("case %d: %d bytes decoded to %d: %v", i, len(src), len(got), err)
		}
	}
}

// TestSize compares with the library's encoder, whose sizes are known to be within 1.2 % of libzstd's.
func TestSize(t *testing.T) {
	t.Parallel()
	src := program(t)
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		t.Fatal(err)
	}
	var e zstdenc.Encoder
	best, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithEncoderLevel(zstd.SpeedBestCompression),
		zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true))
	if err != nil {
		t.Fatal(err)
	}
	var own, hinted, library, deep, deepLibrary int
	for ; len(src) > 1<<20; src = src[1<<20:] {
		chunk := src[:1<<20]
		own += len(e.Encode(nil, chunk, nil))
		hinted += len(e.Encode(nil, chunk, known(chunk)))
		library += len(z.EncodeAll(chunk, nil))
		if !testing.Short() || deep == 0 {
			deep += len(e.EncodeDeep(nil, chunk))
			deepLibrary += len(best.EncodeAll(chunk, nil))
		}
	}
	t.Logf("own %d bytes, with matches %d, library %d", own, hinted, library)
	t.Logf("by a deep search %d bytes, the library's best %d", deep, deepLibrary)
	if deep > deepLibrary+deepLibrary/200 {
		t.Errorf("%d bytes by a deep search, the library's best are %d: more than 0.5 %% larger", deep, deepLibrary)
	}
	if own > library+library/100 {
		t.Errorf("%d bytes, the library makes %d: more than 1 %% larger", own, library)
	}
	// A greedy search of 4 bytes finds worse matches than a deflate encoder does; 8 to 10 % was seen.
	if hinted > library+library/6 {
		t.Errorf("%d bytes with matches of a poor search, the library makes %d: more than a sixth larger", hinted, library)
	}
}

// program returns a few MiB of what images hold: this test's own executable.
func program(t testing.TB) []byte {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func FuzzEncode(f *testing.F) {
	f.Add([]byte("hello hello hello hello hello hello hello"), []byte{6, 0, 0, 30, 6})
	f.Add(bytes.Repeat([]byte{0}, 3000), []byte{1, 0, 0, 255, 1})
	f.Add(bytes.Repeat([]byte("abcdefghij"), 500), []byte{10, 0, 1, 255, 10, 9, 1, 1, 255, 10})
	dec := decoder(f)
	var e zstdenc.Encoder
	f.Fuzz(func(t *testing.T, src, raw []byte) {
		var matches []zstdenc.Match
		for ; len(raw) >= 5; raw = raw[5:] {
			matches = append(matches, zstdenc.Match{
				Pos:    uint32(raw[0]) | uint32(raw[1])<<8,
				Length: uint16(raw[2])<<8 | uint16(raw[3]), Back: uint16(raw[4]),
			})
		}
		src = bytes.Repeat(src, 1+len(matches)%50)
		got, err := dec.DecodeAll(e.Encode(nil, src, matches), nil)
		if err != nil || !bytes.Equal(got, src) {
			t.Fatalf("%d bytes decoded to %d: %v", len(src), len(got), err)
		}
		got, err = dec.DecodeAll(e.EncodeDeep(nil, src), nil)
		if err != nil || !bytes.Equal(got, src) {
			t.Fatalf("%d bytes by a deep search decoded to %d: %v", len(src), len(got), err)
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	src := program(b)[:4<<20]
	var matches [4][]zstdenc.Match
	for i := range matches {
		matches[i] = known(src[i<<20:][:1<<20])
	}
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		b.Fatal(err)
	}
	best, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithEncoderLevel(zstd.SpeedBestCompression),
		zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true), zstd.WithAllLitEntropyCompression(true))
	if err != nil {
		b.Fatal(err)
	}
	var e zstdenc.Encoder
	for name, encode := range map[string]func(dst, src []byte, i int) []byte{
		"search":         func(dst, src []byte, _ int) []byte { return e.Encode(dst, src, nil) },
		"matches":        func(dst, src []byte, i int) []byte { return e.Encode(dst, src, matches[i]) },
		"deep":           func(dst, src []byte, _ int) []byte { return e.EncodeDeep(dst, src) },
		"library":        func(dst, src []byte, _ int) []byte { return z.EncodeAll(src, dst) },
		"library's best": func(dst, src []byte, _ int) []byte { return best.EncodeAll(src, dst) },
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(4 << 20)
			b.ReportAllocs()
			var out []byte
			size := 0
			for b.Loop() {
				size = 0
				for i := range matches {
					out = encode(out[:0], src[i<<20:][:1<<20], i)
					size += len(out)
				}
			}
			b.ReportMetric(float64(size), "frame-bytes")
		})
	}
}

func ExampleEncoder() {
	var e zstdenc.Encoder
	chunk := bytes.Repeat([]byte("a chunk "), 100)
	frame := e.Encode(nil, chunk, nil)
	z, _ := zstd.NewReader(bytes.NewReader(frame))
	defer z.Close()
	back, err := io.ReadAll(z)
	fmt.Println(bytes.Equal(back, chunk), err, len(frame) < len(chunk)/10)
	// Output: true <nil> true
}

// TestFarRepeats: of a chunk that repeats what lies further back than its matches reach, the frame is that of a search; of one that
// does so within their reach, or hardly, it is made of the matches.
func TestFarRepeats(t *testing.T) {
	t.Parallel()
	text := func(seed uint64, n int) []byte { // half of it repeats what is near
		r := rand.New(rand.NewPCG(seed, 0))
		b := make([]byte, 0, n+64)
		for len(b) < n {
			for range 12 {
				b = append(b, byte(r.IntN(200)))
			}
			if back := 16 + r.IntN(20_000); back < len(b) {
				b = append(b, b[len(b)-back:][:12]...)
			}
		}
		return b[:n]
	}
	near := text(1, 400_000)
	far := bytes.Repeat(text(2, 100_000), 4)
	little := append(text(3, 400_000), far[:8_000]...)
	little = append(little, far[:8_000]...)
	for name, c := range map[string]struct {
		src      []byte
		searched bool
	}{
		"near":   {near, false},
		"far":    {far, true},
		"little": {little, false},
		"small":  {append(bytes.Clone(far[:32_600]), far[:32_600]...), false}, // less than twice their reach
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var e zstdenc.Encoder
			frame, search := e.Encode(nil, c.src, known(c.src)), e.Encode(nil, c.src, nil)
			if got := bytes.Equal(frame, search); got != c.searched {
				t.Errorf("Encode of %d bytes with their matches: %d bytes, that of a search %d: searched: %v, want %v", len(c.src), len(frame), len(search), got, c.searched)
			}
			if got, err := decoder(t).DecodeAll(frame, nil); err != nil || !bytes.Equal(got, c.src) {
				t.Errorf("decoded to %d bytes: %v", len(got), err)
			}
		})
	}
}
