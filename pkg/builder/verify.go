package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// verify reads the written files back: the bootstrap must be sound and say what was meant,
// and the chunks that files refer to must be in the blobs.
func (c *conversion) verify(ctx context.Context, want summary) (err error) {
	f, err := os.Open(c.res.BootstrapPath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size := c.res.Stats.BootstrapBytes
	img, err := rafs.Open(f, size)
	if err != nil {
		return err
	}
	if got := summarize(img); got != want {
		return fmt.Errorf("the bootstrap reads back with %d entries (%s), was written with %d (%s)", got.entries, got.sum, want.entries, want.sum)
	}
	c.res.Stats.VerifiedEntries = want.entries
	paths := map[string]string{}
	for _, b := range c.res.Blobs {
		paths[b.Descriptor.Digest.Encoded()] = b.Path
	}
	open := func(b rafs.Blob) (io.ReaderAt, error) { return os.Open(paths[b.ID]) }
	img = nil
	report, err := rafs.Check(ctx, f, size, open, rafs.CheckOptions{Data: true, Workers: c.o.Workers})
	if err != nil {
		return err
	}
	c.res.Stats.VerifiedChunks = report.Chunks
	return nil
}
