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

// verifyBootstrap reads the bootstrap back: it must be sound, say what was meant, and fit
// the tables of the blobs.
func (c *conversion) verifyBootstrap(ctx context.Context, want summary) (err error) {
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
	return nil
}

// blobChunks is what is to be read back of one blob.
type blobChunks struct {
	blob   rafs.Blob
	path   string
	chunks []rafs.Chunk
}

// chunksToVerify returns the chunks of the prefetch blob, and with VerifyData those of the
// layers' blobs too.
func (c *conversion) chunksToVerify(img *rafs.Image) []blobChunks {
	var out []blobChunks
	for i, b := range img.Blobs {
		if f := c.res.Blobs[i]; c.o.VerifyData || f.SourceLayer < 0 {
			out = append(out, blobChunks{b, f.Path, img.BlobChunks(i)})
		}
	}
	return out
}

// verifyRun is the number of chunks that a goroutine verifies before it asks for more.
const verifyRun = 32

// verifyChunks reads chunks of one blob and compares their digests.
func (c *conversion) verifyChunks(ctx context.Context, b blobChunks) (err error) {
	f, err := os.Open(b.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r, err := rafs.OpenBlob(f, b.blob)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(c.o.Workers)
	for chunks := b.chunks; len(chunks) > 0; {
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
	if err := g.Wait(); err != nil {
		return err
	}
	c.res.Stats.VerifiedChunks += len(b.chunks)
	return nil
}
