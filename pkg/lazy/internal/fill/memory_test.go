package fill_test

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
)

// stopped sends nothing until it is opened, and tells when it is asked first.
type stopped struct {
	io.Reader
	open <-chan struct{}
	tell func()
}

func (s *stopped) Read(p []byte) (int, error) {
	s.tell()
	<-s.open
	return s.Reader.Read(p)
}

// Sources that stop keep no memory from others: not before they have sent something, and not all of it afterwards, however many
// there are of one mount.
func TestStoppedSources(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		sent  int  // bytes before they stop
		share bool // they are of one mount
	}{
		"before the first byte, of several mounts": {0, false},
		"before the first byte, of one mount":      {0, true},
		"in the middle, of one mount":              {1, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := quick()
			o.Memory = 4 // two units of demands at once, one of a share
			img := nydus(t, "v6-zstd")
			m := &mount{image: img, t: t, s: fill.New(o)}
			t.Cleanup(m.s.Close)
			gate := make(chan struct{})
			stops := 1 // the others may wait for the memory that one holds
			if tt.sent == 0 {
				stops = len(img.Blobs)
			}
			stuck := make(chan struct{}, len(img.Blobs))
			var readers sync.WaitGroup
			defer readers.Wait()
			defer close(gate)
			one := m.s.Share()
			for n, b := range img.Blobs {
				var once sync.Once
				src := &source{data: img.files[b.ID]}
				src.set(func(_ int, r fill.Request, right []byte) (io.Reader, error) {
					if r.Meta {
						return nil, nil
					}
					rest := &stopped{bytes.NewReader(right[tt.sent:]), gate, func() { once.Do(func() { stuck <- struct{}{} }) }}
					return io.MultiReader(bytes.NewReader(right[:tt.sent]), rest), nil
				})
				h := one
				if !tt.share {
					h = m.s.Share()
				}
				blob, err := h.Open(newCache(b), src, b, img.BlobChunks(n))
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range img.BlobChunks(n)[:2] {
					readers.Go(func() {
						if err := blob.Ensure(t.Context(), int64(c.UncompressedOffset), 1); err != nil {
							t.Error(err)
						}
					})
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for n := range stops {
				select {
				case <-stuck:
				case <-ctx.Done():
					t.Fatalf("%d of %d sources were asked: they wait for memory before they have sent anything", n, stops)
				}
			}
			b := img.Blobs[0]
			other, err := m.s.Open(newCache(b), &source{data: img.files[b.ID]}, b, img.BlobChunks(0))
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range img.BlobChunks(0) {
				if err := other.Ensure(ctx, int64(c.UncompressedOffset), int64(c.UncompressedSize)); err != nil {
					t.Fatalf("Ensure beside stopped sources = %v", err)
				}
			}
		})
	}
}
