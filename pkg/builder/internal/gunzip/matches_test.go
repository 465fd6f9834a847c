package gunzip_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"testing"

	"github.com/headstart-oci/headstart/pkg/builder/internal/gunzip"
)

// TestMatches makes sure that every match is a repetition, that they come in order, and that they are
// those the compressor found: what they do not cover was written byte by byte.
func TestMatches(t *testing.T) {
	t.Parallel()
	for name, data := range samples(t) {
		for level := gzip.HuffmanOnly; level <= gzip.BestCompression; level++ {
			var stored bytes.Buffer
			w, err := gzip.NewWriterLevel(&stored, level)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // two members
				w.Reset(&stored)
				if _, err := w.Write(data); err != nil {
					t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			}
			covered := checkMatches(t, stored.Bytes())
			hasty := level == gzip.BestSpeed // the only level whose header says so
			switch name {
			case "zeros", "text", "ab", "abcdefg":
				if want := len(data) * 2 * 99 / 100; !hasty && level >= 2 && covered < want {
					t.Errorf("%s, level %d: matches cover %d of %d bytes, want %d", name, level, covered, 2*len(data), want)
				}
			}
			if (hasty || level == gzip.NoCompression || level == gzip.HuffmanOnly) && covered > 0 {
				t.Errorf("%s, level %d: matches cover %d bytes, want none", name, level, covered)
			}
		}
	}
}

// checkMatches reads a stream and returns how many bytes its matches cover.
func checkMatches(t *testing.T, stored []byte) (covered int) {
	t.Helper()
	z := gunzip.NewReader(bytes.NewReader(stored))
	var plain []byte
	for {
		p, err := z.Next()
		if errors.Is(err, io.EOF) {
			return covered
		}
		if err != nil {
			t.Fatal(err)
		}
		start := len(plain)
		plain = append(plain, p...)
		end := 0
		for _, m := range z.Matches() {
			at := start + int(m.Pos)
			if int(m.Pos) < end || int(m.Pos)+int(m.Length) > len(p) || int(m.Back) > at || m.Back == 0 {
				t.Fatalf("match %+v of %d bytes, the last ended at %d, %d bytes before", m, len(p), end, start)
			}
			for i := range int(m.Length) {
				if plain[at+i] != plain[at+i-int(m.Back)] {
					t.Fatalf("match %+v is no repetition", m)
				}
			}
			end = int(m.Pos) + int(m.Length)
			covered += int(m.Length)
		}
	}
}
