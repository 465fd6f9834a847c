package backend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// Options says how images are reached; the zero value is the default.
type Options struct {
	// Remote configures registries and containerd. Timeouts that are not set are shorter than those of [remote]: a
	// reader waits.
	Remote remote.Options
	// Platform is that of the image in an index, "os/arch[/variant]"; empty: this machine's.
	Platform string
	// TempDir is where the bootstrap is put while the image is open; empty: os.TempDir. The file has no name.
	TempDir string
	// Early is asked whether the prefetch blob with this id, which is not known to be one of the image yet, is to be
	// streamed from the registry as soon as the manifest names it. Whoever says so has the stream read, by a
	// [fill.Request] with Stream, or calls [Blobs.DropEarly]. nil: no.
	Early func(id string) bool
}

func (o Options) settle() Options {
	t := &o.Remote.Timeouts
	t.Connect = cmp.Or(t.Connect, 5*time.Second)
	t.Header = cmp.Or(t.Header, 15*time.Second)
	t.Stall = cmp.Or(t.Stall, 10*time.Second)
	return o
}

// Blobs gives the blobs of an image. Safe for concurrent use, except for Close.
type Blobs struct {
	origin Origin
	src    remote.Source // nil: loose files

	reopened bool
	early    *early // nil: there is none
}

// Image is an image that was found by its reference, or by its files.
type Image struct {
	*Blobs
	// Reference is the image's canonical reference, or the bootstrap's file name.
	Reference string
	// RAFS is the bootstrap's content. It may be set to nil to give its memory back.
	RAFS *rafs.Image

	img *nydusimage.Image
}

// Open finds the image that ref names, whose files must be absolute paths, and reads its bootstrap, which is verified. Errors are
// those of [nydusimage.Open], and [ErrInvalid] for blobs that cannot be found. The caller closes the image.
func Open(ctx context.Context, ref string, o Options) (*Image, error) {
	o = o.settle()
	r, err := remote.Parse(ref)
	if err != nil {
		return nil, err
	}
	if r.Path != "" && !filepath.IsAbs(r.Path) {
		return nil, fmt.Errorf("%w: %s is no absolute path", ErrInvalid, r.Path)
	}
	var first *early
	img, err := nydusimage.Open(ctx, ref, nydusimage.Options{
		Platform: o.Platform, Remote: o.Remote, TempDir: o.TempDir, Early: func(src remote.Source, m ocispec.Manifest) {
			if o.Early != nil && r.Kind == remote.KindRegistry && first == nil {
				first = startEarly(ctx, src, m, o.Early)
			}
		},
	})
	if err != nil {
		return nil, errors.Join(err, first.drop())
	}
	origin, err := originOf(img)
	if err != nil {
		return nil, errors.Join(err, first.drop(), img.Close())
	}
	origin.Reference, origin.Digest = r.String(), img.Digest()
	return &Image{Blobs: &Blobs{origin: origin, src: img.TakeSource(), early: first}, Reference: img.Reference, RAFS: img.RAFS, img: img}, nil
}

// OpenFiles opens loose files: a bare bootstrap, and a directory with one file per blob, named by its id.
func OpenFiles(bootstrap, blobDir string) (*Image, error) {
	if !filepath.IsAbs(blobDir) {
		return nil, fmt.Errorf("%w: blob directory %q is no absolute path", ErrInvalid, blobDir)
	}
	img, err := nydusimage.OpenFiles(bootstrap, blobDir)
	if err != nil {
		return nil, err
	}
	origin, err := originOf(img)
	if err != nil {
		return nil, errors.Join(err, img.Close())
	}
	origin.BlobDir = blobDir
	return &Image{Blobs: &Blobs{origin: origin}, Reference: img.Reference, RAFS: img.RAFS, img: img}, nil
}

// Bootstrap returns the bare bootstrap and its size in bytes, valid until Close.
func (i *Image) Bootstrap() (io.ReaderAt, int64) { return i.img.Bootstrap() }

// Detach closes the bootstrap and returns the blobs, which the caller closes in place of the image.
func (i *Image) Detach() (*Blobs, error) { return i.Blobs, i.img.Close() }

// Close releases everything.
func (i *Image) Close() error { return errors.Join(i.img.Close(), i.Blobs.Close()) }

// Reopen gives the blobs of an origin. It asks no server for anything yet. Layouts and archives are opened, which may take as long as the file system likes: see [Instant].
func Reopen(ctx context.Context, origin Origin, o Options) (*Blobs, error) {
	loose := origin.Reference == ""
	if err := origin.check(loose); err != nil {
		return nil, err
	}
	b := &Blobs{origin: origin, reopened: true}
	if loose {
		return b, nil
	}
	ref, err := remote.Parse(origin.Reference)
	if err != nil {
		return nil, err
	}
	if b.src, err = remote.OpenSource(ctx, ref, o.settle().Remote); err != nil {
		return nil, fmt.Errorf("open %s: %w", origin.Reference, err)
	}
	return b, nil
}

// Instant reports whether [Reopen] of an origin reads no file of the image: that of a registry, or of loose files.
func Instant(origin Origin) bool {
	ref, err := remote.Parse(origin.Reference)
	return origin.Reference == "" || err == nil && ref.Kind == remote.KindRegistry
}

// Origin returns where the blobs are.
func (b *Blobs) Origin() Origin { return b.origin }

// Close releases connections and files; readers must be closed before.
func (b *Blobs) Close() error {
	if b.src == nil {
		return nil
	}
	return errors.Join(b.early.drop(), b.src.Close())
}

// DropEarly ends the stream that [Options].Early wanted, if nobody has asked for it yet. It may be called at any time before Close returns.
func (b *Blobs) DropEarly() error {
	if b == nil {
		return nil
	}
	return b.early.drop()
}

// Blob returns the n-th blob.
func (b *Blobs) Blob(n int) fill.Source {
	if b.src == nil {
		return &looseBlob{dir: b.origin.BlobDir, files: b.origin.Blobs[n]}
	}
	return &remoteBlob{src: b.src, files: b.origin.Blobs[n], early: b.early}
}

// file returns the file that r is about.
func (o BlobOrigin) file(r fill.Request) *File {
	if r.Meta && o.Meta != nil {
		return o.Meta
	}
	return &o.Data
}

// remoteBlob is a blob of a remote source.
type remoteBlob struct {
	src   remote.Source
	files BlobOrigin
	early *early
}

// Range implements fill.Source.
func (b *remoteBlob) Range(ctx context.Context, r fill.Request) (io.ReadCloser, error) {
	if rc := b.early.take(ctx, b.files.Data.ID, r); rc != nil {
		return rc, nil
	}
	if r.Suspect {
		ctx = remote.AvoidMirrors(ctx)
	}
	return b.src.FetchRange(ctx, b.files.file(r).descriptor(), r.Offset, r.Length)
}

// Retry implements fill.Source.
func (b *remoteBlob) Retry(err error) fill.Retry {
	r := fill.Retry{Again: true}
	if e, ok := errors.AsType[*remote.RegistryError](err); ok {
		r.After = e.RetryAfter
	}
	switch {
	case errors.Is(err, remote.ErrUnavailable), errors.Is(err, remote.ErrStalled), errors.Is(err, io.ErrUnexpectedEOF):
	case errors.Is(err, remote.ErrDigest), errors.Is(err, remote.ErrInvalid):
		r.Most = 1 // a server that answers something else: another size, another range
	default:
		return fill.Retry{}
	}
	return r
}

// looseBlob is a blob that is a file. A file that cannot be read now is not waited for.
type looseBlob struct {
	dir   string
	files BlobOrigin
}

// Range implements fill.Source.
func (b *looseBlob) Range(_ context.Context, r fill.Request) (io.ReadCloser, error) {
	if b.dir == "" {
		return nil, fmt.Errorf("%w: no blob directory", ErrInvalid)
	}
	f, err := os.Open(filepath.Join(b.dir, b.files.file(r).ID))
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, r.Offset, r.Length), f}, nil
}

// Retry implements fill.Source.
func (b *looseBlob) Retry(error) fill.Retry { return fill.Retry{} }
