package main

import (
	"compress/gzip"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
)

// packFixture packs the layers of the fixture image and returns the blobs, named by their ids in a
// directory, the lowest layer first.
func packFixture(t *testing.T) (dir string, blobs []string) {
	t.Helper()
	layout := filepath.Join(testenv.Fixtures(t), "oci", "source")
	document := func(name string, v any) {
		data, err := os.ReadFile(filepath.Join(layout, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, v); err != nil {
			t.Fatal(err)
		}
	}
	var index ocispec.Index
	var m ocispec.Manifest
	document("index.json", &index)
	document(filepath.Join("blobs", "sha256", index.Manifests[0].Digest.Encoded()), &m)
	dir = t.TempDir()
	for _, l := range m.Layers {
		f, err := os.Open(filepath.Join(layout, "blobs", "sha256", l.Digest.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(filepath.Join(dir, "packing"))
		if err != nil {
			t.Fatal(err)
		}
		blob, err := builder.PackLayer(t.Context(), out, z, builder.DefaultOptions())
		if err != nil {
			t.Fatal(err)
		}
		if err := out.Close(); err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, filepath.Join(dir, blob.ID))
		if err := os.Rename(out.Name(), filepath.Join(dir, blob.ID)); err != nil {
			t.Fatal(err)
		}
	}
	return dir, blobs
}

// TestMerge merges packed layers: the result is the fixture's tree, to our reader and to the real
// nydus-image, and what cannot be merged leaves nothing.
func TestMerge(t *testing.T) {
	t.Parallel()
	optimizer := testenv.Binary(t, "optimizer")
	dir, blobs := packFixture(t)
	out := filepath.Join(t.TempDir(), "image.boot")
	stdout, err := exec.Command(optimizer, append([]string{"merge", "--bootstrap", out, "--prefetch", "/app"}, blobs...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, b := range blobs {
		want += digest.NewDigestFromEncoded(digest.SHA256, filepath.Base(b)).String() + "\n"
	}
	if string(stdout) != want {
		t.Errorf("standard output is\n%swant\n%s", stdout, want)
	}
	fixture := filepath.Join(testenv.Fixtures(t), "nydus", "v6-zstd")
	for _, c := range [][]string{
		{optimizer, "check", "--bootstrap", out, "--blob-dir", dir},
		{optimizer, "diff", "--bootstrap", out, "--blob-dir", dir, "--with", filepath.Join(fixture, "image.boot"), "--with-blob-dir", filepath.Join(fixture, "blobs")},
		{testenv.Tool(t, "nydus-image"), "check", "--bootstrap", out, "--blob-dir", dir},
	} {
		if text, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", c, err, text)
		}
	}
	broken := filepath.Join(t.TempDir(), "broken.boot")
	if err := exec.Command(optimizer, "merge", "--bootstrap", broken, out).Run(); err == nil {
		t.Error("merge of a file that is no blob succeeded")
	}
	if _, err := os.Stat(broken); err == nil {
		t.Error("a merge that failed left a bootstrap")
	}
}
