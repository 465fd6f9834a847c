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

// lateImage is an image that is reopened beside its use, by a daemon that took its mount over: that may take reading through an archive, or wait
// for a file system that hangs, and others are to be served meanwhile. Where it fails it is tried again when somebody wants something
// of it; until then that is an error. Safe for concurrent use.
type lateImage struct {
	reopen func() (*backend.Blobs, error) // called by one at a time

	blobs atomic.Pointer[backend.Blobs] // nil: it is not reopened

	mu     sync.Mutex    // guards what follows
	trying chan struct{} // closed at the end of the try that is on its way; nil: none is
	err    error         // of the last try
	tried  time.Time     // its end
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

// Close implements imageSource. What is being reopened is closed when it is there, and nobody waits for it.
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

// get returns the blobs, or why they cannot be reached. It waits for a try until ctx ends.
func (l *lateImage) get(ctx context.Context) (*backend.Blobs, error) {
	l.mu.Lock()
	if l.trying == nil && time.Since(l.tried) >= lateAgain {
		l.try()
	}
	trying := l.trying
	l.mu.Unlock()
	if trying != nil {
		select {
		case <-trying:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch blobs := l.blobs.Load(); {
	case l.closed:
		return nil, errors.Join(fill.ErrClosed, l.err)
	case blobs != nil:
		return blobs, nil
	}
	return nil, l.err
}

// try begins to reopen the image, unless that is done. The caller holds mu, and nobody tries.
func (l *lateImage) try() {
	if l.closed || l.blobs.Load() != nil {
		return
	}
	done := make(chan struct{})
	l.trying = done
	go func() {
		defer close(done)
		blobs, err := l.reopen()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.trying, l.tried, l.err = nil, time.Now(), err
		switch {
		case err != nil:
		case l.closed:
			l.err = blobs.Close()
		default:
			l.blobs.Store(blobs)
		}
	}()
}

// lateBlob is a blob of a lateImage.
type lateBlob struct {
	image *lateImage
	n     int
}

// Range implements fill.Source.
func (b *lateBlob) Range(ctx context.Context, r fill.Request) (io.ReadCloser, error) {
	blobs := b.image.blobs.Load()
	if blobs == nil {
		var err error
		if blobs, err = b.image.get(ctx); err != nil {
			return nil, err
		}
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
