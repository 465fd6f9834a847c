package backend

import (
	"context"
	"io"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// maxSpare bounds the bytes of an early stream that are read for nothing: in front of what is asked for, and behind it, where
// a blob has its table, so that the connection is used again.
const maxSpare = 64 << 10

// early is the stream of a prefetch blob that was asked for when the manifest named it, while the bootstrap was still on its
// way: a start over a slow link has it sooner by the time that it takes to fetch the bootstrap and to mount it. Safe for concurrent use.
type early struct {
	id     string
	size   int64
	cancel context.CancelFunc
	done   chan struct{} // closed when what follows is set
	rc     io.ReadCloser
	err    error
	trip   time.Duration // until the answer began

	mu    sync.Mutex // guards what follows
	taken bool       // whoever took it closes it
}

// startEarly asks for the prefetch blob that m names, if want says so of its id; nil when it names none.
func startEarly(ctx context.Context, src remote.Source, m ocispec.Manifest, want func(id string) bool) *early {
	doc := nydusimage.Document{Manifest: m}
	last, err := doc.Bootstrap()
	if err != nil {
		return nil
	}
	named := last.Annotations[nydusimage.AnnotationPrefetch]
	for _, l := range doc.Blobs() {
		if l.Digest.Validate() != nil || l.Digest.Encoded() != named || l.Size <= 0 || l.Size > remote.MaxBlobSize || !want(named) {
			continue
		}
		// Who asked is answered before the stream is read.
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		e := &early{id: named, size: l.Size, cancel: cancel, done: make(chan struct{})}
		file := File{ID: e.id, Size: e.size}
		began := time.Now()
		go func() {
			defer close(e.done)
			e.rc, e.err = src.FetchRange(ctx, file.descriptor(), 0, e.size)
			e.trip = time.Since(began)
		}()
		return e
	}
	return nil
}

// claim makes the caller the one who reads the stream; false: somebody is already, or nobody may any more.
func (e *early) claim() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	first := !e.taken
	e.taken = true
	return first
}

// drop ends a stream that nobody took. Nobody can from then on.
func (e *early) drop() error {
	if e == nil || !e.claim() {
		return nil
	}
	return e.end()
}

// end closes the stream and returns when nothing of it is left.
func (e *early) end() error {
	e.cancel()
	<-e.done
	if e.rc == nil {
		return nil
	}
	return e.rc.Close()
}

// take returns the bytes that r asks for of blob id; nil when they are not this stream's, which has one reader, or it failed: then
// a request of its own has them, or says why not.
func (e *early) take(ctx context.Context, id string, r fill.Request) io.ReadCloser {
	if e == nil || id != e.id || !r.Stream || !e.claim() {
		return nil
	}
	if r.Meta || r.Suspect || r.Offset > maxSpare || r.Offset+r.Length > e.size {
		_ = e.end() // much of it is here already
		return nil
	}
	stop := context.AfterFunc(ctx, e.cancel)
	<-e.done
	err := e.err
	if err == nil {
		_, err = io.CopyN(io.Discard, e.rc, r.Offset)
	}
	if err != nil {
		stop()
		_ = e.end() // it is of no use
		return nil
	}
	return &earlyBody{LimitedReader: io.LimitedReader{R: e.rc, N: r.Length}, e: e, spare: e.size - r.Offset - r.Length, stop: stop}
}

// earlyBody is what was asked for of an early stream.
type earlyBody struct {
	io.LimitedReader
	e     *early
	spare int64 // bytes of the stream behind it
	stop  func() bool
}

// Trip returns how long the answer took.
func (b *earlyBody) Trip() time.Duration { return b.e.trip }

// Close implements io.Closer. It is called once.
func (b *earlyBody) Close() error {
	if b.spare <= maxSpare && b.N == 0 {
		_, _ = io.CopyN(io.Discard, b.e.rc, b.spare) // for the connection's sake
	}
	b.stop()
	return b.e.end()
}
