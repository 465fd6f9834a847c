package nydusimage

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptrace"
	"os"
	"path"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

const (
	bootstrapName = "image/image.boot" // rafs-format.md, 5.3
	// maxLayer bounds what a bootstrap layer may unpack to: the bootstrap of ten million
	// files takes about 2 GiB.
	maxLayer = 8 << 30
)

// bootstrap is a bootstrap that is being fetched.
type bootstrap struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when what follows is there
	file   *os.File
	size   int64
	diffID digest.Digest
	err    error
}

// startBootstrap begins to fetch a bootstrap layer. Its wait or drop is called. When it returns, the request is on its way: the
// connection that the manifest came over is the bootstrap's then, and others, that nobody waits for as much, dial.
func startBootstrap(ctx context.Context, src remote.Source, desc ocispec.Descriptor, tempDir string) *bootstrap {
	b := &bootstrap{done: make(chan struct{})}
	ctx, b.cancel = context.WithCancel(ctx)
	asked := make(chan struct{})
	once := sync.OnceFunc(func() { close(asked) })
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { once() }})
	go func() {
		defer close(b.done)
		defer once()
		b.file, b.size, b.diffID, b.err = fetchBootstrap(ctx, src, desc, tempDir)
	}()
	<-asked
	return b
}

// wait returns what [fetchBootstrap] did.
func (b *bootstrap) wait() (*os.File, int64, digest.Digest, error) {
	<-b.done
	b.cancel()
	return b.file, b.size, b.diffID, b.err
}

// drop ends the fetch; b may be nil.
func (b *bootstrap) drop() error {
	if b == nil {
		return nil
	}
	b.cancel()
	<-b.done
	if b.file == nil {
		return nil
	}
	return b.file.Close()
}

// fetchBootstrap unpacks the bootstrap of a layer into a file without a name and returns
// it with its size and the digest of the layer's tar. Every byte of the layer is read, so
// that its digest is verified.
func fetchBootstrap(ctx context.Context, src remote.Source, desc ocispec.Descriptor, tempDir string) (f *os.File, size int64, diffID digest.Digest, err error) {
	rc, err := src.Fetch(ctx, desc)
	if err != nil {
		return nil, 0, "", err
	}
	defer func() {
		if err = closeBoth(f, err, rc); err != nil {
			f, size, diffID = nil, 0, ""
		}
	}()
	stored := bufio.NewReaderSize(rc, 1<<16)
	plain, err := decompress(stored)
	if err != nil {
		return nil, 0, "", err
	}
	defer plain.Close()
	limited := &io.LimitedReader{R: plain, N: maxLayer}
	digester := digest.SHA256.Digester()
	f, size, err = findBootstrap(io.TeeReader(limited, digester.Hash()), tempDir)
	if limited.N <= 0 {
		err = errors.Join(err, fmt.Errorf("%w: unpacks to more than %d bytes", ErrInvalid, int64(maxLayer)))
	}
	if err == nil {
		_, err = io.Copy(io.Discard, stored) // what follows the compressed stream is hashed too
	}
	return f, size, digester.Digest(), err
}

// decompress returns the tar in r, which is gzip, zstd or plain; r's first bytes tell.
func decompress(r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzip.NewReader(r)
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}

// findBootstrap copies the bootstrap out of the tar r, which it reads to its end.
func findBootstrap(r io.Reader, tempDir string) (f *os.File, size int64, err error) {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return f, 0, fmt.Errorf("%w: tar: %w", ErrInvalid, err)
		}
		if path.Clean("/"+h.Name) != "/"+bootstrapName || h.Typeflag != tar.TypeReg {
			continue
		}
		if f != nil {
			return f, 0, fmt.Errorf("%w: two entries %s", ErrInvalid, bootstrapName)
		}
		size = h.Size
		if f, err = spool(tempDir, t); err != nil {
			return nil, 0, err
		}
	}
	if f == nil {
		return nil, 0, fmt.Errorf("%w: no entry %s", ErrInvalid, bootstrapName)
	}
	_, err = io.Copy(io.Discard, r) // padding after the last entry is part of the digest
	return f, size, err
}
