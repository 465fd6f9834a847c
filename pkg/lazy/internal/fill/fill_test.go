package fill_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// quick has the waiting of tests.
func quick() fill.Options {
	return fill.Options{Limit: 20 * time.Second, Backoff: time.Millisecond, Idle: time.Millisecond}
}

// Every kind of image is read chunk by chunk, and its files are what they should be.
func TestEnsureAllKinds(t *testing.T) {
	t.Parallel()
	for name, open := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := mounted(t, open(t), quick())
			m.ensureAll()
			m.check()
			m.once()
			for n, b := range m.blobs {
				if !b.Complete() {
					t.Errorf("blob %d is not complete", n)
				}
			}
			s := m.sum()
			if s.Failed != 0 || s.Corrupt != 0 || s.Demand.Bytes == 0 || s.Misses == 0 || s.Prefetch.Requests != 0 {
				t.Errorf("Stats = %+v", s)
			}
		})
	}
}

// A run fetches all of an image by itself: the prefetch blob first and in one request.
func TestRunAllKinds(t *testing.T) {
	t.Parallel()
	for name, open := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := mounted(t, open(t), quick())
			stream := m.prefetchBlob()
			run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: stream, Background: fill.BackgroundFull})
			<-run.Listed()
			if stream >= 0 {
				if !m.blobs[stream].Complete() {
					t.Error("the prefetch blob is not complete")
				}
				data := slices.DeleteFunc(m.sources[stream].seen(), func(r fill.Request) bool { return r.Meta })
				if len(data) != 1 {
					t.Errorf("the prefetch blob took requests %+v", data)
				}
			}
			<-run.Done()
			m.check()
			m.once()
			s := m.sum()
			if s.Waits != 0 || s.Misses != 0 || s.Demand.Requests != 0 || s.Background.Bytes == 0 {
				t.Errorf("Stats = %+v", s)
			}
			run.Close()
		})
	}
}

// Hundreds of readers of overlapping ranges fetch each chunk once, while a run fetches too.
func TestEnsureFetchesOnce(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"nydus zstd", "nydus batch", "ref", "prefetch"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := mounted(t, kinds[name](t), quick())
			run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.prefetchBlob(), Background: fill.BackgroundFull})
			all := make([][]rafs.Chunk, len(m.blobs))
			for n := range all {
				all[n] = m.BlobChunks(n)
			}
			var wg sync.WaitGroup
			for i := range 300 {
				rnd := rand.New(rand.NewPCG(1, uint64(i)))
				wg.Go(func() {
					for range 20 {
						n := rnd.IntN(len(m.blobs))
						c := all[n][rnd.IntN(len(all[n]))]
						if err := m.blobs[n].Ensure(t.Context(), int64(c.UncompressedOffset), rnd.Int64N(1<<20)+1); err != nil {
							t.Error(err)
						} else if !m.caches[n].Ready(c) {
							t.Errorf("chunk %d of blob %d is not there", c.Index, n)
						}
					}
				})
			}
			wg.Wait()
			<-run.Done()
			m.check()
			m.once()
			for n, src := range m.sources {
				// What lies between two wanted units is fetched along, and more than once perhaps.
				if most := int64(len(src.data)+len(src.meta)) * 2; src.asked() > most {
					t.Errorf("blob %d: %d bytes were asked for, at most %d", n, src.asked(), most)
				}
			}
		})
	}
}

// Reads that are near each other become few requests, those of one file one.
func TestEnsureJoinsNear(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd-sha256-64k"), quick())
	biggest := m.BlobChunks(0)
	first, last := biggest[0], biggest[len(biggest)-1]
	end := int64(last.UncompressedOffset) + int64(last.UncompressedSize)
	if err := m.blobs[0].Ensure(t.Context(), int64(first.UncompressedOffset), end-int64(first.UncompressedOffset)); err != nil {
		t.Fatal(err)
	}
	if got := len(m.sources[0].seen()); got != 1 {
		t.Errorf("%d requests for all of a blob of %d bytes", got, len(m.sources[0].data))
	}
	if m.blobs[0].Stats().Demand.Chunks != int64(len(biggest)) {
		t.Errorf("Stats = %+v, want %d chunks", m.blobs[0].Stats(), len(biggest))
	}
}

// Who reads a blob from front to back, or here and there in one part of it, needs fewer and longer requests; who does not gets little that he did not ask for.
func TestEnsureAhead(t *testing.T) {
	t.Parallel()
	img := convert(t, func(o *builder.Options) { o.ChunkSize, o.Compressor = 1<<12, rafs.CompressorNone })
	m := mounted(t, img, quick())
	m.ensureAll()
	for n, src := range m.sources {
		requests := src.seen()
		if len(requests) < 2 {
			continue
		}
		if longest := slices.MaxFunc(requests, func(x, y fill.Request) int { return cmp.Compare(x.Length, y.Length) }); longest.Length <= 128<<10 || longest.Length > 1<<20 {
			t.Errorf("blob %d: the longest of %d requests is %+v", n, len(requests), longest)
		}
	}
	m = mounted(t, img, quick())
	chunks := m.BlobChunks(0)
	for i := len(chunks) - 1; i >= 0; i -= 800 { // 3.2 MB apart
		if err := m.ensure(t.Context(), chunks[i]); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range m.sources[0].seen() {
		if r.Length > 128<<10 {
			t.Errorf("%+v is longer than 128 KiB", r)
		}
	}
	m = mounted(t, img, quick())
	reads := rand.New(rand.NewPCG(1, 2)).Perm(30)
	for _, i := range reads {
		if err := m.ensure(t.Context(), chunks[60*i]); err != nil {
			t.Fatal(err)
		}
	}
	requests := m.sources[0].seen()
	longest := slices.MaxFunc(requests, func(x, y fill.Request) int { return cmp.Compare(x.Length, y.Length) })
	if len(requests) > len(reads)*3/4 || longest.Length <= 128<<10 || longest.Length > 1<<20 {
		t.Errorf("%d requests for %d reads in 7 MB, the longest is %+v", len(requests), len(reads), longest)
	}
}

func TestEnsureRange(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd"), quick())
	size := int64(m.Blobs[0].UncompressedSize)
	for _, r := range [][2]int64{{-1, 1}, {0, 0}, {0, -1}, {size, 1}, {size + 1<<40, 4096}, {1 << 62, 1 << 62}} {
		if err := m.blobs[0].Ensure(t.Context(), r[0], r[1]); !errors.Is(err, fill.ErrRange) {
			t.Errorf("Ensure(%d, %d) = %v, want ErrRange", r[0], r[1], err)
		}
	}
	// The last byte of a block, the first, and one that reaches beyond the end.
	c := m.BlobChunks(0)[3]
	for _, r := range [][2]int64{{int64(c.UncompressedOffset) + 4095, 1}, {int64(c.UncompressedOffset), 1}, {size - 1, 1 << 30}} {
		if err := m.blobs[0].Ensure(t.Context(), r[0], r[1]); err != nil {
			t.Errorf("Ensure(%d, %d) = %v", r[0], r[1], err)
		}
	}
	if !m.caches[0].Ready(c) {
		t.Error("the chunk is not there")
	}
}

// A reader that gives up is let go; what nobody wants any more is not fetched, what is on its way comes.
func TestEnsureCancelled(t *testing.T) {
	t.Parallel()
	o := quick()
	o.Requests, o.Ahead, o.Near = 1, -1, -1
	m := mounted(t, nydus(t, "v6-zstd"), o)
	open := make(chan struct{})
	m.sources[0].set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) {
		return &gate{bytes.NewReader(right), open}, nil
	})
	chunks := m.BlobChunks(0)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the reader was killed")
	errs := make(chan error)
	for _, c := range []rafs.Chunk{chunks[0], chunks[4]} {
		go func() { errs <- m.ensure(ctx, c) }()
		for m.blobs[0].Stats().Misses == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	for m.blobs[0].Stats().Misses < 2 {
		time.Sleep(time.Millisecond)
	}
	cancel(reason)
	for range 2 {
		if err := <-errs; !errors.Is(err, reason) {
			t.Errorf("Ensure = %v, want %v", err, reason)
		}
	}
	close(open)
	if err := m.ensure(t.Context(), chunks[7]); err != nil {
		t.Fatal(err)
	}
	if !m.caches[0].Ready(chunks[0]) && !m.caches[0].Ready(chunks[4]) {
		t.Error("the request that was made brought nothing")
	}
	if got := len(m.sources[0].seen()); got != 2 {
		t.Errorf("%d requests, want 2: %+v", got, m.sources[0].seen())
	}
}

// Closing a blob lets readers go and ends its requests; others go on.
func TestBlobClose(t *testing.T) {
	t.Parallel()
	m := mounted(t, nydus(t, "v6-zstd"), quick())
	m.sources[0].set(func(int, fill.Request, []byte) (io.Reader, error) { return nil, errDown })
	errs := make(chan error)
	c := m.BlobChunks(0)[0]
	for range 3 {
		go func() { errs <- m.ensure(t.Context(), c) }()
	}
	for len(m.sources[0].seen()) == 0 {
		time.Sleep(time.Millisecond)
	}
	m.blobs[0].Close()
	for range 3 {
		if err := <-errs; !errors.Is(err, fill.ErrClosed) {
			t.Errorf("Ensure = %v, want ErrClosed", err)
		}
	}
	if err := m.ensure(t.Context(), c); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("Ensure = %v, want ErrClosed", err)
	}
	if err := m.ensure(t.Context(), m.BlobChunks(1)[0]); err != nil {
		t.Error(err)
	}
	m.s.Close()
	others := m.BlobChunks(1)
	if err := m.ensure(t.Context(), others[len(others)-1]); !errors.Is(err, fill.ErrClosed) {
		t.Errorf("Ensure = %v, want ErrClosed", err)
	}
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: -1})
	<-run.Done()
	run.Close()
}
