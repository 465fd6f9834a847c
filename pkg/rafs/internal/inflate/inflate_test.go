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
	f.Fuzz(func(t *testing.T, p []byte) {
		const limit = 1 << 20
		want, wantErr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(p)), limit))
		d := inflate.Resume(bytes.NewReader(p), 0, 0, nil)
		var got []byte
		var err error
		for err == nil && len(got) < limit && d.Position().Member == 1 {
			var out []byte
			out, err = d.Next()
			got = append(got, out...)
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
