package converter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/unpack"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// ErrUnsupported is builder's: an option that this package does not have, or an image that
// cannot be converted.
var ErrUnsupported = builder.ErrUnsupported

// Layer is a packed layer of an image.
type Layer struct {
	// Digest is that of the whole blob.
	Digest digest.Digest
	// OriginalDigest is that of the layer that a blob packed with OCIRef refers to; nil: what the blob says, if it refers to one.
	OriginalDigest *digest.Digest
	// ReaderAt reads the whole blob.
	ReaderAt content.ReaderAt
}

// Backend takes blobs to a storage of its own instead of the registry. One that also has a method
// Size(digest.Digest) (int64, error) is asked for blobs that are not in the content store, those of chunk dictionaries.
type Backend interface {
	// Push brings the blob of desc from cs to the storage.
	Push(ctx context.Context, cs content.Store, desc ocispec.Descriptor) error
	// Check returns where the blob is in the storage.
	Check(blobDigest digest.Digest) (string, error)
	// Type names the kind of storage.
	Type() string
}

// Encrypter encrypts a bootstrap layer.
type Encrypter = func(context.Context, content.Store, ocispec.Descriptor) (ocispec.Descriptor, error)

// PackOption says how layers are packed. The zero value is the default.
type PackOption struct {
	WorkDir          string // for temporary files, made if it is missing; empty: the system's. Only OCIRef has any
	BuilderPath      string // no effect
	FsVersion        string // "5" or "6" (the default)
	ChunkDictPath    string // bootstrap of an image whose chunks are referred to, not stored
	PrefetchPatterns string // paths, one a line, for the prefetch table of the layer's bootstrap; Merge keeps them. Empty: none
	Compressor       string // "zstd" (the default), "lz4_block", "gzip" or "none"; no effect with OCIRef
	// OCIRef leaves the data in the layer, which is then written as it is stored, gzip or plain tar: the blob says where in
	// it the chunks are. RAFS v6 alone; ErrUnsupported with ChunkDictPath or BatchSize.
	OCIRef       bool
	AlignedChunk bool   // RAFS v6 always is; ErrUnsupported for v5
	ChunkSize    string // bytes, decimal or 0x…; empty: 1 MiB
	BatchSize    string // of small chunks that are compressed together, as ChunkSize; empty or "0": none
	Backend      Backend
	Timeout      *time.Duration
	Encrypt      bool // ErrUnsupported
	Workers      int  // goroutines that compress; 0: one per CPU
}

// MergeOption says how an image is merged. The zero value is the default.
type MergeOption struct {
	WorkDir             string // no effect
	BuilderPath         string // no effect
	FsVersion           string // "5" or "6", which the layers must have; empty: any
	ChunkDictPath       string // bootstrap of the image that the layers were packed with; empty: the layers tell their own blobs
	ParentBootstrapPath string // bootstrap of an image below the layers
	PrefetchPatterns    string // paths, one a line, for the prefetch table; empty: what the layers were packed with, else "/", all
	WithTar             bool   // the bootstrap as image/image.boot of a tar
	OCI                 bool   // OCI media types for what was docker's
	OCIRef              bool   // every layer must have been packed with OCIRef; they may in any case, see Layer.OriginalDigest
	WithReferrer        bool   // the manifest's subject is the source's
	Backend             Backend
	Timeout             *time.Duration
	Encrypt             Encrypter // ErrUnsupported
	AppendFiles         []File    // more files for the tar
	MergeManifest       bool      // the config gets Nydus' media type, for indexes that have the plain image too
}

// UnpackOption says how a layer is unpacked. The zero value is the default.
type UnpackOption struct {
	WorkDir     string // no effect
	BuilderPath string // no effect
	Timeout     *time.Duration
	Stream      bool   // no effect: it always is
	Compressor  string // of layers that LayerReconvertFunc makes: "gzip" (the default), "zstd" or "uncompressed"; no effect on Unpack
	Backend     Backend
}

// File is a file of a bootstrap layer, below image/.
type File struct {
	Name   string
	Reader io.Reader
	Size   int64
}

// maxBootstrap bounds the bootstrap files that are read into memory.
const maxBootstrap = 1 << 30

// options returns what builder understands.
func (o PackOption) options() (builder.Options, error) {
	out := builder.DefaultOptions()
	out.Workers, out.PrefetchPaths = o.Workers, pathsOf(o.PrefetchPatterns)
	var err error
	if out.FSVersion, err = parseVersion(o.FsVersion); err != nil {
		return out, err
	}
	switch {
	case o.OCIRef && out.FSVersion != rafs.V6:
		return out, fmt.Errorf("%w: OCIRef in RAFS v%v, want FsVersion 6", ErrUnsupported, out.FSVersion)
	case o.OCIRef && o.ChunkDictPath != "":
		return out, fmt.Errorf("%w: OCIRef with ChunkDictPath %s", ErrUnsupported, o.ChunkDictPath)
	case o.Encrypt:
		return out, fmt.Errorf("%w: Encrypt", ErrUnsupported)
	case o.AlignedChunk && out.FSVersion == rafs.V5:
		return out, fmt.Errorf("%w: AlignedChunk of RAFS v5", ErrUnsupported)
	}
	if o.OCIRef { // as nydus-image has it
		out.OCIRef, out.Digester, out.TempDir = true, rafs.DigesterSHA256, o.WorkDir
	}
	if o.Compressor != "" {
		if out.Compressor, err = rafs.ParseCompressor(o.Compressor); err != nil {
			return out, fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	if o.ChunkSize != "" {
		if out.ChunkSize, err = parseSize(o.ChunkSize); err != nil {
			return out, fmt.Errorf("ChunkSize: %w", err)
		}
	}
	if o.BatchSize != "" && o.BatchSize != "0" {
		if out.BatchSize, err = parseSize(o.BatchSize); err != nil {
			return out, fmt.Errorf("BatchSize: %w", err)
		}
	}
	if o.ChunkDictPath != "" {
		img, id, err := readBootstrap(o.ChunkDictPath)
		if err != nil {
			return out, fmt.Errorf("chunk dictionary: %w", err)
		}
		out.Dict = &builder.Dict{ID: id, Image: img}
		for _, b := range img.Blobs {
			// Packing reads nothing of a dictionary's blobs.
			out.Dict.Blobs = append(out.Dict.Blobs, builder.StoredBlob{
				Descriptor: ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, b.ID), Size: int64(b.CompressedSize)}, //nolint:gosec // rafs bounds it
				Blob:       b,
				Open:       func(context.Context) (io.ReaderAt, error) { return nil, os.ErrNotExist },
			})
		}
	}
	return out, nil
}

// pathsOf returns the lines of a PrefetchPatterns; nil when it is empty.
func pathsOf(patterns string) []string {
	if patterns == "" {
		return nil
	}
	return strings.Split(strings.TrimSpace(patterns), "\n")
}

// parseVersion reads an FsVersion; empty is v6, as for the converter that this one stands for.
func parseVersion(s string) (rafs.Version, error) {
	if s == "" {
		return rafs.V6, nil
	}
	v, err := rafs.ParseVersion(s)
	if err != nil {
		return 0, fmt.Errorf("%w: FsVersion %q, want 5 or 6", ErrUnsupported, s)
	}
	return v, nil
}

func parseSize(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 0, 32)
	if err != nil || bits.OnesCount64(n) != 1 {
		return 0, fmt.Errorf("%w: %q, want a power of two", ErrUnsupported, s)
	}
	return uint32(n), nil
}

// readBootstrap opens a bootstrap file and returns its digest too.
func readBootstrap(path string) (*rafs.Image, string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, "", err
	}
	if info.Size() > maxBootstrap {
		return nil, "", fmt.Errorf("%w: %s has %d bytes, at most %d", ErrUnsupported, path, info.Size(), maxBootstrap)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, "", err
	}
	img, err := rafs.Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", path, err)
	}
	return img, digest.FromBytes(b).String(), nil
}

// bounded applies an option's timeout.
func bounded(ctx context.Context, timeout *time.Duration) (context.Context, context.CancelFunc) {
	if timeout == nil {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, *timeout)
}

// Pack returns a writer that takes the uncompressed tar of a layer, with OCIRef the layer as it is stored, and writes the layer's blob to
// dest. The blob is whole when Close has returned nil; Close must be called in any case. When packing
// fails, writes fail with the reason. The blob depends on the tar and opt only.
func Pack(ctx context.Context, dest io.Writer, opt PackOption) (io.WriteCloser, error) {
	o, err := opt.options()
	if err != nil {
		return nil, err
	}
	if o.TempDir != "" {
		if err := os.MkdirAll(o.TempDir, 0o750); err != nil {
			return nil, err
		}
	}
	ctx, cancel := bounded(ctx, opt.Timeout)
	r, w := io.Pipe()
	p := &packer{PipeWriter: w, done: make(chan struct{})}
	// A read that waits for the caller ends with the context.
	stop := context.AfterFunc(ctx, func() { _ = r.CloseWithError(context.Cause(ctx)) })
	go func() {
		defer cancel()
		defer stop()
		_, p.err = builder.PackLayer(ctx, dest, r, o)
		if cause := context.Cause(ctx); p.err != nil && cause != nil && !errors.Is(p.err, cause) {
			p.err = fmt.Errorf("%w: %w", cause, p.err) // the end of the context closed what was read
		}
		_ = r.CloseWithError(errors.Join(p.err, errPacked)) // never fails
		close(p.done)
	}()
	return p, nil
}

// errPacked is what writes after the end get.
var errPacked = errors.New("the layer is packed")

// packer is a layer being packed by a goroutine that Close waits for.
type packer struct {
	*io.PipeWriter
	done chan struct{}
	err  error // valid when done is closed
}

// Close ends the tar and waits for the blob. It may be called more than once.
func (p *packer) Close() error {
	_ = p.PipeWriter.Close() // never fails
	<-p.done
	return p.err
}

// Merge writes the bootstrap of the image that layers make, lowest first, to dest: bare, or in
// a tar (not compressed) with opt.WithTar. It returns the digests of the blobs that the bootstrap
// refers to: some of the layers', with OCIRef their OriginalDigest, and those of chunk dictionaries.
func Merge(ctx context.Context, layers []Layer, dest io.Writer, opt MergeOption) ([]digest.Digest, error) {
	ctx, cancel := bounded(ctx, opt.Timeout)
	defer cancel()
	o, err := opt.options()
	if err != nil {
		return nil, err
	}
	var packed []builder.PackedLayer
	for _, l := range layers {
		p := builder.PackedLayer{Digest: l.Digest, Blob: l.ReaderAt, Size: l.ReaderAt.Size()}
		if l.OriginalDigest != nil {
			p.Layer = *l.OriginalDigest
		}
		packed = append(packed, p)
	}
	if opt.FsVersion != "" {
		if got, err := layersVersion(layers); err != nil {
			return nil, err
		} else if got != opt.FsVersion {
			return nil, fmt.Errorf("%w: FsVersion %q, and the layers have RAFS v%s", ErrUnsupported, opt.FsVersion, got)
		}
	}
	var boot bytes.Buffer
	blobs, err := builder.MergeLayers(ctx, &boot, packed, o)
	if err != nil {
		return nil, err
	}
	tables, err := tablesOf(boot.Bytes(), layers, opt)
	if err != nil {
		return nil, err
	}
	if !opt.WithTar {
		_, err := dest.Write(boot.Bytes())
		return blobs, err
	}
	files := append([]file{{name: "image.boot", size: int64(boot.Len()), write: copyOf(&boot, int64(boot.Len()))}}, tables...)
	for _, f := range opt.AppendFiles {
		files = append(files, file{name: f.Name, size: f.Size, write: copyOf(f.Reader, f.Size)})
	}
	return blobs, writeFiles(dest, files)
}

// options returns what builder understands.
func (opt *MergeOption) options() (builder.MergeOptions, error) {
	o := builder.MergeOptions{Prefetch: pathsOf(opt.PrefetchPatterns), DefaultPrefetch: []string{"/"}}
	if opt.Encrypt != nil {
		return o, fmt.Errorf("%w: Encrypt", ErrUnsupported)
	}
	if _, err := parseVersion(opt.FsVersion); err != nil {
		return o, err
	}
	if opt.ParentBootstrapPath != "" {
		img, _, err := readBootstrap(opt.ParentBootstrapPath)
		if err != nil {
			return o, fmt.Errorf("parent bootstrap: %w", err)
		}
		o.Parent = img
	}
	if opt.ChunkDictPath != "" {
		img, _, err := readBootstrap(opt.ChunkDictPath)
		if err != nil {
			return o, fmt.Errorf("chunk dictionary: %w", err)
		}
		o.Dict = img
	}
	return o, nil
}

// tablesOf returns the tables of the layers that are only referred to, as files for the bootstrap's layer: nydus-snapshotter gives them
// to nydusd, which has one request less to make. With opt.OCIRef there must be no other blob.
func tablesOf(boot []byte, layers []Layer, opt MergeOption) ([]file, error) {
	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		return nil, err
	}
	var out []file
	for _, b := range img.Blobs {
		meta, separate := b.MetaBlob()
		if !separate {
			if opt.OCIRef && opt.ParentBootstrapPath == "" {
				return nil, fmt.Errorf("%w: OCIRef, and blob %s has its chunks itself", ErrUnsupported, b.ID)
			}
			continue
		}
		i := slices.IndexFunc(layers, func(l Layer) bool { return l.Digest.Encoded() == meta.ID })
		if i < 0 {
			continue // the parent's
		}
		write, size, err := builder.CachedTable(b, layers[i].ReaderAt)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", layers[i].Digest, err)
		}
		out = append(out, file{name: meta.ID + ".blob.meta", size: size, write: write})
	}
	return out, nil
}

// layersVersion returns the version of the first layer's bootstrap; the others must have the same.
func layersVersion(layers []Layer) (string, error) {
	if len(layers) == 0 {
		return "", fmt.Errorf("%w: no layers to merge", builder.ErrInvalid)
	}
	boot, err := rafs.ReadInline(layers[0].ReaderAt, layers[0].ReaderAt.Size())
	if err != nil {
		return "", fmt.Errorf("layer %s: %w", layers[0].Digest, err)
	}
	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		return "", fmt.Errorf("bootstrap of layer %s: %w", layers[0].Digest, err)
	}
	return img.Version.String(), nil
}

// file is a file of a bootstrap layer's tar, whose content write writes.
type file struct {
	name  string
	size  int64
	write func(io.Writer) error
}

func copyOf(r io.Reader, size int64) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.CopyN(w, r, size)
		return err
	}
}

// writeFiles writes the tar of a bootstrap layer.
func writeFiles(w io.Writer, files []file) error {
	tw := tar.NewWriter(w)
	at := time.Unix(0, 0)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "image", Mode: 0o755, ModTime: at}); err != nil {
		return err
	}
	for _, f := range files {
		err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "image/" + f.name, Mode: 0o444, Size: f.size, ModTime: at})
		if err == nil {
			err = f.write(tw)
		}
		if err != nil {
			return fmt.Errorf("file %s of the bootstrap layer: %w", f.name, err)
		}
	}
	return tw.Close()
}

// Unpack writes the tar of the layer that the blob ra was packed from to dest: whiteouts, owners,
// times, links and attributes included, every chunk verified. The tar is not the layer's byte for byte. ErrUnsupported for a blob packed with
// OCIRef, which does not hold the layer's data.
func Unpack(ctx context.Context, ra content.ReaderAt, dest io.Writer, opt UnpackOption) error {
	ctx, cancel := bounded(ctx, opt.Timeout)
	defer cancel()
	img, read, err := builder.OpenLayer(ra, ra.Size())
	if err != nil {
		return err
	}
	_, err = unpack.Tar(ctx, unpack.Source{Image: img, Read: read}, dest)
	return err
}
