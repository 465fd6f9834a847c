package rafs

import (
	"context"
	"errors"
	"io"
	"io/fs"
)

var errTODO = errors.New("rafs: not written yet")

// Open reads a bootstrap whole, with all bounds checked.
func Open(r io.ReaderAt, size int64) (*Image, error) { return nil, errTODO }

// BlobReader reads chunks of one blob. Safe for concurrent use.
type BlobReader struct{}

// OpenBlob returns a reader of the blob file r that b describes. It does not close r.
func OpenBlob(r io.ReaderAt, b Blob) (*BlobReader, error) { return nil, errTODO }

// ReadChunk returns the uncompressed, verified bytes of c; the slice is the caller's.
func (b *BlobReader) ReadChunk(ctx context.Context, c Chunk) ([]byte, error) { return nil, errTODO }

// ReadStored returns the bytes of c as stored; they are not verified.
func (b *BlobReader) ReadStored(ctx context.Context, c Chunk) ([]byte, error) { return nil, errTODO }

// FS returns the image's tree as a file system whose FileInfo.Sys() is the *Inode.
// open is called at most once per blob, when its first byte is read.
func (img *Image) FS(open func(b Blob) (*BlobReader, error)) fs.FS { return nil }

// Walk calls fn for every directory entry in depth-first order of name bytes, parents first; the root is "/".
// Hard links are visited once per name. It does not recurse.
func (img *Image) Walk(fn func(path string, ino *Inode) error) error { return errTODO }

// Lookup returns the inode at an absolute path without following symlinks; nil when there is none.
func (img *Image) Lookup(path string) *Inode { return nil }

// BlobChunks returns the distinct chunks of blob index that the tree uses, by chunk index.
func (img *Image) BlobChunks(index int) []Chunk { return nil }

// CheckOptions says how deep [Check] looks.
type CheckOptions struct {
	Data      bool // read every chunk and compare its digest; and each blob file with its id
	Workers   int  // goroutines for Data; 0: GOMAXPROCS
	MaxFaults int  // stop after so many faults; 0: 100
}

// Report is what [Check] saw.
type Report struct {
	Inodes, Files, Dirs, Symlinks int
	Blobs, Chunks                 int
	DataBytes                     int64 // uncompressed bytes of the files
	CheckedBytes                  int64 // chunk bytes whose digest was compared
}

// Check verifies an image. open gives the blob file of b (closed by Check if it is an io.Closer); nil open: the bootstrap alone.
// The error joins all faults found (errors.Join of *FormatError).
func Check(ctx context.Context, bootstrap io.ReaderAt, size int64, open func(b Blob) (io.ReaderAt, error), o CheckOptions) (Report, error) {
	return Report{}, errTODO
}

// ExpandBlob writes the cache file of blob index: every chunk uncompressed at its UncompressedOffset, zeros elsewhere. Chunks of
// zeros are not written, so a new file stays sparse; the file's last byte always is.
func (img *Image) ExpandBlob(ctx context.Context, index int, r *BlobReader, w io.WriterAt) error {
	return errTODO
}

// Info is everything in a bootstrap's tables, with offsets; it marshals to JSON.
type Info struct{}

// Inspect reads the tables of a bootstrap without its tree.
func Inspect(r io.ReaderAt, size int64) (*Info, error) { return nil, errTODO }
