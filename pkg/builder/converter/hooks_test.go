package converter_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
)

// labels keeps the labels of a content store, which the local store leaves to a database.
// containerd's converter works on the platforms of an index at once.
type labels struct {
	mu sync.Mutex
	of map[digest.Digest]map[string]string
}

func (l *labels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.of[d]), nil
}

func (l *labels) Set(d digest.Digest, set map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of[d] = maps.Clone(set)
	return nil
}

func (l *labels) Update(d digest.Digest, update map[string]string) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[d] == nil {
		l.of[d] = map[string]string{}
	}
	maps.Copy(l.of[d], update)
	return maps.Clone(l.of[d]), nil
}

func newStore(t testing.TB) content.Store {
	t.Helper()
	cs, err := local.NewLabeledStore(t.TempDir(), &labels{of: map[digest.Digest]map[string]string{}})
	if err != nil {
		t.Fatal(err)
	}
	return cs
}

func put(t testing.TB, cs content.Store, mediaType string, b []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err := content.WriteBlob(t.Context(), cs, d.Digest.String(), bytes.NewReader(b), d); err != nil {
		t.Fatal(err)
	}
	return d
}

func get(t testing.TB, cs content.Store, d ocispec.Descriptor, v any) []byte {
	t.Helper()
	b, err := content.ReadBlob(t.Context(), cs, d)
	if err != nil {
		t.Fatal(err)
	}
	if v != nil {
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func encode(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// putImage puts the fixture into a store, with docker's media types or OCI's, in an index.
func putImage(t testing.TB, cs content.Store, docker bool, archs ...string) ocispec.Descriptor {
	t.Helper()
	return putLayers(t, cs, docker, false, archs...)
}

// putLayers is putImage with layers that are compressed or not.
func putLayers(t testing.TB, cs content.Store, docker, compressed bool, archs ...string) ocispec.Descriptor {
	t.Helper()
	layerType, configType, manifestType, indexType := ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	if docker {
		layerType, configType, manifestType, indexType = images.MediaTypeDockerSchema2Layer, images.MediaTypeDockerSchema2Config, images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2ManifestList
	}
	var layers []ocispec.Descriptor
	config := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers"}, Config: ocispec.ImageConfig{Entrypoint: []string{"/app/main"}}}
	config.OS = "linux"
	for _, l := range fixtureTars(t) {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
		if compressed {
			layerType, l = ocispec.MediaTypeImageLayerGzip, gzipped(t, l)
		}
		layers = append(layers, put(t, cs, layerType, l))
		config.History = append(config.History, ocispec.History{CreatedBy: "a layer"})
	}
	var entries []ocispec.Descriptor
	for _, arch := range archs {
		config.Architecture = arch
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifestType, Config: put(t, cs, configType, encode(t, config)), Layers: layers}
		d := put(t, cs, manifestType, encode(t, m))
		d.Platform = &config.Platform
		entries = append(entries, d)
		layers = layers[:1] // the next platform is another image
		config.RootFS.DiffIDs, config.History = config.RootFS.DiffIDs[:1], config.History[:1]
	}
	return put(t, cs, indexType, encode(t, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: indexType, Manifests: entries}))
}

func convertImage(t testing.TB, cs content.Store, image ocispec.Descriptor, pack nydus.PackOption, merge nydus.MergeOption, docker2oci bool) (*ocispec.Descriptor, error) {
	t.Helper()
	convert := converter.IndexConvertFuncWithHook(nydus.LayerConvertFunc(pack), docker2oci, platforms.All,
		converter.ConvertHooks{PostConvertHook: nydus.ConvertHookFunc(merge)})
	return convert(t.Context(), cs, image)
}

// bootstrapOf returns the bare bootstrap of a bootstrap layer.
func bootstrapOf(t testing.TB, cs content.Store, d ocispec.Descriptor) []byte {
	t.Helper()
	r := tar.NewReader(gunzip(t, get(t, cs, d, nil)))
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "image/image.boot" {
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
	}
}

// TestContainerdConverter converts an index in a real content store with containerd's own
// converter, as nerdctl, ctr and acceleration-service call it, and judges what comes out.
func TestContainerdConverter(t *testing.T) {
	cs := newStore(t)
	for name, test := range map[string]struct {
		docker  bool
		version string
	}{"oci": {false, "6"}, "docker": {true, "6"}, "v5": {false, "5"}} {
		t.Run(name, func(t *testing.T) {
			source := putImage(t, cs, test.docker, "amd64", "arm64")
			got, err := convertImage(t, cs, source, nydus.PackOption{FsVersion: test.version}, nydus.MergeOption{OCI: true}, true)
			if err != nil {
				t.Fatal(err)
			}
			var index ocispec.Index
			get(t, cs, *got, &index)
			if len(index.Manifests) != 2 || got.MediaType != ocispec.MediaTypeImageIndex {
				t.Fatalf("%s: index %+v", got.MediaType, index)
			}
			var m ocispec.Manifest
			raw := get(t, cs, index.Manifests[0], &m)
			if len(m.Layers) != 3 || m.Layers[2].MediaType != ocispec.MediaTypeImageLayerGzip {
				t.Fatalf("layers %+v", m.Layers)
			}
			config := get(t, cs, m.Config, nil)
			doc, err := nydusimage.Parse(raw, config)
			if err != nil {
				t.Fatal(err)
			}
			var ids []string
			var blobs [][]byte
			for _, l := range m.Layers[:2] {
				ids = append(ids, l.Digest.Encoded())
				blobs = append(blobs, get(t, cs, l, nil))
			}
			if err := doc.Check(ids); err != nil {
				t.Error(err)
			}
			if m.Annotations[builder.AnnotationFSVersion] != test.version || m.Layers[2].Annotations[builder.AnnotationFSVersion] != test.version {
				t.Errorf("the image's version is %v and %v, want %s", m.Annotations, m.Layers[2].Annotations, test.version)
			}
			if len(doc.Config.History) != 3 || !cmp.Equal(doc.Config.Config.Entrypoint, []string{"/app/main"}) {
				t.Errorf("config %s", config)
			}
			info, err := cs.Info(t.Context(), index.Manifests[0].Digest)
			if err != nil || info.Labels["containerd.io/gc.ref.content.l.2"] != m.Layers[2].Digest.String() || info.Labels["containerd.io/gc.ref.content.config"] != m.Config.Digest.String() {
				t.Errorf("labels %v, %v: what containerd's garbage collector goes by", info.Labels, err)
			}
			judge(t, bootstrapOf(t, cs, m.Layers[2]), blobs, true)

			// What is a Nydus image stays as it is.
			again, err := convertImage(t, cs, *got, nydus.PackOption{}, nydus.MergeOption{OCI: true}, true)
			if err != nil || again != nil && again.Digest != got.Digest {
				t.Errorf("converted again: %v, %v", again, err)
			}
		})
	}
}

// TestConverterOptions: one manifest comes out of its index; the subject; another config type.
func TestConverterOptions(t *testing.T) {
	cs := newStore(t)
	source := putImage(t, cs, false, "amd64")
	got, err := convertImage(t, cs, source, nydus.PackOption{Compressor: "lz4_block"}, nydus.MergeOption{WithReferrer: true, MergeManifest: true}, false)
	if err != nil {
		t.Fatal(err)
	}
	var from ocispec.Index
	var m ocispec.Manifest
	get(t, cs, source, &from)
	get(t, cs, *got, &m)
	if got.MediaType != ocispec.MediaTypeImageManifest || m.Subject == nil || m.Subject.Digest != from.Manifests[0].Digest || m.Subject.Platform != nil {
		t.Errorf("%s with subject %+v", got.MediaType, m.Subject)
	}
	if m.Config.MediaType != "application/vnd.nydus.image.config.v1+json" || m.Annotations[builder.AnnotationSourceDigest] != from.Manifests[0].Digest.String() {
		t.Errorf("manifest %+v", m)
	}
}

// storage is a backend that remembers what it got.
type storage struct{ blobs []digest.Digest }

func (s *storage) Push(_ context.Context, _ content.Store, d ocispec.Descriptor) error {
	if len(s.blobs) == 2 {
		return errBroken
	}
	s.blobs = append(s.blobs, d.Digest)
	return nil
}

func (*storage) Check(digest.Digest) (string, error) { return "", nil }
func (*storage) Type() string                        { return "test" }

// TestBackend: blobs go to a storage, and the manifest has the bootstrap only.
func TestBackend(t *testing.T) {
	cs := newStore(t)
	source := putImage(t, cs, false, "amd64")
	s := &storage{}
	got, err := convertImage(t, cs, source, nydus.PackOption{Backend: s}, nydus.MergeOption{Backend: s}, false)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	var config ocispec.Image
	get(t, cs, *got, &m)
	get(t, cs, m.Config, &config)
	if len(s.blobs) != 2 || len(m.Layers) != 1 || len(config.RootFS.DiffIDs) != 1 || len(config.History) != 1 {
		t.Errorf("%d blobs in the storage, manifest %+v, config %+v", len(s.blobs), m, config)
	}
	if _, err := convertImage(t, cs, source, nydus.PackOption{Backend: s}, nydus.MergeOption{Backend: s}, false); !errors.Is(err, errBroken) {
		t.Errorf("a broken storage: %v", err)
	}
}

// sized is a backend that knows the blobs of a dictionary, as nydus-snapshotter's interface has it.
type sized struct {
	storage
	sizes map[digest.Digest]int64
}

func (s *sized) Size(d digest.Digest) (int64, error) {
	if n, ok := s.sizes[d]; ok {
		return n, nil
	}
	return 0, errBroken
}

// TestBackendSize: blobs of a chunk dictionary that only the backend has.
func TestBackendSize(t *testing.T) {
	cs := newStore(t)
	data := strings.Repeat("shared", 3000)
	base := pack(t, tarOf(t, "a="+data), nydus.PackOption{})
	boot, ids := merge(t, [][]byte{base}, nydus.MergeOption{})
	dict, _ := store(t, boot, nil)
	layer := put(t, cs, nydus.MediaTypeNydusBlob, pack(t, tarOf(t, "b="+data, "c=new"), nydus.PackOption{ChunkDictPath: dict}))
	b := &sized{sizes: map[digest.Digest]int64{ids[0]: 12345}}
	opt := nydus.MergeOption{ChunkDictPath: dict, Backend: b}
	_, blobs, err := nydus.MergeLayers(t.Context(), cs, []ocispec.Descriptor{layer}, opt)
	if err != nil || len(blobs) != 2 || blobs[1].Digest != ids[0] || blobs[1].Size != 12345 {
		t.Errorf("blobs %+v, %v, want the dictionary's with 12345 bytes", blobs, err)
	}
	b.sizes = nil
	if _, _, err := nydus.MergeLayers(t.Context(), cs, []ocispec.Descriptor{layer}, opt); !errors.Is(err, errBroken) {
		t.Errorf("a blob that nobody has: %v", err)
	}
	opt.Encrypt = func(_ context.Context, _ content.Store, d ocispec.Descriptor) (ocispec.Descriptor, error) {
		return d, nil
	}
	if _, _, err := nydus.MergeLayers(t.Context(), cs, []ocispec.Descriptor{layer}, opt); !errors.Is(err, nydus.ErrUnsupported) {
		t.Errorf("Encrypt: %v, want ErrUnsupported", err)
	}
}

// TestBuildKit makes the calls that BuildKit makes (moby/buildkit util/compression/nydus.go and
// cache/compression_nydus.go): it packs a layer while it is being made, merges readers of its store
// through a pipe into a gzip stream, and unpacks. TestBuildKitModule has its own code do so.
func TestBuildKit(t *testing.T) {
	cs := newStore(t)
	var descs []ocispec.Descriptor
	for _, l := range fixtureTars(t) {
		w, err := content.OpenWriter(t.Context(), cs, content.WithRef("buildkit"))
		if err != nil {
			t.Fatal(err)
		}
		pw, err := nydus.Pack(t.Context(), w, nydus.PackOption{FsVersion: "6"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(pw, bytes.NewReader(l)); err != nil {
			t.Fatal(err)
		}
		if err := pw.Close(); err != nil {
			t.Fatal(err)
		}
		d := w.Digest()
		status, err := w.Status()
		if err := errors.Join(err, w.Commit(t.Context(), 0, ""), w.Close()); err != nil {
			t.Fatal(err)
		}
		descs = append(descs, ocispec.Descriptor{MediaType: nydus.MediaTypeNydusBlob, Digest: d, Size: status.Offset, Annotations: map[string]string{nydus.LayerAnnotationNydusBlob: "true"}})
	}
	var layers []nydus.Layer
	var blobs [][]byte
	for _, d := range descs {
		ra, err := cs.ReaderAt(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		defer ra.Close()
		layers = append(layers, nydus.Layer{Digest: d.Digest, ReaderAt: ra})
		blobs = append(blobs, get(t, cs, d, nil))
	}
	pr, pw := io.Pipe()
	go func() {
		_, err := nydus.Merge(t.Context(), layers, pw, nydus.MergeOption{WithTar: true})
		_ = pw.CloseWithError(err) // never fails
	}()
	var targz bytes.Buffer
	z := gzip.NewWriter(&targz)
	if _, err := io.Copy(z, pr); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	judge(t, bootstrapOf(t, cs, put(t, cs, ocispec.MediaTypeImageLayerGzip, targz.Bytes())), blobs, true)
	for i, d := range descs {
		ra, err := cs.ReaderAt(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := errors.Join(nydus.Unpack(t.Context(), ra, &out, nydus.UnpackOption{Stream: true}), ra.Close()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(names(t, fixtureTars(t)[i]), names(t, out.Bytes())); diff != "" {
			t.Errorf("layer %d:\n%s", i, diff)
		}
	}
}
