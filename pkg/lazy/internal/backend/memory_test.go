package backend_test

import (
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// forgetful is a cache that keeps nothing but which chunks it had.
type forgetful struct{ cache }

func (c *forgetful) Put(ch rafs.Chunk, _ []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ready[ch.UncompressedOffset] = true
	return nil
}

// BenchmarkMemory fills images of 39 MB from 20 mounts at once, each with a stream, the rest and eight readers. heap-MB is the most
// that the Go heap had in use beyond what it had before, with the registry's buffers, which run in the same process.
func BenchmarkMemory(b *testing.B) {
	s := program(b, 600, 200)
	for b.Loop() {
		runtime.GC()
		var before, now runtime.MemStats
		runtime.ReadMemStats(&before)
		sched := fill.New(fill.Options{})
		var images []*backend.Image
		var wg sync.WaitGroup
		for range 20 {
			img, err := backend.Open(b.Context(), s.ref(), options())
			if err != nil {
				b.Fatal(err)
			}
			images = append(images, img)
			var blobs []*fill.Blob
			for n, info := range img.RAFS.Blobs {
				chunks := img.RAFS.BlobChunks(n)
				blob, err := sched.Open(&forgetful{cache{ready: map[uint64]bool{}}}, img.Blob(n), info, chunks)
				if err != nil {
					b.Fatal(err)
				}
				blobs = append(blobs, blob)
				for i := range 8 {
					wg.Go(func() {
						for at := i; at < len(chunks); at += 8 {
							if err := blob.Ensure(b.Context(), int64(chunks[at].UncompressedOffset), 1); err != nil {
								b.Error(err)
							}
						}
					})
				}
			}
			sched.Start(fill.Plan{Blobs: blobs, Stream: img.Origin().Prefetch, Background: fill.BackgroundFull})
			img.RAFS = nil
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		var peak uint64
		tick := time.NewTicker(5 * time.Millisecond)
		for running := true; running; {
			select {
			case <-done:
				running = false
			case <-tick.C:
			}
			runtime.ReadMemStats(&now)
			peak = max(peak, now.HeapInuse)
		}
		tick.Stop()
		sched.Close()
		for _, img := range images {
			if err := img.Close(); err != nil {
				b.Error(err)
			}
		}
		b.ReportMetric(float64(peak-min(peak, before.HeapInuse))/1e6, "heap-MB")
	}
}
