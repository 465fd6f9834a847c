package rafs

import (
	"context"
	"errors"
	"io"
	"io/fs"
)

var errTODO = errors.New("rafs: not written yet")

// FS returns the image's tree as a file system whose FileInfo.Sys() is the *Inode.
// open is called at most once per blob, when its first byte is read.
func (img *Image) FS(open func(b Blob) (*BlobReader, error)) fs.FS { return nil }

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

func (t *v6Tables) info() *Info { return nil }

// Inspect reads the tables of a bootstrap without its tree.
func Inspect(r io.ReaderAt, size int64) (*Info, error) { return nil, errTODO }
