package rafs_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestAppendAfter: a chunk touches the one before it in its file, lies before it, or is more than 8 KiB away.
func TestAppendAfter(t *testing.T) {
	t.Parallel()
	for _, v := range []rafs.Version{rafs.V5, rafs.V6} {
		var out bytes.Buffer
		w, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Version: v, ChunkSize: 4096})
		must(t, err)
		add := func(letter byte, size int, before ...rafs.Chunk) rafs.Chunk {
			p := bytes.Repeat([]byte{letter}, size)
			c, err := w.AppendAfter(before, rafs.EncodedChunk{Digest: rafs.DigesterBLAKE3.Sum(p), Data: p, UncompressedSize: uint32(size)})
			must(t, err)
			for _, b := range before {
				if end := b.CompressedOffset + uint64(b.CompressedSize); c.CompressedOffset > end && c.CompressedOffset-end <= 8192 {
					t.Errorf("v%v: chunk %c at %d behind one that ends at %d", v, letter, c.CompressedOffset, end)
				}
			}
			return c
		}
		a := add('a', 4096)
		b := add('b', 10, a)
		if c := add('b', 10, a); c != b || b.CompressedOffset != 4096 {
			t.Errorf("v%v: the equal chunk that touches is %+v, want %+v", v, c, b)
		}
		c := add('c', 10, a)       // b lies between: zeros go in front
		again := add('c', 10, a)   // far enough from a
		second := add('d', 100, c) // touches
		if again != c || c.CompressedOffset != 4096+8192+1 || second.CompressedOffset != c.CompressedOffset+10 {
			t.Errorf("v%v: c = %+v, again %+v, d = %+v", v, c, again, second)
		}
		e := add('e', 4096, second)
		copied := add('e', 4096, c) // d lies between: stored again
		if copied.Index == e.Index || copied.Digest != e.Digest {
			t.Errorf("v%v: e = %+v, its copy %+v", v, e, copied)
		}
		if back := add('a', 4096, e); back != a {
			t.Errorf("v%v: an equal chunk before it is %+v, want %+v", v, back, a)
		}
		blob, err := w.Close()
		must(t, err)
		if blob.ChunkCount != 6 {
			t.Errorf("v%v: %d chunks, want 6", v, blob.ChunkCount)
		}
		r, err := rafs.OpenBlob(bytes.NewReader(out.Bytes()), blob)
		must(t, err)
		for _, c := range []rafs.Chunk{a, b, c, second, e, copied} {
			if _, err := r.ReadChunk(t.Context(), c); err != nil {
				t.Error(err)
			}
		}
		if _, err := w.AppendAfter(nil, rafs.EncodedChunk{}); err == nil || errors.Is(err, rafs.ErrInvalid) {
			t.Errorf("AppendAfter to a closed blob = %v", err)
		}
	}
}
