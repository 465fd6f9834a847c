package builder

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// verifyBootstrap reads the bootstrap back: it must be sound, say what was meant, and fit
// the tables of the blobs.
func (c *conversion) verifyBootstrap(ctx context.Context, want summary) (err error) {
	f, err := os.Open(c.res.BootstrapPath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	open := func(b rafs.Blob) (io.ReaderAt, error) { return c.openForCheck(ctx, b) }
	if _, err := readBack(ctx, f, c.res.Stats.BootstrapBytes, open, c.o.Workers, want); err != nil {
		return err
	}
	c.res.Stats.VerifiedEntries = want.entries
	return nil
}

// readBack checks a bootstrap that was written, and the blobs that open gives, and returns what it reads back as, which must be
// what want says. A small one is checked and read at the same time; of a large one there is never more than one tree in memory.
func readBack(ctx context.Context, f io.ReaderAt, size int64, open func(rafs.Blob) (io.ReaderAt, error), workers int, want summary) (*rafs.Image, error) {
	var img *rafs.Image
	check := func() error {
		_, err := rafs.Check(ctx, f, size, open, rafs.CheckOptions{Workers: workers})
		return err
	}
	read := func() (err error) {
		if img, err = rafs.Open(f, size); err != nil {
			return err
		}
		if got := summarize(img); got != want {
			return fmt.Errorf("%w: the bootstrap reads back with %d entries (%s), was written with %d (%s)", ErrDigest, got.entries, got.sum, want.entries, want.sum)
		}
		return nil
	}
	if workers == 1 || want.entries >= manyEntries {
		if err := check(); err != nil {
			return nil, err
		}
		collectTree(want.entries)
		if err := read(); err != nil {
			return nil, err
		}
		return img, nil
	}
	// The check says more about what is wrong, so that its error comes first.
	var g errgroup.Group
	var checked, same error
	g.Go(func() error { checked = check(); return nil })
	g.Go(func() error { same = read(); return nil })
	_ = g.Wait() // they keep their errors
	if err := cmp.Or(checked, same); err != nil {
		return nil, err
	}
	return img, nil
}

// blobChunks is what is to be read back of one blob.
type blobChunks struct {
	blob   *builtBlob
	chunks []rafs.Chunk
}

// chunksToVerify returns the chunks of the prefetch blob, and with VerifyData those of the
// layers' blobs too.
func (c *conversion) chunksToVerify(img *rafs.Image) []blobChunks {
	var out []blobChunks
	for i, b := range img.Blobs {
		if f := c.res.Blobs[i]; c.o.VerifyData || f.SourceLayer < 0 && !f.Stored {
			out = append(out, blobChunks{c.blobByID(b.ID), img.BlobChunks(i)})
		}
	}
	return out
}

// verifyRun is the number of chunks that a goroutine verifies before it asks for more.
const verifyRun = 32

// verifyChunks reads chunks of one blob and compares their digests.
func (c *conversion) verifyChunks(ctx context.Context, b blobChunks) (err error) {
	readers := blobReaders{dir: c.dir}
	defer func() { err = errors.Join(err, readers.Close()) }()
	r, err := readers.get(ctx, b.blob)
	if err != nil {
		return err
	}
	if err := readers.announce(ctx, b.blob, b.chunks); err != nil {
		return err
	}
	var known *copies
	if b.blob == c.prefetch {
		known = c.copies
	}
	if err := verifyChunks(ctx, r, b.chunks, known, c.o.Workers); err != nil {
		return err
	}
	c.res.Stats.VerifiedChunks += len(b.chunks)
	return nil
}

// verifyChunks reads chunks back, those that are copies as they are stored.
func verifyChunks(ctx context.Context, r *rafs.BlobReader, chunks []rafs.Chunk, known *copies, workers int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	buffers := sync.Pool{New: func() any { return new(rafs.ChunkBuffer) }}
	for len(chunks) > 0 {
		run := chunks[:min(len(chunks), verifyRun)]
		chunks = chunks[len(run):]
		g.Go(func() error {
			buf, _ := buffers.Get().(*rafs.ChunkBuffer)
			defer buffers.Put(buf)
			for _, chunk := range run {
				if err := known.verify(ctx, r, chunk, buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// verifyID compares the digest of a blob's file with its id.
func verifyID(ctx context.Context, b *builtBlob) (err error) {
	f, err := os.Open(b.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sum := sha256.New()
	buf := make([]byte, blobBuffer)
	for n := 0; err == nil; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err = f.Read(buf)
		sum.Write(buf[:n]) // never fails
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != b.ID {
		return fmt.Errorf("%w: the file of blob %s has sha256 %s", ErrDigest, b.ID, got)
	}
	return nil
}

// blobByID returns the blob of the blob table that has a file of this name.
func (c *conversion) blobByID(id string) *builtBlob {
	if c.prefetch != nil && c.prefetch.ID == id {
		return c.prefetch
	}
	for i := range c.layers {
		if b := c.layers[i].blob; b != nil && hasFile([]rafs.Blob{b.Blob}, id) {
			return b
		}
	}
	for i := range c.dict.blobs {
		if c.dict.blobs[i].Blob.ID == id {
			return c.blobAt(uint16(c.prefetchNumber() + 1 + i)) //nolint:gosec // a blob's number
		}
	}
	panic("builder: blob " + id + " is of no table")
}

// manyEntries is the number of names from which on trees are worth thinking of: 20,000 have 8 MB.
const manyEntries = 20_000

// collectTree frees a tree of so many names that is no longer used before another one is built: of a million files
// it has 400 MB, and next to nothing is left that the collector must visit. It leaves a small one alone: the collector would
// let the heap grow in small steps again, of some MiB, and run at each: 18 times for 10,000 files, which took 30 ms.
func collectTree(entries int) {
	if entries >= manyEntries {
		runtime.GC()
	}
}
