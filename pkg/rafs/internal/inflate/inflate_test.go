package inflate_test

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	kgzip "github.com/klauspost/compress/gzip"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/inflate"
)

// samples are streams of many kinds with what they hold.
func samples(tb testing.TB) map[string][2][]byte {
	tb.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	var text []byte
	for len(text) < 2_000_000 {
		text = append(text, strings.Repeat(string(rune('a'+r.IntN(26))), r.IntN(30))+" the words of a text "[:r.IntN(20)]...)
	}
	skewed := make([]byte, 500_000) // long codes
	for i := range skewed {
		skewed[i] = byte(r.ExpFloat64() * 9)
	}
	list := map[string][2][]byte{}
	add := func(name string, level int, data ...[]byte) {
		var out bytes.Buffer
		for i, p := range data {
			z, err := gzip.NewWriterLevel(&out, level)
			if err != nil {
				tb.Fatal(err)
			}
			if i%2 == 1 {
				z.Name, z.Comment, z.Extra = "name", "a comment", []byte("extra field")
			}
			if _, err := z.Write(p); err != nil {
				tb.Fatal(err)
			}
			if err := z.Close(); err != nil {
				tb.Fatal(err)
			}
		}
		list[name] = [2][]byte{out.Bytes(), bytes.Join(data, nil)}
	}
	add("empty", 6, nil)
	add("one byte", 6, []byte("x"))
	add("zeros", 9, make([]byte, 3_000_000))
	add("noise", 6, noise)
	add("stored", 0, noise, text)
	add("huffman only", gzip.HuffmanOnly, text, skewed)
	add("fast", 1, text, skewed)
	add("best", 9, text, skewed, noise)
	add("members", 6, text[:10], nil, text[:70000], skewed, noise[:5], nil)
	return list
}

// bufferBits is how many bits the decoder reads at once.
const bufferBits = 8 * 32 << 10

// bitString is deflate data written bit by bit, the lowest bit of a byte first.
type bitString struct {
	p []byte
	n int // bits
}

func (b *bitString) put(v, bits int) {
	for i := range bits {
		if b.n%8 == 0 {
			b.p = append(b.p, 0)
		}
		b.p[b.n/8] |= byte(v>>i&1) << (b.n % 8)
		b.n++
	}
}

// shortEnd is deflate data whose end of block takes one bit, with a stored block directly behind: so many
// times the letter a, one bit each, and then stored. No encoder at hand makes codes as short as that.
func shortEnd(letters int, stored []byte) (data, want []byte) {
	var b bitString
	b.put(0b10<<1, 3)     // codes of its own, not the last block
	b.put((18-4)<<10, 14) // 257 lengths of literals, 1 of distances, 18 of code lengths
	for _, symbol := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1} {
		b.put(map[int]int{18: 1, 0: 2, 1: 2}[symbol], 3)
	}
	// The codes of code lengths: 0 for 18, 10 for 0, 11 for 1, from the highest bit on.
	zeros := func(n int) { b.put((n-11)<<1, 8) }
	zeros('a')
	b.put(0b11, 2) // a has length 1
	zeros(138)
	zeros(256 - 'a' - 1 - 138)
	b.put(0b11, 2) // and so has the end
	b.put(0b01, 2) // no distance
	for range letters {
		b.put(0, 1)
	}
	b.put(1, 1)
	b.put(1, 3) // the last block, stored
	b.put(0, (8-b.n%8)%8)
	b.put(len(stored), 16)
	b.put(^len(stored), 16)
	return append(b.p, stored...), append(bytes.Repeat([]byte("a"), letters), stored...)
}

// TestStoredBehindRefill has the decoder fill its buffer right before a stored block, when bytes that are
// to be given back from the bit buffer are those before the fill.
func TestStoredBehindRefill(t *testing.T) {
	t.Parallel()
	// With more than a buffer of data the fill is where the codes end within a word of the buffer's end.
	stored := bytes.Repeat([]byte("stored "), 100)
	for _, tt := range []struct {
		name     string
		reader   func(io.Reader) io.Reader
		from, to int // letters
	}{
		{"whole", func(r io.Reader) io.Reader { return r }, bufferBits - 256, bufferBits - 128},
		{"halves", iotest.HalfReader, bufferBits/2 - 256, bufferBits/2 - 128},
		{"bytes", iotest.OneByteReader, 0, 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for letters := tt.from; letters < tt.to; letters++ {
				data, want := shortEnd(letters, stored)
				if letters == tt.from {
					if p, err := io.ReadAll(flate.NewReader(bytes.NewReader(data))); err != nil || !bytes.Equal(p, want) {
						t.Fatalf("compress/flate reads the test's data as %d bytes, %v, want %d", len(p), err, len(want))
					}
				}
				got, err := readBlocks(inflate.Resume(tt.reader(bytes.NewReader(data)), 0, 0, nil), len(want))
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%d letters: %d bytes, %v, want %d", letters, len(got), err, len(want))
				}
			}
		})
	}
}

// readBlocks reads up to the end of the member or limit.
func readBlocks(d *inflate.Decoder, limit int) (got []byte, err error) {
	for err == nil && len(got) < limit && d.Position().Member == 1 {
		var p []byte
		p, err = d.Next()
		got = append(got, p...)
	}
	return got, err
}

func readAll(d *inflate.Decoder) ([]byte, error) {
	var out []byte
	for {
		p, err := d.Next()
		out = append(out, p...)
		if err != nil {
			if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				err = nil
			}
			return out, err
		}
	}
}

func TestDecode(t *testing.T) {
	t.Parallel()
	for name, s := range samples(t) {
		for reader, r := range map[string]io.Reader{
			"whole": bytes.NewReader(s[0]), "halves": iotest.HalfReader(bytes.NewReader(s[0])),
			"bytes": iotest.OneByteReader(bytes.NewReader(s[0])), "data and error": iotest.DataErrReader(bytes.NewReader(s[0])),
		} {
			got, err := readAll(inflate.NewReader(r))
			if err != nil || !bytes.Equal(got, s[1]) {
				t.Errorf("%s, %s: %d bytes, %v, want %d", name, reader, len(got), err, len(s[1]))
			}
		}
	}
}

// TestResume takes up every sample at each of its blocks.
func TestResume(t *testing.T) {
	t.Parallel()
	for name, s := range samples(t) {
		d := inflate.NewReader(bytes.NewReader(s[0]))
		blocks := 0
		for {
			if pos := d.Position(); pos.Block {
				blocks++
				again := inflate.Resume(bytes.NewReader(s[0][pos.In:]), pos.Prev, pos.Bits, bytes.Clone(d.Window()))
				if got, err := readAll(again); err != nil || !bytes.Equal(got, s[1][pos.Out:]) {
					t.Fatalf("%s: resumed at %+v: %d bytes, %v, want %d", name, pos, len(got), err, len(s[1])-int(pos.Out))
				}
			}
			if _, err := d.Next(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if pos := d.Position(); pos.Out != int64(len(s[1])) || pos.In != int64(len(s[0])) {
			t.Errorf("%s: at %+v at the end of %d", name, pos, len(s[1]))
		}
		if blocks == 0 {
			t.Errorf("%s: no block seen", name)
		}
	}
}

// TestTruncated holds that a stream cut anywhere gives a beginning of its output and then an error.
func TestTruncated(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	for name, s := range samples(t) {
		for range 20 {
			n := r.IntN(len(s[0]))
			got, err := readAll(inflate.NewReader(bytes.NewReader(s[0][:n])))
			want, wantErr := readGzip(s[0][:n])
			if !bytes.HasPrefix(s[1], got) || (err == nil) != (wantErr == nil) {
				t.Errorf("%s cut to %d of %d: %d bytes, %v; compress/gzip: %d bytes, %v", name, n, len(s[0]), len(got), err, len(want), wantErr)
			}
			if len(got) < len(want) {
				t.Errorf("%s cut to %d: %d bytes, compress/gzip gives %d", name, n, len(got), len(want))
			}
		}
	}
}

func TestReadError(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	s := samples(t)["best"]
	_, err := readAll(inflate.NewReader(io.MultiReader(bytes.NewReader(s[0][:5000]), iotest.ErrReader(broken))))
	if !errors.Is(err, broken) {
		t.Errorf("error = %v, want the reader's", err)
	}
}

func readGzip(p []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

// FuzzInflate holds raw deflate data against the standard library.
func FuzzInflate(f *testing.F) {
	for _, s := range samples(f) {
		if len(s[0]) < 2000 { // mutating long ones takes too long
			f.Add(s[0][10:])
		}
	}
	f.Add([]byte{0x03, 0x00})
	// One for each way that the bits may lie in the last word before the stored block.
	for letters := range 64 {
		data, _ := shortEnd(letters, []byte("stored"))
		f.Add(data)
	}
	data, _ := shortEnd(bufferBits-194, bytes.Repeat([]byte("stored "), 100))
	f.Add(data)
	f.Fuzz(func(t *testing.T, p []byte) {
		const limit = 1 << 20
		want, wantErr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(p)), limit))
		d := inflate.Resume(bytes.NewReader(p), 0, 0, nil)
		got, err := readBlocks(d, limit)
		for name, cut := range map[string]func(io.Reader) io.Reader{"bytes": iotest.OneByteReader, "halves": iotest.HalfReader} {
			again, againErr := readBlocks(inflate.Resume(cut(bytes.NewReader(p)), 0, 0, nil), limit)
			if !bytes.Equal(again, got) || (againErr == nil) != (err == nil) {
				t.Fatalf("read in %s: %d bytes, %v; at once: %d bytes, %v", name, len(again), againErr, len(got), err)
			}
		}
		if pos := d.Position(); pos.In > int64(len(p))+8 {
			t.Errorf("position %+v of %d bytes", pos, len(p))
		}
		n := min(len(got), len(want))
		if !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("output differs within %d bytes", n)
		}
		if wantErr == nil && len(got) < len(want) {
			t.Errorf("%d bytes, %v, compress/flate gives %d", len(got), err, len(want))
		}
		if wantErr != nil && len(got) > len(want)+64<<10 {
			t.Errorf("%d bytes, compress/flate stops after %d: %v", len(got), len(want), wantErr)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	s := samples(b)["fast"]
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(int64(len(s[1])))
		for b.Loop() {
			d := inflate.NewReader(bytes.NewReader(s[0]))
			for {
				if _, err := d.Next(); err != nil {
					break
				}
			}
		}
	})
	b.Run("klauspost", func(b *testing.B) {
		b.SetBytes(int64(len(s[1])))
		for b.Loop() {
			z, err := kgzip.NewReader(bytes.NewReader(s[0]))
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, z); err != nil {
				b.Fatal(err)
			}
		}
	})
}
