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
	// OriginalDigest is that of the layer a blob only refers to; nil here.
	OriginalDigest *digest.Digest
	// ReaderAt reads the whole blob.
	ReaderAt content.ReaderAt
}

// Backend takes blobs to a storage of its own instead of the registry.
type Backend interface {
	// Push brings the blob of desc from cs to the storage.
	Push(ctx context.Context, cs content.Store, desc ocispec.Descriptor) error
	// Check returns where the blob is in the storage.
	Check(blobDigest digest.Digest) (string, error)
	// Type names the kind of storage.
	Type() string
}

// PackOption says how layers are packed. The zero value is the default.
type PackOption struct {
	WorkDir          string // no effect
	BuilderPath      string // no effect
	FsVersion        string // "5" or "6" (the default)
	ChunkDictPath    string // bootstrap of an image whose chunks are referred to, not stored
	PrefetchPatterns string // no effect: the bootstrap of an image has the table, see MergeOption
	Compressor       string // "zstd" (the default), "lz4_block" or "none"
	OCIRef           bool   // ErrUnsupported
	AlignedChunk     bool   // RAFS v6 always is; ErrUnsupported for v5
	ChunkSize        string // bytes, decimal or 0x…; empty: 1 MiB
	BatchSize        string // of small chunks that are compressed together, as ChunkSize; empty or "0": none
	Backend          Backend
	Timeout          *time.Duration
	Encrypt          bool // ErrUnsupported
	Workers          int  // goroutines that compress; 0: one per CPU
}

// MergeOption says how an image is merged. The zero value is the default.
type MergeOption struct {
	WorkDir             string // no effect
	BuilderPath         string // no effect
	FsVersion           string // "5" or "6", which the layers must have; empty: any
	ChunkDictPath       string // bootstrap of the image that the layers were packed with; empty: the layers tell their own blobs
	ParentBootstrapPath string // bootstrap of an image below the layers
	PrefetchPatterns    string // paths, one a line, for the prefetch table; empty: "/", all
	WithTar             bool   // the bootstrap as image/image.boot of a tar
	OCI                 bool   // OCI media types for what was docker's
	OCIRef              bool   // ErrUnsupported
	WithReferrer        bool   // the manifest's subject is the source's
	Backend             Backend
	Timeout             *time.Duration
	AppendFiles         []File // more files for the tar
	MergeManifest       bool   // the config gets Nydus' media type, for indexes that have the plain image too
}

// UnpackOption says how a layer is unpacked. The zero value is the default.
type UnpackOption struct {
	WorkDir     string // no effect
	BuilderPath string // no effect
	Timeout     *time.Duration
	Stream      bool // no effect: it always is
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
	out.Workers = o.Workers
	var err error
	if out.FSVersion, err = parseVersion(o.FsVersion); err != nil {
		return out, err
	}
	switch {
	case o.OCIRef:
		return out, fmt.Errorf("%w: OCIRef", ErrUnsupported)
	case o.Encrypt:
		return out, fmt.Errorf("%w: Encrypt", ErrUnsupported)
	case o.AlignedChunk && out.FSVersion == rafs.V5:
		return out, fmt.Errorf("%w: AlignedChunk of RAFS v5", ErrUnsupported)
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

// Pack returns a writer that takes the uncompressed tar of a layer and writes the layer's blob to
// dest. The blob is whole when Close has returned nil; Close must be called in any case. When packing
// fails, writes fail with the reason. The blob depends on the tar and opt only.
func Pack(ctx context.Context, dest io.Writer, opt PackOption) (io.WriteCloser, error) {
	o, err := opt.options()
	if err != nil {
		return nil, err
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
// refers to: some of the layers', and those of chunk dictionaries.
func Merge(ctx context.Context, layers []Layer, dest io.Writer, opt MergeOption) ([]digest.Digest, error) {
	if opt.OCIRef {
		return nil, fmt.Errorf("%w: OCIRef", ErrUnsupported)
	}
	if _, err := parseVersion(opt.FsVersion); err != nil {
		return nil, err
	}
	ctx, cancel := bounded(ctx, opt.Timeout)
	defer cancel()
	o := builder.MergeOptions{Prefetch: []string{"/"}}
	if opt.PrefetchPatterns != "" {
		o.Prefetch = strings.Split(strings.TrimSpace(opt.PrefetchPatterns), "\n")
	}
	if opt.ParentBootstrapPath != "" {
		img, _, err := readBootstrap(opt.ParentBootstrapPath)
		if err != nil {
			return nil, fmt.Errorf("parent bootstrap: %w", err)
		}
		o.Parent = img
	}
	if opt.ChunkDictPath != "" {
		img, _, err := readBootstrap(opt.ChunkDictPath)
		if err != nil {
			return nil, fmt.Errorf("chunk dictionary: %w", err)
		}
		o.Dict = img
	}
	var packed []builder.PackedLayer
	for _, l := range layers {
		if l.OriginalDigest != nil {
			return nil, fmt.Errorf("%w: layer %s refers to %s", ErrUnsupported, l.Digest, l.OriginalDigest)
		}
		packed = append(packed, builder.PackedLayer{Digest: l.Digest, Blob: l.ReaderAt, Size: l.ReaderAt.Size()})
	}
	if opt.FsVersion != "" {
		if got, err := layersVersion(layers); err != nil {
			return nil, err
		} else if got != opt.FsVersion {
			return nil, fmt.Errorf("%w: FsVersion %q, and the layers have RAFS v%s", ErrUnsupported, opt.FsVersion, got)
		}
	}
	if !opt.WithTar {
		return builder.MergeLayers(ctx, dest, packed, o)
	}
	var boot bytes.Buffer
	blobs, err := builder.MergeLayers(ctx, &boot, packed, o)
	if err != nil {
		return nil, err
	}
	files := append([]File{{Name: "image.boot", Reader: &boot, Size: int64(boot.Len())}}, opt.AppendFiles...)
	return blobs, writeFiles(dest, files)
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

// writeFiles writes the tar of a bootstrap layer.
func writeFiles(w io.Writer, files []File) error {
	tw := tar.NewWriter(w)
	at := time.Unix(0, 0)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "image", Mode: 0o755, ModTime: at}); err != nil {
		return err
	}
	for _, f := range files {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "image/" + f.Name, Mode: 0o444, Size: f.Size, ModTime: at}); err != nil {
			return err
		}
		if _, err := io.CopyN(tw, f.Reader, f.Size); err != nil {
			return fmt.Errorf("file %s of the bootstrap layer: %w", f.Name, err)
		}
	}
	return tw.Close()
}

// Unpack writes the tar of the layer that the blob ra was packed from to dest: whiteouts, owners,
// times, links and attributes included, every chunk verified. The tar is not the layer's byte for byte.
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
