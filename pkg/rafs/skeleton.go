package rafs

import (
	"context"
	"errors"
	"io"
	"io/fs"
)

var errTODO = errors.New("rafs: not written yet")

// Level chooses between speed and size of compression.
type Level int

// The levels; what they mean depends on the compressor.
const (
	LevelDefault Level = iota // for layer blobs: fast, within 3 % of libzstd's level 3
	LevelBest                 // for prefetch blobs: small, slow
)

// Encoder compresses chunks. Not safe for concurrent use: one per worker.
type Encoder struct{}

// NewEncoder returns an encoder for compressor c. maxSize bounds the sources
// it will be given and with that its memory; 0 means MaxChunkSize.
func NewEncoder(c Compressor, level Level) (*Encoder, error) { return nil, errTODO }

// Encode appends the stored form of src to dst[:0]'s array when it is large enough.
// When compression does not make src strictly smaller, out is a src itself (not a copy) and compressed is false.
func (e *Encoder) Encode(dst, src []byte) (out []byte, compressed bool, err error) {
	return nil, false, errTODO
}

// EncodedChunk is a chunk on its way into a blob.
type EncodedChunk struct {
	Digest           Digest // of the uncompressed bytes
	Data             []byte // bytes to store
	Compressed       bool   // Data is compressed
	UncompressedSize uint32 // bytes, 1..chunk size
}

// BlobOptions says how a blob is made.
type BlobOptions struct {
	Compressor   Compressor // of the chunks and of the blob.meta table
	Digester     Digester
	ChunkSize    uint32 // 0: DefaultChunkSize
	MarkPrefetch bool   // set feature 0x400; readers before 2.4 refuse such an image
	TOC          bool   // add the blob.digest and TOC sections
}

// BlobWriter writes one blob, front to back.
type BlobWriter struct{}

// NewBlobWriter starts a blob. w receives every byte once, in order.
func NewBlobWriter(w io.Writer, o BlobOptions) (*BlobWriter, error) { return nil, errTODO }

// Append stores one chunk, or returns the record of the equal chunk (digest and size) that the blob has already.
// Chunk.Blob is 0: the caller sets it when it knows the blob's place in the image.
func (b *BlobWriter) Append(c EncodedChunk) (Chunk, error) { return Chunk{}, errTODO }

// Close writes the tables behind the chunks and returns the blob's description; it does not close the io.Writer.
// ErrNoChunks when nothing was appended (nothing was written then).
func (b *BlobWriter) Close() (Blob, error) { return Blob{}, errTODO }

// BootstrapInfo describes a written bootstrap.
type BootstrapInfo struct {
	Size   int64 // bytes
	Inodes int   // distinct inodes
	Chunks int   // records of the chunk table
}

// WriteBootstrap writes img as RAFS v6. Same image, same bytes.
func WriteBootstrap(w io.Writer, img *Image) (BootstrapInfo, error) {
	return BootstrapInfo{}, errTODO
}

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
