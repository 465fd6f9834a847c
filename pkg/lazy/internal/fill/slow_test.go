package fill_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// trickle gives the right bytes, one at a time.
type trickle struct {
	io.Reader
	quit <-chan struct{}
}

func (r trickle) Read(p []byte) (int, error) {
	select {
	case <-r.quit:
		return 0, io.EOF
	case <-time.After(20 * time.Millisecond):
		return r.Reader.Read(p[:1])
	}
}

// A request that brings next to nothing is ended, and another one is made: whether a reader began it or joined it.
func TestTrickle(t *testing.T) {
	t.Parallel()
	for name, background := range map[string]fill.Background{"begun by a reader": fill.BackgroundNone, "begun in the background": fill.BackgroundFull} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := quick()
			o.Limit = 4 * time.Second
			m := mounted(t, nydus(t, "v6-zstd"), o)
			quit := make(chan struct{})
			defer close(quit)
			var asked atomic.Int64
			m.sources[0].set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) {
				if asked.Add(1) > 2 {
					return nil, nil
				}
				return trickle{bytes.NewReader(right), quit}, nil
			})
			if background != fill.BackgroundNone {
				run := m.s.Start(fill.Plan{Blobs: m.blobs[:1], Stream: -1, Background: background})
				defer run.Close()
				for asked.Load() == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			c := slices.MaxFunc(m.BlobChunks(0), func(x, y rafs.Chunk) int { return cmp.Compare(x.CompressedSize, y.CompressedSize) })
			var err error
			for range 5 { // a reader may give up in between, and the next one goes on
				if err = m.ensure(t.Context(), c); err == nil {
					break
				}
			}
			if err != nil || asked.Load() < 2 {
				t.Errorf("Ensure = %v after %d requests, want the largest chunk from a request after those that trickle", err, asked.Load())
			}
			m.ensureAll()
			m.check()
		})
	}
}

// A deadline ends a read whose source hangs and obeys nobody. Reads of other blobs go on meanwhile.
func TestDeadline(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd"), quick())
	quit := make(chan struct{})
	defer close(quit)
	m.sources[0].set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) {
		return &gate{bytes.NewReader(right), quit}, nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	late := make(chan error, 1)
	go func() { late <- m.ensure(ctx, m.BlobChunks(0)[0]) }()
	for _, c := range m.BlobChunks(1) {
		if err := m.ensure(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-late; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ensure = %v, want the deadline", err)
	}
	if s := m.blobs[0].Stats(); s.Failed != 1 {
		t.Errorf("Stats = %+v, want one read that failed", s)
	}
}

// What is told to end lets readers go at once, whatever its source does, and says when the source has let go too.
func TestEndDeaf(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd"), quick())
	quit := make(chan struct{})
	open := sync.OnceFunc(func() { close(quit) })
	defer open()
	m.sources[0].set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) {
		return &gate{bytes.NewReader(right), quit}, nil
	})
	late := make(chan error, 1)
	go func() { late <- m.ensure(t.Context(), m.BlobChunks(0)[0]) }()
	for len(m.sources[0].seen()) == 0 {
		time.Sleep(time.Millisecond)
	}
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: 0, Background: fill.BackgroundFull})
	for len(m.sources[0].seen()) < 2 {
		time.Sleep(time.Millisecond)
	}
	ends := []<-chan struct{}{run.End(), m.blobs[0].EndSource(m.sources[0]), m.blobs[0].End(), m.s.End()}
	if err := <-late; !errors.Is(err, fill.ErrClosed) {
		t.Errorf("Ensure = %v, want ErrClosed", err)
	}
	for i, end := range ends {
		select {
		case <-end:
			t.Errorf("%d has ended, and its source is in use", i)
		default:
		}
	}
	open()
	for _, end := range ends {
		<-end
	}
}
