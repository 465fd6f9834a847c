package builder

import (
	"bytes"
	"errors"
	"hash/maphash"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestCopiesVerify flips a byte of a chunk that is compared as it is stored, and one of a chunk that is not.
func TestCopiesVerify(t *testing.T) {
	t.Parallel()
	var file bytes.Buffer
	w, err := rafs.NewBlobWriter(&file, rafs.BlobOptions{Compressor: rafs.CompressorZstd})
	if err != nil {
		t.Fatal(err)
	}
	enc, err := rafs.NewEncoder(rafs.CompressorZstd, rafs.LevelDefault)
	if err != nil {
		t.Fatal(err)
	}
	known := newCopies()
	var chunks []rafs.Chunk
	for i, raw := range [][]byte{bytes.Repeat([]byte("copied "), 300), bytes.Repeat([]byte("made anew "), 300), []byte("raw")} {
		data, compressed, err := enc.Encode(nil, raw)
		if err != nil {
			t.Fatal(err)
		}
		sum := rafs.DigesterBLAKE3.Sum(raw)
		c, err := w.Append(rafs.EncodedChunk{Digest: sum, Data: data, Compressed: compressed, UncompressedSize: uint32(len(raw))})
		if err != nil {
			t.Fatal(err)
		}
		chunks = append(chunks, c)
		if i != 1 {
			known.sums[sum] = maphash.Bytes(known.seed, data)
		}
	}
	blob, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	p := file.Bytes()
	r, err := rafs.OpenBlob(bytes.NewReader(p), blob)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*copies{known, nil} {
		if err := verifyChunks(t.Context(), r, chunks, s, 2); err != nil {
			t.Errorf("verifyChunks = %v", err)
		}
	}
	for i, c := range chunks {
		last := &p[c.CompressedOffset+uint64(c.CompressedSize)-1]
		*last ^= 1
		if err := verifyChunks(t.Context(), r, chunks, known, 2); !errors.Is(err, ErrDigest) && !errors.Is(err, rafs.ErrDigest) && !errors.Is(err, rafs.ErrInvalid) {
			t.Errorf("verifyChunks with chunk %d changed = %v", i, err)
		}
		*last ^= 1
	}
}
