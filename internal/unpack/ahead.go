package unpack

import (
	"context"
	"iter"
	"runtime"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// maxAhead bounds the bytes that are read and not yet written. A chunk has at most 16 MiB.
const maxAhead = 16 << 20

// ahead reads chunks before they are asked for, several at a time, in the order in which files
// are written. Its read is for one goroutine.
type ahead struct {
	src    func(ctx context.Context, c rafs.Chunk) ([]byte, error)
	order  chan *readChunk
	room   *semaphore.Weighted
	cancel context.CancelFunc
	group  *errgroup.Group
	lost   bool // the order was not kept: chunks are read when they are asked for
}

// readChunk is a chunk that is being read.
type readChunk struct {
	chunk rafs.Chunk
	done  chan struct{} // closed when what follows is set
	data  []byte
	err   error
}

// readAhead begins to read the chunks of src. The caller calls stop.
func readAhead(ctx context.Context, src Source) *ahead {
	ctx, cancel := context.WithCancel(ctx)
	workers := runtime.GOMAXPROCS(0)
	a := &ahead{src: src.Read, order: make(chan *readChunk, 64), room: semaphore.NewWeighted(maxAhead), cancel: cancel, group: &errgroup.Group{}}
	jobs := make(chan *readChunk)
	for range workers {
		a.group.Go(func() error {
			for j := range jobs {
				j.data, j.err = src.Read(ctx, j.chunk)
				close(j.done)
			}
			return nil
		})
	}
	a.group.Go(func() error {
		defer close(jobs)
		defer close(a.order)
		for ino := range files(ctx, src.Image) {
			for _, c := range ino.Chunks {
				if a.room.Acquire(ctx, weight(c)) != nil {
					return nil // who stopped this knows why
				}
				j := &readChunk{chunk: c, done: make(chan struct{})}
				select {
				case a.order <- j: // before jobs: what is read is always in order
				case <-ctx.Done():
					return nil
				}
				select {
				case jobs <- j:
				case <-ctx.Done():
					return nil
				}
			}
		}
		return nil
	})
	return a
}

func weight(c rafs.Chunk) int64 { return min(int64(c.UncompressedSize), maxAhead) }

// read returns the bytes of c.
func (a *ahead) read(ctx context.Context, c rafs.Chunk) ([]byte, error) {
	if !a.lost {
		j, ok := <-a.order
		if ok && j.chunk == c {
			select {
			case <-j.done:
				a.room.Release(weight(c))
				return j.data, j.err
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		a.lost = true
		a.cancel()
	}
	return a.src(ctx, c)
}

// stop ends reading ahead and waits for it.
func (a *ahead) stop() {
	a.cancel()
	_ = a.group.Wait() // none of them fails
}

// files yields the regular files of a tree once each, in the order in which Tar and Dir write them, until
// ctx ends: a tree that is no tree has no end.
func files(ctx context.Context, img *rafs.Image) iter.Seq[*rafs.Inode] {
	return func(yield func(*rafs.Inode) bool) {
		seen := map[*rafs.Inode]bool{}
		for _, ino := range Entries(img) {
			if ctx.Err() != nil {
				return
			}
			if ino.Mode&typeMask != typeFile || seen[ino] {
				continue
			}
			seen[ino] = true
			if !yield(ino) {
				return
			}
		}
	}
}
