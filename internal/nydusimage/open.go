package nydusimage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// Options says how [Open] reaches an image.
type Options struct {
	Platform string // "os/arch[/variant]"; empty: this machine's
	Remote   remote.Options
	// Read reads the bootstrap; nil: [rafs.Open]. [rafs.OpenStrict] suits who writes the tree out, and
	// [rafs.OpenTables] who does not want it: RAFS has none then.
	Read func(bootstrap io.ReaderAt, size int64) (*rafs.Image, error)
	// TempDir is where the bootstrap, and blobs of images that are no layout, are put while
	// the Image is open; empty: os.TempDir. The files have no name: nothing stays behind.
	TempDir string
	// Early is told the manifest as soon as it is there, before anything of it was checked, with what its layers are read from: what
	// is needed soon can be asked for while the bootstrap is on its way. nil: nobody asks.
	Early func(src remote.Source, m ocispec.Manifest)
}

// Image is an open Nydus image. Its methods are safe for concurrent use, except for Close.
type Image struct {
	// Reference is the image's canonical reference, or the bootstrap's file name.
	Reference string
	// Source is what the registry, layout, archive or containerd holds; nil for loose files.
	Source *remote.Image
	// Document is the manifest and config; nil for loose files.
	Document *Document
	// RAFS is the bootstrap's content.
	RAFS *rafs.Image

	bootstrap *os.File
	size      int64
	blobFile  func(ctx context.Context, id string) (*os.File, error)
	src       remote.Source
	tempDir   string // as in Options
}

// Open opens the Nydus image that ref names. Its documents must agree with each other and
// with the bootstrap ([Document.Check]). It returns [ErrInvalid] for one that does not or
// is no Nydus image, and the errors of [remote] and [rafs]. The caller closes the Image.
func Open(ctx context.Context, ref string, o Options) (*Image, error) {
	r, err := remote.Parse(ref)
	if err != nil {
		return nil, err
	}
	src, err := remote.OpenSource(ctx, r, o.Remote)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", r, err)
	}
	img, err := open(ctx, r, src, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", r, err), src.Close())
	}
	return img, nil
}

func open(ctx context.Context, ref remote.Reference, src remote.Source, o Options) (*Image, error) {
	var boot *bootstrap
	sel, err := remote.SelectNydusEarly(ctx, src, o.Platform, func(m ocispec.Manifest) {
		if last, err := (&Document{Manifest: m}).Bootstrap(); err == nil {
			boot = startBootstrap(ctx, src, last, o.TempDir)
			if o.Early != nil {
				o.Early(src, m)
			}
		}
	})
	if err == nil && !Is(sel.Manifest) {
		err = fmt.Errorf("%w: no layer says that it is a bootstrap or a blob: this is a plain container image", ErrInvalid)
	}
	doc := &Document{Manifest: sel.Manifest, Config: sel.Config}
	var last ocispec.Descriptor
	if err == nil {
		last, err = doc.Bootstrap()
	}
	if err != nil {
		return nil, errors.Join(err, boot.drop())
	}
	file, size, diffID, err := boot.wait()
	if err != nil {
		return nil, fmt.Errorf("bootstrap layer %s: %w", last.Digest, err)
	}
	img := &Image{Reference: ref.String(), Source: &sel, Document: doc, bootstrap: file, size: size, src: src, tempDir: o.TempDir}
	img.blobFile = func(ctx context.Context, id string) (*os.File, error) {
		return img.fetchBlob(ctx, ref, id, o.TempDir)
	}
	read := o.Read
	if read == nil {
		read = rafs.Open
	}
	img.RAFS, err = read(file, size)
	if err == nil {
		err = errors.Join(doc.Check(img.blobIDs()), doc.checkDiffID(diffID))
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return img, nil
}

// OpenFiles opens loose files: a bare bootstrap and a directory with one file per blob,
// named by its id. blobDir may be empty when no blob is going to be read.
func OpenFiles(bootstrap, blobDir string) (*Image, error) {
	return OpenFilesBy(rafs.Open, bootstrap, blobDir)
}

// OpenFilesBy is [OpenFiles] with [Options].Read.
func OpenFilesBy(read func(bootstrap io.ReaderAt, size int64) (*rafs.Image, error), bootstrap, blobDir string) (*Image, error) {
	f, size, err := OpenRegular(bootstrap)
	if err != nil {
		return nil, err
	}
	img := &Image{Reference: bootstrap, bootstrap: f, size: size}
	img.blobFile = func(_ context.Context, id string) (*os.File, error) {
		if blobDir == "" {
			return nil, fmt.Errorf("blob %s: no --blob-dir was given", id)
		}
		f, _, err := OpenRegular(filepath.Join(blobDir, id))
		return f, err
	}
	if img.RAFS, err = read(f, img.size); err != nil {
		return nil, errors.Join(fmt.Errorf("bootstrap %s: %w", bootstrap, err), f.Close())
	}
	return img, nil
}

// Close releases everything.
func (i *Image) Close() error {
	err := i.bootstrap.Close()
	if i.src != nil {
		err = errors.Join(err, i.src.Close())
	}
	return err
}

// TakeSource returns what the image's layers are read from, which the caller closes from then on, after the image and
// its blobs; nil for loose files.
func (i *Image) TakeSource() remote.Source {
	src := i.src
	i.src = nil
	return src
}

// Bootstrap returns the bare bootstrap and its size in bytes, valid until Close.
func (i *Image) Bootstrap() (io.ReaderAt, int64) { return i.bootstrap, i.size }

// blobIDs returns the ids of the files that the manifest must list: of the blobs, or of their tables
// where the data are in the layers of the image that this one refers to (OCI-ref).
func (i *Image) blobIDs() []string {
	var ids []string
	for _, b := range i.RAFS.Blobs {
		listed, _ := b.MetaBlob()
		ids = append(ids, listed.ID)
	}
	return ids
}

// plainID tells whether a blob id may be a file name: 1 to 64 letters and digits of ASCII.
func plainID(id string) bool {
	return id != "" && len(id) <= 64 && strings.IndexFunc(id, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	}) < 0
}

// OpenBlob opens the file of a blob. The caller closes it.
func (i *Image) OpenBlob(ctx context.Context, b rafs.Blob) (*os.File, error) {
	if !plainID(b.ID) {
		return nil, fmt.Errorf("%w: blob id %q, want at most 64 letters and digits", ErrInvalid, b.ID)
	}
	f, err := i.blobFile(ctx, b.ID)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", b.ID, err)
	}
	return f, nil
}

// fetchBlob opens the layer whose digest is the blob's id, or the layer of another image in the same
// repository that a blob refers to. A layout has it as a file; from elsewhere it is copied, verified on the way, into a file without a name.
func (i *Image) fetchBlob(ctx context.Context, ref remote.Reference, id, tempDir string) (*os.File, error) {
	src, layers := i.src, slices.Clone(i.Document.Blobs())
	for _, b := range i.RAFS.Blobs {
		if _, separate := b.MetaBlob(); separate {
			layers = append(layers, ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, b.ID), Size: clamp(b.CompressedSize)})
		}
	}
	for _, l := range layers {
		if l.Digest.Encoded() != id {
			continue
		}
		if ref.Kind == remote.KindLayout {
			return remote.OpenLayoutBlob(ref.Path, l.Digest)
		}
		rc, err := src.Fetch(ctx, l)
		if err != nil {
			return nil, err
		}
		f, err := spool(tempDir, rc)
		return f, closeBoth(f, err, rc)
	}
	return nil, fmt.Errorf("%w: no layer has this digest", ErrInvalid)
}

func clamp(n uint64) int64 { return int64(min(n, 1<<63-1)) }

// Scratch makes a temporary file without a name, for what [rafs.BlobReader.Spill] puts by. The caller closes it.
func (i *Image) Scratch() (*os.File, error) { return spool(i.tempDir, strings.NewReader("")) }

// spool copies r into a temporary file that has no name any more when spool returns.
func spool(dir string, r io.Reader) (*os.File, error) {
	f, err := os.CreateTemp(dir, "headstart-*")
	if err != nil {
		return nil, err
	}
	err = os.Remove(f.Name())
	if err == nil {
		_, err = io.Copy(f, r)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// closeBoth closes rc and, when that or what came before failed, f.
func closeBoth(f *os.File, err error, rc io.Closer) error {
	err = errors.Join(err, rc.Close())
	if err != nil && f != nil {
		err = errors.Join(err, f.Close())
	}
	return err
}

// CheckLayers reads what the layers hold that no blob of the bootstrap is: with data every
// byte of it, verified by its digest, else the first byte, to see that it is there.
func (i *Image) CheckLayers(ctx context.Context, data bool) error {
	if i.Document == nil {
		return nil
	}
	used := map[string]bool{}
	for _, id := range i.blobIDs() {
		used[id] = data
	}
	var errs []error
	for _, l := range i.Document.Blobs() {
		if used[l.Digest.Encoded()] {
			continue // its chunks are checked one by one
		}
		if err := i.touch(ctx, l, data); err != nil {
			errs = append(errs, fmt.Errorf("layer %s: %w", l.Digest, err))
		}
	}
	return errors.Join(errs...)
}

func (i *Image) touch(ctx context.Context, l ocispec.Descriptor, data bool) error {
	var rc io.ReadCloser
	var err error
	if data {
		rc, err = i.src.Fetch(ctx, l)
	} else {
		rc, err = i.src.FetchRange(ctx, l, 0, min(1, l.Size))
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, rc)
	return errors.Join(err, rc.Close())
}

// PrefetchBlob returns the index of the blob that the image's annotation names as the
// prefetch blob, else of the one that carries the feature flag, and whether there is one.
func (i *Image) PrefetchBlob() (int, bool) {
	const flag = 0x400 // IS_SEPARATED_WITH_PREFETCH_FILES, rafs-format.md 0.3
	named := ""
	if i.Document != nil {
		if last, err := i.Document.Bootstrap(); err == nil {
			named = last.Annotations[AnnotationPrefetch]
		}
	}
	for n, b := range i.RAFS.Blobs {
		if b.ID == named || b.Features&flag != 0 {
			return n, true
		}
	}
	return 0, false
}

// Digest returns the manifest's digest, empty for loose files.
func (i *Image) Digest() digest.Digest {
	if i.Source == nil {
		return ""
	}
	return i.Source.Descriptor.Digest
}

// Layer returns the descriptor of the layer that is the blob with this id.
func (i *Image) Layer(id string) (ocispec.Descriptor, error) {
	if i.Document != nil {
		for _, l := range i.Document.Blobs() {
			if l.Digest.Encoded() == id {
				return l, nil
			}
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("%w: blob %s is no layer of the image", ErrInvalid, id)
}

// ReaderAt reads a layer by ranges, unverified, until ctx ends or the image is closed.
func (i *Image) ReaderAt(ctx context.Context, l ocispec.Descriptor) io.ReaderAt {
	return remote.NewReaderAt(ctx, i.src, l)
}

// Fetch returns a layer's bytes, verified. The caller closes it.
func (i *Image) Fetch(ctx context.Context, l ocispec.Descriptor) (io.ReadCloser, error) {
	return i.src.Fetch(ctx, l)
}
