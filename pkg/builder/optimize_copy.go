package builder

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// mergeGap is how many bytes that nobody wants are read to save a request: at 10 MB/s they
// take about as long as a round trip of 10 ms.
const mergeGap = 128 << 10

// openBlobs opens the blobs that chunks are read from and has their ranges fetched.
func (c *optimization) openBlobs(ctx context.Context, chunks []rafs.Chunk) ([]*rafs.BlobReader, error) {
	byBlob := make([][]rafs.Chunk, len(c.img.Blobs))
	for _, ch := range chunks {
		byBlob[ch.Blob] = append(byBlob[ch.Blob], ch)
	}
	readers := make([]*rafs.BlobReader, len(c.img.Blobs))
	for i, wanted := range byBlob {
		if len(wanted) == 0 {
			continue
		}
		b := c.img.Blobs[i]
		c.res.Stats.SourceBlobs++
		var err error
		if readers[i], err = c.src.OpenBlob(ctx, b); err != nil {
			return nil, fmt.Errorf("open blob %s: %w", b.ID, err)
		}
		if c.src.Fetch == nil {
			continue
		}
		ranges, err := storedRanges(ctx, readers[i], wanted)
		if err != nil {
			return nil, err
		}
		if err := c.src.Fetch(ctx, b, ranges); err != nil {
			return nil, fmt.Errorf("fetch chunks of blob %s: %w", b.ID, err)
		}
	}
	return readers, nil
}

// storedRanges returns the ranges that hold chunks, near ones merged.
func storedRanges(ctx context.Context, r *rafs.BlobReader, chunks []rafs.Chunk) ([]StoredRange, error) {
	ranges := make([]StoredRange, 0, len(chunks))
	for _, ch := range chunks {
		off, n, err := r.StoredRange(ctx, ch)
		if err != nil {
			return nil, err
		}
		const most = 1 << 62
		if off > most || n > most {
			return nil, fmt.Errorf("%w: chunk %d of blob %s at byte %d", ErrInvalid, ch.Index, r.Blob().ID, off)
		}
		ranges = append(ranges, StoredRange{Offset: int64(off), Length: int64(n)})
	}
	slices.SortFunc(ranges, func(a, b StoredRange) int {
		return cmp.Or(cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Length, b.Length))
	})
	merged := ranges[:0]
	for _, n := range ranges {
		if k := len(merged) - 1; k >= 0 && n.Offset-merged[k].Offset-merged[k].Length <= mergeGap {
			merged[k].Length = max(merged[k].Length, n.Offset+n.Length-merged[k].Offset)
			continue
		}
		merged = append(merged, n)
	}
	return merged, nil
}

// compressor returns what the prefetch blob is compressed with: the image's compressor, or zstd where blobs of an image may
// differ and that is gzip, as of every image over OCI layers: it is smaller, and nydusd 2.2.0 ends when it prefetches such a blob.
func (c *optimization) compressor() rafs.Compressor {
	if c.img.Compressor == rafs.CompressorGzip && c.img.Version != rafs.V5 {
		return rafs.CompressorZstd
	}
	return c.img.Compressor
}

// writeBlob writes the prefetch blob of plan and returns the records of its chunks.
func (c *optimization) writeBlob(ctx context.Context, plan *prefetchPlan) (_ map[rafs.Digest]rafs.Chunk, err error) {
	if len(plan.chunks) == 0 {
		return nil, nil
	}
	readers, err := c.openBlobs(ctx, plan.chunks)
	if err != nil {
		return nil, err
	}
	out, err := c.createBlob()
	if err != nil {
		return nil, err
	}
	defer out.abort()
	level := rafs.LevelDefault
	if c.o.Recompress {
		level = rafs.LevelBest
	}
	g, gctx := errgroup.WithContext(ctx)
	pool, err := startPool(gctx, g, c.o.Workers, c.compressor(), level)
	if err != nil {
		return nil, err
	}
	records, err := plan.writeChunks(gctx, pool, out.BlobWriter, c.o.Recompress,
		func(blob uint16) (*rafs.BlobReader, error) { return readers[blob], nil },
		func(done int64) { c.progress(Event{Stage: StagePrefetch, Done: done, Total: plan.stats.RawBytes}) })
	pool.close()
	if err := errors.Join(err, g.Wait()); err != nil {
		return nil, err
	}
	if c.blob, err = out.finish(); err != nil {
		return nil, err
	}
	c.copies = plan.copies
	f := c.blob.file(-1)
	c.res.Prefetch, plan.stats.BlobBytes = &f, f.Descriptor.Size
	return records, nil
}

func (c *optimization) createBlob() (*blobFile, error) {
	f, err := os.OpenFile(c.path("prefetch.blob"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	b := &blobFile{f: f, w: bufio.NewWriterSize(f, blobBuffer), path: f.Name()}
	o := rafs.BlobOptions{
		Compressor: c.compressor(), Digester: c.img.Digester, ChunkSize: c.img.ChunkSize,
		MarkPrefetch: c.o.MarkPrefetchBlob, Version: c.img.Version, BatchSize: c.o.BatchSize,
	}
	if c.o.Recompress {
		o.BatchLevel = rafs.LevelBest
	}
	b.BlobWriter, err = rafs.NewBlobWriter(b.w, o)
	if err != nil {
		b.abort()
		return nil, err
	}
	return b, nil
}
