package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
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
	// Bare bootstraps, named by their blobs as nydus-image wants them, make the same image.
	bare := t.TempDir()
	args := []string{"merge", "--prefetch", "/app", "--bootstrap", filepath.Join(bare, "merged")}
	for _, name := range blobs {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		inner, err := rafs.ReadInline(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(bare, filepath.Base(name)+".boot")
		if err := os.WriteFile(file, inner, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, file)
	}
	if text, err := exec.Command(optimizer, args...).CombinedOutput(); err != nil {
		t.Fatalf("merge of bootstraps: %v\n%s", err, text)
	}
	a, aerr := os.ReadFile(out)
	b, berr := os.ReadFile(filepath.Join(bare, "merged"))
	if err := errors.Join(aerr, berr); err != nil || !bytes.Equal(a, b) {
		t.Errorf("bare bootstraps make another image than their blobs: %v", err)
	}
	nameless := filepath.Join(bare, "layer.boot")
	if err := os.Rename(args[len(args)-1], nameless); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "broken.boot")
	for file, want := range map[string]string{nameless: "has a placeholder for the id of its blob", os.Args[0]: "it is no bare bootstrap", "/nowhere": "no such file"} {
		text, err := exec.Command(optimizer, "merge", "--bootstrap", broken, file).CombinedOutput()
		if err == nil || !strings.Contains(string(text), want) {
			t.Errorf("merge of %s = %v, %s, want %q", file, err, text, want)
		}
	}
	if _, err := os.Stat(broken); err == nil {
		t.Error("a merge that failed left a bootstrap")
	}
}
