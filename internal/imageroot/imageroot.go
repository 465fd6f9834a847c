// Package imageroot unpacks the layers of a container image into a private directory, each into one of
// its own, so that an overlay of them is the image's root and every file is of a layer.
//
//	root, err := imageroot.Open(ctx, src, imageroot.Options{Base: dir})
//	defer root.Close()
//	// root.Layers, root.Image.Config
//
// A [Root] is the caller's until it is closed. What a process leaves that was killed is removed by the
// next Open below the same base directory: a lock, which ends with its process, tells whose is in use.
package imageroot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// DefaultBase is the directory of roots where none is named. It should be on a disk's filesystem:
// an overlay or a memory filesystem is slower, or no place for an overlay's upper directory.
const DefaultBase = "/var/lib/headstart/record"

// ErrUnsupported is returned for an image that cannot be run from its layers: a Nydus image, or one
// without layers.
var ErrUnsupported = errors.New("unsupported image")

// lockName is the file in each root that its process holds locked, and in the base directory the one that is
// held while roots are made and removed.
const lockName = "lock"

// Options says where and how.
type Options struct {
	Base     string // directory for roots, made when missing; empty: DefaultBase
	Platform string // "os/arch[/variant]"; empty: this machine's
	// Progress, when set, is told of each layer before it is unpacked: its number from 1, how many there
	// are, and its stored size in bytes.
	Progress func(layer, layers int, size int64)
}

// Root is an image whose layers are unpacked. Close it. It is not safe for concurrent use.
type Root struct {
	Image  remote.Image
	Layers []string // directories in overlay's form, the lowest first
	// Scratch is an empty directory beside the layers, for what runs on them.
	Scratch string

	dir  string
	lock *os.File
}

// Open finds the image for o.Platform in src and unpacks its layers. It checks the digests of
// what it reads and of what comes out of it. When it fails, nothing is left. Errors are those of
// [remote.Select] and of the source, ErrUnsupported, and the system's. It takes root: layers have
// owners, devices and trusted attributes.
func Open(ctx context.Context, src remote.Source, o Options) (*Root, error) {
	if o.Base == "" {
		o.Base = DefaultBase
	}
	img, err := remote.Select(ctx, src, o.Platform)
	if err != nil {
		return nil, err
	}
	if img.Nydus() {
		return nil, fmt.Errorf("%w: it is a Nydus image, whose layers hold no files; name the image that it was made from", ErrUnsupported)
	}
	if len(img.Layers) == 0 {
		return nil, fmt.Errorf("%w: it has no layers", ErrUnsupported)
	}
	r, err := newRoot(o.Base)
	if err != nil {
		return nil, fmt.Errorf("make a directory for the image's root: %w", err)
	}
	r.Image = img
	for i, l := range img.Layers {
		if o.Progress != nil {
			o.Progress(i+1, len(img.Layers), l.Descriptor.Size)
		}
		if err := r.unpack(ctx, src, i, l); err != nil {
			return nil, errors.Join(fmt.Errorf("unpack layer %d (%s): %w", i, l.Descriptor.Digest, err), r.Close())
		}
	}
	return r, nil
}

// newRoot makes the directory of a root and removes those of dead processes.
func newRoot(base string) (_ *Root, err error) {
	if base, err = filepath.Abs(base); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(base, 0o700); err != nil {
		return nil, err
	}
	held, err := locked(filepath.Join(base, lockName), 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	// What cannot be removed must not keep the next from being made.
	_ = clean(base)
	dir, err := os.MkdirTemp(base, "root-")
	if err != nil {
		return nil, err
	}
	lock, err := locked(filepath.Join(dir, lockName), unix.LOCK_NB)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	r := &Root{dir: dir, lock: lock, Scratch: filepath.Join(dir, "scratch")}
	if err := os.Mkdir(r.Scratch, 0o700); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// locked opens a file, made when missing, and locks it until it is closed.
func locked(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|flags)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

// clean removes the roots that nobody holds. The base directory is locked.
func clean(base string) error {
	dirs, err := filepath.Glob(filepath.Join(base, "root-*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		lock, err := locked(filepath.Join(dir, lockName), unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		default:
			errs = append(errs, os.RemoveAll(dir), lock.Close())
		}
	}
	return errors.Join(errs...)
}

// unpack makes the directory of the layer i.
func (r *Root) unpack(ctx context.Context, src remote.Source, i int, l remote.Layer) (err error) {
	// Short: 500 of them are to fit into a page of mount options as long as the base is short.
	dir := filepath.Join(r.dir, strconv.Itoa(i))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	stored, err := src.Fetch(ctx, l.Descriptor)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stored.Close()) }()
	tar, err := compression.DecompressStream(stored)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tar.Close()) }()
	sum := l.DiffID.Algorithm().Digester()
	in := io.TeeReader(tar, sum.Hash())
	parents := slices.Clone(r.Layers)
	slices.Reverse(parents)
	if _, err := archive.Apply(ctx, dir, in, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(parents)); err != nil {
		return err
	}
	// The tar's padding counts for its digest, and only the end of the stored bytes says that they are whole.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, stored); err != nil {
		return err
	}
	if got := sum.Digest(); got != l.DiffID {
		return fmt.Errorf("%w: the uncompressed layer has %s, want %s", remote.ErrDigest, got, l.DiffID)
	}
	r.Layers = append(r.Layers, dir)
	return nil
}

// Close removes the directory with all that is in it. Nothing may be mounted there any more.
func (r *Root) Close() error {
	if r.lock == nil {
		return nil
	}
	err := errors.Join(os.RemoveAll(r.dir), r.lock.Close())
	r.lock = nil
	return err
}
