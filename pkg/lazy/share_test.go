package lazy_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// content is what an image has: contents by path.
type content map[string][]byte

// mixed returns a tree of n files of 1 to 200 KB, of which those below shared are the same for every seed.
func mixed(seed uint64, n, shared int) content {
	files := content{}
	for i := range n {
		s := seed
		if i < shared {
			s = 0
		}
		// Shared and own files lie side by side.
		r := rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, s, i)))
		p := make([]byte, 1000+int(r.Uint64()%200_000))
		_, _ = r.Read(p)
		files[fmt.Sprintf("d%d/f%05d", i%7, i*7919%n)] = p
	}
	return files
}

// image converts a tree to an image of one layer in a layout, and returns the request that mounts it.
func (b *box) image(name string, files content, flags ...string) lazy.Request {
	b.t.Helper()
	return b.imageAt("oci:"+filepath.Join(b.dir, name)+":v1", files, flags...)
}

// imageAt is image for any target.
func (b *box) imageAt(dst string, files content, flags ...string) lazy.Request {
	b.t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	paths := []string{}
	for path := range files {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		if err := w.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(files[path])), Typeflag: tar.TypeReg}); err != nil {
			b.t.Fatal(err)
		}
		if _, err := w.Write(files[path]); err != nil {
			b.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		b.t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		img, err = mutate.ConfigFile(img, &ggcr.ConfigFile{Architecture: "amd64", OS: "linux", RootFS: must2(img.ConfigFile()).RootFS})
	}
	if err != nil {
		b.t.Fatal(err)
	}
	src, err := os.MkdirTemp(b.dir, "source-")
	if err != nil {
		b.t.Fatal(err)
	}
	path, err := ggcrlayout.Write(src, empty.Index)
	if err == nil {
		err = path.AppendImage(img)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	args := append([]string{"convert", "-q", "oci:" + src, dst, "--chunk-size", "64KiB"}, flags...)
	if out, err := exec.Command(b.binary, args...).CombinedOutput(); err != nil {
		b.t.Fatalf("optimizer %q: %v: %s", args, err, out)
	}
	return lazy.Request{Reference: dst, Platform: "linux/amd64", Background: "none"}
}

func must2(c *ggcr.ConfigFile, err error) *ggcr.ConfigFile {
	if err != nil {
		panic(err)
	}
	return c
}

// same compares a tree with what it should be.
func (f content) same(t testing.TB, dir string) {
	t.Helper()
	for path, want := range f {
		got, err := os.ReadFile(filepath.Join(dir, path))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: %d bytes, %v, want %d others", path, len(got), err, len(want))
		}
	}
}

// at returns the numbers of the mount at dir.
func (b *box) at(dir string) lazy.Mount {
	b.t.Helper()
	for _, m := range b.status().Mounts {
		if m.Dir == dir {
			return m
		}
	}
	b.t.Fatalf("no mount at %s", dir)
	return lazy.Mount{}
}

func fetched(s lazy.Stats) int64 { return s.Fetched().Bytes }

// Two images share 80 % of their chunks: the second one fetches what it has for itself, however it is read.
func TestShare(t *testing.T) {
	files, shared := 300, 240
	if testing.Short() {
		files, shared = 100, 80
	}
	for name, how := range map[string]struct {
		flags      []string
		background string
		restart    bool
		driver     lazy.Driver
	}{
		"demand":     {background: "none"},
		"background": {background: "full"},
		"sha256":     {background: "none", flags: []string{"--digester", "sha256"}},
		"closed":     {background: "none", restart: true},
		"fuse":       {background: "none", driver: lazy.DriverFUSE},
		"v5":         {background: "none", driver: lazy.DriverFUSE, flags: []string{"--fs-version", "5"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t)
			one, two := mixed(1, files, shared), mixed(2, files, shared)
			first := b.image("one", one, how.flags...)
			second := b.image("two", two, how.flags...)
			first.Background, second.Background = "full", how.background
			first.Driver, second.Driver = how.driver, how.driver
			m := b.mount(b.mountpoint("a"), first)
			if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
				t.Fatal(err)
			}
			if how.restart { // nobody has it any more, and the index is another daemon's
				b.unmount(m.Dir)
				b.gone()
			}
			dir := b.mountpoint("b")
			m = b.mount(dir, second)
			if how.background == "full" {
				if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
					t.Fatal(err)
				}
			}
			two.same(t, dir)
			if done, err := b.client.Wait(t.Context(), m.Device); err != nil || done.State != lazy.StateComplete {
				t.Fatalf("Wait() = %+v, %v", done, err)
			}
			var own, all int64
			for path, p := range two {
				all += int64(len(p))
				if !bytes.Equal(one[path], p) {
					own += int64(len(p))
				}
			}
			s := b.at(dir).Stats
			t.Logf("fetched %d of %d bytes (%.1f %%), own %.1f %%, reused %d chunks, %d bytes", fetched(s), all, 100*float64(fetched(s))/float64(all), 100*float64(own)/float64(all), s.ReusedChunks, s.ReusedBytes)
			if got := fetched(s); got > own+all/100 {
				t.Errorf("the second mount fetched %d bytes, its own files have %d", got, own)
			}
			if s.ReusedBytes < all-own || s.ReusedChunks == 0 {
				t.Errorf("reused %d bytes in %d chunks, want %d", s.ReusedBytes, s.ReusedChunks, all-own)
			}
		})
	}
}

// gone waits until no daemon is left.
func (b *box) gone() {
	b.t.Helper()
	eventually(b.t, func() string {
		if _, err := b.client.Status(b.t.Context(), false); err == nil {
			return "the daemon stays"
		}
		return ""
	})
}

// A mount that shares nothing fetches everything, and nothing of it is lent.
func TestShareNone(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	files := mixed(1, 40, 40)
	r := b.image("one", files)
	other := b.image("two", mixed(2, 45, 40))
	r.Share, r.Background = lazy.ShareNone, "full"
	m := b.mount(b.mountpoint("a"), r)
	if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
		t.Fatal(err)
	}
	other.Background = "full"
	m = b.mount(b.mountpoint("b"), other)
	if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
		t.Fatal(err)
	}
	if s := b.at(m.Dir).Stats; s.ReusedChunks != 0 {
		t.Errorf("%d chunks were lent by a mount that lends nothing", s.ReusedChunks)
	}
	files.same(t, b.at(b.mountpoint("a")).Dir)
	r.Share = "some"
	if _, err := b.client.Mount(t.Context(), b.mountpoint("c"), r); err == nil || !strings.Contains(err.Error(), "share") {
		t.Errorf("Mount(share some) = %v, want a refusal", err)
	}
}

// Chunks that are wrong on disk are not lent: they are fetched, and the second image is right.
func TestShareCorrupt(t *testing.T) {
	t.Parallel()
	b := newBox(t)
	one, two := mixed(1, 60, 50), mixed(2, 60, 50)
	first, second := b.image("one", one), b.image("two", two)
	first.Background = "full"
	m := b.mount(b.mountpoint("a"), first)
	if _, err := b.client.Wait(t.Context(), m.Device); err != nil {
		t.Fatal(err)
	}
	b.unmount(m.Dir)
	b.gone()
	data, err := filepath.Glob(filepath.Join(b.state, "blobs", "*", "data"))
	if err != nil || len(data) == 0 {
		t.Fatal(data, err)
	}
	for _, name := range data {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		for at := int64(100); at < info.Size(); at += 20_000 { // every chunk
			if _, err := f.WriteAt([]byte("not what it was"), at); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	dir := b.mountpoint("b")
	m = b.mount(dir, second)
	two.same(t, dir)
	s := b.at(dir).Stats
	var own, all int64
	for path, p := range two {
		all += int64(len(p))
		if !bytes.Equal(one[path], p) {
			own += int64(len(p))
		}
	}
	// Every chunk of more than 20,000 bytes is wrong: nearly all is fetched, and not only what no other image has.
	if got := fetched(s); s.Failed != 0 || got < own+(all-own)*4/5 {
		t.Errorf("%+v: fetched %d bytes, want nearly all of %d in place of those that are wrong: %d are its own", s, got, all, own)
	}
	raw, _ := json.Marshal(s)
	t.Logf("%s", raw)
}
