package imageroot_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/headstart-oci/headstart/internal/imageroot"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/remote"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// image writes a layout with one layer for each map of files.
func image(t *testing.T, diffID *v1.Hash, layers ...map[string]string) string {
	t.Helper()
	testenv.Root(t)
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, files := range layers {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, text := range files {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(w, text); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if diffID != nil {
		config.RootFS.DiffIDs[0] = *diffID
	}
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	l, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = l.AppendImage(img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func open(t *testing.T, ctx context.Context, dir, base string) (*imageroot.Root, error) {
	t.Helper()
	src, err := remote.OpenSource(t.Context(), remote.Layout(dir, ""), remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	return imageroot.Open(ctx, src, imageroot.Options{Base: base, Platform: "linux/amd64"})
}

func roots(t *testing.T, base string) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(base, "root-*"))
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func TestOpen(t *testing.T) {
	dir := image(t, nil, map[string]string{"a": "1", "b/c": "1"}, map[string]string{"b/d": "2", ".wh.a": ""})
	base := filepath.Join(t.TempDir(), "made")
	r, err := open(t, t.Context(), dir, base)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Layers) != 2 {
		t.Fatalf("layers %q", r.Layers)
	}
	if text, err := os.ReadFile(filepath.Join(r.Layers[1], "b/d")); err != nil || string(text) != "2" {
		t.Errorf("b/d of the second layer: %q, %v", text, err)
	}
	if info, err := os.Lstat(filepath.Join(r.Layers[1], "a")); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("the whiteout is %v, %v, want a device", info, err)
	}
	// Another one beside it, and what is left of one whose process is gone.
	dead := filepath.Join(base, "root-dead")
	if err := os.MkdirAll(filepath.Join(dead, "0/x"), 0o755); err != nil {
		t.Fatal(err)
	}
	second, err := open(t, t.Context(), dir, base)
	if err != nil {
		t.Fatal(err)
	}
	if got := roots(t, base); len(got) != 2 {
		t.Errorf("there are %q, want those in use", got)
	}
	for range 2 {
		if err := errors.Join(r.Close(), second.Close()); err != nil {
			t.Error(err)
		}
	}
	if got := roots(t, base); len(got) != 0 {
		t.Errorf("there are %q, want none", got)
	}
}

func TestOpenFails(t *testing.T) {
	base := t.TempDir()
	other := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("ab", 32)}
	if _, err := open(t, t.Context(), image(t, &other, map[string]string{"a": "1"}), base); !errors.Is(err, remote.ErrDigest) || !strings.Contains(err.Error(), "unpack layer 0") {
		t.Errorf("another diff id: %v", err)
	}
	if _, err := open(t, t.Context(), image(t, nil), base); !errors.Is(err, imageroot.ErrUnsupported) {
		t.Errorf("no layers: %v", err)
	}
	// What a layer names outside of its directory is inside of it, or refused.
	if r, err := open(t, t.Context(), image(t, nil, map[string]string{"../../escaped": "1"}), base); err == nil {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, dir := range []string{base, filepath.Dir(base)} {
		if _, err := os.Stat(filepath.Join(dir, "escaped")); err == nil {
			t.Error("a layer wrote outside of its directory")
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, ctx, image(t, nil, map[string]string{"a": "1"}), base); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	blobs := image(t, nil, map[string]string{"a": strings.Repeat("x", 1<<16)})
	names, err := filepath.Glob(filepath.Join(blobs, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && len(b) > 1 && b[0] == 0x1f { // the gzip layer
			b[len(b)/2] ^= 1
			if err := os.WriteFile(name, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := open(t, t.Context(), blobs, base); err == nil {
		t.Error("a damaged layer is unpacked")
	}
	if left := roots(t, base); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}
