package remote_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// collect runs containerd's garbage collector to its end.
func collect(t *testing.T, ctx context.Context, e *testcri.Env) {
	t.Helper()
	s := e.Client().LeasesService()
	l, err := s.Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, l, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
}

func stored(t *testing.T, ctx context.Context, e *testcri.Env, d digest.Digest) bool {
	t.Helper()
	_, err := e.Client().ContentStore().Info(ctx, d)
	if err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	return err == nil
}

// TestContainerdGarbage has the collector run at every stage: what belongs to an image
// stays, what was left goes.
func TestContainerdGarbage(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	ctx := namespaces.WithNamespace(t.Context(), "example")
	o := remote.Options{ContainerdAddress: e.Address(), Namespace: "example"}

	other, img := newImage(t, 1, "amd64", 1000), newImage(t, 2, "amd64", 2000, 3000)
	publish(t, "containerd:registry.test/other:v", other, o)
	dst, err := remote.OpenTarget(t.Context(), parse(t, "containerd:registry.test/app:v"), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range append(img.blobs, img.config.Blob()) {
		if _, err := dst.Push(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		collect(t, ctx, e)
		if !stored(t, ctx, e, b.Descriptor.Digest) {
			t.Fatal("a blob was collected while its image is written")
		}
	}
	if err := dst.Tag(t.Context(), img.manifest.Descriptor, img.manifest.Data); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	collect(t, ctx, e)
	checkImage(t, openSource(t, "containerd:registry.test/app:v", o), img)
	checkImage(t, openSource(t, "containerd:registry.test/other:v", o), other)

	// What is given up is collected; what exists and is used again is not.
	dst, err = remote.OpenTarget(t.Context(), parse(t, "containerd:registry.test/third:v"), o)
	if err != nil {
		t.Fatal(err)
	}
	waste := newImage(t, 3, "amd64", 4000)
	if _, err := dst.Push(t.Context(), waste.blobs[0]); err != nil {
		t.Fatal(err)
	}
	if err := e.Client().ImageService().Delete(ctx, "registry.test/app:v"); err != nil {
		t.Fatal(err)
	}
	if got, err := dst.Push(t.Context(), img.blobs[0]); err != nil || got != remote.Existed {
		t.Errorf("Push of what exists = %v, %v", got, err)
	}
	collect(t, ctx, e)
	if !stored(t, ctx, e, img.blobs[0].Descriptor.Digest) {
		t.Error("what exists was collected while it is used again")
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	collect(t, ctx, e)
	for _, d := range []digest.Digest{waste.blobs[0].Descriptor.Digest, img.blobs[0].Descriptor.Digest} {
		if stored(t, ctx, e, d) {
			t.Errorf("%s was given up and is still there", d)
		}
	}
	if list, err := e.Client().LeasesService().List(ctx); err != nil || len(list) != 0 {
		t.Errorf("leases left: %v, %v", list, err)
	}
}

// TestContainerdTag keeps an image record's labels and adds labels to content without.
func TestContainerdTag(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	ctx := namespaces.WithNamespace(t.Context(), "example")
	o := remote.Options{ContainerdAddress: e.Address(), Namespace: "example"}
	img := newImage(t, 1, "amd64", 1000)
	lease, err := e.Client().LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	// The manifest is there already, without labels.
	lctx := leases.WithLease(ctx, lease.ID)
	d := img.manifest.Descriptor
	if err := content.WriteBlob(lctx, e.Client().ContentStore(), "x", readerOf(img.manifest.Data), d, content.WithLabels(map[string]string{"mine": "1"})); err != nil {
		t.Fatal(err)
	}
	record := images.Image{Name: "registry.test/app:v", Target: d, Labels: map[string]string{"keep": "me"}}
	if _, err := e.Client().ImageService().Create(ctx, record); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 { // at once
		wg.Go(func() { publish(t, "containerd:registry.test/app:v", img, o) })
	}
	wg.Wait()
	if err := e.Client().LeasesService().Delete(ctx, lease); err != nil {
		t.Fatal(err)
	}
	collect(t, ctx, e)
	checkImage(t, openSource(t, "containerd:registry.test/app:v", o), img)
	got, err := e.Client().ImageService().Get(ctx, record.Name)
	if err != nil || got.Labels["keep"] != "me" {
		t.Errorf("image record %+v, %v", got, err)
	}
	info, err := e.Client().ContentStore().Info(ctx, d.Digest)
	if err != nil || info.Labels["mine"] != "1" || info.Labels["containerd.io/gc.ref.content.l.0"] == "" {
		t.Errorf("labels of the manifest %v, %v", info.Labels, err)
	}
}

// TestContainerdFallback reads from the registry what containerd has discarded.
func TestContainerdFallback(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	o := remote.Options{ContainerdAddress: e.Address()}
	img := newImage(t, 1, "amd64", 1000, 2000)
	publish(t, r.Host+"/app:v", img, o)
	publish(t, "containerd:"+r.Host+"/app:v", img, o)
	if err := e.Client().ContentStore().Delete(ctx, img.blobs[1].Descriptor.Digest); err != nil {
		t.Fatal(err)
	}

	_, err := readAll(t.Context(), openSource(t, "containerd:"+r.Host+"/app:v", o), img.blobs[1].Descriptor)
	wantError(t, "without fallback", err, remote.ErrNotFound, "k8s.io")
	o.RegistryFallback = true
	src := openSource(t, "containerd:"+r.Host+"/app:v", o)
	checkImage(t, src, img)
	if got, err := readRange(t.Context(), src, img.blobs[1].Descriptor, 5, 10); err != nil || len(got) != 10 {
		t.Errorf("FetchRange = %d bytes, %v", len(got), err)
	}

	// An image that containerd does not have at all, and one that nobody has.
	publish(t, r.Host+"/new:v", newImage(t, 2, "amd64", 10), o)
	checkImage(t, openSource(t, "containerd:k8s.io/"+r.Host+"/new:v", o), newImage(t, 2, "amd64", 10))
	_, err = openSource(t, "containerd:k8s.io/"+r.Host+"/none:v", o).Resolve(t.Context())
	wantError(t, "nobody", err, remote.ErrNotFound, "containerd", "registry "+r.Host)

	// By digest, with and without an image record; by image ID.
	o.RegistryFallback = false
	pinned := "containerd:" + r.Host + "/app@" + img.manifest.Descriptor.Digest.String()
	if got, err := openSource(t, pinned, o).Resolve(t.Context()); err != nil || got.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("Resolve by digest = %+v, %v", got, err)
	}
	id := "containerd:" + img.config.Descriptor.Digest.String()
	record := images.Image{Name: img.config.Descriptor.Digest.String(), Target: img.manifest.Descriptor}
	if _, err := e.Client().ImageService().Create(ctx, record); err != nil && !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	if got, err := openSource(t, id, o).Resolve(t.Context()); err != nil || got.Digest != img.manifest.Descriptor.Digest {
		t.Errorf("Resolve by image ID = %+v, %v", got, err)
	}
	_, err = remote.OpenTarget(t.Context(), parse(t, id), o)
	wantError(t, "target by image ID", err, remote.ErrInvalid, "image ID")

	// containerd is gone: the registry alone does.
	o.RegistryFallback = true
	o.ContainerdAddress = filepath.Join(t.TempDir(), "nowhere.sock")
	checkImage(t, openSource(t, "containerd:"+r.Host+"/app:v", o), img)
}

// TestContainerdSilent names the socket when nobody answers there.
func TestContainerdSilent(t *testing.T) {
	t.Parallel()
	o := hasty()
	o.ContainerdAddress = filepath.Join(t.TempDir(), "none.sock")
	_, err := openSource(t, "containerd:nginx", o).Resolve(t.Context())
	wantError(t, "nobody", err, remote.ErrUnavailable, o.ContainerdAddress, "docker.io/library/nginx:latest")
	_, err = openTarget(t, "containerd:nginx", o).Push(t.Context(), newImage(t, 1, "amd64", 1).blobs[0])
	wantError(t, "nobody", err, remote.ErrUnavailable, o.ContainerdAddress)

	o.ContainerdAddress = filepath.Join(t.TempDir(), "mute.sock")
	l, err := net.Listen("unix", o.ContainerdAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	started := time.Now()
	_, err = openSource(t, "containerd:nginx", o).Resolve(t.Context())
	wantError(t, "mute", err, remote.ErrStalled, o.ContainerdAddress)
	if errors.Is(err, context.DeadlineExceeded) && time.Since(started) > 30*time.Second {
		t.Errorf("it took %s", time.Since(started))
	}
}
