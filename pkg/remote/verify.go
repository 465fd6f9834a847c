package remote

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// checkDescriptor refuses a descriptor that nothing can be verified against.
func checkDescriptor(desc ocispec.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: descriptor digest %q: %w", ErrInvalid, short(desc.Digest), err)
	}
	if desc.Size < 0 || desc.Size > MaxBlobSize {
		return fmt.Errorf("%w: descriptor %s: size %d, want 0 to %d", ErrInvalid, desc.Digest, desc.Size, int64(MaxBlobSize))
	}
	return nil
}

// short bounds what a message repeats of a digest that may be anything.
func short(d digest.Digest) string {
	if len(d) > 160 {
		return string(d[:160]) + "…"
	}
	return string(d)
}

// verifier passes desc.Size bytes of rc on and ends with [ErrDigest] unless they have the
// digest and nothing follows. The last bytes are held back until that is known: who got all
// of them got the right ones.
type verifier struct {
	rc    io.ReadCloser
	v     digest.Verifier
	desc  ocispec.Descriptor
	where string
	off   int64
	err   error // sticky: io.EOF or what went wrong
}

// verify returns a verifier; where, which may be empty, begins its errors.
func verify(rc io.ReadCloser, desc ocispec.Descriptor, where string) io.ReadCloser {
	return &verifier{rc: rc, v: desc.Digest.Verifier(), desc: desc, where: where}
}

func (r *verifier) mismatch(format string, args ...any) error {
	err := fmt.Errorf("%w: %s: %s", ErrDigest, r.desc.Digest, fmt.Sprintf(format, args...))
	if r.where != "" {
		err = fmt.Errorf("%s: %w", r.where, err)
	}
	return err
}

func (r *verifier) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if left := r.desc.Size - r.off; int64(len(p)) > left {
		p = p[:left]
	}
	var n int
	var err error
	if len(p) > 0 {
		n, err = r.rc.Read(p)
	}
	_, _ = r.v.Write(p[:n]) // a hash never fails
	r.off += int64(n)
	switch {
	case r.off == r.desc.Size:
		if r.err = r.end(err); !errors.Is(r.err, io.EOF) {
			return 0, r.err
		}
		return n, r.err
	case errors.Is(err, io.EOF):
		r.err = r.mismatch("got %d bytes, want %d", r.off, r.desc.Size)
		return n, r.err
	case err != nil:
		r.err = err
		return n, r.err
	}
	return n, nil
}

// end checks the digest and that nothing follows; io.EOF when all is well.
func (r *verifier) end(err error) error {
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for tries := 0; err == nil; tries++ {
		var one [1]byte
		var n int
		if n, err = r.rc.Read(one[:]); n > 0 {
			return r.mismatch("more than the %d bytes of its descriptor", r.desc.Size)
		}
		if tries > 100 {
			return io.ErrNoProgress
		}
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	if !r.v.Verified() {
		return r.mismatch("%d bytes of other content", r.desc.Size)
	}
	return io.EOF
}

func (r *verifier) Close() error { return r.rc.Close() }

// ReadAll returns the content of desc, verified and held in memory; it returns [ErrTooLarge]
// when desc.Size exceeds limit, without fetching. Errors are those of [Source.Fetch].
func ReadAll(ctx context.Context, src Source, desc ocispec.Descriptor, limit int64) ([]byte, error) {
	if desc.Size > limit {
		return nil, fmt.Errorf("%w: %s: %d bytes, at most %d are read into memory", ErrTooLarge, short(desc.Digest), desc.Size, limit)
	}
	rc, err := src.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(rc)
	if err = errors.Join(err, rc.Close()); err != nil {
		return nil, err
	}
	return data, nil
}

// checkRange refuses a range outside of desc's content.
func checkRange(desc ocispec.Descriptor, off, n int64) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	if off < 0 || n < 0 || off > desc.Size || n > desc.Size-off {
		return fmt.Errorf("%w: %s: [%d, +%d) of %d bytes", ErrRange, desc.Digest, off, n, desc.Size)
	}
	return nil
}

// exactly passes n bytes of rc on; fewer end with io.ErrUnexpectedEOF.
type exactly struct {
	rc   io.ReadCloser
	left int64
}

func (r *exactly) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := r.rc.Read(p)
	r.left -= int64(n)
	if r.left > 0 && errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (r *exactly) Close() error { return r.rc.Close() }
