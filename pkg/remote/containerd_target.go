package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// leaseTime is how long containerd keeps what was pushed when the writer dies.
const leaseTime = 24 * time.Hour

// containerdTarget writes an image to containerd's content store and then names it. A lease
// keeps the garbage collector off until the image record holds the content.
type containerdTarget struct {
	*contentStore

	mu    sync.Mutex // guards lease
	lease *leases.Lease
}

// leased returns ctx with the target's namespace and lease.
func (t *containerdTarget) leased(ctx context.Context) (context.Context, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lease == nil {
		brief, cancel := t.brief(ctx)
		defer cancel()
		l, err := t.client.LeasesService().Create(brief, leases.WithRandomID(), leases.WithExpiration(leaseTime))
		if err != nil {
			return nil, t.wrap(brief, "create a lease", err)
		}
		t.lease = &l
	}
	return leases.WithLease(t.in(ctx), t.lease.ID), nil
}

// Close implements Target: what was not tagged is left to the garbage collector.
func (t *containerdTarget) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var err error
	if t.lease != nil {
		ctx, cancel := t.brief(context.Background())
		defer cancel()
		if err = t.client.LeasesService().Delete(ctx, *t.lease); errdefs.IsNotFound(err) {
			err = nil
		}
		err = t.wrap(ctx, "delete the lease", err)
		t.lease = nil
	}
	return errors.Join(err, t.client.Close())
}

// Exists implements Target.
func (t *containerdTarget) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	if err := checkDescriptor(desc); err != nil {
		return false, err
	}
	ctx, cancel := t.brief(ctx)
	defer cancel()
	info, err := t.client.ContentStore().Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, t.wrap(ctx, "content "+desc.Digest.String(), err)
	}
	return info.Size == desc.Size, nil
}

// Push implements Target. Content that is there is put under the lease too.
func (t *containerdTarget) Push(ctx context.Context, b Blob) (PushResult, error) {
	if err := checkDescriptor(b.Descriptor); err != nil {
		return 0, err
	}
	ctx, err := t.leased(ctx)
	if err != nil {
		return 0, err
	}
	var labels map[string]string
	if isManifest(b.Descriptor.MediaType) {
		data, err := readBlob(ctx, b)
		if err != nil {
			return 0, err
		}
		if labels, err = gcLabels(b.Descriptor.MediaType, data); err != nil {
			return 0, err
		}
	}
	result, err := t.write(ctx, b, labels)
	if err != nil {
		return 0, t.wrap(ctx, "write "+b.Descriptor.Digest.String(), err)
	}
	return result, nil
}

func (t *containerdTarget) write(ctx context.Context, b Blob, labels map[string]string) (_ PushResult, err error) {
	cs := t.client.ContentStore()
	// One that another process writes is waited for.
	w, err := content.OpenWriter(ctx, cs, content.WithRef("headstart-"+b.Descriptor.Digest.String()), content.WithDescriptor(b.Descriptor))
	if errdefs.IsAlreadyExists(err) {
		return Existed, t.label(ctx, b.Descriptor, labels)
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Truncate(0); err != nil { // what a writer that died has left
		return 0, err
	}
	if err := copyBlob(ctx, chunked{w}, b); err != nil {
		return 0, err
	}
	err = w.Commit(ctx, b.Descriptor.Size, b.Descriptor.Digest, content.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		return Existed, t.label(ctx, b.Descriptor, labels)
	}
	return Uploaded, err
}

// chunked keeps one write below the size of a message.
type chunked struct{ io.Writer }

func (c chunked) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		n, err := c.Writer.Write(p[:min(len(p), containerdBuffer)])
		if total += n; err != nil {
			return total, err
		}
		p = p[n:]
	}
	return total, nil
}

// label adds labels to content that is there; others stay.
func (t *containerdTarget) label(ctx context.Context, desc ocispec.Descriptor, labels map[string]string) error {
	if len(labels) == 0 {
		return nil
	}
	fields := make([]string, 0, len(labels))
	for k := range labels {
		fields = append(fields, "labels."+k)
	}
	_, err := t.client.ContentStore().Update(ctx, content.Info{Digest: desc.Digest, Labels: labels}, fields...)
	return err
}

// Tag implements Target: the image record is made, or pointed at desc, when all else is
// there.
func (t *containerdTarget) Tag(ctx context.Context, desc ocispec.Descriptor, data []byte) error {
	if err := checkDocument(t.ref, desc, data); err != nil {
		return err
	}
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	if _, err := t.Push(ctx, Blob{Descriptor: desc, Open: open}); err != nil {
		return err
	}
	ctx, err := t.leased(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := t.brief(ctx)
	defer cancel()
	store := t.client.ImageService()
	img := images.Image{Name: t.ref.Name(), Target: desc}
	for range 8 { // another writer may make or remove it between the two calls
		if _, err = store.Create(ctx, img); !errdefs.IsAlreadyExists(err) {
			break
		}
		if _, err = store.Update(ctx, img, "target"); !errdefs.IsNotFound(err) {
			break
		}
	}
	if err != nil {
		return t.wrap(ctx, fmt.Sprintf("name the image %s", img.Name), err)
	}
	return nil
}
