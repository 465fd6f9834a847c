//go:build nydus

// Package buildkit_test builds an image with BuildKit's own code, which calls Headstart where it would call nydus-snapshotter.
package buildkit_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/klauspost/compress/gzip"
	"github.com/moby/buildkit/cache"
	cacheconfig "github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/snapshot"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/winlayers"
	bolt "go.etcd.io/bbolt"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// newManager sets up BuildKit's cache with real stores.
func newManager(ctx context.Context, t *testing.T) (cache.Manager, content.Store, *leaseutil.Manager) {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	snapshotter, err := native.NewSnapshotter(filepath.Join(dir, "snapshots"))
	must(err)
	store, err := local.NewStore(dir)
	must(err)
	db, err := bolt.Open(filepath.Join(dir, "containerd.db"), 0o644, nil)
	must(err)
	t.Cleanup(func() { db.Close() })
	mdb := ctdmetadata.NewDB(db, store, map[string]snapshots.Snapshotter{"native": snapshotter})
	must(mdb.Init(ctx))
	ns, _ := namespaces.Namespace(ctx)
	store = containerdsnapshot.NewContentStore(mdb.ContentStore(), ns)
	leases := leaseutil.WithNamespace(ctdmetadata.NewLeaseManager(mdb), ns)
	md, err := metadata.NewStore(filepath.Join(dir, "metadata.db"))
	must(err)
	t.Cleanup(func() { md.Close() })
	m, err := cache.NewManager(cache.ManagerOpt{
		Snapshotter:   snapshot.FromContainerdSnapshotter("native", containerdsnapshot.NSSnapshotter(ns, mdb.Snapshotter("native")), nil),
		MetadataStore: md, ContentStore: store, LeaseManager: leases, GarbageCollect: mdb.GarbageCollect,
		Applier: winlayers.NewFileSystemApplierWithWindows(store, apply.NewFileSystemApplier(store)),
		Differ:  winlayers.NewWalkingDiffWithWindows(store, walking.NewWalkingDiff(store)),
		Root:    dir, MountPoolRoot: filepath.Join(dir, "mounts"),
	})
	must(err)
	t.Cleanup(func() { m.Close() })
	return m, store, leases
}

func tarOf(t *testing.T, files map[string]string) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// TestBuildKit commits two layers in BuildKit's cache, has it export them as Nydus blobs and merge their bootstraps, and
// leaves bootstrap and blobs in the directory $HEADSTART_OUT for others to judge.
func TestBuildKit(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "buildkit-test")
	m, store, leases := newManager(ctx, t)
	ctx, done, err := leaseutil.WithLease(ctx, leases, leaseutil.MakeTemporary)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	var ref cache.ImmutableRef
	for _, files := range []map[string]string{{"lower": "below", "gone": "gone", "big": string(bytes.Repeat([]byte("data "), 500_000))}, {"upper": "above", ".wh.gone": ""}} {
		next, err := m.New(ctx, ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		mountable, err := next.Mount(ctx, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		mounts, release, err := mountable.Mount()
		if err != nil {
			t.Fatal(err)
		}
		err = mount.WithTempMount(ctx, mounts, func(root string) error {
			_, err := archive.Apply(ctx, root, tarOf(t, files))
			return err
		})
		if err := errors.Join(err, release()); err != nil {
			t.Fatal(err)
		}
		if ref, err = next.Commit(ctx); err != nil {
			t.Fatal(err)
		}
	}
	comp := compression.New(compression.Nydus).SetForce(true)
	remotes, err := ref.GetRemotes(ctx, true, cacheconfig.RefConfig{Compression: comp}, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := cache.MergeNydus(ctx, ref, comp, nil)
	if err != nil {
		t.Fatal(err)
	}
	out := os.Getenv("HEADSTART_OUT")
	if out == "" {
		out = t.TempDir()
	}
	if err := os.MkdirAll(filepath.Join(out, "blobs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if n := len(remotes[0].Descriptors); n != 2 {
		t.Fatalf("%d layers, want 2", n)
	}
	for _, d := range remotes[0].Descriptors {
		if d.MediaType != compression.Nydus.MediaType() {
			t.Errorf("a layer is a %s", d.MediaType)
		}
		b, err := content.ReadBlob(ctx, store, d)
		if err == nil {
			err = os.WriteFile(filepath.Join(out, "blobs", d.Digest.Encoded()), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		// BuildKit reads its own layers back through Unpack.
		plain, err := compression.Nydus.Decompress(ctx, store, d)
		if err != nil {
			t.Fatal(err)
		}
		names := 0
		for tr := tar.NewReader(plain); ; names++ {
			if _, err := tr.Next(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if plain.Close(); names < 2 {
			t.Errorf("layer %s unpacks to %d names", d.Digest, names)
		}
	}
	b, err := content.ReadBlob(ctx, store, *boot)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if err != nil {
			t.Fatalf("no image/image.boot in the bootstrap layer: %v", err)
		}
		if h.Name != "image/image.boot" {
			continue
		}
		bootstrap, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		img, err := rafs.Open(bytes.NewReader(bootstrap), int64(len(bootstrap)))
		if err != nil {
			t.Fatal(err)
		}
		if img.Lookup("/lower") == nil || img.Lookup("/upper") == nil || img.Lookup("/gone") != nil || len(img.Blobs) != 2 {
			t.Errorf("the image has %d blobs; /lower and /upper should be there, and no /gone", len(img.Blobs))
		}
		if err := os.WriteFile(filepath.Join(out, "image.boot"), bootstrap, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
}
