package workload_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/internal/workload"
)

func build(t *testing.T, name workload.Name, o workload.Options) *workload.Image {
	t.Helper()
	img, err := workload.Build(t.Context(), name, o)
	if errors.Is(err, workload.ErrUnavailable) {
		t.Skipf("Build(%s): %v", name, err)
	}
	if err != nil {
		t.Fatalf("Build(%s): %v", name, err)
	}
	return img
}

// checkLayers reads every layer and holds it against its digest and diff ID.
func checkLayers(t *testing.T, img *workload.Image) map[string]*tar.Header {
	t.Helper()
	files := map[string]*tar.Header{}
	for n, l := range img.Manifest.Layers {
		rc, err := img.Layer(n)
		if err != nil {
			t.Fatal(err)
		}
		stored, raw := digest.SHA256.Digester(), digest.SHA256.Digester()
		zr, err := gzip.NewReader(io.TeeReader(rc, stored.Hash()))
		if err != nil {
			t.Fatal(err)
		}
		body := io.TeeReader(zr, raw.Hash())
		tr := tar.NewReader(body)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("layer %d: %v", n, err)
			}
			files[strings.TrimSuffix(h.Name, "/")] = h
		}
		if _, err := io.Copy(io.Discard, body); err != nil {
			t.Fatal(err)
		}
		if stored.Digest() != l.Digest {
			t.Errorf("layer %d: digest = %s, want %s", n, stored.Digest(), l.Digest)
		}
		if want := img.Config.RootFS.DiffIDs[n]; raw.Digest() != want {
			t.Errorf("layer %d: diff ID = %s, want %s", n, raw.Digest(), want)
		}
		if err := rc.Close(); err != nil {
			t.Error(err)
		}
	}
	return files
}

func TestStaticIsDeterministic(t *testing.T) {
	t.Parallel()
	a := build(t, workload.Static, workload.Options{CacheDir: t.TempDir()})
	b := build(t, workload.Static, workload.Options{CacheDir: t.TempDir()})
	if a.Target.Digest != b.Target.Digest {
		t.Errorf("two builds differ: %s and %s", a.Target.Digest, b.Target.Digest)
	}
	files := checkLayers(t, a)
	for name, want := range map[string]byte{
		"data/link": tar.TypeLink, "data/null": tar.TypeChar, "data/fifo": tar.TypeFifo, "data/.wh.deleted": tar.TypeReg,
		"data/symlink": tar.TypeSymlink, "data/bytes-\xff\xfe": tar.TypeReg, "hidden/.wh..wh..opq": tar.TypeReg,
	} {
		h := files[name]
		if h == nil || h.Typeflag != want {
			t.Errorf("entry %q = %+v, want type %q", name, h, want)
		}
	}
	if got := files["data/xattrs"].PAXRecords["SCHILY.xattr.user.headstart"]; got != "value\x00with zero" {
		t.Errorf("xattr = %q", got)
	}
	if len(a.Command()) < 2 || a.Tag() != "1" || a.Size() < 1<<20 {
		t.Errorf("Command, Tag, Size = %q, %q, %d", a.Command(), a.Tag(), a.Size())
	}
}

// TestConcurrentBuild has many builders of one cache; all get the same image and nothing
// but it and its lock is left.
func TestConcurrentBuild(t *testing.T) {
	t.Parallel()
	cache := t.TempDir()
	if err := os.MkdirAll(filepath.Join(cache, "unrelated"), 0o755); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	digests := make([]digest.Digest, 4)
	for i := range digests {
		wg.Go(func() {
			img, err := workload.Build(context.Background(), workload.Static, workload.Options{CacheDir: cache})
			if err != nil {
				t.Error(err)
				return
			}
			digests[i] = img.Target.Digest
		})
	}
	wg.Wait()
	for _, d := range digests {
		if d != digests[0] || d == "" {
			t.Errorf("digests = %v, want equal", digests)
		}
	}
	entries, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 3 {
		t.Errorf("cache holds %v, want an image, its lock and the unrelated directory", entries)
	}
}

// TestKilledBuilder leaves what a killed builder leaves and builds over it.
func TestKilledBuilder(t *testing.T) {
	t.Parallel()
	cache := t.TempDir()
	img := build(t, workload.Static, workload.Options{CacheDir: cache})
	if err := os.RemoveAll(img.Dir); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(cache, "."+filepath.Base(img.Dir)+".tmp-123")
	if err := os.MkdirAll(filepath.Join(left, "layout"), 0o755); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	again := build(t, workload.Static, workload.Options{CacheDir: cache, Log: &log})
	if again.Target.Digest != img.Target.Digest {
		t.Errorf("digest = %s, want %s", again.Target.Digest, img.Target.Digest)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left over directory: %v, want it gone", err)
	}
	if !strings.Contains(log.String(), "workload static: built in") {
		t.Errorf("log = %q, want progress", log.String())
	}
}

func TestUnknownName(t *testing.T) {
	t.Parallel()
	_, err := workload.Build(t.Context(), "nonesuch", workload.Options{CacheDir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), `unknown workload "nonesuch"`) {
		t.Errorf("Build(nonesuch) = %v, want an error that names it", err)
	}
}

func TestCancelledBuild(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cache := t.TempDir()
	if _, err := workload.Build(ctx, workload.Static, workload.Options{CacheDir: cache}); !errors.Is(err, context.Canceled) {
		t.Errorf("Build with a cancelled context = %v, want context.Canceled", err)
	}
}

func TestArchive(t *testing.T) {
	t.Parallel()
	img := build(t, workload.Static, workload.Options{})
	var buf bytes.Buffer
	if err := img.WriteArchive(&buf); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	tr := tar.NewReader(&buf)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names[h.Name] = true
	}
	for _, want := range []string{"oci-layout", "index.json", "blobs/sha256/" + img.Target.Digest.Encoded()} {
		if !names[want] {
			t.Errorf("archive lacks %s", want)
		}
	}
}

// TestRealImages builds the large images or takes them from the cache and verifies them.
func TestRealImages(t *testing.T) {
	if testing.Short() {
		t.Skip("large images")
	}
	for name, want := range map[workload.Name]string{
		workload.Burst:  "files/299/59999",
		workload.GoTool: "usr/local/go/src/net/http/server.go",
		workload.Python: "app/server.py",
		workload.Nginx:  "usr/sbin/nginx",
		workload.Node:   "usr/share/nodejs/serve-static/package.json",
		workload.JDK:    "app/Server.class",
	} {
		t.Run(string(name), func(t *testing.T) {
			img := build(t, name, workload.Options{Log: os.Stderr})
			files := checkLayers(t, img)
			if files[want] == nil {
				t.Errorf("no %s among %d entries", want, len(files))
			}
			t.Logf("%s: %d layers, %d entries, %.1f MB", img.Reference, len(img.Manifest.Layers), len(files), float64(img.Size())/1e6)
		})
	}
}
