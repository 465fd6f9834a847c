package fill_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// long is an image whose first blob has 7 MB in chunks of 4 KiB, stored as they are.
func long(t testing.TB) *image {
	return convert(t, func(o *builder.Options) { o.ChunkSize, o.Compressor = 1<<12, rafs.CompressorNone })
}

// readOn reads chunks as a mount does: it waits for what is missing, and says so of what is there.
func (m *mount) readOn(chunks []rafs.Chunk) {
	m.t.Helper()
	for _, c := range chunks {
		if m.caches[c.Blob].Ready(c) {
			m.blobs[c.Blob].Touched(int64(c.UncompressedOffset), int64(c.UncompressedSize))
		} else if err := m.ensure(m.t.Context(), c); err != nil {
			m.t.Fatal(err)
		}
	}
}

// upTo returns the chunks of a blob that begin before off.
func upTo(chunks []rafs.Chunk, off uint64) []rafs.Chunk {
	for i, c := range chunks {
		if c.UncompressedOffset >= off {
			return chunks[:i]
		}
	}
	return chunks
}

func TestReadAhead(t *testing.T) {
	t.Parallel()
	img := long(t)
	for name, test := range map[string]func(t *testing.T, img *image){
		"one": testAheadOfOne, "two": testAheadOfTwo, "bound": testAheadBound, "faults": testAheadFaults, "hangs": testAheadHangs,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, img)
		})
	}
}

// Who reads a blob front to back waits for a few requests, and what follows is fetched before he comes to it.
func testAheadOfOne(t *testing.T, img *image) {
	m := mounted(t, img, quick())
	m.readOn(m.BlobChunks(0))
	m.once()
	if s := m.sum(); s.Demand.Requests > 8 || s.ReadAhead.Requests == 0 || s.Misses != s.Demand.Requests || s.Fetched().Bytes > int64(len(m.sources[0].data)) {
		t.Errorf("of %d bytes read front to back: Stats = %+v, want at most 8 requests on demand, the rest ahead", len(m.sources[0].data), s)
	}
}

// Two who read two parts of a blob front to back are told apart.
func testAheadOfTwo(t *testing.T, img *image) {
	m := mounted(t, img, quick())
	chunks := m.BlobChunks(0)
	half := len(chunks) / 2
	for i := range half {
		m.readOn(chunks[i : i+1])
		m.readOn(chunks[half+i : half+i+1])
	}
	m.once()
	// Requests that follow none have 128 KiB.
	if s := m.sum(); s.Demand.Requests > int64(len(m.sources[0].data))>>19 || s.ReadAhead.Requests == 0 {
		t.Errorf("Stats = %+v for a blob of %d bytes, want requests of 512 KiB and more on demand, and some ahead", s, len(m.sources[0].data))
	}
}

// Who stops in the middle has at most one request too many; who reads here and there has none.
func testAheadBound(t *testing.T, img *image) {
	m := mounted(t, img, quick())
	const read = 4 << 20
	m.readOn(upTo(m.BlobChunks(0), read))
	m.s.Close() // nothing is on its way any more
	if got := m.sources[0].asked(); got > read+2<<20 {
		t.Errorf("%d bytes were asked for, of which %d were read", got, read)
	}
	m = mounted(t, img, quick())
	chunks := m.BlobChunks(0)
	for i := len(chunks) - 1; i >= 0; i -= 40 {
		m.readOn(chunks[i : i+1])
	}
	if s := m.sum(); s.ReadAhead.Requests != 0 {
		t.Errorf("back to front: Stats = %+v, want nothing read ahead", s)
	}
	m = mounted(t, img, quick())
	m.readOn(upTo(m.BlobChunks(0), 512<<10))
	if s := m.sum(); s.ReadAhead.Requests != 0 {
		t.Errorf("the first 512 KiB: Stats = %+v, want nothing read ahead", s)
	}
}

// While a prefetch blob is on its way nothing else shares its link that nobody waits for.
func TestReadAheadAfterLists(t *testing.T) {
	t.Parallel()
	img := convert(t, func(o *builder.Options) {
		o.ChunkSize, o.Compressor, o.List, o.MarkPrefetchBlob = 1<<12, rafs.CompressorNone, startList(), true
	})
	m := mounted(t, img, quick())
	open := make(chan struct{})
	n := m.prefetchBlob()
	m.sources[n].set(func(_ int, _ fill.Request, right []byte) (io.Reader, error) {
		return &gate{bytes.NewReader(right), open}, nil
	})
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: n, Background: fill.BackgroundNone})
	m.readOn(upTo(m.BlobChunks(0), 4<<20))
	if s := m.blobs[0].Stats(); s.ReadAhead.Requests != 0 || s.Demand.Requests < 5 {
		t.Errorf("Stats = %+v, want nothing read ahead before the prefetch blob is there", s)
	}
	close(open)
	<-run.Done()
	m.readOn(m.BlobChunks(0))
	if s := m.blobs[0].Stats(); s.ReadAhead.Requests == 0 {
		t.Errorf("Stats = %+v, want the rest read ahead", s)
	}
}

// What is wrong or does not come when it is read ahead is fetched when somebody wants it.
func testAheadFaults(t *testing.T, img *image) {
	for name, fault := range map[string]func(right []byte) (io.Reader, error){
		"down":  func([]byte) (io.Reader, error) { return nil, errDown },
		"short": func(right []byte) (io.Reader, error) { return bytes.NewReader(right[:len(right)/2]), nil },
		"wrong": func(right []byte) (io.Reader, error) { return bytes.NewReader(make([]byte, len(right))), nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := mounted(t, img, quick())
			m.sources[0].set(func(n int, _ fill.Request, right []byte) (io.Reader, error) {
				if n == 5 { // those before are demands
					return fault(right)
				}
				return nil, nil
			})
			m.readOn(m.BlobChunks(0))
			m.once()
			for n := 1; n < len(m.blobs); n++ {
				m.readOn(m.BlobChunks(n))
			}
			m.check()
			if s := m.sum(); s.ReadAhead.Requests == 0 || s.Failed != 0 {
				t.Errorf("Stats = %+v, want some read ahead and no read that failed", s)
			}
		})
	}
}

// A source that hangs while something is read ahead keeps a reader for no longer than he waits, and one of something else not at all.
func testAheadHangs(t *testing.T, img *image) {
	m := mounted(t, img, quick())
	open := make(chan struct{})
	m.sources[0].set(func(_ int, r fill.Request, right []byte) (io.Reader, error) {
		if r.Offset > 1<<20 && r.Offset < 2<<20 { // not by number: it may be asked for before the last demand
			return &gate{bytes.NewReader(right), open}, nil
		}
		return nil, nil
	})
	defer close(open)
	chunks := m.BlobChunks(0)
	m.readOn(upTo(chunks, 1<<20))
	for deadline := time.Now().Add(time.Minute); len(m.sources[0].seen()) < 5 || m.sum().ReadAhead.Requests < 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("Stats = %+v, want four demands and one request ahead", m.sum())
		}
	}
	m.readOn(chunks[len(chunks)-1:])
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	next := upTo(chunks, uint64(2<<20))
	if err := m.ensure(ctx, next[len(next)-1]); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ensure = %v, want %v", err, context.DeadlineExceeded)
	}
}
