package remote_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// tarOf makes a tar of headers; a regular file's content is its Linkname.
func tarOf(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		var content string
		if h.Typeflag == 0 || h.Typeflag == tar.TypeReg {
			content, h.Linkname, h.Size = h.Linkname, "", int64(len(h.Linkname))
		}
		h.Mode = 0o644
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func reg(name string, content []byte) tar.Header {
	return tar.Header{Name: name, Linkname: string(content)}
}

// archiveOf returns img's archive as entries, named v.
func archiveOf(t testing.TB, img testImage) []tar.Header {
	t.Helper()
	desc := img.manifest.Descriptor
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: "v"}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{desc}}
	data, err := json.Marshal(index)
	if err != nil {
		t.Fatal(err)
	}
	entries := []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir},
		{Name: "blobs/", Typeflag: tar.TypeDir},
		{Name: "blobs/sha256/", Typeflag: tar.TypeDir},
		reg("./index.json", data), reg("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)),
		reg("manifest.json", []byte("[]")), reg("repositories", []byte("{}")),
	}
	for i, b := range img.blobs {
		entries = append(entries, reg("blobs/sha256/"+b.Descriptor.Digest.Encoded(), img.data[i]))
	}
	for _, d := range []remote.Document{img.config, img.manifest} {
		entries = append(entries, reg("./blobs/sha256/"+d.Descriptor.Digest.Encoded(), d.Data))
	}
	return entries
}

func TestArchiveBadInput(t *testing.T) {
	t.Parallel()
	img := newImage(t, 1, "amd64", 100_000)
	layer := "blobs/sha256/" + img.blobs[0].Descriptor.Digest.Encoded()
	good := archiveOf(t, img)
	whole := tarOf(t, good...)
	without := func(name string) []tar.Header {
		var out []tar.Header
		for _, h := range good {
			if strings.TrimPrefix(h.Name, "./") != name {
				out = append(out, h)
			}
		}
		return out
	}
	with := func(base []tar.Header, more ...tar.Header) []byte {
		return tarOf(t, append(append([]tar.Header(nil), base...), more...)...)
	}
	for name, c := range map[string]struct {
		data  []byte
		class error // nil: it is fine
		parts []string
	}{
		"good":                   {data: whole},
		"no end marker":          {data: whole[:len(whole)-1024]},
		"links beside the image": {data: with(good, tar.Header{Name: "latest", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}, tar.Header{Name: "../../x", Linkname: "boo"}, tar.Header{Name: "/abs", Linkname: "boo"})},
		"a link as another blob": {data: with(good, tar.Header{Name: "blobs/sha256/" + hex64, Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"})},
		"empty":                  {data: nil, class: remote.ErrInvalid, parts: []string{"no oci image layout"}},
		"empty tar":              {data: make([]byte, 1024), class: remote.ErrInvalid, parts: []string{"no oci image layout"}},
		"no tar":                 {data: bytes.Repeat([]byte("x"), 2048), class: remote.ErrInvalid, parts: []string{"entry 0"}},
		"gzip":                   {data: gzipped(t, whole), class: remote.ErrUnsupported, parts: []string{"compressed (gzip)"}},
		"zstd":                   {data: []byte("\x28\xb5\x2f\xfd1234"), class: remote.ErrUnsupported, parts: []string{"zstd"}},
		"docker archive":         {data: tarOf(t, reg("manifest.json", []byte("[]"))), class: remote.ErrUnsupported, parts: []string{"docker archive"}},
		"truncated in a header":  {data: whole[:512*4+100], class: remote.ErrInvalid},
		"truncated in a blob":    {data: whole[:len(whole)/2], class: remote.ErrInvalid},
		"no oci-layout":          {data: tarOf(t, without("oci-layout")...), class: remote.ErrUnsupported},
		"no index":               {data: tarOf(t, without("index.json")...), class: remote.ErrInvalid, parts: []string{"no index.json"}},
		"no layer":               {data: tarOf(t, without(layer)...), class: remote.ErrNotFound, parts: []string{layer[len("blobs/sha256/"):]}},
		"layer is a symlink":     {data: with(without(layer), tar.Header{Name: layer, Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"}), class: remote.ErrInvalid, parts: []string{"no regular file"}},
		"layer is a hard link":   {data: with(without(layer), tar.Header{Name: layer, Typeflag: tar.TypeLink, Linkname: "index.json"}), class: remote.ErrInvalid, parts: []string{"no regular file"}},
		"layer is a device":      {data: with(without(layer), tar.Header{Name: layer, Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 5}), class: remote.ErrInvalid, parts: []string{"no regular file"}},
		"index is a symlink":     {data: with(without("index.json"), tar.Header{Name: "index.json", Typeflag: tar.TypeSymlink, Linkname: "oci-layout"}), class: remote.ErrInvalid, parts: []string{"no regular file"}},
		"layer twice":            {data: with(good, reg(layer, []byte("x"))), class: remote.ErrInvalid, parts: []string{"twice"}},
		"index twice, otherwise": {data: with(good, reg("./x/../index.json", []byte("{}"))), class: remote.ErrInvalid, parts: []string{"twice"}},
		"layer elsewhere":        {data: with(without(layer), reg("../"+layer, img.data[0]), reg("/"+layer, img.data[0])), class: remote.ErrNotFound},
		"layer is wrong":         {data: with(without(layer), reg(layer, bytes.Repeat([]byte("x"), len(img.data[0])))), class: remote.ErrDigest},
		"layer is short":         {data: with(without(layer), reg(layer, img.data[0][1:])), class: remote.ErrDigest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "a.tar")
			if err := os.WriteFile(file, c.data, 0o644); err != nil {
				t.Fatal(err)
			}
			err := readImage(t, "oci-archive:"+file+":v")
			if c.class == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, "read", err, c.class, append(c.parts, file)...)
		})
	}
}

// FuzzArchive reads damaged archives: whatever is read whole is right.
func FuzzArchive(f *testing.F) {
	img := newImage(f, 1, "amd64", 100)
	f.Add(tarOf(f, archiveOf(f, img)...))
	f.Add(make([]byte, 1024))
	f.Fuzz(func(t *testing.T, data []byte) {
		file := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(file, data, 0o644); err != nil {
			t.Fatal(err)
		}
		src, err := remote.OpenSource(t.Context(), remote.Archive(file, ""), remote.Options{})
		if err != nil {
			if src != nil {
				t.Fatal("a source in spite of an error")
			}
			return
		}
		defer src.Close()
		got, err := remote.Select(t.Context(), src, "linux/amd64")
		if err != nil {
			return
		}
		for _, l := range got.Layers {
			data, err := readAll(t.Context(), src, l.Descriptor)
			if err == nil && l.Descriptor.Digest.Algorithm().FromBytes(data) != l.Descriptor.Digest {
				t.Fatal("wrong bytes without an error")
			}
		}
	})
}

// FuzzManifest parses manifests.
func FuzzManifest(f *testing.F) {
	f.Add(newImage(f, 1, "amd64", 10).manifest.Data)
	f.Add([]byte(`{"schemaVersion":1,"fsLayers":[]}`))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := remote.ParseManifest(data)
		if err != nil {
			if !errors.Is(err, remote.ErrInvalid) && !errors.Is(err, remote.ErrUnsupported) && !errors.Is(err, remote.ErrTooLarge) {
				t.Fatalf("unclassed error %v", err)
			}
			return
		}
		for _, l := range m.Layers {
			if l.Digest.Validate() != nil || l.Size < 0 {
				t.Fatalf("bad layer %+v", l)
			}
		}
	})
}

// TestArchiveIsDeterministic writes equal bytes, appears only whole, and replaces.
func TestArchiveIsDeterministic(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	img := newImage(t, 1, "amd64", 100_000, 200_000, 0, 50)
	var first []byte
	for range 3 {
		publish(t, "oci-archive:"+dir+"/a.tar:v", img, remote.Options{})
		data, err := os.ReadFile(dir + "/a.tar")
		if err != nil {
			t.Fatal(err)
		}
		if first != nil && !bytes.Equal(first, data) {
			t.Error("equal images, different archives")
		}
		first = data
	}
}

// TestArchiveRecovers goes on after blobs that failed half-way, pushed at once with others.
func TestArchiveRecovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	dst := openTarget(t, "oci-archive:"+dir+"/a.tar:v", remote.Options{})
	img := newImage(t, 1, "amd64", 100_000, 70_001, 333)
	var wg sync.WaitGroup
	for _, b := range img.blobs {
		wg.Go(func() {
			broken := b
			broken.Open = func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(io.LimitReader(bytes.NewReader(make([]byte, 1<<20)), b.Descriptor.Size/2)), nil
			}
			if _, err := dst.Push(t.Context(), broken); !errors.Is(err, remote.ErrDigest) {
				t.Errorf("Push of half a blob: %v, want %v", err, remote.ErrDigest)
			}
			if _, err := dst.Push(t.Context(), b); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := os.Stat(dir + "/a.tar"); err == nil {
		t.Error("the archive is there before it is whole")
	}
	if _, err := remote.Publish(t.Context(), dst, img.blobs, img.config, img.manifest, remote.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	checkImage(t, openSource(t, "oci-archive:"+dir+"/a.tar", remote.Options{}), img)
	_, err := dst.Push(t.Context(), remote.NewDocument("x/y", []byte("late")).Blob())
	wantError(t, "Push after Tag", err, nil, "finished")
}

// TestArchiveSweeps removes what a writer that died has left, and nobody else's files.
func TestArchiveSweeps(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	alive := openTarget(t, "oci-archive:"+dir+"/a.tar:v", remote.Options{})
	for _, name := range []string{".headstart-a.tar-1", ".headstart-a.tar-2", ".headstart-b.tar-1"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if old := time.Now().Add(-time.Hour); e.Name() != ".headstart-a.tar-2" {
			if err := os.Chtimes(filepath.Join(dir, e.Name()), old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	img := newImage(t, 1, "amd64", 10)
	publish(t, "oci-archive:"+dir+"/a.tar:v", img, remote.Options{})
	for name, want := range map[string]bool{".headstart-a.tar-1": false, ".headstart-a.tar-2": true, ".headstart-b.tar-1": true} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", name, err, want)
		}
	}
	if _, err := remote.Publish(t.Context(), alive, img.blobs, img.config, img.manifest, remote.PublishOptions{}); err != nil {
		t.Errorf("the writer that was alive: %v", err)
	}
	_, err = remote.OpenTarget(t.Context(), parse(t, "oci-archive:"+dir), remote.Options{})
	wantError(t, "a directory as target", err, remote.ErrInvalid, dir)
}
