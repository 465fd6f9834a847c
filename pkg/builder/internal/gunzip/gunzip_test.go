package gunzip_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	kgzip "github.com/klauspost/compress/gzip"

	"github.com/headstart-oci/headstart/pkg/builder/internal/gunzip"
)

func readAll(r io.Reader) ([]byte, error) {
	z := gunzip.NewReader(r)
	var out []byte
	for {
		p, err := z.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, p...)
	}
}

// samples are inputs of many kinds and sizes.
func samples(t testing.TB) map[string][]byte {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	skewed := make([]byte, 500_000)
	for i := range skewed {
		skewed[i] = byte(rnd.ExpFloat64() * 8)
	}
	var far bytes.Buffer
	for range 40 {
		far.Write(noise[:32768])
		far.Write(noise[:32767])
		far.WriteString("x")
	}
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"empty": nil, "one": {7}, "noise": noise, "skewed": skewed, "zeros": make([]byte, 1<<20),
		"text": []byte(strings.Repeat("It was the best of times, it was the worst of times. ", 9999)),
		"ab":   []byte(strings.Repeat("ab", 99999)), "abcdefg": []byte(strings.Repeat("abcdefg", 99999)),
		"far": far.Bytes(), "program": self[:min(len(self), 1<<20)],
	}
}

func compress(t testing.TB, level int, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Name, w.Comment, w.Extra = "name", "comment", []byte("extra")
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestReader(t *testing.T) {
	for name, want := range samples(t) {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, 1, 6, 9} {
			z := compress(t, level, want)
			for kind, r := range map[string]io.Reader{
				"whole": bytes.NewReader(z), "one byte": iotest.OneByteReader(bytes.NewReader(z)), "data with EOF": iotest.DataErrReader(bytes.NewReader(z)),
			} {
				if got, err := readAll(r); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s, level %d, %s: %d bytes, %v; want %d bytes", name, level, kind, len(got), err, len(want))
				}
			}
		}
	}
}

func TestMembers(t *testing.T) {
	var z, want []byte
	for _, b := range samples(t) {
		z = append(z, compress(t, 6, b)...)
		want = append(want, b...)
	}
	if got, err := readAll(bytes.NewReader(z)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("members: %d bytes, %v; want %d", len(got), err, len(want))
	}
	if _, err := readAll(bytes.NewReader(append(z, 0))); !errors.Is(err, gunzip.ErrHeader) {
		t.Errorf("a zero behind: %v, want %v", err, gunzip.ErrHeader)
	}
	if _, err := readAll(bytes.NewReader(append(z, "long garbage behind"...))); !errors.Is(err, gunzip.ErrHeader) {
		t.Errorf("garbage behind: %v, want %v", err, gunzip.ErrHeader)
	}
}

// TestCut cuts a small stream at every byte, and fails its source there.
func TestCut(t *testing.T) {
	z := compress(t, 9, []byte(strings.Repeat("It was the best of times, it was the worst of times. ", 40)+"Quirky, fuzzy jackdaws."))
	for n := range z {
		if got, err := readAll(bytes.NewReader(z[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d of %d: %d bytes, %v; want %v", n, len(z), len(got), err, io.ErrUnexpectedEOF)
		}
		gone := errors.New("gone")
		if _, err := readAll(io.MultiReader(bytes.NewReader(z[:n]), iotest.ErrReader(gone))); !errors.Is(err, gone) {
			t.Errorf("source fails at %d of %d: %v; want %v", n, len(z), err, gone)
		}
	}
}

// TestHeader compares headers with the standard library's mind.
func TestHeader(t *testing.T) {
	z := compress(t, 6, []byte("x"))
	for _, n := range []int{0, 1, 510, 511, 512, 513, 5000} {
		bad := slices.Concat(z[:10], z[10:17], bytes.Repeat([]byte("n"), n), []byte("\x00"), z[22:])
		same(t, bad)
	}
}

// TestFlip flips every bit of a stream: the outcome is the standard library's.
func TestFlip(t *testing.T) {
	z := compress(t, 6, []byte(strings.Repeat("It was the best of times, it was the worst of times. ", 3)+"Quirky, fuzzy jackdaws."))
	for i := range len(z) * 8 {
		bad := bytes.Clone(z)
		bad[i/8] ^= 1 << (i % 8)
		same(t, bad)
	}
}

// same compares the outcome with the standard library's.
func same(t testing.TB, z []byte) {
	t.Helper()
	const most = 1 << 22
	want, wantErr := func() ([]byte, error) {
		r, err := gzip.NewReader(bytes.NewReader(z))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(r, most))
	}()
	if len(want) == most {
		return
	}
	got, err := readAll(bytes.NewReader(z))
	if (err == nil) != (wantErr == nil) || err == nil && !bytes.Equal(got, want) {
		t.Errorf("%x: got %d bytes, %v; want %d bytes, %v", z[:min(len(z), 200)], len(got), err, len(want), wantErr)
	}
}

func FuzzReader(f *testing.F) {
	for _, b := range samples(f) {
		for _, level := range []int{gzip.HuffmanOnly, 0, 1, 6, 9} {
			f.Add(compress(f, level, b[:min(len(b), 2000)]))
		}
	}
	f.Fuzz(func(t *testing.T, z []byte) { same(t, z) })
}

func BenchmarkReader(b *testing.B) {
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		b.Fatal(err)
	}
	z := compress(b, 6, self)
	if env := os.Getenv("HEADSTART_BENCH_GZIP"); env != "" {
		if z, err = os.ReadFile(env); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("gunzip", func(b *testing.B) {
		for b.Loop() {
			r := gunzip.NewReader(bytes.NewReader(z))
			n := int64(0)
			for {
				p, err := r.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					b.Fatal(err)
				}
				n += int64(len(p))
			}
			b.SetBytes(n)
		}
	})
	b.Run("klauspost", func(b *testing.B) {
		for b.Loop() {
			r, err := kgzip.NewReader(bytes.NewReader(z))
			if err != nil {
				b.Fatal(err)
			}
			n, err := io.Copy(io.Discard, r)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(n)
		}
	})
	b.Run("standard", func(b *testing.B) {
		for b.Loop() {
			r, err := gzip.NewReader(bytes.NewReader(z))
			if err != nil {
				b.Fatal(err)
			}
			n, err := io.Copy(io.Discard, r)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(n)
		}
	})
}
