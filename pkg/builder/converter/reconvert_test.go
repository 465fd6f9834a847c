package converter_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestReconvert makes a plain image of a Nydus image with containerd's converter, as nydusify does, and compares its layers with those
// that the Nydus image was made of.
func TestReconvert(t *testing.T) {
	for compressor, mediaType := range map[string]string{
		"": ocispec.MediaTypeImageLayerGzip, "zstd": ocispec.MediaTypeImageLayerZstd, "uncompressed": ocispec.MediaTypeImageLayer,
	} {
		t.Run(mediaType, func(t *testing.T) {
			cs := newStore(t)
			image, err := convertImage(t, cs, putImage(t, cs, false, "amd64"), nydus.PackOption{}, nydus.MergeOption{OCI: true, MergeManifest: true}, true)
			if err != nil {
				t.Fatal(err)
			}
			convert := nydus.DefaultIndexConvertFunc(nydus.LayerReconvertFunc(nydus.UnpackOption{Compressor: compressor}), true, platforms.All)
			plain, err := convert(t.Context(), cs, *image)
			if err != nil {
				t.Fatal(err)
			}
			var m ocispec.Manifest
			var config ocispec.Image
			get(t, cs, *plain, &m)
			get(t, cs, m.Config, &config)
			want := fixtureTars(t)
			if len(m.Layers) != len(want) || len(config.RootFS.DiffIDs) != len(want) || len(config.History) != len(want) || m.Config.MediaType != ocispec.MediaTypeImageConfig {
				t.Fatalf("manifest %+v, config %+v, want %d layers", m, config, len(want))
			}
			for i, l := range m.Layers {
				got := plainLayer(t, cs, l)
				if id := digest.FromBytes(got); id != config.RootFS.DiffIDs[i] || l.MediaType != mediaType || nydus.IsNydusBlob(l) {
					t.Errorf("layer %d is %+v with diff ID %s, the config says %s", i, l, id, config.RootFS.DiffIDs[i])
				}
				if diff := cmp.Diff(names(t, want[i]), names(t, got)); diff != "" {
					t.Errorf("layer %d (-packed +unpacked):\n%s", i, diff)
				}
			}
			info, err := cs.Info(t.Context(), plain.Digest)
			if err != nil || info.Labels["containerd.io/gc.ref.content.config"] != m.Config.Digest.String() {
				t.Errorf("labels %v, %v", info.Labels, err)
			}
		})
	}
}

// plainLayer returns the tar of a layer.
func plainLayer(t testing.TB, cs content.Store, d ocispec.Descriptor) []byte {
	t.Helper()
	var r io.Reader = bytes.NewReader(get(t, cs, d, nil))
	switch d.MediaType {
	case ocispec.MediaTypeImageLayerGzip:
		r = gunzip(t, get(t, cs, d, nil))
	case ocispec.MediaTypeImageLayerZstd:
		z, err := zstd.NewReader(r)
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		r = z
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestReconvertErrors: what cannot be unpacked, and backends.
func TestReconvertErrors(t *testing.T) {
	cs := newStore(t)
	layer := tarOf(t, "a=1")
	blob := put(t, cs, nydus.MediaTypeNydusBlob, pack(t, layer, nydus.PackOption{}))
	blob.Annotations = map[string]string{nydus.LayerAnnotationNydusBlob: "true"}
	ref := put(t, cs, nydus.MediaTypeNydusBlob, pack(t, gzipped(t, layer), nydus.PackOption{OCIRef: true}))
	ref.Annotations = blob.Annotations
	bare := put(t, cs, nydus.MediaTypeNydusBlob, bytes.Repeat([]byte("no bootstrap"), 100))
	bare.Annotations = blob.Annotations
	full := &storage{blobs: []digest.Digest{"", ""}}
	for name, c := range map[string]struct {
		opt  nydus.UnpackOption
		desc ocispec.Descriptor
		want error
	}{
		"compressor":   {nydus.UnpackOption{Compressor: "xz"}, blob, nydus.ErrUnsupported},
		"ref":          {nydus.UnpackOption{}, ref, nydus.ErrUnsupported},
		"no bootstrap": {nydus.UnpackOption{}, bare, rafs.ErrNoBootstrap},
		"backend":      {nydus.UnpackOption{Backend: full}, blob, errBroken},
	} {
		if got, err := nydus.LayerReconvertFunc(c.opt)(t.Context(), cs, c.desc); got != nil || !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v, want %v", name, got, err, c.want)
		}
	}
	s := &storage{}
	got, err := nydus.LayerReconvertFunc(nydus.UnpackOption{Backend: s})(t.Context(), cs, blob)
	if err != nil || len(s.blobs) != 1 || s.blobs[0] != got.Digest {
		t.Errorf("backend got %v, layer %+v, %v", s.blobs, got, err)
	}
	if got, err := nydus.LayerReconvertFunc(nydus.UnpackOption{})(t.Context(), cs, put(t, cs, ocispec.MediaTypeImageLayer, layer)); got != nil || err != nil {
		t.Errorf("a plain layer: %+v, %v, want it left alone", got, err)
	}
}
