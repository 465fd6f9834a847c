package backend_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// zoo returns the layout that the real nydusify wrote.
func zoo(t testing.TB) string {
	t.Helper()
	return filepath.Join(testenv.Fixtures(t), "oci", "nydus-v6")
}

// compare reads every blob of an image by ranges and compares them with the files in dir.
func compare(t *testing.T, blobs *backend.Blobs, dir string) {
	t.Helper()
	for n, b := range blobs.Origin().Blobs {
		want, err := os.ReadFile(filepath.Join(dir, b.Data.ID))
		if err != nil {
			t.Fatal(err)
		}
		src := blobs.Blob(n)
		for _, r := range []fill.Request{{Length: int64(len(want))}, {Length: 1}, {Offset: 100, Length: 1000}, {Offset: int64(len(want)) - 1, Length: 1}, {Length: 5, Meta: true}} {
			rc, err := src.Range(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(rc)
			if err = errors.Join(err, rc.Close()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want[r.Offset:][:r.Length]) {
				t.Errorf("blob %d: Range(%+v) differs", n, r)
			}
		}
	}
}

// again is an origin after it was kept as JSON.
func again(t *testing.T, o backend.Origin) backend.Origin {
	t.Helper()
	p, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	var kept backend.Origin
	if err := json.Unmarshal(p, &kept); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(o, kept); diff != "" {
		t.Errorf("the origin changed (-want +got):\n%s", diff)
	}
	return kept
}

func TestOpenLayout(t *testing.T) {
	t.Parallel()
	dir := zoo(t)
	img, err := backend.Open(t.Context(), "oci:"+dir, backend.Options{Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	boot, size := img.Bootstrap()
	if parsed, err := rafs.Open(boot, size); err != nil || len(parsed.Blobs) != len(img.RAFS.Blobs) {
		t.Errorf("the bootstrap is %v, %v", parsed, err)
	}
	files := filepath.Join(dir, "blobs", "sha256")
	compare(t, img.Blobs, files)
	origin := again(t, img.Origin())
	if origin.Prefetch != -1 || origin.Digest == "" {
		t.Errorf("Origin = %+v", origin)
	}
	blobs, err := img.Detach()
	if err != nil {
		t.Fatal(err)
	}
	compare(t, blobs, files)
	if err := blobs.Close(); err != nil {
		t.Error(err)
	}
	blobs, err = backend.Reopen(t.Context(), origin, backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	compare(t, blobs, files)
	if err := blobs.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenFiles(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", "v6-zstd")
	img, err := backend.OpenFiles(filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	compare(t, img.Blobs, filepath.Join(dir, "blobs"))
	blobs, err := backend.Reopen(t.Context(), again(t, img.Origin()), backend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	compare(t, blobs, filepath.Join(dir, "blobs"))
	if err := errors.Join(blobs.Close(), img.Close()); err != nil {
		t.Error(err)
	}
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", "v6-zstd")
	for name, open := range map[string]func() (*backend.Image, error){
		"is no absolute path": func() (*backend.Image, error) {
			return backend.OpenFiles(filepath.Join(dir, "image.boot"), "blobs")
		},
		"oci/dir is no absolute path": func() (*backend.Image, error) {
			return backend.Open(t.Context(), "oci:oci/dir", backend.Options{})
		},
		"plain container image": func() (*backend.Image, error) {
			return backend.Open(t.Context(), "oci:"+filepath.Join(testenv.Fixtures(t), "oci", "source"), backend.Options{Platform: "linux/amd64"})
		},
	} {
		if img, err := open(); img != nil || err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("open = %v, want an error with %s", err, name)
		}
	}
	id := strings.Repeat("a", 64)
	for name, o := range map[string]backend.Origin{
		"prefetch blob 3 of 1": {Reference: "oci:/x", Prefetch: 3, Blobs: []backend.BlobOrigin{{Data: backend.File{ID: id, Size: 1}}}},
		"size 0":               {Reference: "oci:/x", Prefetch: -1, Blobs: []backend.BlobOrigin{{Data: backend.File{ID: id}}}},
		"is no sha256":         {Reference: "oci:/x", Prefetch: -1, Blobs: []backend.BlobOrigin{{Data: backend.File{ID: "abc", Size: 1}}}},
		"at most 64 letters":   {BlobDir: "/x", Prefetch: -1, Blobs: []backend.BlobOrigin{{Data: backend.File{ID: "../x", Size: 1}}}},
		"is not absolute":      {BlobDir: "x", Prefetch: -1},
	} {
		if b, err := backend.Reopen(t.Context(), o, backend.Options{}); b != nil || !errors.Is(err, backend.ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("Reopen = %v, want ErrInvalid with %s", err, name)
		}
	}
}
