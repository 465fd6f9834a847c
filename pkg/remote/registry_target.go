package remote

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registryTarget writes to the first endpoint that may be pushed to.
type registryTarget struct{ *repository }

func (t registryTarget) Close() error {
	t.close()
	return nil
}

func (t registryTarget) host(ctx context.Context) (docker.RegistryHost, error) {
	hosts, err := t.endpoints(ctx, docker.HostCapabilityPush)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	return hosts[0], nil
}

// Exists implements Target.
func (t registryTarget) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if err := checkDescriptor(desc); err != nil {
		return false, err
	}
	h, err := t.host(ctx)
	if err != nil {
		return false, err
	}
	c := call{want: "look for " + desc.Digest.String(), method: http.MethodHead, path: "blobs/" + desc.Digest.String(), push: true}
	if isManifest(desc.MediaType) {
		c.path, c.header = "manifests/"+desc.Digest.String(), http.Header{"Accept": {desc.MediaType}}
	}
	resp, err := t.do(ctx, h, c)
	if err != nil {
		return false, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		drain(resp.Body)
		if resp.ContentLength >= 0 && resp.ContentLength != desc.Size {
			return false, t.fail(h, c, fmt.Errorf("%w: the registry has %d bytes, its descriptor says %d", ErrDigest, resp.ContentLength, desc.Size))
		}
		return true, nil
	case http.StatusNotFound:
		drain(resp.Body)
		return false, nil
	}
	return false, t.answer(h, c, resp)
}

// Push implements Target.
func (t registryTarget) Push(ctx context.Context, b Blob) (PushResult, error) {
	found, err := t.Exists(ctx, b.Descriptor)
	if err != nil {
		return 0, err
	}
	if found {
		return Existed, nil
	}
	h, err := t.host(ctx)
	if err != nil {
		return 0, err
	}
	if isManifest(b.Descriptor.MediaType) {
		data, err := readBlob(ctx, b)
		if err != nil {
			return 0, err
		}
		return Uploaded, t.putManifest(ctx, h, b.Descriptor, b.Descriptor.Digest.String(), data)
	}
	up := &upload{t: t, h: h, b: b}
	return up.run(ctx)
}

// readBlob reads a manifest that is pushed like a blob.
func readBlob(ctx context.Context, b Blob) ([]byte, error) {
	if b.Descriptor.Size > MaxManifestSize {
		return nil, fmt.Errorf("%w: manifest %s of %d bytes, at most %d", ErrTooLarge, b.Descriptor.Digest, b.Descriptor.Size, MaxManifestSize)
	}
	rc, err := b.Open(ctx)
	if err != nil {
		return nil, err
	}
	v := verify(rc, b.Descriptor, "")
	data, err := io.ReadAll(v)
	if cerr := v.Close(); err == nil {
		err = cerr
	}
	return data, err
}

// Tag implements Target.
func (t registryTarget) Tag(ctx context.Context, desc ocispec.Descriptor, data []byte) error {
	if err := checkDocument(t.ref, desc, data); err != nil {
		return err
	}
	h, err := t.host(ctx)
	if err != nil {
		return err
	}
	object := t.ref.Tag
	if object == "" {
		object = desc.Digest.String()
	}
	return t.putManifest(ctx, h, desc, object, data)
}

// checkDocument refuses a manifest that is not what desc or the reference says.
func checkDocument(ref Reference, desc ocispec.Descriptor, data []byte) error {
	if err := checkDescriptor(desc); err != nil {
		return err
	}
	if !isManifest(desc.MediaType) {
		return fmt.Errorf("%w: %s: media type %q is no image manifest or index", ErrInvalid, desc.Digest, desc.MediaType)
	}
	if len(data) > MaxManifestSize {
		return fmt.Errorf("%w: manifest of %d bytes, at most %d", ErrTooLarge, len(data), MaxManifestSize)
	}
	if int64(len(data)) != desc.Size || desc.Digest.Algorithm().FromBytes(data) != desc.Digest {
		return fmt.Errorf("%w: manifest of %d bytes is not %s of %d", ErrDigest, len(data), desc.Digest, desc.Size)
	}
	if ref.Digest != "" && ref.Digest != desc.Digest {
		return fmt.Errorf("%w: the target %s names a digest, the image has %s", ErrInvalid, ref, desc.Digest)
	}
	return nil
}

func (t registryTarget) putManifest(ctx context.Context, h docker.RegistryHost, desc ocispec.Descriptor, object string, data []byte) error {
	c := call{
		want: "push manifest " + object, method: http.MethodPut, path: "manifests/" + object, push: true,
		header: http.Header{"Content-Type": {desc.MediaType}},
		body:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		size:   int64(len(data)),
	}
	resp, err := t.do(ctx, h, c)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusAccepted {
		return t.answer(h, c, resp)
	}
	drain(resp.Body)
	if got := digest.Digest(resp.Header.Get("Docker-Content-Digest")); got != "" && got != desc.Digest {
		return t.fail(h, c, fmt.Errorf("%w: the registry stored it as %s, want %s", ErrDigest, short(got), desc.Digest))
	}
	return nil
}

// location returns where an upload goes on: relative to the request that answered.
func location(resp *http.Response) (*url.URL, error) {
	v := resp.Header.Get("Location")
	if v == "" {
		return nil, fmt.Errorf("%w: the answer has no Location", ErrInvalid)
	}
	u, err := resp.Request.URL.Parse(v)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("%w: Location %q", ErrInvalid, v)
	}
	return u, nil
}
