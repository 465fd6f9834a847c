package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// tempPrefix begins the names of files that are being written, in the layout's root. A
// writer holds a lock on its own; one without a lock was left by a writer that died.
const tempPrefix = ".headstart-"

// lockPoll is how often a lock that another process holds is tried.
const lockPoll = 10 * time.Millisecond

// layoutTarget writes an OCI image layout directory. Blobs appear under their names when they
// are whole and on disk; index.json changes last, by rename, under a lock of the directory,
// so that several writers of one layout lose nothing of each other.
type layoutTarget struct {
	ref Reference
	dir *os.Root
}

// openLayoutTarget makes the directory and its oci-layout file when they are missing and
// removes what writers that died have left.
func openLayoutTarget(ctx context.Context, ref Reference) (_ Target, err error) {
	if err := os.MkdirAll(ref.Path, 0o755); err != nil {
		return nil, fmt.Errorf("oci layout: %w", err)
	}
	dir, err := os.OpenRoot(ref.Path)
	if err != nil {
		return nil, fmt.Errorf("oci layout: %w", err)
	}
	t := &layoutTarget{ref: ref, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, dir.Close())
		}
	}()
	if err := t.locked(ctx, t.prepare); err != nil {
		return nil, fmt.Errorf("oci layout %s: %w", ref.Path, err)
	}
	return t, nil
}

func (t *layoutTarget) Close() error { return t.dir.Close() }

// prepare runs under the lock.
func (t *layoutTarget) prepare() error {
	if err := t.sweep(); err != nil {
		return err
	}
	if err := t.dir.MkdirAll(ocispec.ImageBlobsDir+"/sha256", 0o755); err != nil {
		return err
	}
	if err := errors.Join(t.syncDir(ocispec.ImageBlobsDir), t.syncDir(".")); err != nil {
		return err
	}
	data, err := dirFiles{t.dir}.document(ocispec.ImageLayoutFile, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		data, err = json.Marshal(ocispec.ImageLayout{Version: layoutVersion})
		if err != nil {
			return err
		}
		return t.replace(ocispec.ImageLayoutFile, data)
	}
	if err != nil {
		return err
	}
	var l ocispec.ImageLayout
	if err := json.Unmarshal(data, &l); err != nil || l.Version != layoutVersion {
		return fmt.Errorf("%w: its %s file says %.80q, want version %q", ErrUnsupported, ocispec.ImageLayoutFile, data, layoutVersion)
	}
	return nil
}

// sweep removes temporary files that nobody holds a lock on. New ones are made and locked
// under the directory's lock, which the caller has.
func (t *layoutTarget) sweep() error {
	entries, err := fs.ReadDir(t.dir.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) || !e.Type().IsRegular() {
			continue
		}
		f, err := t.dir.Open(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			err = t.dir.Remove(e.Name())
		}
		if err = errors.Join(err, f.Close()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// locked runs f while no other process or goroutine runs one for the same directory.
func (t *layoutTarget) locked(ctx context.Context, f func() error) (err error) {
	d, err := t.dir.Open(".")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }() // closing releases the lock
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock: %w", err)
		}
		if err := sleep(ctx, lockPoll); err != nil {
			return fmt.Errorf("lock held by another writer: %w", err)
		}
	}
}

// temp makes a temporary file that sweep leaves alone until it is closed.
func (t *layoutTarget) temp(ctx context.Context) (f *os.File, err error) {
	err = t.locked(ctx, func() error {
		f, err = t.tempLocked()
		return err
	})
	return f, err
}

func (t *layoutTarget) tempLocked() (*os.File, error) {
	for range 100 {
		name := fmt.Sprintf("%s%d-%x", tempPrefix, os.Getpid(), time.Now().UnixNano())
		f, err := t.dir.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close(), t.dir.Remove(name))
		}
		return f, nil
	}
	return nil, errors.New("no free name for a temporary file")
}

// settle syncs f and gives it its name, or removes it when err is not nil. It closes f.
func (t *layoutTarget) settle(f *os.File, name string, err error) error {
	temp := filepath.Base(f.Name())
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = t.dir.Rename(temp, name)
	} else {
		err = errors.Join(err, ignore(t.dir.Remove(temp), fs.ErrNotExist))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return t.syncDir(filepath.Dir(name))
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

func (t *layoutTarget) syncDir(name string) error {
	d, err := t.dir.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// replace writes a small file whole; the caller has the lock.
func (t *layoutTarget) replace(name string, data []byte) error {
	f, err := t.tempLocked()
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return t.settle(f, name, err)
}

// Exists implements Target. A file of the right name and size is taken as the blob.
func (t *layoutTarget) Exists(_ context.Context, desc ocispec.Descriptor) (bool, error) {
	if err := checkDescriptor(desc); err != nil {
		return false, err
	}
	info, err := t.dir.Stat(blobName(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("oci layout %s: %w", t.ref.Path, err)
	}
	return info.Mode().IsRegular() && info.Size() == desc.Size, nil
}

// intact reads the file that has the name and size of a blob, and reports whether it has its digest too. One that cannot be read has
// not; the error is that of ctx.
func (t *layoutTarget) intact(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	f, _, err := dirFiles{t.dir}.regular(blobName(desc.Digest))
	if err != nil {
		return false, ctx.Err()
	}
	v := verify(f, desc, t.ref.Path)
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, untilDone{ctx.Err, v}, make([]byte, 256<<10))
	return errors.Join(err, v.Close()) == nil, ctx.Err()
}

// Push implements Target. A blob that is a file on this host, or is to be verified, takes the place of a damaged one; others
// are only looked for.
func (t *layoutTarget) Push(ctx context.Context, b Blob) (PushResult, error) {
	found, err := t.Exists(ctx, b.Descriptor)
	if err == nil && found && (b.File != "" || b.Verify) {
		if found, err = t.intact(ctx, b.Descriptor); err != nil {
			err = fmt.Errorf("oci layout %s: read blob %s: %w", t.ref.Path, b.Descriptor.Digest, err)
		}
	}
	if err != nil {
		return 0, err
	}
	if found {
		return Existed, nil
	}
	name := blobName(b.Descriptor.Digest)
	if err := t.dir.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return 0, fmt.Errorf("oci layout %s: %w", t.ref.Path, err)
	}
	f, err := t.link(ctx, b)
	if err != nil {
		return 0, fmt.Errorf("oci layout %s: %w", t.ref.Path, err)
	}
	if f == nil {
		if f, err = t.temp(ctx); err != nil {
			return 0, fmt.Errorf("oci layout %s: %w", t.ref.Path, err)
		}
		err = copyBlob(ctx, f, b)
	}
	if err := t.settle(f, name, err); err != nil {
		return 0, fmt.Errorf("oci layout %s: write blob %s: %w", t.ref.Path, b.Descriptor.Digest, err)
	}
	return Uploaded, nil
}

// link makes b's file a temporary file of the layout and opens it. It returns nil where
// that cannot be: there is no file, it is on another filesystem, or the size is not that of the blob.
func (t *layoutTarget) link(ctx context.Context, b Blob) (f *os.File, err error) {
	if b.File == "" {
		return nil, nil //nolint:nilnil // no file is no error
	}
	info, err := os.Lstat(b.File)
	if err != nil || !info.Mode().IsRegular() || info.Size() != b.Descriptor.Size {
		return nil, nil //nolint:nilnil // copying tells what is wrong with it
	}
	err = t.locked(ctx, func() error {
		f, err = t.linkLocked(b.File)
		return err
	})
	return f, err
}

// linkLocked links file under a temporary name; nil where links cannot be made. The caller
// has the directory's lock.
func (t *layoutTarget) linkLocked(file string) (*os.File, error) {
	temp, err := t.tempLocked()
	if err != nil {
		return nil, err
	}
	name := filepath.Base(temp.Name())
	if err := errors.Join(t.dir.Remove(name), temp.Close()); err != nil {
		return nil, err
	}
	dir, err := t.dir.Open(".")
	if err != nil {
		return nil, err
	}
	err = unix.Linkat(unix.AT_FDCWD, file, int(dir.Fd()), name, 0)
	if cerr := dir.Close(); err != nil || cerr != nil {
		return nil, cerr // another filesystem, or one without links
	}
	f, err := t.dir.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(err, t.dir.Remove(name))
	}
	if err := errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), f.Chmod(0o644)); err != nil {
		return nil, errors.Join(err, f.Close(), t.dir.Remove(name))
	}
	return f, nil
}

// copyBlob writes b to w, verified.
func copyBlob(ctx context.Context, w io.Writer, b Blob) error {
	rc, err := b.Open(ctx)
	if err != nil {
		return err
	}
	v := verify(rc, b.Descriptor, "")
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, untilDone{ctx.Err, v}, make([]byte, 256<<10))
	return errors.Join(err, v.Close())
}

// untilDone is a reader that ends when its context does.
type untilDone struct {
	ended func() error
	io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ended(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// Tag implements Target.
func (t *layoutTarget) Tag(ctx context.Context, desc ocispec.Descriptor, data []byte) error {
	if err := checkDocument(t.ref, desc, data); err != nil {
		return err
	}
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	if _, err := t.Push(ctx, Blob{Descriptor: desc, Verify: true, Open: open}); err != nil {
		return err
	}
	err := t.locked(ctx, func() error {
		index, err := readIndex(dirFiles{t.dir}, t.ref.Path)
		if _, serr := t.dir.Stat(ocispec.ImageIndexFile); errors.Is(serr, fs.ErrNotExist) {
			index, err = emptyIndex(), nil
		}
		if err != nil {
			return err
		}
		index.Manifests = withEntry(index.Manifests, entry(t.ref, desc))
		data, err := encodeIndex(index)
		if err != nil {
			return err
		}
		return t.replace(ocispec.ImageIndexFile, data)
	})
	if err != nil {
		return fmt.Errorf("oci layout %s: %s: %w", t.ref.Path, ocispec.ImageIndexFile, err)
	}
	return nil
}

func emptyIndex() ocispec.Index {
	return ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
}

func encodeIndex(index ocispec.Index) ([]byte, error) {
	data, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return nil, err
	}
	if data = append(data, '\n'); len(data) > MaxManifestSize {
		return nil, fmt.Errorf("%w: %d bytes with the new entry, at most %d", ErrTooLarge, len(data), MaxManifestSize)
	}
	return data, nil
}

// entry is desc as an entry of a layout's index, named as ref says.
func entry(ref Reference, desc ocispec.Descriptor) ocispec.Descriptor {
	annotations := make(map[string]string, len(desc.Annotations)+1)
	maps.Copy(annotations, desc.Annotations)
	delete(annotations, ocispec.AnnotationRefName)
	if ref.Tag != "" {
		annotations[ocispec.AnnotationRefName] = ref.Tag
	}
	desc.Annotations = nil
	if len(annotations) > 0 {
		desc.Annotations = annotations
	}
	return desc
}

// withEntry returns entries with e in place of those that it replaces: of its name or, when it
// has none, of its digest without a name.
func withEntry(entries []ocispec.Descriptor, e ocispec.Descriptor) []ocispec.Descriptor {
	name := e.Annotations[ocispec.AnnotationRefName]
	kept := filter(entries, func(d ocispec.Descriptor) bool {
		return d.Annotations[ocispec.AnnotationRefName] != name || (name == "" && d.Digest != e.Digest)
	})
	return append(kept, e)
}
