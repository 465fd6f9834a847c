package remote

import (
	"context"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ReaderAt reads content of a source by ranges, each with a request of its own. What it
// reads is not verified. Safe for concurrent use, until the source is closed.
type ReaderAt struct {
	ctx  context.Context //nolint:containedctx // io.ReaderAt has none
	src  Source
	desc ocispec.Descriptor
}

// NewReaderAt returns a reader of desc's content. It asks for nothing yet. Its reads end
// with ctx.
func NewReaderAt(ctx context.Context, src Source, desc ocispec.Descriptor) *ReaderAt {
	return &ReaderAt{ctx: ctx, src: src, desc: desc}
}

// Size returns the bytes that the descriptor says.
func (r *ReaderAt) Size() int64 { return r.desc.Size }

// ReadAt implements io.ReaderAt. Beyond the content's end it returns io.EOF.
func (r *ReaderAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= r.desc.Size && len(p) > 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), r.desc.Size-off)
	rc, err := r.src.FetchRange(r.ctx, r.desc, off, n)
	if err != nil {
		return 0, err
	}
	got, err := io.ReadFull(rc, p[:n])
	if cerr := rc.Close(); err == nil {
		err = cerr
	}
	if err == nil && n < int64(len(p)) {
		err = io.EOF
	}
	return got, err
}
