package remote

import (
	"context"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Source gives the content of an image. Open one with [OpenSource]. Its methods are safe for
// concurrent use; Close is called once, when no reader is in use any more.
type Source interface {
	// Resolve returns the descriptor that the reference points to, an index or a manifest:
	// media type, digest and size. It returns [ErrNotFound] when there is none.
	Resolve(ctx context.Context) (ocispec.Descriptor, error)

	// Fetch returns exactly desc.Size bytes with digest desc.Digest; a stream that differs
	// ends with [ErrDigest] instead of io.EOF. The caller closes it. [ErrNotFound] when the
	// content is not there.
	Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)

	// FetchRange returns the n bytes from offset off of the content of desc, not verified:
	// a digest covers the whole. A stream that is shorter ends with io.ErrUnexpectedEOF.
	// [ErrRange] when off, n lie outside [0, desc.Size]. The caller closes it.
	FetchRange(ctx context.Context, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error)

	// Close releases connections and files.
	Close() error
}

// Target takes the content of an image. Open one with [OpenTarget]. Push and Exists are safe
// for concurrent use; Tag comes after all of them. [Publish] does it in the right order.
type Target interface {
	// Exists reports whether the target has desc already.
	Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error)

	// Push writes one blob, or one manifest by its digest, and returns when the target has
	// it whole: bytes that do not match b.Descriptor are [ErrDigest] and leave nothing.
	Push(ctx context.Context, b Blob) (PushResult, error)

	// Tag writes data, the manifest or index that desc describes, and makes the reference's
	// name point at it, atomically: a reader sees the old image or the new one. Everything
	// it refers to was pushed before. A reference that is a digest must be desc's.
	Tag(ctx context.Context, desc ocispec.Descriptor, data []byte) error

	// Close releases connections, leases and temporary files. What was not tagged is not
	// visible by name; an archive that was not tagged does not exist.
	Close() error
}

// Blob is content to push.
type Blob struct {
	Descriptor ocispec.Descriptor

	// Open returns the bytes from their start; it is called again after a failure and may
	// be called from another goroutine.
	Open func(ctx context.Context) (io.ReadCloser, error)

	// File, if not empty, is a file on this host that holds exactly the bytes that Open gives, was
	// verified by the caller, and is not written any more, though it may be removed. A layout on the same
	// filesystem links it in place of copying it; others ignore it.
	File string

	// Verify has a blob that a layout has already read before it is taken, as one with a File is: a damaged one is
	// replaced. Others, which verify what they are given before they keep it, ignore it.
	Verify bool

	// MountFrom is a repository of the target's registry that may have the blob: the
	// registry is asked to take it from there. Others than registry targets ignore it.
	MountFrom string
}

// PushResult says how a blob came to be in the target.
type PushResult uint8

// The ways of [PushResult].
const (
	Uploaded PushResult = iota + 1 // its bytes were written
	Existed                        // it was there
	Mounted                        // the registry took it from another of its repositories
)

// String returns the result in lower case.
func (r PushResult) String() string {
	switch r {
	case Uploaded:
		return "uploaded"
	case Existed:
		return "existed"
	case Mounted:
		return "mounted"
	default:
		return "unknown"
	}
}
