package remote_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// testImage is an image to publish.
type testImage struct {
	blobs    []remote.Blob
	data     [][]byte // of blobs
	config   remote.Document
	manifest remote.Document
}

// newImage makes an image whose layers hold size bytes each; equal seeds are equal images.
func newImage(t testing.TB, seed int64, platform string, sizes ...int) testImage {
	t.Helper()
	var img testImage
	var config ocispec.Image
	config.OS, config.Architecture = "linux", platform
	config.Config.Env = []string{fmt.Sprintf("SEED=%d", seed)}
	config.RootFS.Type = "layers"
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	r := rand.New(rand.NewSource(seed))
	for i, size := range sizes {
		raw := layerTar(t, fmt.Sprintf("layer%d", i), r, size)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(raw))
		doc := remote.NewDocument(ocispec.MediaTypeImageLayerGzip, gzipped(t, raw))
		img.blobs, img.data = append(img.blobs, doc.Blob()), append(img.data, doc.Data)
		m.Layers = append(m.Layers, doc.Descriptor)
	}
	img.config = remote.NewDocument(ocispec.MediaTypeImageConfig, encode(t, config))
	m.Config = img.config.Descriptor
	img.manifest = remote.NewDocument(ocispec.MediaTypeImageManifest, encode(t, m))
	return img
}

func layerTar(t testing.TB, name string, r *rand.Rand, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	data := make([]byte, size)
	r.Read(data)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)})); err != nil {
		t.Fatal(err)
	}
	_, err := w.Write(data)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(data)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func encode(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func parse(t testing.TB, s string) remote.Reference {
	t.Helper()
	ref, err := remote.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func openSource(t testing.TB, ref string, o remote.Options) remote.Source {
	t.Helper()
	src, err := remote.OpenSource(t.Context(), parse(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Errorf("close %s: %v", ref, err)
		}
	})
	return src
}

func openTarget(t testing.TB, ref string, o remote.Options) remote.Target {
	t.Helper()
	dst, err := remote.OpenTarget(t.Context(), parse(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dst.Close(); err != nil {
			t.Errorf("close %s: %v", ref, err)
		}
	})
	return dst
}

func publish(t testing.TB, ref string, img testImage, o remote.Options) remote.Published {
	t.Helper()
	dst, err := remote.OpenTarget(t.Context(), parse(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	p, err := remote.Publish(t.Context(), dst, img.blobs, img.config, img.manifest, remote.PublishOptions{})
	if err := errors.Join(err, dst.Close()); err != nil {
		t.Fatalf("Publish(%s): %v", ref, err)
	}
	return p
}

// readAll fetches desc and closes it.
func readAll(ctx context.Context, src remote.Source, desc ocispec.Descriptor) ([]byte, error) {
	rc, err := src.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(rc)
	return data, errors.Join(err, rc.Close())
}

func readRange(ctx context.Context, src remote.Source, desc ocispec.Descriptor, off, n int64) ([]byte, error) {
	rc, err := src.FetchRange(ctx, desc, off, n)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(rc)
	return data, errors.Join(err, rc.Close())
}

// wantClass fails the test unless err is of class and its text has all of parts.
func wantError(t testing.TB, what string, err, class error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want %v", what, class)
		return
	}
	t.Logf("%s: %v", what, err)
	if class != nil && !errors.Is(err, class) {
		t.Errorf("%s: error %v, want class %v", what, err, class)
	}
	for _, p := range parts {
		if !bytes.Contains([]byte(err.Error()), []byte(p)) {
			t.Errorf("%s: error %q does not say %q", what, err, p)
		}
	}
}

func osDir(dir string) fs.FS { return os.DirFS(dir) }

func emptyIndex() v1.ImageIndex { return empty.Index }

// transportFor returns a transport whose connections end with the test.
func transportFor(t testing.TB) http.RoundTripper {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func contextWithTimeout(t testing.TB, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}

// hostsDir makes a configuration directory with one host's hosts.toml.
func hostsDir(t testing.TB, host, toml string, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	sub := filepath.Join(dir, strings.ReplaceAll(host, ":", "_")+"_")
	if !strings.Contains(host, ":") {
		sub = filepath.Join(dir, host)
	}
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(files); i += 2 {
		if err := os.WriteFile(filepath.Join(sub, files[i]), []byte(files[i+1]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(sub, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func readerOf(data []byte) io.Reader { return bytes.NewReader(data) }
