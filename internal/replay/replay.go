// Package replay reads of an image what an access list says that a run read, and tells which
// blobs served it: what a start from this image would fetch.
package replay

import (
	"context"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Report says what a list found in an image.
type Report struct {
	Listed int `json:"listed"` // accesses of the list
	Files  int `json:"files"`  // distinct regular files that were found
	// Missing counts paths that the image does not have; the first ones are in MissingPaths.
	Missing      int      `json:"missing"`
	MissingPaths []string `json:"missing_paths,omitempty"`
	NotRegular   int      `json:"not_regular"` // paths of directories, devices and so on
	// Chunks are distinct; Bytes are theirs, uncompressed, and all were verified. StoredBytes are what is
	// fetched for them; a chunk of a batch counts as its whole batch.
	Chunks      int    `json:"chunks"`
	Bytes       uint64 `json:"bytes"`
	StoredBytes uint64 `json:"stored_bytes"`
	Blobs       []Blob `json:"blobs"` // those that served a chunk, in the order of the image
}

// Blob is what one blob served.
type Blob struct {
	ID          string `json:"id"`
	Prefetch    bool   `json:"prefetch"` // it is the image's prefetch blob
	Chunks      int    `json:"chunks"`
	Bytes       uint64 `json:"bytes"`
	StoredBytes uint64 `json:"stored_bytes"`
}

// Outside returns the bytes that came from other blobs than the prefetch blob.
func (r Report) Outside() (n uint64) {
	for _, b := range r.Blobs {
		if !b.Prefetch {
			n += b.Bytes
		}
	}
	return n
}

// stored names the stored form of a chunk: those of one batch have the same.
type stored struct {
	blob   uint16
	offset uint64
}

type replayer struct {
	img    *rafs.Image
	report Report
	blobs  []Blob
	seen   map[rafs.Chunk]struct{}
	stored map[stored]struct{}
	files  map[*rafs.Inode]struct{}
}

// Run reads every chunk of img that list touches, once, with read, which verifies it. prefetch
// is the index of the image's prefetch blob, -1 when there is none. What a path stands for is what a conversion puts into
// that blob for it ([builder.Resolve]). An error of read names the path.
func Run(ctx context.Context, img *rafs.Image, list *persist.List, prefetch int, read func(context.Context, rafs.Chunk) ([]byte, error)) (Report, error) {
	r := replayer{
		img: img, blobs: make([]Blob, len(img.Blobs)), seen: map[rafs.Chunk]struct{}{},
		stored: map[stored]struct{}{}, files: map[*rafs.Inode]struct{}{},
	}
	for i, b := range img.Blobs {
		r.blobs[i] = Blob{ID: b.ID, Prefetch: i == prefetch}
	}
	r.report.Listed = len(list.Accesses)
	err := builder.Resolve(img.Root, list, func(a *trace.Access, found []*rafs.Inode) error {
		for _, ino := range r.regular(a.Path, found) {
			if err := r.file(ctx, ino, a.Ranges, read); err != nil {
				return fmt.Errorf("replay %q, %w", a.Path, err)
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return Report{}, err
	}
	for _, b := range r.blobs {
		if b.Chunks > 0 {
			r.report.Blobs = append(r.report.Blobs, b)
		}
	}
	r.report.Files = len(r.files)
	return r.report, nil
}

// regular returns the regular files of found, or counts why there are none.
func (r *replayer) regular(path string, found []*rafs.Inode) []*rafs.Inode {
	switch {
	case len(found) == 0:
		r.report.Missing++
		if len(r.report.MissingPaths) < builder.MaxMissingPaths {
			r.report.MissingPaths = append(r.report.MissingPaths, path)
		}
	case !found[0].IsRegular(): // what several are is regular
		r.report.NotRegular++
		return nil
	}
	return found
}

// file reads the chunks of ino that ranges touch.
func (r *replayer) file(ctx context.Context, ino *rafs.Inode, ranges []trace.Range, read func(context.Context, rafs.Chunk) ([]byte, error)) error {
	r.files[ino] = struct{}{}
	for n, c := range ino.Chunks {
		if !touches(ranges, int64(n)*int64(r.img.ChunkSize), int64(c.UncompressedSize)) {
			continue
		}
		if err := r.take(ctx, c, read); err != nil {
			return fmt.Errorf("chunk %d: %w", n, err)
		}
	}
	return nil
}

// touches reports whether one of ranges overlaps [off, off+length); nil ranges are the whole file.
func touches(ranges []trace.Range, off, length int64) bool {
	if ranges == nil {
		return true
	}
	for _, r := range ranges {
		// Differences of non-negative numbers do not overflow.
		if r.Offset < off+length && off-r.Offset < r.Length {
			return true
		}
	}
	return false
}

func (r *replayer) take(ctx context.Context, c rafs.Chunk, read func(context.Context, rafs.Chunk) ([]byte, error)) error {
	if _, ok := r.seen[c]; ok {
		return nil
	}
	r.seen[c] = struct{}{}
	if _, err := read(ctx, c); err != nil {
		return err
	}
	b, size := &r.blobs[c.Blob], uint64(c.UncompressedSize)
	b.Chunks++
	b.Bytes += size
	r.report.Chunks++
	r.report.Bytes += size
	if _, ok := r.stored[stored{c.Blob, c.CompressedOffset}]; !ok {
		r.stored[stored{c.Blob, c.CompressedOffset}] = struct{}{}
		b.StoredBytes += uint64(c.CompressedSize)
		r.report.StoredBytes += uint64(c.CompressedSize)
	}
	return nil
}
