package nydusimage_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

func TestMain(m *testing.M) { testenv.Main(m) }

const (
	blobKey      = nydusimage.AnnotationBlob
	bootstrapKey = nydusimage.AnnotationBootstrap
)

// zoo is the layout that the real nydusify wrote, in a copy that may be changed.
type zoo struct {
	t        *testing.T
	dir      string
	manifest ocispec.Manifest
	config   ocispec.Image
}

func newZoo(t *testing.T) *zoo {
	t.Helper()
	z := &zoo{t: t, dir: filepath.Join(t.TempDir(), "zoo")}
	if err := os.CopyFS(z.dir, os.DirFS(filepath.Join(testenv.Fixtures(t), "oci", "nydus-v6"))); err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	z.get("index.json", &index)
	z.get(blobPath(index.Manifests[0].Digest), &z.manifest)
	z.get(blobPath(z.manifest.Config.Digest), &z.config)
	return z
}

func blobPath(d digest.Digest) string { return filepath.Join("blobs", "sha256", d.Encoded()) }

func (z *zoo) get(name string, v any) {
	z.t.Helper()
	b, err := os.ReadFile(filepath.Join(z.dir, name))
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		z.t.Fatal(err)
	}
}

func (z *zoo) put(mediaType string, b []byte) ocispec.Descriptor {
	z.t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err := os.WriteFile(filepath.Join(z.dir, blobPath(d.Digest)), b, 0o600); err != nil {
		z.t.Fatal(err)
	}
	return d
}

func (z *zoo) putJSON(mediaType string, v any) ocispec.Descriptor {
	z.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		z.t.Fatal(err)
	}
	return z.put(mediaType, b)
}

// save writes config, manifest and index, and returns the reference.
func (z *zoo) save() string {
	z.t.Helper()
	z.manifest.Config = z.putJSON(ocispec.MediaTypeImageConfig, z.config)
	d := z.putJSON(ocispec.MediaTypeImageManifest, z.manifest)
	d.Annotations = map[string]string{ocispec.AnnotationRefName: "changed"}
	b, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{d}})
	if err == nil {
		err = os.WriteFile(filepath.Join(z.dir, "index.json"), b, 0o600)
	}
	if err != nil {
		z.t.Fatal(err)
	}
	return "oci:" + z.dir + ":changed"
}

func (z *zoo) last() *ocispec.Descriptor { return &z.manifest.Layers[len(z.manifest.Layers)-1] }

// setBootstrap replaces the bootstrap layer.
func (z *zoo) setBootstrap(stored []byte, diffID digest.Digest) {
	z.t.Helper()
	d := z.put(z.last().MediaType, stored)
	d.Annotations = z.last().Annotations
	*z.last() = d
	z.config.RootFS.DiffIDs[len(z.config.RootFS.DiffIDs)-1] = diffID
}

func (z *zoo) bootstrap() []byte {
	z.t.Helper()
	img, err := nydusimage.Open(z.t.Context(), "oci:"+z.dir, nydusimage.Options{Platform: "linux/amd64"})
	if err != nil {
		z.t.Fatal(err)
	}
	r, size := img.Bootstrap()
	b := make([]byte, size)
	if _, err := r.ReadAt(b, 0); err != nil {
		z.t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		z.t.Fatal(err)
	}
	return b
}

func TestOpenByOthers(t *testing.T) {
	t.Parallel()
	z := newZoo(t)
	temp := t.TempDir()
	img, err := nydusimage.Open(t.Context(), "oci:"+z.dir, nydusimage.Options{Platform: "linux/amd64", TempDir: temp})
	if err != nil {
		t.Fatal(err)
	}
	if err := img.CheckLayers(t.Context(), true); err != nil {
		t.Error(err)
	}
	if err := img.CheckLayers(t.Context(), false); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) != 0 {
		t.Errorf("files with names in the temporary directory: %v, %v", left, err)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	if ref := newZoo(t).save(); ref != "" {
		img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Platform: "linux/amd64"})
		if err != nil {
			t.Fatalf("saved without a change: %v", err)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
}

// One change to the documents at a time, each of which must be found.
func TestContradictions(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(z *zoo){
		"has 3 layers, its config 2 diff IDs":                      func(z *zoo) { z.config.RootFS.DiffIDs = z.config.RootFS.DiffIDs[1:] },
		"layer 0: diff ID is sha256:0000":                          func(z *zoo) { z.config.RootFS.DiffIDs[0] = digest.Digest("sha256:" + strings.Repeat("0", 64)) },
		"media type is \"application/vnd.oci.image.layer.v1.tar\"": func(z *zoo) { z.manifest.Layers[0].MediaType = ocispec.MediaTypeImageLayer },
		"annotation " + blobKey + " is \"\"":                       func(z *zoo) { delete(z.manifest.Layers[1].Annotations, blobKey) },
		"annotation " + bootstrapKey + " is \"yes\"":               func(z *zoo) { z.last().Annotations[bootstrapKey] = "yes" },
		"which is no layer of the image": func(z *zoo) {
			z.manifest.Layers = z.manifest.Layers[1:]
			z.config.RootFS.DiffIDs = z.config.RootFS.DiffIDs[1:]
		},
		"names blob \"abc\"":             func(z *zoo) { z.last().Annotations[nydusimage.AnnotationPrefetch] = "abc" },
		"the bootstrap layer unpacks to": func(z *zoo) { z.config.RootFS.DiffIDs[2] = z.config.RootFS.DiffIDs[1] },
		"plain container image": func(z *zoo) {
			for i := range z.manifest.Layers {
				z.manifest.Layers[i].Annotations, z.manifest.Layers[i].MediaType = nil, ocispec.MediaTypeImageLayerGzip
			}
		},
	} {
		z := newZoo(t)
		change(z)
		img, err := nydusimage.Open(t.Context(), z.save(), nydusimage.Options{Platform: "linux/amd64"})
		if img != nil || !errors.Is(err, nydusimage.ErrInvalid) && !errors.Is(err, remote.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("Open = %v, want ErrInvalid with %s", err, want)
		}
	}
}

func pack(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		h.Mode = 0o644
		body := []byte(h.Linkname)
		if h.Typeflag == tar.TypeReg {
			h.Linkname = ""
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t *testing.T, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// The bootstrap layer may be stored in any of the layer compressions; what is no bootstrap
// layer is refused. Linkname stands for a regular file's content here.
func TestBootstrapLayers(t *testing.T) {
	t.Parallel()
	boot := string(newZoo(t).bootstrap())
	good := pack(t, tar.Header{Name: "image/", Typeflag: tar.TypeDir}, tar.Header{Name: "image/image.boot", Typeflag: tar.TypeReg, Linkname: boot})
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	twice := pack(t, tar.Header{Name: "image/image.boot", Typeflag: tar.TypeReg, Linkname: boot}, tar.Header{Name: "./image/image.boot", Typeflag: tar.TypeReg, Linkname: boot})
	cut := good[:len(good)/2]
	none := pack(t, tar.Header{Name: "image/other", Typeflag: tar.TypeReg, Linkname: boot})
	link := pack(t, tar.Header{Name: "image/image.boot", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"})
	for name, c := range map[string]struct {
		stored, plain []byte
		want          string
	}{
		"gzip":        {gz(t, good), good, ""},
		"zstd":        {enc.EncodeAll(good, nil), good, ""},
		"plain":       {good, good, ""},
		"two":         {gz(t, twice), twice, "two entries image/image.boot"},
		"cut off":     {gz(t, cut), cut, "unexpected EOF"},
		"none":        {gz(t, none), none, "no entry image/image.boot"},
		"link":        {gz(t, link), link, "no entry image/image.boot"},
		"cut gzip":    {gz(t, good)[:1000], good, "unexpected EOF"},
		"no gzip":     {[]byte{0x1f, 0x8b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, good, "gzip: invalid header"},
		"nothing":     {nil, nil, "no entry image/image.boot"},
		"nonsense":    {bytes.Repeat([]byte("nonsense"), 100), good, "tar: "},
		"not a RAFS":  {gz(t, pack(t, tar.Header{Name: "image/image.boot", Typeflag: tar.TypeReg, Linkname: strings.Repeat("x", 8192)})), nil, "rafs: "},
		"short":       {gz(t, pack(t, tar.Header{Name: "image/image.boot", Typeflag: tar.TypeReg, Linkname: "x"})), nil, "rafs: "},
		"wrong names": {gz(t, pack(t, tar.Header{Name: "../image/image.boot.x", Typeflag: tar.TypeReg, Linkname: boot})), nil, "no entry"},
	} {
		z := newZoo(t)
		z.setBootstrap(c.stored, digest.FromBytes(c.plain))
		temp := t.TempDir()
		img, err := nydusimage.Open(t.Context(), z.save(), nydusimage.Options{Platform: "linux/amd64", TempDir: temp})
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			} else if err := img.Close(); err != nil {
				t.Error(err)
			}
		} else if img != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: Open = %v, want an error with %s", name, err, c.want)
		}
		if left, err := os.ReadDir(temp); err != nil || len(left) != 0 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
	}
}

func TestCheckLayersFindsDamage(t *testing.T) {
	t.Parallel()
	z := newZoo(t)
	// A layer that no chunk refers to is damaged, then missing.
	extra := z.put(nydusimage.MediaTypeBlob, []byte("nobody reads this"))
	extra.Annotations = map[string]string{blobKey: "true"}
	z.manifest.Layers = append([]ocispec.Descriptor{extra}, z.manifest.Layers...)
	z.config.RootFS.DiffIDs = append([]digest.Digest{extra.Digest}, z.config.RootFS.DiffIDs...)
	ref := z.save()
	name := filepath.Join(z.dir, blobPath(extra.Digest))
	check := func(data bool, want error) {
		t.Helper()
		img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Platform: "linux/amd64"})
		if err != nil {
			t.Fatal(err)
		}
		if err := img.CheckLayers(t.Context(), data); !errors.Is(err, want) {
			t.Errorf("CheckLayers(%v) = %v, want %v", data, err, want)
		}
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
	check(true, nil)
	if err := os.WriteFile(name, []byte("nobody reads THIS"), 0o600); err != nil {
		t.Fatal(err)
	}
	check(true, remote.ErrDigest)
	check(false, nil)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	check(false, remote.ErrNotFound)
}

func TestOpenFilesErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "x.boot")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		dir:             "is a directory",
		dir + "/absent": "no such file or directory",
		file:            "bootstrap " + file + ": ",
	} {
		if img, err := nydusimage.OpenFiles(name, ""); img != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("OpenFiles(%s) = %v, want an error with %s", name, err, want)
		}
	}
	boot := filepath.Join(testenv.Fixtures(t), "nydus", "v6-zstd", "image.boot")
	img, err := nydusimage.OpenFiles(boot, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"../../etc/passwd", "", "a/b", ".", strings.Repeat("a", 65)} {
		if _, err := img.OpenBlob(t.Context(), rafs.Blob{ID: id}); !errors.Is(err, nydusimage.ErrInvalid) {
			t.Errorf("OpenBlob(%q) = %v, want ErrInvalid", id, err)
		}
	}
	if _, err := img.OpenBlob(t.Context(), rafs.Blob{ID: "abc"}); err == nil || !strings.Contains(err.Error(), "no --blob-dir was given") {
		t.Errorf("OpenBlob = %v", err)
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}
