package fuse

import (
	"errors"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// ErrImage is returned for an image whose chunks cannot be placed in cache files.
var ErrImage = errors.New("image cannot be placed in cache files")

// Align gives every chunk of a v5 image blocks of its own in the cache file: v5 puts them side by side, and what is there
// is known by blocks. Other images stay as they are: their chunks begin at blocks.
//
// Chunk i at offset u goes to u, rounded up to a block, and i blocks behind it, which depends on nothing but the
// chunk's record, so that images that share a blob agree. No two meet when offsets go up with indices: a chunk
// takes at most one block more than the distance to the next.
func Align(img *rafs.Image) error {
	if img.Version != rafs.V5 {
		return nil
	}
	const most = 1 << 48 // bytes of a blob; far above what a cache file may have
	for n := range img.Blobs {
		b := &img.Blobs[n]
		if b.UncompressedSize > most {
			return fmt.Errorf("%w: blob %s of %d bytes, want at most %d", ErrImage, b.ID, b.UncompressedSize, uint64(most))
		}
		b.UncompressedSize = roundUp(b.UncompressedSize) + (uint64(b.ChunkCount)+1)*blockSize
	}
	seen := map[*rafs.Inode]bool{}
	return img.Walk(func(path string, ino *rafs.Inode) error {
		if len(ino.Chunks) == 0 || seen[ino] {
			return nil
		}
		seen[ino] = true
		chunks := make([]rafs.Chunk, len(ino.Chunks)) // files may share memory
		for i, c := range ino.Chunks {
			if int(c.Blob) >= len(img.Blobs) || c.UncompressedOffset > most {
				return fmt.Errorf("%w: %s: chunk %d at %d of blob %d", ErrImage, path, i, c.UncompressedOffset, c.Blob)
			}
			c.UncompressedOffset = roundUp(c.UncompressedOffset) + uint64(c.Index)*blockSize
			chunks[i] = c
		}
		ino.Chunks = chunks
		return nil
	})
}

func roundUp(n uint64) uint64 { return (n + blockSize - 1) &^ (blockSize - 1) }
