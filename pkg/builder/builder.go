package builder

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Source is the image to convert. It is read, never changed.
type Source struct {
	// Manifest describes the manifest of the platform to convert; its digest becomes the
	// result's nydus-source-digest annotation. The zero value leaves the annotation out.
	Manifest ocispec.Descriptor
	// Config is the image config as stored.
	Config []byte
	// Layers are the image's layers, lowest first.
	Layers []Layer
	// Annotations are the source manifest's; the result's manifest keeps them.
	Annotations map[string]string
}

// Layer is one layer of a [Source].
type Layer struct {
	// Descriptor has the media type, digest and size of the stored bytes. All three are verified.
	Descriptor ocispec.Descriptor
	// DiffID is the digest of the uncompressed tar; empty means the one of Source.Config.
	DiffID digest.Digest
	// Open gives the stored bytes from the start. It is called once; Convert closes what it returns.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// Verified says that what Open returns compares size and digest with Descriptor by itself, and
	// fails at the latest at its end when they differ: the bytes are then not hashed twice.
	Verified bool
	// Record, when set, gives the record that an earlier conversion of the layer has made
	// ([Options].Records) under the same [RecordKey]; then Open is not called and the layer's
	// blob is Stored, which is nil for a layer without data. A record is believed, except that
	// what it says of chunks must agree with the blob's own tables.
	Record func(ctx context.Context) (io.ReadCloser, error)
	Stored *StoredBlob
	// OpenAt gives the stored bytes at random, for the chunks that are read back of a layer that the result
	// refers to (Options.OCIRef): those of the prefetch blob, and all with Options.VerifyData. They are verified
	// by the chunks' digests. What it returns is closed if it is an io.Closer; if it has a method
	// Fetch(context.Context, []StoredRange) error, that is told before which ranges will be read.
	OpenAt func(ctx context.Context) (io.ReaderAt, error)
}

// Options say how an image is built. [DefaultOptions] gives what most callers want; the
// zero value differs from it only in that chunks are stored uncompressed.
type Options struct {
	FSVersion rafs.Version // rafs.V5 or rafs.V6; 0 means V6
	// Compressor is any of rafs' compressors; nydus-image reads CompressorGzip and does not write it. With OCIRef
	// it is that of the prefetch blob.
	Compressor rafs.Compressor
	Digester   rafs.Digester // the zero value is BLAKE3
	ChunkSize  uint32        // bytes, a power of two in [rafs.MinChunkSize, rafs.MaxChunkSize]; 0 means rafs.DefaultChunkSize
	// BatchSize makes batches of small chunks in the layers' blobs: chunks below half of it are compressed
	// together, as many as stay below it. PrefetchBatchSize does so in the prefetch blob. Both are powers of two
	// in [rafs.MinChunkSize, rafs.MaxChunkSize]; 0 means no batches. RAFS v6 only. nydusd before 2.3 refuses
	// such images; the kernel, and readers that ask for one chunk, read more than the chunk.
	BatchSize, PrefetchBatchSize uint32
	// Workers is the number of goroutines that digest and compress, at most [MaxWorkers]; 0 means GOMAXPROCS.
	// It never changes the output.
	Workers int
	// List is the access list the prefetch blob is made from; nil or empty: no prefetch blob.
	List *persist.List
	// MarkPrefetchBlob sets the feature 0x400 on the prefetch blob. Readers before Nydus 2.4
	// refuse an image that has it.
	MarkPrefetchBlob bool
	// NoRecompress keeps the chunks of the prefetch blob as the layers' blobs store them. By
	// default they are compressed anew with the strongest level where that is smaller.
	NoRecompress bool
	// VerifyData also decompresses and digests every chunk of the layers' blobs before Convert
	// returns, which takes about a sixth of the time. The bootstrap, the blobs' tables and the prefetch
	// blob are always verified.
	VerifyData bool
	// OCIRef leaves the chunks in the source's own layers, which must be gzip or plain tar: instead of a blob, each gets
	// a small file that says from where on to decompress (ZRAN), and the result refers to the
	// layers. Equal chunks of two layers stay apart. Sparse files with holes are ErrUnsupported, as are RAFS v5, BatchSize, Dict and
	// Records. Nydus itself takes SHA-256 digests for such images.
	OCIRef bool
	// PrefetchPaths is for [PackLayer] alone: the absolute paths of the prefetch table in the layer's bootstrap. Those that are not in the
	// layer are left out; a directory stands for all below it.
	PrefetchPaths []string
	// Dict is a chunk dictionary; nil: none.
	Dict *Dict
	// Records makes a record of each layer that is read, for conversions to come.
	Records bool
	// TempDir is where the result's files are made, in a directory of their own; empty means os.TempDir.
	TempDir string
	// WriteEarly has the kernel write blobs to the disk while they are made, instead of some time later: who syncs
	// the result's files, to keep them, waits less for it. Without effect on the output.
	WriteEarly bool
	// Progress, when set, is told how far the conversion is. It is called by one goroutine
	// at a time, about once for each megabyte, and must return quickly.
	Progress func(Event)
}

// DefaultOptions returns zstd, BLAKE3, chunks of 1 MiB, and no VerifyData.
func DefaultOptions() Options {
	return Options{
		Compressor: rafs.CompressorZstd,
		Digester:   rafs.DigesterBLAKE3,
		ChunkSize:  rafs.DefaultChunkSize,
	}
}

// Stage is what a conversion is busy with.
type Stage string

// The stages of a conversion, in order. Layers may be read two at a time.
const (
	StageLayer     Stage = "layer"     // reading layer Event.Layer; Done and Total are its stored bytes
	StagePrefetch  Stage = "prefetch"  // copying chunks; Done and Total are uncompressed bytes
	StageBootstrap Stage = "bootstrap" // writing the bootstrap; Done and Total are 0
	StageVerify    Stage = "verify"    // reading the result back; Done and Total are 0
)

// Event is one report of progress.
type Event struct {
	Stage Stage
	Layer int   // index into Source.Layers in StageLayer, else 0
	Done  int64 // bytes
	Total int64 // bytes, 0 when unknown
}

// File is a file of a [Result] and the descriptor to publish it with.
type File struct {
	Descriptor ocispec.Descriptor
	Path       string // on this host; gone after Result.Close
	// SourceLayer is the index into Source.Layers that a blob was made from, -1 for the
	// prefetch blob, the bootstrap and the blobs of a dictionary.
	SourceLayer int
	// Stored is true for a blob that lies elsewhere ([StoredBlob]): it has no Path.
	Stored bool
}

// Result is a converted image in temporary files. It is not changed after [Convert]
// returned it and safe for concurrent use, except for Close.
type Result struct {
	// Blobs are the blobs the bootstrap refers to, in its order: those of the layers, lowest
	// first, then the prefetch blob if there is one.
	Blobs []File
	// Bootstrap is the last layer of the image: a tar.gz with the bootstrap in it.
	Bootstrap File
	// BootstrapPath is the bare bootstrap file.
	BootstrapPath string
	// Layers are the source's layers that the bootstrap refers to (Options.OCIRef), lowest first. The manifest does not list
	// them; readers look for them, by digest, where the image is.
	Layers []ocispec.Descriptor
	// Config and Manifest are the JSON documents of the image.
	Config, Manifest                     []byte
	ConfigDescriptor, ManifestDescriptor ocispec.Descriptor
	Stats                                Stats
	// Records are those of the layers that were read, with Options.Records.
	Records []Record

	dir *workDir
}

// Stats tells what a conversion read, left out and wrote.
type Stats struct {
	SourceBytes     int64 // stored bytes of all layers that were read
	TarBytes        int64 // uncompressed bytes of all layers
	Entries         int   // names in the merged tree, the root not counted
	Files           int   // regular files among them; hard links count as one
	FileBytes       int64 // their sizes
	Chunks          int   // chunks stored in the layers' blobs
	BlobBytes       int64 // bytes of the blobs in Result.Blobs, the prefetch blob not counted
	BootstrapBytes  int64 // bytes of the bare bootstrap
	XattrsIgnored   int   // trusted.* and unknown namespaces, as containerd ignores them
	BlobsDropped    int   // blobs made of layers that nothing refers to any more
	JoinedLayers    int   // layers whose blobs were made one, because the format counts no more than rafs.MaxBlobs
	LayersReused    int   // layers that were not read: their blob and record were there
	DictChunks      int   // chunks of the layers that the dictionary has, each time counted
	DictBlobs       int   // blobs of the dictionary that the image refers to
	CutChunks       int   // chunks of layers referred to that lie in two gzip members: nydusd 2.2.0 cannot read them
	Prefetch        PrefetchStats
	MissingPaths    []string // the first of the listed paths that are not in the image, at most [MaxMissingPaths]
	VerifiedChunks  int      // chunks that were read back and digested
	VerifiedEntries int      // entries found in the written bootstrap
}

// PrefetchStats tells what became of the access list.
type PrefetchStats struct {
	Listed     int // accesses in the list
	Files      int // accesses that named a regular file of the image for the first time
	Repeated   int // accesses to a file named before (links included), with nothing new or with more ranges
	Missing    int // accesses whose path is not in the image
	NotRegular int // accesses to directories, devices and other things without data
	// Patterns and Directories are accesses of a list that was not recorded, which stand for files, each counted in
	// Files or Repeated.
	Patterns, Directories int
	Chunks                int   // chunks in the prefetch blob; 0 means there is none
	RawBytes              int64 // their uncompressed bytes
	BlobBytes             int64 // size of the prefetch blob
	Recoded               int   // chunks that the strongest level made smaller
}

// Errors to test for with errors.Is. The error text names layer and entry, and what was
// read and wanted.
var (
	// ErrInvalid is returned for bytes of the source that are no valid layer or config.
	ErrInvalid = errors.New("invalid image")
	// ErrUnsupported is returned for what no conversion can do: encrypted or foreign layers,
	// unknown compressions, more blobs than the format can count.
	ErrUnsupported = errors.New("unsupported image")
	// ErrDigest is returned when stored bytes or a tar do not have the digest they are named by.
	ErrDigest = errors.New("digest mismatch")
	// ErrReuse is returned, with the cause, when [Layer].Record or what it goes with is at fault, or may be: without
	// records the conversion may succeed. What fails to be written, and other layers that fail, are not it.
	ErrReuse = errors.New("reuse of a built layer")
	// ErrDict is returned, with the cause, when [Options].Dict is at fault, or may be: without it the conversion may succeed. A source
	// that cannot be read, and what fails to be written, are not it.
	ErrDict = errors.New("chunk dictionary")
)

// Close removes the files of r. It may be called more than once.
func (r *Result) Close() error { return r.dir.remove() }

// Open opens the file for reading; the caller closes it. One that is Stored elsewhere is
// not opened here: os.ErrNotExist.
func (f File) Open() (io.ReadCloser, error) { return os.Open(f.Path) }
