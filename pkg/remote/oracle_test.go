package remote_test

import (
	"bytes"
	"context"
	"io"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	ggcrremote "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// TestOthersReadWhatWeWrite has go-containerregistry and oras-go judge our targets.
func TestOthersReadWhatWeWrite(t *testing.T) {
	img := newImage(t, 30, "amd64", 10_000, 2_000_000)
	want := img.manifest.Descriptor.Digest.String()

	t.Run("layout", func(t *testing.T) {
		dir := t.TempDir()
		publish(t, "oci:"+dir+":v1", img, remote.Options{})
		publish(t, "oci:"+dir+":v2", img, remote.Options{})
		index, err := layout.ImageIndexFromPath(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Index(index); err != nil {
			t.Error(err)
		}
		store, err := oci.NewFromFS(t.Context(), osDir(dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, tag := range []string{"v1", "v2"} {
			readByORAS(t, store, tag, want)
		}
	})
	t.Run("archive", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "i.tar")
		publish(t, "oci-archive:"+file+":v1", img, remote.Options{})
		store, err := oci.NewFromTar(t.Context(), file)
		if err != nil {
			t.Fatal(err)
		}
		readByORAS(t, store, "v1", want)
	})
	t.Run("registry", func(t *testing.T) {
		r := critest.StartRegistry(t, testcri.RegistryOptions{})
		publish(t, r.Host+"/a/b/c:v1", img, remote.Options{})
		ref, err := name.ParseReference(r.Host + "/a/b/c:v1")
		if err != nil {
			t.Fatal(err)
		}
		got, err := ggcrremote.Image(ref, ggcrremote.WithTransport(transportFor(t)), ggcrremote.WithContext(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(got); err != nil {
			t.Error(err)
		}
		if d, err := got.Digest(); err != nil || d.String() != want {
			t.Errorf("digest %s, %v, want %s", d, err, want)
		}
	})
}

func readByORAS(t *testing.T, store *oci.ReadOnlyStore, tag, want string) {
	t.Helper()
	desc, err := store.Resolve(t.Context(), tag)
	if err != nil || desc.Digest.String() != want {
		t.Fatalf("oras: %s is %s, %v, want %s", tag, desc.Digest, err, want)
	}
	children, err := content.Successors(t.Context(), store, desc)
	if err != nil || len(children) != 3 {
		t.Fatalf("oras: %d children, %v, want 3", len(children), err)
	}
	for _, c := range children {
		if _, err := content.FetchAll(t.Context(), store, c); err != nil {
			t.Errorf("oras: %s: %v", c.Digest, err)
		}
	}
}

// TestWeReadWhatOthersWrote reads images of go-containerregistry.
func TestWeReadWhatOthersWrote(t *testing.T) {
	img, err := random.Image(50_000, 3)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("layout", func(t *testing.T) {
		dir := t.TempDir()
		p, err := layout.Write(dir, emptyIndex())
		if err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{ocispec.AnnotationRefName: "x/y:tag"})); err != nil {
			t.Fatal(err)
		}
		checkForeign(t, openSource(t, "oci:"+dir, remote.Options{}), img)
		checkForeign(t, openSource(t, "oci:"+dir+":tag", remote.Options{}), img)
	})
	t.Run("registry", func(t *testing.T) {
		r := critest.StartRegistry(t, testcri.RegistryOptions{})
		ref, err := r.Push(t.Context(), "x/y", "tag", img)
		if err != nil {
			t.Fatal(err)
		}
		checkForeign(t, openSource(t, ref, remote.Options{}), img)
	})
	t.Run("containerd", func(t *testing.T) {
		e := critest.Start(t, testcri.Options{})
		if err := e.Import(t.Context(), "docker.io/library/random:1", img); err != nil {
			t.Fatal(err)
		}
		checkForeign(t, openSource(t, "containerd:random:1", remote.Options{ContainerdAddress: e.Address()}), img)
	})
}

// checkForeign reads what is there of a docker schema 2 image without platform.
func checkForeign(t *testing.T, src remote.Source, want v1.Image) {
	t.Helper()
	entries, err := remote.List(t.Context(), src)
	if err != nil || len(entries) == 0 {
		t.Fatalf("List = %v, %v", entries, err)
	}
	data, err := remote.ReadAll(t.Context(), src, entries[0], remote.MaxManifestSize)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := want.RawManifest()
	if err != nil || !bytes.Equal(raw, data) {
		t.Fatalf("manifest differs: %v", err)
	}
	m, err := remote.ParseManifest(data)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := want.Layers()
	if err != nil || len(m.Layers) != len(layers) {
		t.Fatalf("%d layers, want %d, %v", len(m.Layers), len(layers), err)
	}
	for _, l := range m.Layers {
		if _, err := readAll(t.Context(), src, l); err != nil {
			t.Error(err)
		}
	}
}

// TestFixture reads the images of the real nydusify and the one they were made from.
func TestFixture(t *testing.T) {
	dir := filepath.Join(testenv.Fixtures(t), "oci")
	for _, name := range []string{"source", "nydus-v5", "nydus-v6"} {
		src := openSource(t, "oci:"+filepath.Join(dir, name), remote.Options{})
		img, err := remote.Select(t.Context(), src, "linux/amd64")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if img.Nydus() != (name != "source") {
			t.Errorf("%s: Nydus() = %v", name, img.Nydus())
		}
		for _, l := range img.Layers {
			if _, err := readAll(t.Context(), src, l.Descriptor); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestMediaTypes publishes a docker schema 2 image from a source to a target, byte for byte.
func TestCopy(t *testing.T) {
	img, err := random.Image(50_000, 2)
	if err != nil {
		t.Fatal(err)
	}
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	from, err := r.Push(t.Context(), "x/y", "tag", img)
	if err != nil {
		t.Fatal(err)
	}
	src := openSource(t, from, remote.Options{})
	root, err := src.Resolve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := remote.ReadAll(t.Context(), src, root, remote.MaxManifestSize)
	if err != nil {
		t.Fatal(err)
	}
	m, err := remote.ParseManifest(manifest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := remote.ReadAll(t.Context(), src, m.Config, remote.MaxConfigSize)
	if err != nil {
		t.Fatal(err)
	}
	var blobs []remote.Blob
	for _, l := range m.Layers {
		blobs = append(blobs, remote.Blob{
			Descriptor: l, MountFrom: "x/y",
			Open: func(ctx context.Context) (io.ReadCloser, error) { return src.Fetch(ctx, l) },
		})
	}
	for _, to := range []string{r.Host + "/other/place:tag", "oci:" + t.TempDir() + ":tag"} {
		dst := openTarget(t, to, remote.Options{})
		p, err := remote.Publish(t.Context(), dst, blobs, remote.Document{Descriptor: m.Config, Data: config},
			remote.Document{Descriptor: root, Data: manifest}, remote.PublishOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if to[0] != 'o' && p.Mounted != 2 {
			t.Errorf("Publish to another repository = %+v, want 2 mounted", p)
		}
		checkForeign(t, openSource(t, to, remote.Options{}), img)
	}
}
