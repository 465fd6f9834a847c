package fill_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// node is what other caches have, by digest.
type node struct {
	chunks map[rafs.Digest][]byte
	lies   map[rafs.Digest]bool // they are found, and then they are not there
}

// borrowing is a cache that borrows from a node.
type borrowing struct {
	*cache
	node *node

	mu    sync.Mutex
	asked int
}

// Find implements fill.Borrower.
func (b *borrowing) Find(chunks []rafs.Chunk) []bool {
	found := make([]bool, len(chunks))
	for i, c := range chunks {
		found[i] = b.node.chunks[c.Digest] != nil || b.node.lies[c.Digest]
	}
	return found
}

// Borrow implements fill.Borrower.
func (b *borrowing) Borrow(_ context.Context, chunks []rafs.Chunk) {
	b.mu.Lock()
	b.asked += len(chunks)
	b.mu.Unlock()
	for _, c := range chunks {
		if p := b.node.chunks[c.Digest]; p != nil {
			_ = b.Put(c, p)
		}
	}
}

// neighbours fetches all of img once, and returns a node that has some of it.
func neighbours(t testing.TB, img *image, share float64, lies bool) *node {
	t.Helper()
	m := mounted(t, img, quick())
	m.ensureAll()
	n := &node{chunks: map[rafs.Digest][]byte{}, lies: map[rafs.Digest]bool{}}
	r := rand.New(rand.NewPCG(5, 6))
	for i, c := range m.caches {
		for _, chunk := range m.BlobChunks(i) {
			if r.Float64() < share {
				n.chunks[chunk.Digest] = slices.Clone(c.data[chunk.UncompressedOffset:][:chunk.UncompressedSize])
			} else if lies && r.IntN(2) == 0 {
				n.lies[chunk.Digest] = true
			}
		}
	}
	m.s.Close()
	return n
}

// borrower opens img over caches that borrow.
func borrower(t testing.TB, img *image, n *node, o fill.Options) *mount {
	t.Helper()
	m := &mount{image: img, t: t, s: fill.New(o)}
	t.Cleanup(m.s.Close)
	for i, b := range img.Blobs {
		src := &source{data: img.files[b.ID], quit: make(chan struct{})}
		if meta, separate := b.MetaBlob(); separate {
			src.meta = img.files[meta.ID]
		}
		c := newCache(b)
		blob, err := m.s.Open(&borrowing{cache: c, node: n}, src, b, img.BlobChunks(i))
		if err != nil {
			t.Fatal(err)
		}
		m.caches, m.sources, m.blobs = append(m.caches, c), append(m.sources, src), append(m.blobs, blob)
	}
	return m
}

// spared fails the test when a request reads the bytes of a chunk that the node has. Units of several chunks, which the table places, are
// left out: one that is not there takes them all.
func (m *mount) spared(n *node) {
	m.t.Helper()
	for i, b := range m.Blobs {
		if b.PlacedByMeta() {
			continue
		}
		for _, c := range m.BlobChunks(i) {
			if n.chunks[c.Digest] == nil || c.Batch {
				continue
			}
			for _, r := range m.sources[i].seen() {
				from, to := int64(c.CompressedOffset), int64(c.CompressedOffset)+int64(c.CompressedSize)
				if !r.Meta && r.Offset < to && from < r.Offset+r.Length {
					m.t.Errorf("blob %d: request [%d, +%d) reads chunk %d at [%d, %d), which is on the node", i, r.Offset, r.Length, c.Index, from, to)
				}
			}
		}
	}
}

// What other caches have is not fetched, in whatever way the rest is: on demand, by the stream of a prefetch blob, in the background. What is
// said to be there and is not is fetched.
func TestBorrowAllKinds(t *testing.T) {
	t.Parallel()
	for name, open := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if testing.Short() && !slices.Contains([]string{"nydus zstd", "nydus batch", "prefetch", "ref with prefetch"}, name) {
				t.Skip("one kind of each sort is enough for the short form")
			}
			img := open(t)
			shares, truths := []float64{0, 0.8, 1}, []bool{false, true}
			if testing.Short() {
				shares, truths = []float64{0.8}, []bool{true}
			}
			for _, share := range shares {
				for _, lies := range truths {
					n := neighbours(t, img, share, lies)
					demand := borrower(t, img, n, quick())
					demand.ensureAll()
					demand.check()
					demand.once()
					demand.spared(n)
					run := borrower(t, img, n, quick())
					r := run.s.Start(fill.Plan{Blobs: run.blobs, Stream: run.prefetchBlob(), Background: fill.BackgroundFull})
					<-r.Done()
					r.Close()
					run.check()
					run.once()
					run.spared(n)
					for what, m := range map[string]*mount{"demand": demand, "run": run} {
						s := m.sum()
						asked := int64(0)
						for _, src := range m.sources {
							asked += src.asked()
						}
						if s.Failed != 0 || s.Corrupt != 0 || (s.ReusedChunks == 0) != (share == 0) || (s.ReusedBytes == 0) != (share == 0) {
							t.Errorf("%s, %v lent: Stats = %+v", what, share, s)
						}
						if got := s.Fetched().Bytes; share == 1 && got != 0 && what == "demand" {
							t.Errorf("%s: %d bytes fetched, and all is on the node", what, got)
						}
						if share == 0 && asked == 0 {
							t.Errorf("%s: nothing asked for, and nothing is on the node", what)
						}
					}
				}
			}
		})
	}
}

// A source that is gone is no matter where the node has what is read.
func TestBorrowWithoutSource(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"nydus zstd", "nydus batch", "ref"} {
		img := kinds[kind](t)
		n := neighbours(t, img, 1, false)
		m := borrower(t, img, n, quick())
		for _, src := range m.sources {
			src.set(func(int, fill.Request, []byte) (io.Reader, error) { return nil, errors.New("gone") })
		}
		m.ensureAll()
		m.check()
	}
}

// Readers and a run take from the node and from sources at once, and each chunk is put once.
func TestBorrowAtOnce(t *testing.T) {
	t.Parallel()
	img := kinds["prefetch"](t)
	n := neighbours(t, img, 0.5, true)
	m := borrower(t, img, n, quick())
	r := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.prefetchBlob(), Background: fill.BackgroundFull})
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			for i := range m.blobs {
				chunks := slices.Clone(m.BlobChunks(i))
				rand.New(rand.NewPCG(uint64(k), 1)).Shuffle(len(chunks), func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
				for _, c := range chunks {
					if err := m.ensure(t.Context(), c); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	<-r.Done()
	r.Close()
	m.check()
	m.once()
	m.spared(n)
}
