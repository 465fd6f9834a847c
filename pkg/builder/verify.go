package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// verify reads the written files back: the bootstrap must be sound and say what was meant,
// the blobs must fit it, and every chunk that a file refers to must be in its blob.
func (c *conversion) verify(ctx context.Context, want summary) (err error) {
	f, err := os.Open(c.res.BootstrapPath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size := c.res.Stats.BootstrapBytes
	paths := map[string]string{}
	for _, b := range c.res.Blobs {
		paths[b.Descriptor.Digest.Encoded()] = b.Path
	}
	open := func(b rafs.Blob) (io.ReaderAt, error) { return os.Open(paths[b.ID]) }
	if _, err := rafs.Check(ctx, f, size, open, rafs.CheckOptions{Workers: c.o.Workers}); err != nil {
		return err
	}
	img, err := rafs.Open(f, size)
	if err != nil {
		return err
	}
	if got := summarize(img); got != want {
		return fmt.Errorf("the bootstrap reads back with %d entries (%s), was written with %d (%s)", got.entries, got.sum, want.entries, want.sum)
	}
	c.res.Stats.VerifiedEntries = want.entries
	for i, b := range img.Blobs {
		if err := c.verifyChunks(ctx, b, paths[b.ID], img.BlobChunks(i)); err != nil {
			return err
		}
	}
	return nil
}

// verifyRun is the number of chunks that a goroutine verifies before it asks for more.
const verifyRun = 32

// verifyChunks reads chunks of one blob and compares their digests.
func (c *conversion) verifyChunks(ctx context.Context, b rafs.Blob, path string, chunks []rafs.Chunk) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r, err := rafs.OpenBlob(f, b)
	if err != nil {
		return err
	}
	c.res.Stats.VerifiedChunks += len(chunks)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(c.o.Workers)
	for len(chunks) > 0 {
		run := chunks[:min(len(chunks), verifyRun)]
		chunks = chunks[len(run):]
		g.Go(func() error {
			for _, chunk := range run {
				if _, err := r.ReadChunk(ctx, chunk); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}
