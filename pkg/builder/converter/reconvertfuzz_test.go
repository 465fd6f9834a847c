package converter_test

import (
	"encoding/json"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
)

// FuzzReconvertHook takes the bootstrap out of any manifest with any config. What comes out has a diff ID for each layer, and one
// layer less; what has no bootstrap stays.
func FuzzReconvertHook(f *testing.F) {
	id := digest.FromString("a")
	boot := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: id, Size: 1, Annotations: map[string]string{nydus.LayerAnnotationNydusBootstrap: "true"}}
	blob := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: id, Size: 1, Annotations: map[string]string{nydus.LayerAnnotationUncompressed: id.String()}}
	config := `{"rootfs":{"type":"layers","diff_ids":["` + id.String() + `","` + id.String() + `"]},"history":[{"created_by":"a"},{"empty_layer":true}],"x":1}`
	for _, layers := range [][]ocispec.Descriptor{{blob, boot}, {boot}, {boot, blob}, nil} {
		m, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: layers})
		if err != nil {
			f.Fatal(err)
		}
		for _, c := range []string{config, `{"rootfs":null}`, `null`, `{"rootfs":{"diff_ids":[""]},"history":null}`, `[`} {
			f.Add(m, []byte(c))
		}
	}
	cs := newStore(f)
	hook := nydus.ReconvertHookFunc()
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		var m, out ocispec.Manifest
		if len(config) == 0 || json.Unmarshal(manifest, &m) != nil {
			return
		}
		m.Config = put(t, cs, ocispec.MediaTypeImageConfig, config)
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		desc := put(t, cs, ocispec.MediaTypeImageManifest, raw)
		got, err := hook(t.Context(), cs, desc, &desc)
		if err != nil {
			if got != nil {
				t.Errorf("hook = %+v, %v", got, err)
			}
			return
		}
		get(t, cs, *got, &out)
		if n := len(m.Layers) - 1; n < 0 || !nydus.IsNydusBootstrap(m.Layers[n]) {
			if got.Digest != desc.Digest {
				t.Errorf("a manifest without bootstrap becomes %+v", out)
			}
			return
		}
		var c struct {
			RootFS ocispec.RootFS `json:"rootfs"`
		}
		get(t, cs, out.Config, &c)
		if len(out.Layers) != len(m.Layers)-1 || len(c.RootFS.DiffIDs) != len(out.Layers) {
			t.Errorf("%d layers become %d, with %d diff IDs", len(m.Layers), len(out.Layers), len(c.RootFS.DiffIDs))
		}
	})
}
