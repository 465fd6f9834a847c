package remote

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxArchiveEntries bounds the entries of an archive that are looked at.
const maxArchiveEntries = 1 << 17

// blobPattern is the name of a blob in an archive.
// Source: image-spec image-layout.md, "blobs".
var blobPattern = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^blobs/[a-z0-9]+(?:[+._-][a-z0-9]+)*/[a-zA-Z0-9=_-]{1,200}$`)
})

// archiveFiles is a layout in a tar that is read in place.
type archiveFiles struct {
	f       *os.File
	entries map[string]extent
}

// extent is where a file's bytes are in the tar, or why it cannot be read.
type extent struct {
	off, size int64
	err       error
}

// openArchive finds the files of the layout in the tar at path: one pass over its headers.
func openArchive(path string) (_ files, err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: oci archive: %w", ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("oci archive: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: oci archive %s: not a regular file", ErrInvalid, path)
	}
	if err := refuseCompressed(f, path); err != nil {
		return nil, err
	}
	entries, err := indexTar(f, info.Size())
	if err != nil {
		return nil, fmt.Errorf("oci archive %s: %w", path, err)
	}
	if _, ok := entries["manifest.json"]; ok {
		if _, ok := entries[ocispec.ImageLayoutFile]; !ok {
			return nil, fmt.Errorf("%w: oci archive %s: a docker archive (manifest.json and no %s)", ErrUnsupported, path, ocispec.ImageLayoutFile)
		}
	}
	return &archiveFiles{f: f, entries: entries}, nil
}

// refuseCompressed names the compression of a file that is no tar.
func refuseCompressed(f io.ReaderAt, path string) error {
	magic := make([]byte, 6)
	n, err := f.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for name, prefix := range map[string]string{"gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd", "xz": "\xfd7zXZ\x00", "bzip2": "BZh"} {
		if bytes.HasPrefix(magic[:n], []byte(prefix)) {
			return fmt.Errorf("%w: oci archive %s is compressed (%s): decompress it first", ErrUnsupported, path, name)
		}
	}
	return nil
}

// indexTar returns the layout's files among the entries of the tar r of size bytes. Other
// entries are passed over; their names are never used as paths.
func indexTar(r io.ReadSeeker, size int64) (map[string]extent, error) {
	entries := make(map[string]extent)
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: entry %d: %w", ErrInvalid, n, err)
		}
		if n >= maxArchiveEntries {
			return nil, fmt.Errorf("%w: more than %d entries", ErrTooLarge, maxArchiveEntries)
		}
		name, ok := layoutName(h.Name)
		if !ok || h.Typeflag == tar.TypeDir {
			continue
		}
		off, err := r.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		e, err := tarExtent(h, name, off, size)
		if err != nil {
			return nil, err
		}
		if _, twice := entries[name]; twice {
			return nil, fmt.Errorf("%w: entry %s is there twice", ErrInvalid, name)
		}
		entries[name] = e
	}
}

// layoutName returns the cleaned name of an entry that belongs to a layout.
func layoutName(name string) (string, bool) {
	clean := path.Clean(strings.TrimPrefix(name, "./"))
	switch {
	case clean == ocispec.ImageLayoutFile, clean == ocispec.ImageIndexFile, clean == "manifest.json", blobPattern().MatchString(clean):
		return clean, true
	}
	return "", false
}

func tarExtent(h *tar.Header, name string, off, size int64) (extent, error) {
	if h.Typeflag != tar.TypeReg {
		// Not refused at once: an archive may have links beside the blobs of its image.
		return extent{err: fmt.Errorf("%w: entry %s is no regular file (type %q)", ErrInvalid, name, h.Typeflag)}, nil
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return extent{err: fmt.Errorf("%w: entry %s is sparse", ErrUnsupported, name)}, nil
		}
	}
	if h.Size < 0 || off > size || h.Size > size-off {
		return extent{}, fmt.Errorf("%w: entry %s: %d bytes from %d, the archive ends at %d", ErrInvalid, name, h.Size, off, size)
	}
	return extent{off: off, size: h.Size}, nil
}

func (a *archiveFiles) find(name string) (extent, error) {
	e, ok := a.entries[name]
	if !ok {
		return extent{}, fs.ErrNotExist
	}
	return e, e.err
}

func (a *archiveFiles) document(name string, limit int64) ([]byte, error) {
	e, err := a.find(name)
	if err != nil {
		return nil, err
	}
	if e.size > limit {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, e.size, limit)
	}
	return io.ReadAll(io.NewSectionReader(a.f, e.off, e.size))
}

func (a *archiveFiles) content(name string, off, n int64) (io.ReadCloser, int64, error) {
	e, err := a.find(name)
	if err != nil {
		return nil, 0, err
	}
	if off > e.size || n > e.size-off {
		return io.NopCloser(strings.NewReader("")), e.size, nil // the size tells the caller
	}
	return io.NopCloser(io.NewSectionReader(a.f, e.off+off, n)), e.size, nil
}

func (a *archiveFiles) close() error { return a.f.Close() }
