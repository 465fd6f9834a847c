package fill_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
)

// A mount that goes ends its prefetch; a reader of another one that waits for a chunk of it does not fail.
func TestRunClosesUnderReader(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd-sha256-64k"), quick())
	const n = 0
	chunks := m.BlobChunks(n)
	first := make(chan struct{})
	m.sources[n].set(func(i int, _ fill.Request, right []byte) (io.Reader, error) {
		if i == 1 {
			return &gate{bytes.NewReader(right), first}, nil
		}
		return nil, nil
	})
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1, Background: fill.BackgroundFull})
	for len(m.sources[n].seen()) == 0 {
		time.Sleep(time.Millisecond)
	}
	done := make(chan error)
	go func() { done <- m.ensure(t.Context(), chunks[0]) }()
	select {
	case err := <-done:
		t.Fatalf("Ensure = %v before the bytes came", err)
	case <-time.After(20 * time.Millisecond):
	}
	go func() { time.Sleep(10 * time.Millisecond); close(first) }()
	run.Close()
	if err := <-done; err != nil {
		t.Errorf("Ensure = %v (closed: %v, canceled: %v), want nil", err, errors.Is(err, fill.ErrClosed), errors.Is(err, context.Canceled))
	}
}
