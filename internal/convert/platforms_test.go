package convert_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// pushImage pushes an image of one layer with one file and returns its entry.
func pushImage(t *testing.T, to remote.Target, platform ocispec.Platform, content string) ocispec.Descriptor {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := errors.Join(
		w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "file", Mode: 0o644, Size: int64(len(content))}),
		func() error { _, err := io.WriteString(w, content); return err }(), w.Close()); err != nil {
		t.Fatal(err)
	}
	blob := remote.NewDocument(ocispec.MediaTypeImageLayer, layer.Bytes())
	config := encode(t, ocispec.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{blob.Descriptor.Digest}}})
	return pushManifest(t, to, platform, remote.NewDocument(ocispec.MediaTypeImageConfig, config), blob)
}

func pushManifest(t *testing.T, to remote.Target, platform ocispec.Platform, config, layer remote.Document) ocispec.Descriptor {
	t.Helper()
	m := remote.NewDocument(ocispec.MediaTypeImageManifest, encode(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config.Descriptor, Layers: []ocispec.Descriptor{layer.Descriptor},
		Annotations: map[string]string{"of": platform.Architecture},
	}))
	if _, err := remote.PublishUnnamed(t.Context(), to, []remote.Blob{layer.Blob()}, config, m, remote.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	m.Descriptor.Platform = &platform
	return m.Descriptor
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pushIndex makes ref an index as BuildKit writes one: images of two Linux platforms and
// a Windows one, and an attestation about the first.
func pushIndex(t *testing.T, ref string) []ocispec.Descriptor {
	t.Helper()
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	to, err := remote.OpenTarget(t.Context(), r, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	amd := pushImage(t, to, ocispec.Platform{OS: "linux", Architecture: "amd64"}, "amd64")
	arm := pushImage(t, to, ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, "arm64")
	amd.Annotations = map[string]string{"entry": "kept"}
	win := pushImage(t, to, ocispec.Platform{OS: "windows", Architecture: "amd64"}, "windows")
	note := pushManifest(t, to, ocispec.Platform{OS: "unknown", Architecture: "unknown"},
		remote.NewDocument(ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"type":"layers","diff_ids":[]}}`)),
		remote.NewDocument("application/vnd.in-toto+json", []byte(`{"predicate":"SBOM"}`)))
	note.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": amd.Digest.String()}
	entries := []ocispec.Descriptor{amd, arm, win, note}
	index := remote.NewDocument(ocispec.MediaTypeImageIndex, encode(t, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: entries, Annotations: map[string]string{"index": "kept"},
	}))
	if err := errors.Join(to.Tag(t.Context(), index.Descriptor, index.Data), to.Close()); err != nil {
		t.Fatal(err)
	}
	return entries
}

func readIndex(t *testing.T, ref string) remote.Index {
	t.Helper()
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), r, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	index, err := remote.ReadIndex(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	return index
}

// nydusFile reads a whole file of the Nydus image for a platform, as a client that
// prefers Nydus images finds it.
func nydusFile(t *testing.T, ref, platform, path string) string {
	t.Helper()
	img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Platform: platform, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	chunks := img.Chunks()
	defer func() {
		if err := errors.Join(chunks.Close(), img.Close()); err != nil {
			t.Error(err)
		}
	}()
	var out []byte
	for _, c := range img.RAFS.Lookup(path).Chunks {
		b, err := chunks.Read(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	return string(out)
}

func indexOptions(t *testing.T, source, target string) convert.Options {
	t.Helper()
	b := builder.DefaultOptions()
	b.TempDir = t.TempDir()
	return convert.Options{Source: source, Target: target, Build: b}
}

// All platforms of an index become an index, in every kind of target that needs no daemon.
func TestAllPlatforms(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source := "oci:" + dir + "/src:app"
	pushIndex(t, source)
	for _, target := range []string{"oci:" + dir + "/out:app", "oci-archive:" + dir + "/out.tar:app"} {
		o := indexOptions(t, source, target)
		o.AllPlatforms = true
		o.List = list("/file")
		o.List.Platform = "linux/amd64"
		sum, err := convert.Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		empty(t, o.Build.TempDir)
		index := readIndex(t, target)
		if len(index.Entries) != 2 || index.Plain || index.Annotations["index"] != "kept" || index.Root.Digest != sum.TargetDigest {
			t.Fatalf("%s: index %+v", target, index)
		}
		if len(index.NydusImages()) != 0 || index.Entries[0].Annotations["entry"] != "kept" {
			t.Errorf("entries %+v: alone, Nydus images are the images of their platforms", index.Entries)
		}
		if sum.Platform != "linux/amd64,linux/arm64/v8" && sum.Platform != "linux/amd64,linux/arm64" {
			t.Errorf("Platform = %q", sum.Platform)
		}
		if text := strings.Join(sum.Warnings, "\n"); !strings.Contains(text, "windows/amd64") || !strings.Contains(text, "1 attestations") {
			t.Errorf("Warnings = %q", text)
		}
		if len(sum.Images) != 2 || sum.Images[0].Prefetch.Chunks != 1 || sum.Images[1].Prefetch.Chunks != 0 || len(sum.Images[1].Warnings) != 1 {
			t.Errorf("Images = %+v: the list is of amd64 alone", sum.Images)
		}
		for platform, want := range map[string]string{"linux/amd64": "amd64", "linux/arm64": "arm64"} {
			if got := nydusFile(t, target, platform, "/file"); got != want {
				t.Errorf("%s %s: /file = %q", target, platform, got)
			}
		}
	}
}

// With MergePlatform the plain images stay byte for byte, their attestations too, and come
// first; a real registry takes it all, and another client finds the plain image by its platform.
func TestMergePlatform(t *testing.T) {
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	for name, all := range map[string]bool{"all": true, "some": false} {
		t.Run(name, func(t *testing.T) {
			source, target := r.Host+"/"+name+"/src:app", r.Host+"/"+name+"/out:app"
			entries := pushIndex(t, source)
			o := indexOptions(t, source, target)
			o.MergePlatform, o.AllPlatforms = true, all
			want := entries
			if !all {
				o.Platforms = []string{"linux/amd64", "linux/amd64"}
				want = []ocispec.Descriptor{entries[0], entries[3]}
			}
			sum, err := convert.Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			index := readIndex(t, target)
			for i, d := range want {
				if got := index.Entries[i]; got.Digest != d.Digest || got.Annotations["entry"] != d.Annotations["entry"] {
					t.Errorf("entry %d = %+v, want %+v", i, got, d)
				}
			}
			nydus := index.NydusImages()
			if len(nydus) != len(index.Entries)-len(want) || len(nydus) != len(sum.Images) {
				t.Fatalf("entries %+v", index.Entries)
			}
			for _, d := range nydus {
				if d.ArtifactType != "application/vnd.nydus.image.manifest.v1+json" || !slices.Contains(d.Platform.OSFeatures, "nydus.remoteimage.v1") {
					t.Errorf("entry %+v has no marks", d)
				}
			}
			if got := nydusFile(t, target, "linux/amd64", "/file"); got != "amd64" {
				t.Errorf("/file = %q", got)
			}
			other(t, target, entries[0].Digest)
			// Once more: nothing is new, and the name says the same.
			again, err := convert.Run(t.Context(), o)
			if err != nil || again.Uploaded != 0 || again.TargetDigest != sum.TargetDigest {
				t.Errorf("again: %+v, %v", again, err)
			}
		})
	}
}

// An index goes to containerd's image store too, and stays whole when containerd collects garbage.
func TestMergePlatformContainerd(t *testing.T) {
	e := critest.Start(t, testcri.Options{})
	source := "oci:" + t.TempDir() + "/src:app"
	entries := pushIndex(t, source)
	o := indexOptions(t, source, "containerd:example/registry.test/app:v")
	o.TargetRemote = remote.Options{ContainerdAddress: e.Address()}
	o.MergePlatform, o.AllPlatforms = true, true
	sum := run(t, o)
	ctx := namespaces.WithNamespace(t.Context(), "example")
	leased := e.Client().LeasesService()
	l, err := leased.Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := leased.Delete(ctx, l, leases.SynchronousDelete); err != nil { // runs the collector
		t.Fatal(err)
	}
	img, err := e.Client().ImageService().Get(ctx, "registry.test/app:v")
	if err != nil || img.Target.Digest != sum.TargetDigest {
		t.Fatalf("image %+v, %v, want %s", img, err, sum.TargetDigest)
	}
	// containerd, which is told of no Nydus, takes the plain image of its platform.
	m, err := images.Manifest(ctx, e.Client().ContentStore(), img.Target, platforms.OnlyStrict(ocispec.Platform{OS: "linux", Architecture: "amd64"}))
	if err != nil || m.Annotations["of"] != "amd64" || len(m.Layers) != 1 {
		t.Errorf("manifest %+v, %v, want that of %s", m, err, entries[0].Digest)
	}
	got, err := nydusimage.Open(t.Context(), o.Target, nydusimage.Options{Platform: "linux/arm64", Remote: o.TargetRemote, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(got.CheckLayers(t.Context(), true), got.Close()); err != nil {
		t.Error(err)
	}
}

// other reads ref with another library: it is sound, and its linux/amd64 image is want.
func other(t *testing.T, ref string, want digest.Digest) {
	t.Helper()
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := ggcr.Image(tag, ggcr.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := img.Digest(); err != nil || got.String() != want.String() {
		t.Errorf("another client finds %s, %v, want %s", got, err, want)
	}
	if err := validate.Image(img, validate.Fast); err != nil {
		t.Error(err)
	}
}

// A source that is no index: all platforms of it are one; merged it becomes an index of two.
func TestPlainSource(t *testing.T) {
	t.Parallel()
	o := options(t, "oci:"+t.TempDir()+"/out:v6")
	o.Platform, o.AllPlatforms = "", true
	sum, err := convert.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if index := readIndex(t, o.Target); !index.Plain || index.Root.Digest != sum.TargetDigest || len(sum.Images) != 0 {
		t.Errorf("index %+v", index)
	}
	o = options(t, "oci:"+t.TempDir()+"/out:v6")
	o.MergePlatform = true
	if sum, err = convert.Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	index := readIndex(t, o.Target)
	if index.Plain || len(index.Entries) != 2 || len(index.NydusImages()) != 1 || index.Entries[0].Digest != sum.Images[0].SourceDigest {
		t.Errorf("index %+v", index)
	}
}

func TestPlatformErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	source := "oci:" + dir + "/src:app"
	pushIndex(t, source)
	for want, set := range map[string]func(o *convert.Options){
		"want linux/s390x":      func(o *convert.Options) { o.Platforms = []string{"linux/amd64", "linux/s390x"} },
		"it is the source":      func(o *convert.Options) { o.AllPlatforms, o.Target = true, o.Source },
		"platform \"?\"":        func(o *convert.Options) { o.Platforms = []string{"linux/amd64", "?"} },
		"open target oci:/dev/": func(o *convert.Options) { o.AllPlatforms, o.Target = true, "oci:/dev/null/x" },
	} {
		o := indexOptions(t, source, "oci:"+dir+"/out")
		set(&o)
		if _, err := convert.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Run = %v, want an error with %s", err, want)
		}
		empty(t, o.Build.TempDir)
	}
	// Cancelled between two images: no name.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := indexOptions(t, source, "oci:"+dir+"/cancelled:x")
	o.AllPlatforms = true
	o.Progress = func(e convert.Event) {
		if strings.HasPrefix(e.Task, "linux/arm64") {
			cancel()
		}
	}
	if _, err := convert.Run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("Run = %v, want context.Canceled", err)
	}
	empty(t, o.Build.TempDir)
	if _, err := nydusimage.Open(t.Context(), o.Target, nydusimage.Options{}); err == nil {
		t.Error("the name exists")
	}
}
