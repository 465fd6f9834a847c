package remote

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// defaultContainerd is where containerd listens unless it is configured otherwise.
const defaultContainerd = "/run/containerd/containerd.sock"

// containerdBuffer is how much one call of containerd's content service carries; its limit
// is that of a message, 16 MiB.
const containerdBuffer = 1 << 20

// contentStore is one namespace of a containerd, with what its readers and writers share.
type contentStore struct {
	ref       Reference
	o         settings
	namespace string
	client    *containerd.Client
}

// openContainerd makes a client; containerd is contacted by the first call.
func openContainerd(ref Reference, o settings) (*contentStore, error) {
	socket := strings.TrimPrefix(o.ContainerdAddress, "unix://")
	// The library's own dialer waits for a socket that is not there.
	dial := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: o.Timeouts.Connect}).DialContext(ctx, "unix", socket)
	})
	client, err := containerd.New(socket, containerd.WithTimeout(o.Timeouts.Connect), containerd.WithExtraDialOpts([]grpc.DialOption{dial}))
	if err != nil {
		return nil, fmt.Errorf("containerd %s: %w", o.ContainerdAddress, err)
	}
	namespace := ref.Namespace
	if namespace == "" {
		namespace = o.Namespace
	}
	return &contentStore{ref: ref, o: o, namespace: namespace, client: client}, nil
}

func (s *contentStore) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(quiet(ctx), s.namespace)
}

// brief returns the context of a call that is answered at once.
func (s *contentStore) brief(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(s.in(ctx), s.o.Timeouts.Header,
		fmt.Errorf("%w: containerd %s: no answer for %s", ErrStalled, s.o.ContainerdAddress, s.o.Timeouts.Header))
}

// wrap names the namespace and classes what containerd answered.
func (s *contentStore) wrap(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); errors.Is(cause, ErrStalled) {
		err = cause
	}
	switch {
	case errdefs.IsNotFound(err):
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	case errdefs.IsUnavailable(err):
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return fmt.Errorf("containerd %s: namespace %s: %s: %w", s.o.ContainerdAddress, s.namespace, what, err)
}

func (s *contentStore) Close() error { return s.client.Close() }

// containerdSource reads images from containerd's image and content stores.
type containerdSource struct{ *contentStore }

// Resolve implements Source: the image of that name, or content of the reference's digest.
func (s containerdSource) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	ctx, cancel := s.brief(ctx)
	defer cancel()
	if s.ref.Digest != "" {
		return s.byDigest(ctx, s.ref.Digest)
	}
	img, err := s.client.ImageService().Get(ctx, s.ref.Name())
	if err != nil {
		return ocispec.Descriptor{}, s.wrap(ctx, "image "+s.ref.Name(), err)
	}
	return img.Target, nil
}

// byDigest describes content that no image record needs to name: its media type is in it.
func (s containerdSource) byDigest(ctx context.Context, d digest.Digest) (ocispec.Descriptor, error) {
	info, err := s.client.ContentStore().Info(ctx, d)
	if err != nil {
		return ocispec.Descriptor{}, s.wrap(ctx, "manifest "+d.String(), err)
	}
	desc := ocispec.Descriptor{Digest: d, Size: info.Size}
	data, err := ReadAll(ctx, s, desc, MaxManifestSize)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if desc.MediaType, err = sniff(data); err != nil {
		return ocispec.Descriptor{}, s.wrap(ctx, d.String(), err)
	}
	return desc, nil
}

// Fetch implements Source.
func (s containerdSource) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := checkDescriptor(desc); err != nil {
		return nil, err
	}
	rc, err := s.open(ctx, desc, 0, desc.Size)
	if err != nil {
		return nil, err
	}
	return verify(rc, desc, "containerd "+s.o.ContainerdAddress+": namespace "+s.namespace), nil
}

// FetchRange implements Source.
func (s containerdSource) FetchRange(ctx context.Context, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	if err := checkRange(desc, off, n); err != nil {
		return nil, err
	}
	rc, err := s.open(ctx, desc, off, n)
	if err != nil {
		return nil, err
	}
	return &exactly{rc: rc, left: n}, nil
}

func (s containerdSource) open(ctx context.Context, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	what := "content " + desc.Digest.String()
	ctx = s.in(ctx)
	ra, err := s.client.ContentStore().ReaderAt(ctx, desc)
	if err != nil {
		return nil, s.wrap(ctx, what, err)
	}
	if ra.Size() != desc.Size {
		err := fmt.Errorf("%w: %d bytes, its descriptor says %d", ErrDigest, ra.Size(), desc.Size)
		return nil, s.wrap(ctx, what, errors.Join(err, ra.Close()))
	}
	buffer := int(min(n, containerdBuffer)) // each read of it is one call
	return &contentReader{Reader: bufio.NewReaderSize(io.NewSectionReader(ra, off, n), buffer), ra: ra}, nil
}

type contentReader struct {
	io.Reader
	ra content.ReaderAt
}

func (r *contentReader) Close() error { return r.ra.Close() }

// fallbackSource asks first, and second for what first does not give.
type fallbackSource struct {
	first, second Source
	o             settings
}

// Fallback returns a source that asks first and, for what it does not have or cannot give,
// second: an image whose layers containerd discarded after unpacking is read from its
// registry, blob by blob. A stream that has begun is not replaced. Close closes both.
func Fallback(first, second Source, o Options) Source {
	return &fallbackSource{first: first, second: second, o: o.settle()}
}

// either calls f with each source until one succeeds.
func either[T any](ctx context.Context, s *fallbackSource, what string, f func(Source) (T, error)) (T, error) {
	v, err := f(s.first)
	if err == nil || ctx.Err() != nil || errors.Is(err, ErrInvalid) || errors.Is(err, ErrRange) {
		return v, err
	}
	s.o.Log.Info("read from the second source", zap.String("what", what), zap.Error(err))
	v, err2 := f(s.second)
	if err2 != nil {
		return v, errors.Join(err, err2)
	}
	return v, nil
}

func (s *fallbackSource) Resolve(ctx context.Context) (ocispec.Descriptor, error) {
	return either(ctx, s, "reference", func(src Source) (ocispec.Descriptor, error) { return src.Resolve(ctx) })
}

func (s *fallbackSource) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return either(ctx, s, desc.Digest.String(), func(src Source) (io.ReadCloser, error) { return src.Fetch(ctx, desc) })
}

func (s *fallbackSource) FetchRange(ctx context.Context, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	return either(ctx, s, desc.Digest.String(), func(src Source) (io.ReadCloser, error) { return src.FetchRange(ctx, desc, off, n) })
}

func (s *fallbackSource) Close() error { return errors.Join(s.first.Close(), s.second.Close()) }

// annotationRef is on a layer of a Nydus image that says where in another layer, which the manifest does
// not list, the data are. Source: nydus-snapshotter pkg/label/label.go NydusRefLayer.
const annotationRef = "containerd.io/snapshot/nydus-ref"

// gcLabels are the labels by which containerd's garbage collector follows a manifest or
// index to what it refers to.
// Source: containerd docs/garbage-collection.md, "containerd.io/gc.ref.content".
func gcLabels(mediaType string, data []byte) (map[string]string, error) {
	labels := make(map[string]string)
	if images.IsIndexType(mediaType) {
		index, err := parseIndex(data)
		if err != nil {
			return nil, err
		}
		for i, d := range index.Manifests {
			labels[fmt.Sprintf("containerd.io/gc.ref.content.m.%d", i)] = d.Digest.String()
		}
		return labels, nil
	}
	m, err := ParseManifest(data)
	if err != nil {
		return nil, err
	}
	labels["containerd.io/gc.ref.content.config"] = m.Config.Digest.String()
	for i, d := range m.Layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = d.Digest.String()
		if ref := digest.Digest(d.Annotations[annotationRef]); ref.Validate() == nil {
			labels[fmt.Sprintf("containerd.io/gc.ref.content.ref.%d", i)] = ref.String()
		}
	}
	return labels, nil
}
