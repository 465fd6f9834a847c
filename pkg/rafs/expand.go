package rafs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// ExpandBlob writes the cache file of blob index to w: every chunk that the tree uses, uncompressed and verified,
// at its UncompressedOffset. The file is what the kernel takes as device of the blob.
//
// Blocks of zeros are not written, so w must read as zeros where nothing was written (a new file does, and
// stays sparse); the last byte is always written, so that the file has its full length.
// Chunks are written by several goroutines at once, in no order. Errors are those of
// [BlobReader.ReadChunk] and of w.
func (img *Image) ExpandBlob(ctx context.Context, index int, r *BlobReader, w io.WriterAt) error {
	if index < 0 || index >= len(img.Blobs) {
		return fmt.Errorf("%w: expand blob %d of %d", ErrInvalid, index, len(img.Blobs))
	}
	if end := img.Blobs[index].UncompressedSize; end > 0 {
		if _, err := w.WriteAt([]byte{0}, clampOffset(end-1)); err != nil {
			return fmt.Errorf("expand blob %d: %w", index, err)
		}
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, c := range img.BlobChunks(index) {
		if groupCtx.Err() != nil {
			break
		}
		group.Go(func() error {
			p, err := r.ReadChunk(groupCtx, c)
			if err != nil {
				return err
			}
			return writeSparse(w, p, c.UncompressedOffset)
		})
	}
	if err := errors.Join(group.Wait(), ctx.Err()); err != nil {
		return fmt.Errorf("expand blob %d: %w", index, err)
	}
	return nil
}

// writeSparse writes p at offset, without its blocks of zeros.
func writeSparse(w io.WriterAt, p []byte, offset uint64) error {
	var zeros [disk.BlockSize]byte
	for start := 0; start < len(p); {
		end := start
		for end < len(p) && !bytes.Equal(p[end:min(end+disk.BlockSize, len(p))], zeros[:min(disk.BlockSize, len(p)-end)]) {
			end = min(end+disk.BlockSize, len(p))
		}
		if end > start {
			if _, err := w.WriteAt(p[start:end], clampOffset(offset)+int64(start)); err != nil {
				return err
			}
		}
		start = end + disk.BlockSize
	}
	return nil
}
