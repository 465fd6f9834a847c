package lazy

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
)

// imageSource is where the blobs of a mount come from.
type imageSource interface {
	Blob(n int) fill.Source
	// Narrow is [backend.Blobs.Narrow].
	Narrow(scope string) string
	DropEarly() error
	Close() error
}

// lateAgain is how long an image that could not be reopened is left alone: to try may mean to read through an archive, and many
// readers may ask.
const lateAgain = time.Second

// lateImage is an image that could not be reopened when a daemon took its mount over. It is tried again when somebody wants
// something of it; until then that is an error. Safe for concurrent use.
type lateImage struct {
	reopen func(context.Context) (*backend.Blobs, error)

	blobs atomic.Pointer[backend.Blobs] // nil: it is not reopened

	mu     sync.Mutex // guards what follows, and is held while it is reopened
	err    error      // of the last try
	tried  time.Time
	closed bool
}

// Blob implements imageSource.
func (l *lateImage) Blob(n int) fill.Source { return &lateBlob{l, n} }

// Narrow implements imageSource: nobody knows whether a secret was handed out for what is not reopened. It waits for nobody.
func (l *lateImage) Narrow(scope string) string {
	if blobs := l.blobs.Load(); blobs != nil {
		return blobs.Narrow(scope)
	}
	if scope == backend.ScopePublic {
		return ""
	}
	return scope
}

// DropEarly implements imageSource: what is reopened has no early stream.
func (l *lateImage) DropEarly() error { return nil }

// Close implements imageSource.
func (l *lateImage) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	if blobs := l.blobs.Load(); blobs != nil {
		return blobs.Close()
	}
	return nil
}

// get returns the blobs, or why they cannot be reached.
func (l *lateImage) get(ctx context.Context) (*backend.Blobs, error) {
	if blobs := l.blobs.Load(); blobs != nil {
		return blobs, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch blobs := l.blobs.Load(); {
	case l.closed:
		return nil, errors.Join(fill.ErrClosed, l.err)
	case blobs != nil:
		return blobs, nil
	case time.Since(l.tried) < lateAgain:
		return nil, l.err
	}
	blobs, err := l.reopen(ctx)
	if ctx.Err() == nil { // else it says nothing about the image
		l.tried = time.Now()
	}
	if err != nil {
		l.err = err
		return nil, err
	}
	l.blobs.Store(blobs)
	return blobs, nil
}

// lateBlob is a blob of a lateImage.
type lateBlob struct {
	image *lateImage
	n     int
}

// Range implements fill.Source.
func (b *lateBlob) Range(ctx context.Context, r fill.Request) (io.ReadCloser, error) {
	blobs, err := b.image.get(ctx)
	if err != nil {
		return nil, err
	}
	return blobs.Blob(b.n).Range(ctx, r)
}

// Retry implements fill.Source. An image that cannot be reopened now is not waited for.
func (b *lateBlob) Retry(err error) fill.Retry {
	blobs := b.image.blobs.Load()
	if blobs == nil {
		return fill.Retry{}
	}
	return blobs.Blob(b.n).Retry(err)
}
