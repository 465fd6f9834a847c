// Package replay reads of an image what an access list says that a run read, and tells which
// blobs served it: what a start from this image would fetch.
package replay

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// maxNames bounds how many paths a Report names.
const maxNames = 10

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
	fsys   *rafs.FS
	report Report
	blobs  []Blob
	seen   map[rafs.Chunk]struct{}
	stored map[stored]struct{}
	files  map[*rafs.Inode]struct{}
}

// Run reads every chunk of img that list touches, once, with read, which verifies it. prefetch
// is the index of the image's prefetch blob, -1 when there is none. Links of paths are followed inside the image, as
// opening them would. An error of read names the path.
func Run(ctx context.Context, img *rafs.Image, list *persist.List, prefetch int, read func(context.Context, rafs.Chunk) ([]byte, error)) (Report, error) {
	r := replayer{
		img: img, fsys: img.FS(nil), blobs: make([]Blob, len(img.Blobs)), seen: map[rafs.Chunk]struct{}{},
		stored: map[stored]struct{}{}, files: map[*rafs.Inode]struct{}{},
	}
	for i, b := range img.Blobs {
		r.blobs[i] = Blob{ID: b.ID, Prefetch: i == prefetch}
	}
	r.report.Listed = len(list.Accesses)
	for i := range list.Accesses {
		a := &list.Accesses[i]
		ino := r.find(a.Path)
		if ino == nil {
			continue
		}
		for n, c := range ino.Chunks {
			if !touches(a.Ranges, int64(n)*int64(img.ChunkSize), int64(c.UncompressedSize)) {
				continue
			}
			if err := r.take(ctx, c, read); err != nil {
				return Report{}, fmt.Errorf("replay %q, chunk %d: %w", a.Path, n, err)
			}
		}
	}
	for _, b := range r.blobs {
		if b.Chunks > 0 {
			r.report.Blobs = append(r.report.Blobs, b)
		}
	}
	r.report.Files = len(r.files)
	return r.report, nil
}

// find returns the regular file at path, or counts why there is none.
func (r *replayer) find(path string) *rafs.Inode {
	name := strings.Trim(path, "/")
	ino := r.img.Lookup(name)
	if utf8.ValidString(name) && fs.ValidPath(name) {
		ino = nil
		if info, err := r.fsys.Stat(name); err == nil {
			ino, _ = info.Sys().(*rafs.Inode)
		}
	}
	switch {
	case ino == nil:
		r.report.Missing++
		if len(r.report.MissingPaths) < maxNames {
			r.report.MissingPaths = append(r.report.MissingPaths, path)
		}
		return nil
	case !ino.IsRegular():
		r.report.NotRegular++
		return nil
	}
	r.files[ino] = struct{}{}
	return ino
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
