package nydusimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Chunks reads the data of an image. Blobs are opened when their first chunk is asked for.
// Safe for concurrent use, except for Close.
type Chunks struct {
	img *Image

	mu    sync.Mutex // guards what follows
	open  []*rafs.BlobReader
	files []*os.File
}

// Chunks returns a reader of the image's data. The caller closes it, before the image.
func (i *Image) Chunks() *Chunks {
	return &Chunks{img: i, open: make([]*rafs.BlobReader, len(i.RAFS.Blobs))}
}

// Read returns the uncompressed bytes of c, verified against its digest. The slice is the
// caller's. Its errors are those of [rafs.BlobReader.ReadChunk] and [Image.OpenBlob].
func (c *Chunks) Read(ctx context.Context, chunk rafs.Chunk) ([]byte, error) {
	r, err := c.blob(ctx, int(chunk.Blob))
	if err != nil {
		return nil, err
	}
	return r.ReadChunk(ctx, chunk)
}

// ReadInto is [Chunks.Read] with memory that is used again.
func (c *Chunks) ReadInto(ctx context.Context, chunk rafs.Chunk, buf *rafs.ChunkBuffer) error {
	r, err := c.blob(ctx, int(chunk.Blob))
	if err != nil {
		return err
	}
	return r.ReadInto(ctx, chunk, buf)
}

// Blob returns the reader of the n-th blob of the image, valid until Close.
func (c *Chunks) Blob(ctx context.Context, n int) (*rafs.BlobReader, error) { return c.blob(ctx, n) }

func (c *Chunks) blob(ctx context.Context, n int) (*rafs.BlobReader, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n >= len(c.open) {
		return nil, fmt.Errorf("%w: chunk of blob %d, the image has %d", ErrInvalid, n, len(c.open))
	}
	if c.open[n] != nil {
		return c.open[n], nil
	}
	b := c.img.RAFS.Blobs[n]
	r, err := rafs.OpenBlobFrom(func(b rafs.Blob) (io.ReaderAt, error) {
		f, err := c.img.OpenBlob(ctx, b)
		if err != nil {
			return nil, err // not f: a nil file in an interface is not nil
		}
		c.files = append(c.files, f) // until Close, also when the table of a blob is missing
		return f, nil
	}, b)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", b.ID, err)
	}
	if r.Spills() {
		scratch, err := c.img.Scratch()
		if err != nil {
			return nil, fmt.Errorf("blob %s: %w", b.ID, err)
		}
		c.files = append(c.files, scratch)
		r.Spill(scratch)
	}
	c.open[n] = r
	return r, nil
}

// Close closes the blobs.
func (c *Chunks) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	c.files = nil
	return errors.Join(errs...)
}
