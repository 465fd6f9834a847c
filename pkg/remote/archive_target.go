package remote

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// archiveTarget writes an OCI archive to a temporary file beside the wanted one, which
// appears when the image is tagged. Blobs are written one after the other, in the order of
// their Push calls; times are 0 and owners root, so that equal images are equal bytes.
type archiveTarget struct {
	ref  Reference
	path string // of the file, without symbolic links

	mu   sync.Mutex // guards what follows
	f    *os.File   // nil after Tag or Close
	tw   *tar.Writer
	have map[digest.Digest]bool
	err  error // the file is broken: said again by every call
}

var errClosed = errors.New("archive is finished or closed")

func openArchiveTarget(ref Reference) (_ Target, err error) {
	path := ref.Path
	if info, err := os.Stat(path); err == nil {
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("%w: oci archive %s: there is something else than a file", ErrInvalid, path)
		}
		if path, err = filepath.EvalSymlinks(path); err != nil { // what a link names is replaced, not the link
			return nil, fmt.Errorf("oci archive: %w", err)
		}
	}
	dir, base := filepath.Dir(path), filepath.Base(path)
	if err := sweepArchive(dir, tempPrefix+base+"-"); err != nil {
		return nil, fmt.Errorf("oci archive: %w", err)
	}
	f, err := os.CreateTemp(dir, tempPrefix+base+"-*")
	if err != nil {
		return nil, fmt.Errorf("oci archive: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("oci archive: lock: %w", err), f.Close(), os.Remove(f.Name()))
	}
	t := &archiveTarget{ref: ref, path: path, f: f, tw: tar.NewWriter(f), have: make(map[digest.Digest]bool)}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: layoutVersion})
	if err == nil {
		err = t.add(ocispec.ImageLayoutFile, int64(len(layout)), func(w io.Writer) error {
			_, err := w.Write(layout)
			return err
		})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("oci archive %s: %w", ref.Path, err), t.Close())
	}
	return t, nil
}

// staleAge is how old a temporary file without a lock must be: a writer has made it and will
// lock it at once, or it is dead.
const staleAge = time.Minute

// sweepArchive removes temporary files that writers which died have left in dir.
func sweepArchive(dir, prefix string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if !strings.HasPrefix(e.Name(), prefix) || err != nil || !info.Mode().IsRegular() || time.Since(info.ModTime()) < staleAge {
			continue
		}
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // another sweeper was here, or it is another user's
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = ignore(os.Remove(f.Name()), fs.ErrNotExist)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// add appends one file; when that fails the archive ends again where it ended before.
func (t *archiveTarget) add(name string, size int64, write func(io.Writer) error) error {
	if t.err != nil {
		return t.err
	}
	if t.f == nil {
		return errClosed
	}
	if err := t.tw.Flush(); err != nil { // the padding of the file before
		t.err = err
		return err
	}
	start, err := t.f.Seek(0, io.SeekCurrent)
	if err != nil {
		t.err = err
		return err
	}
	err = t.tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0), Format: format(size),
	})
	if err == nil {
		err = write(t.tw)
	}
	if err == nil {
		err = t.tw.Flush()
	}
	if err != nil {
		t.tw = tar.NewWriter(t.f)
		if terr := t.f.Truncate(start); terr != nil {
			t.err = terr
		} else if _, terr := t.f.Seek(start, io.SeekStart); terr != nil {
			t.err = terr
		}
	}
	return err
}

// format is the plainest that holds the size.
func format(size int64) tar.Format {
	if size >= 8<<30 { // 11 octal digits
		return tar.FormatPAX
	}
	return tar.FormatUSTAR
}

// Exists implements Target: it knows what was pushed to it.
func (t *archiveTarget) Exists(_ context.Context, desc ocispec.Descriptor) (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.have[desc.Digest], checkDescriptor(desc)
}

// Push implements Target.
func (t *archiveTarget) Push(ctx context.Context, b Blob) (PushResult, error) {
	if err := checkDescriptor(b.Descriptor); err != nil {
		return 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.have[b.Descriptor.Digest] {
		return Existed, nil
	}
	err := t.add(blobName(b.Descriptor.Digest), b.Descriptor.Size, func(w io.Writer) error { return copyBlob(ctx, w, b) })
	if err != nil {
		return 0, fmt.Errorf("oci archive %s: write blob %s: %w", t.ref.Path, b.Descriptor.Digest, err)
	}
	t.have[b.Descriptor.Digest] = true
	return Uploaded, nil
}

// Tag implements Target: it finishes the archive. The image is its only entry.
func (t *archiveTarget) Tag(ctx context.Context, desc ocispec.Descriptor, data []byte) error {
	if err := checkDocument(t.ref, desc, data); err != nil {
		return err
	}
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	if _, err := t.Push(ctx, Blob{Descriptor: desc, Open: open}); err != nil {
		return err
	}
	index := emptyIndex()
	index.Manifests = []ocispec.Descriptor{entry(t.ref, desc)}
	encoded, err := encodeIndex(index)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.add(ocispec.ImageIndexFile, int64(len(encoded)), func(w io.Writer) error {
		_, err := w.Write(encoded)
		return err
	})
	if err == nil {
		err = t.publish()
	}
	if err != nil {
		return fmt.Errorf("oci archive %s: %w", t.ref.Path, err)
	}
	return nil
}

// publish gives the file its name.
func (t *archiveTarget) publish() error {
	if err := t.tw.Close(); err != nil {
		t.err = err
		return err
	}
	if err := t.f.Chmod(0o644); err != nil {
		return err
	}
	if err := t.f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(t.f.Name(), t.path); err != nil {
		return err
	}
	f := t.f
	t.f = nil
	dir, err := os.Open(filepath.Dir(t.path))
	if err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(dir.Sync(), dir.Close(), f.Close())
}

// Close implements Target.
func (t *archiveTarget) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.f == nil {
		return nil
	}
	name := t.f.Name()
	err := errors.Join(t.f.Close(), ignore(os.Remove(name), fs.ErrNotExist))
	t.f = nil
	return err
}
