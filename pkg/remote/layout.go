package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// layoutVersion is the only one there is.
// Source: image-spec image-layout.md, "oci-layout file".
const layoutVersion = ocispec.ImageLayoutVersion

// files is a layout's files, in a directory or in a tar.
type files interface {
	// document returns a small file; fs.ErrNotExist when it is not there, [ErrTooLarge]
	// when it has more than limit bytes.
	document(name string, limit int64) ([]byte, error)
	// content returns the n bytes of a blob from off; fs.ErrNotExist when it is not there.
	// Size is the blob's.
	content(name string, off, n int64) (rc io.ReadCloser, size int64, err error)
	close() error
}

// layoutSource reads an OCI image layout.
type layoutSource struct {
	ref Reference
	f   files
}

// openLayout checks that f is a layout.
func openLayout(ref Reference, f files) (Source, error) {
	data, err := f.document(ocispec.ImageLayoutFile, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		if _, ierr := f.document(ocispec.ImageIndexFile, MaxManifestSize); ierr != nil {
			return nil, fmt.Errorf("%w: %s: no oci image layout: it has no %s file", ErrInvalid, ref.Path, ocispec.ImageLayoutFile)
		}
		return nil, fmt.Errorf("%w: %s: no %s file", ErrInvalid, ref.Path, ocispec.ImageLayoutFile)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", ref.Path, ocispec.ImageLayoutFile, err)
	}
	var l ocispec.ImageLayout
	if err := json.Unmarshal(data, &l); err != nil {
		return nil, fmt.Errorf("%w: %s: %s: %w", ErrInvalid, ref.Path, ocispec.ImageLayoutFile, err)
	}
	if l.Version != layoutVersion {
		return nil, fmt.Errorf("%w: %s: layout version %.40q, want %q", ErrUnsupported, ref.Path, l.Version, layoutVersion)
	}
	return &layoutSource{ref: ref, f: f}, nil
}

// readIndex reads and checks index.json.
func readIndex(f files, path string) (ocispec.Index, error) {
	data, err := f.document(ocispec.ImageIndexFile, MaxManifestSize)
	if errors.Is(err, fs.ErrNotExist) {
		return ocispec.Index{}, fmt.Errorf("%w: %s: no %s file", ErrInvalid, path, ocispec.ImageIndexFile)
	}
	if err != nil {
		return ocispec.Index{}, fmt.Errorf("%s: %s: %w", path, ocispec.ImageIndexFile, err)
	}
	index, err := parseIndex(data)
	if err != nil {
		return ocispec.Index{}, fmt.Errorf("%s: %s: %w", path, ocispec.ImageIndexFile, err)
	}
	return index, nil
}

// Resolve implements Source: the entry named by the reference's digest or tag, or the only
// one.
func (s *layoutSource) Resolve(context.Context) (ocispec.Descriptor, error) {
	index, err := readIndex(s.f, s.ref.Path)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := findEntry(index.Manifests, s.ref)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w", s.ref.Path, err)
	}
	if err := checkDescriptor(desc); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %s: %w", s.ref.Path, ocispec.ImageIndexFile, err)
	}
	return desc, nil
}

// findEntry picks an entry of a layout's index.
func findEntry(entries []ocispec.Descriptor, ref Reference) (ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	want := "image"
	switch {
	case ref.Digest != "":
		want = "entry with digest " + ref.Digest.String()
		found = filter(entries, func(d ocispec.Descriptor) bool { return d.Digest == ref.Digest })
		found = found[:min(1, len(found))] // equal content
	case ref.Tag != "":
		want = fmt.Sprintf("entry named %q", ref.Tag)
		found = filter(entries, func(d ocispec.Descriptor) bool { return d.Annotations[ocispec.AnnotationRefName] == ref.Tag })
		if len(found) == 0 { // other tools put the whole reference there, or beside it
			found = filter(entries, func(d ocispec.Descriptor) bool {
				return strings.HasSuffix(d.Annotations[ocispec.AnnotationRefName], ":"+ref.Tag) ||
					strings.HasSuffix(d.Annotations[images.AnnotationImageName], ":"+ref.Tag)
			})
		}
	default: // an index of artifacts about an image is no image
		found = filter(entries, func(d ocispec.Descriptor) bool { return !isFallbackTag(d.Annotations[ocispec.AnnotationRefName]) })
	}
	found = distinct(found)
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return ocispec.Descriptor{}, fmt.Errorf("%w: no %s; the layout has %s", ErrNotFound, want, entryNames(entries))
	default:
		return ocispec.Descriptor{}, fmt.Errorf("%w: which %s? the layout has %s", ErrNotFound, want, entryNames(found))
	}
}

func filter(in []ocispec.Descriptor, keep func(ocispec.Descriptor) bool) []ocispec.Descriptor {
	return slices.DeleteFunc(slices.Clone(in), func(d ocispec.Descriptor) bool { return !keep(d) })
}

// distinct leaves one entry for each digest: a layout may give an image several names.
func distinct(in []ocispec.Descriptor) []ocispec.Descriptor {
	seen := make(map[digest.Digest]bool, len(in))
	return filter(in, func(d ocispec.Descriptor) bool {
		again := seen[d.Digest]
		seen[d.Digest] = true
		return !again
	})
}

// entryNames lists names for a message, shortened.
func entryNames(entries []ocispec.Descriptor) string {
	if len(entries) == 0 {
		return "no entries"
	}
	const most = 8
	var names []string
	for _, d := range entries[:min(len(entries), most)] {
		name := d.Annotations[ocispec.AnnotationRefName]
		if name == "" {
			name = short(d.Digest)
		}
		names = append(names, fmt.Sprintf("%.160q", name))
	}
	if len(entries) > most {
		names = append(names, fmt.Sprintf("and %d more", len(entries)-most))
	}
	return strings.Join(names, ", ")
}

// blobName is the path of a blob below a layout's root.
func blobName(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}

// open returns the bytes [off, off+n) of desc's blob.
func (s *layoutSource) open(desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	rc, size, err := s.f.content(blobName(desc.Digest), off, n)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s: blob %s", ErrNotFound, s.ref.Path, desc.Digest)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: blob %s: %w", s.ref.Path, desc.Digest, err)
	}
	if size != desc.Size {
		return nil, errors.Join(fmt.Errorf("%w: %s: blob %s has %d bytes, its descriptor says %d", ErrDigest, s.ref.Path, desc.Digest, size, desc.Size), rc.Close())
	}
	return rc, nil
}

// Fetch implements Source.
func (s *layoutSource) Fetch(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	rc, err := s.open(desc, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	return verify(rc, desc, s.ref.Path), nil
}

// FetchRange implements Source.
func (s *layoutSource) FetchRange(_ context.Context, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	if err := checkRange(desc, off, n); err != nil {
		return nil, err
	}
	rc, err := s.open(desc, off, n)
	if err != nil {
		return nil, err
	}
	return &exactly{rc: rc, left: n}, nil
}

// file implements localSource for layouts that are directories.
func (s *layoutSource) file(desc ocispec.Descriptor) *os.File {
	dir, ok := s.f.(dirFiles)
	if !ok || checkDescriptor(desc) != nil {
		return nil
	}
	f, size, err := dir.regular(blobName(desc.Digest))
	if err != nil {
		return nil
	}
	if size != desc.Size {
		_ = f.Close() // only read
		return nil
	}
	return f
}

func (s *layoutSource) Close() error { return s.f.close() }

// OpenLayoutBlob opens the file of a blob in the layout directory dir; its bytes are not verified. It returns
// [ErrNotFound] where there is none, and [ErrInvalid] for what is no regular file; symbolic links do not leave dir. The
// caller closes the file.
func OpenLayoutBlob(dir string, d digest.Digest) (_ *os.File, err error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("%w: digest %q: %w", ErrInvalid, d, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("oci layout: %w", err)
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	f, _, err := dirFiles{root}.regular(blobName(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s: blob %s: %w", ErrNotFound, dir, d, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: blob %s: %w", dir, d, err)
	}
	return f, nil
}

// dirFiles is a layout directory; its root keeps symbolic links inside.
type dirFiles struct{ root *os.Root }

func openDir(path string) (files, error) {
	root, err := os.OpenRoot(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: oci layout: %w", ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("oci layout: %w", err)
	}
	return dirFiles{root}, nil
}

func (d dirFiles) document(name string, limit int64) ([]byte, error) {
	f, size, err := d.regular(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	if size > limit {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, size, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

func (d dirFiles) content(name string, off, n int64) (io.ReadCloser, int64, error) {
	f, size, err := d.regular(name)
	if err != nil {
		return nil, 0, err
	}
	return &section{SectionReader: io.NewSectionReader(f, off, n), closer: f}, size, nil
}

// regular opens a regular file: nothing else can be a part of a layout, and a FIFO would hang.
func (d dirFiles) regular(name string) (*os.File, int64, error) {
	name = filepath.FromSlash(name)
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is not a regular file", ErrInvalid, name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

func (d dirFiles) close() error { return d.root.Close() }

// section reads a part of a file and closes the file.
type section struct {
	*io.SectionReader
	closer io.Closer
}

func (s *section) Close() error { return s.closer.Close() }
