package convert_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestIssue1996: diff IDs were lost when a prefetch blob came in (dragonflyoss/nydus 1996). Those of converted and optimized images
// are computed again here, from the files of the layout.
func TestIssue1996(t *testing.T) {
	for _, version := range []rafs.Version{rafs.V5, rafs.V6} {
		t.Run("convert v"+version.String(), func(t *testing.T) {
			dir := t.TempDir()
			o := options(t, "oci:"+dir+":image")
			o.Build.FSVersion, o.Build.List = version, list("/app/main", "/bin/tool")
			if _, err := convert.Run(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			checkDiffIDs(t, dir, 3) // a layer, prefetch blob, bootstrap: the other layer's chunks are all in the prefetch blob
		})
		t.Run("optimize v"+version.String(), func(t *testing.T) {
			dir := t.TempDir()
			o := optimizeOptions(t, "oci:"+dir+":image")
			o.Source = "oci:" + filepath.Join(testenv.Fixtures(t), "oci", "nydus-v"+version.String())
			optimize(t, o)
			checkDiffIDs(t, dir, 4)
		})
	}
}

// checkDiffIDs holds the config of every image in a layout against its layers: want of them, each the sha256 of its plain bytes.
func checkDiffIDs(t *testing.T, dir string, want int) {
	t.Helper()
	read := func(d digest.Digest) []byte {
		b, err := os.ReadFile(filepath.Join(dir, "blobs", d.Algorithm().String(), d.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	decode := func(b []byte, v any) {
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var todo ocispec.Index
	decode(b, &todo)
	images := 0
	for len(todo.Manifests) > 0 {
		d := todo.Manifests[0]
		todo.Manifests = todo.Manifests[1:]
		if d.MediaType == ocispec.MediaTypeImageIndex {
			var index ocispec.Index
			decode(read(d.Digest), &index)
			todo.Manifests = append(todo.Manifests, index.Manifests...)
			continue
		}
		var m ocispec.Manifest
		var config ocispec.Image
		decode(read(d.Digest), &m)
		decode(read(m.Config.Digest), &config)
		images++
		if len(m.Layers) != want || len(config.RootFS.DiffIDs) != want {
			t.Fatalf("%d layers, %d diff IDs, want %d", len(m.Layers), len(config.RootFS.DiffIDs), want)
		}
		for i, l := range m.Layers {
			plain := read(l.Digest)
			if l.MediaType == ocispec.MediaTypeImageLayerGzip {
				z, err := gzip.NewReader(bytes.NewReader(plain))
				if err == nil {
					plain, err = io.ReadAll(z)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if got := digest.FromBytes(plain); got != config.RootFS.DiffIDs[i] {
				t.Error(fmt.Sprintf("layer %d, a %s: ", i, l.MediaType), "its plain bytes have ", got, ", the config says ", config.RootFS.DiffIDs[i])
			}
		}
	}
	if images == 0 {
		t.Error("no image in the layout")
	}
}
