package fill_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// asking is a cache that others get chunks for.
type asking struct {
	*cache
	node  *node
	asked atomic.Int64
}

// Elsewhere implements fill.Asker.
func (a *asking) Elsewhere(_ context.Context, chunks []rafs.Chunk) {
	a.asked.Add(int64(len(chunks)))
	for _, c := range chunks {
		if p := a.node.chunks[c.Digest]; p != nil {
			_ = a.Put(c, p)
		}
	}
}

// The sources of every kind of image are gone, for their tables too: what others can get is read, what nobody has fails.
func TestElsewhereAllKinds(t *testing.T) {
	t.Parallel()
	for name, open := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := open(t)
			n := neighbours(t, img, 0.5, false)
			s := fill.New(fill.Options{Limit: 100 * time.Millisecond, Backoff: time.Millisecond})
			t.Cleanup(s.Close)
			got, failed := 0, 0
			for i, info := range img.Blobs {
				src := &source{quit: make(chan struct{})} // which has nothing
				c := &asking{cache: newCache(info), node: n}
				b, err := s.Open(c, src, info, img.BlobChunks(i))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(b.Close)
				for _, chunk := range img.BlobChunks(i) {
					if failed > 3 && n.chunks[chunk.Digest] == nil {
						continue // each waits
					}
					err := b.Ensure(t.Context(), int64(chunk.UncompressedOffset), int64(chunk.UncompressedSize))
					if n.chunks[chunk.Digest] != nil {
						if got++; err != nil || !c.Ready(chunk) {
							t.Fatalf("blob %d, chunk %d, which others can get: %v, ready %t", i, chunk.Index, err, c.Ready(chunk))
						}
					} else if failed++; err == nil || c.Ready(chunk) {
						t.Errorf("blob %d, chunk %d, which nobody has: %v, want an error", i, chunk.Index, err)
					}
				}
				if c.asked.Load() == 0 && len(img.BlobChunks(i)) > 0 {
					t.Error("nobody was asked")
				}
			}
			if got == 0 || failed == 0 {
				t.Errorf("%d chunks came from elsewhere, %d failed: want some of both", got, failed)
			}
		})
	}
}
