package remote_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// TestLayoutBadInput damages a good layout.
func TestLayoutBadInput(t *testing.T) {
	t.Parallel()
	img := newImage(t, 1, "amd64", 1000)
	manifest, layer := img.manifest.Descriptor.Digest, img.blobs[0].Descriptor.Digest
	blob := func(d digest.Digest) string { return "blobs/sha256/" + d.Encoded() }
	index := func(entries string) string {
		return `{"schemaVersion":2,"manifests":[` + entries + `]}`
	}
	entry := func(mediaType, d, size, more string) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%s%s}`, mediaType, d, size, more)
	}
	for name, c := range map[string]struct {
		files map[string]string // replaced; "" removes
		links map[string]string
		ref   string
		class error
		parts []string
	}{
		"no oci-layout":      {files: map[string]string{"oci-layout": ""}, class: remote.ErrInvalid, parts: []string{"no oci-layout file"}},
		"wrong version":      {files: map[string]string{"oci-layout": `{"imageLayoutVersion":"9.0"}`}, class: remote.ErrUnsupported, parts: []string{`"9.0", want "1.0.0"`}},
		"garbled version":    {files: map[string]string{"oci-layout": `{`}, class: remote.ErrInvalid, parts: []string{"oci-layout"}},
		"huge version file":  {files: map[string]string{"oci-layout": strings.Repeat(" ", 1<<17)}, class: remote.ErrTooLarge},
		"no index":           {files: map[string]string{"index.json": ""}, class: remote.ErrInvalid, parts: []string{"no index.json"}},
		"garbled index":      {files: map[string]string{"index.json": `{"manifests":3}`}, class: remote.ErrInvalid, parts: []string{"index.json"}},
		"manifest as index":  {files: map[string]string{"index.json": string(img.manifest.Data)}, class: remote.ErrInvalid, parts: []string{"a manifest where an index"}},
		"huge index":         {files: map[string]string{"index.json": strings.Repeat(" ", 5<<20)}, class: remote.ErrTooLarge},
		"empty index":        {files: map[string]string{"index.json": index("")}, class: remote.ErrNotFound, parts: []string{"no entries"}},
		"other tag":          {ref: ":other", class: remote.ErrNotFound, parts: []string{`no entry named "other"`, `"v"`}},
		"other digest":       {ref: "@sha256:" + hex64, class: remote.ErrNotFound, parts: []string{hex64}},
		"digest of a path":   {files: map[string]string{"index.json": index(entry(ocispec.MediaTypeImageManifest, "sha256:../../oci-layout", "30", ""))}, class: remote.ErrInvalid},
		"negative size":      {files: map[string]string{"index.json": index(entry(ocispec.MediaTypeImageManifest, manifest.String(), "-1", ""))}, class: remote.ErrInvalid},
		"huge size":          {files: map[string]string{"index.json": index(entry(ocispec.MediaTypeImageManifest, manifest.String(), "1099511627776", ""))}, class: remote.ErrTooLarge},
		"other size":         {files: map[string]string{"index.json": index(entry(ocispec.MediaTypeImageManifest, manifest.String(), "7", ""))}, class: remote.ErrDigest, parts: []string{"says 7"}},
		"other media type":   {files: map[string]string{"index.json": index(entry("text/plain", manifest.String(), fmt.Sprint(len(img.manifest.Data)), ""))}, class: remote.ErrUnsupported, parts: []string{"text/plain"}},
		"no manifest":        {files: map[string]string{blob(manifest): ""}, class: remote.ErrNotFound, parts: []string{manifest.String()}},
		"no config":          {files: map[string]string{blob(img.config.Descriptor.Digest): ""}, class: remote.ErrNotFound, parts: []string{"config of"}},
		"flipped manifest":   {files: map[string]string{blob(manifest): strings.Replace(string(img.manifest.Data), "2", "3", 1)}, class: remote.ErrDigest, parts: []string{manifest.String()}},
		"flipped layer":      {files: map[string]string{blob(layer): strings.Repeat("x", int(img.blobs[0].Descriptor.Size))}, class: remote.ErrDigest, parts: []string{layer.String()}},
		"truncated layer":    {files: map[string]string{blob(layer): "x"}, class: remote.ErrDigest, parts: []string{"has 1 bytes"}},
		"link out":           {links: map[string]string{blob(layer): "/etc/passwd"}, class: nil, parts: []string{"path escapes"}},
		"relative link out":  {links: map[string]string{blob(layer): "../../../../../../../etc/passwd"}, parts: []string{"path escapes"}},
		"blobs elsewhere":    {links: map[string]string{"blobs": "/etc"}, parts: []string{"path escapes"}},
		"link to itself":     {links: map[string]string{blob(layer): filepath.Base(blob(layer))}, parts: []string{"too many levels"}},
		"two images, no tag": {files: map[string]string{"index.json": index(entry(ocispec.MediaTypeImageManifest, manifest.String(), "5", "") + "," + entry(ocispec.MediaTypeImageManifest, layer.String(), "5", `,"annotations":{"org.opencontainers.image.ref.name":"b"}`))}, class: remote.ErrNotFound, parts: []string{"which image?", `"b"`, manifest.String()}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			publish(t, "oci:"+dir+":v", img, remote.Options{})
			for f, content := range c.files {
				if err := os.Remove(filepath.Join(dir, f)); err != nil {
					t.Fatal(err)
				}
				if content != "" {
					if err := os.WriteFile(filepath.Join(dir, f), []byte(content), 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			for f, to := range c.links {
				if err := errors.Join(os.RemoveAll(filepath.Join(dir, f)), os.Symlink(to, filepath.Join(dir, f))); err != nil {
					t.Fatal(err)
				}
			}
			parts := append(c.parts, dir)
			if name == "huge size" || name == "other media type" { // found by who asks, not by the layout
				parts = c.parts
			}
			wantError(t, "read", readImage(t, "oci:"+dir+c.ref), c.class, parts...)
		})
	}
}

// readImage reads all of an image.
func readImage(t testing.TB, ref string) (err error) {
	t.Helper()
	src, err := remote.OpenSource(t.Context(), parse(t, ref), remote.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	img, err := remote.Select(t.Context(), src, "linux/amd64")
	if err != nil {
		return err
	}
	for _, l := range img.Layers {
		if _, err := readAll(t.Context(), src, l.Descriptor); err != nil {
			return err
		}
	}
	return nil
}

func TestMissingPaths(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o644); err != nil {
		t.Fatal(err)
	}
	wantError(t, "layout", readImage(t, "oci:"+dir+"/missing"), remote.ErrNotFound, "missing")
	wantError(t, "archive", readImage(t, "oci-archive:"+dir+"/missing"), remote.ErrNotFound, "missing")
	wantError(t, "empty directory", readImage(t, "oci:"+dir), remote.ErrInvalid, "no oci image layout")
	wantError(t, "file as layout", readImage(t, "oci:"+file), nil, "not a directory")
	wantError(t, "directory as archive", readImage(t, "oci-archive:"+dir), remote.ErrInvalid, "not a regular file")
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "l"), 0o755), os.Rename(fifo, filepath.Join(dir, "l", "oci-layout"))); err != nil {
		t.Fatal(err)
	}
	wantError(t, "FIFO in a layout", readImage(t, "oci:"+dir+"/l"), remote.ErrInvalid, "not a regular file")
}

// TestLayoutDamagedBlob: what is written again takes the place of a file that has the blob's name and size, and other bytes.
func TestLayoutDamagedBlob(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	target := openTarget(t, "oci:"+dir+"/layout:x", remote.Options{})
	data := bytes.Repeat([]byte("the bytes of a blob "), 50_000)
	desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(data), Size: int64(len(data))}
	blob := filepath.Join(dir, "layout", "blobs", "sha256", desc.Digest.Encoded())
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	b := remote.Blob{Descriptor: desc, File: file, Open: func(context.Context) (io.ReadCloser, error) { return os.Open(file) }}
	for _, step := range []struct {
		spoil bool
		want  remote.PushResult
	}{{false, remote.Uploaded}, {false, remote.Existed}, {true, remote.Uploaded}, {false, remote.Existed}} {
		if step.spoil {
			bad := bytes.Clone(data)
			bad[len(bad)/2] ^= 1
			if err := errors.Join(os.Remove(blob), os.WriteFile(blob, bad, 0o600)); err != nil { // not into the link to file
				t.Fatal(err)
			}
		}
		if got, err := target.Push(t.Context(), b); err != nil || got != step.want {
			t.Errorf("Push, spoilt %v = %v, %v, want %v", step.spoil, got, err, step.want)
		}
		if got, err := os.ReadFile(blob); err != nil || !bytes.Equal(got, data) {
			t.Errorf("spoilt %v: the blob has %d other bytes, %v", step.spoil, len(got), err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := target.Push(ctx, b); !errors.Is(err, context.Canceled) {
		t.Errorf("Push, cancelled = %v", err)
	}
}

// TestArchiveLink: an archive is written where a link leads to, and the link stays.
func TestArchiveLink(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	there, link := filepath.Join(dir, "there", "image.tar"), filepath.Join(dir, "link.tar")
	if err := errors.Join(os.Mkdir(filepath.Dir(there), 0o755), os.WriteFile(there, nil, 0o600), os.Symlink("there/image.tar", link)); err != nil {
		t.Fatal(err)
	}
	img := newImage(t, 3, "amd64", 1000)
	publish(t, "oci-archive:"+link+":x", img, remote.Options{})
	checkImage(t, openSource(t, "oci-archive:"+there+":x", remote.Options{}), img)
	if to, err := os.Readlink(link); err != nil || to != "there/image.tar" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	for _, d := range []string{dir, filepath.Dir(there)} {
		if left, err := filepath.Glob(filepath.Join(d, ".headstart-*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// TestLayoutConcurrentWriters has goroutines write one layout, some the same tag: no entry
// is lost and every image is whole.
func TestLayoutConcurrentWriters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const writers = 24
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			img := newImage(t, int64(i%5), "amd64", 10_000) // some are equal
			publish(t, fmt.Sprintf("oci:%s:tag%d", dir, i%20), img, remote.Options{})
		})
	}
	wg.Wait()
	checkLayout(t, dir, 20)
}

// checkLayout has ggcr validate a layout of n entries, and wants nothing but a layout.
func checkLayout(t *testing.T, dir string, n int) {
	t.Helper()
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil || len(m.Manifests) != n {
		t.Fatalf("%d entries, %v, want %d", len(m.Manifests), err, n)
	}
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasPrefix(f.Name(), ".") {
			t.Errorf("%s was left", f.Name())
		}
	}
}

// TestLayoutWriterProcesses kills writers at every moment while others go on.
func TestLayoutWriterProcesses(t *testing.T) {
	if dir := os.Getenv("HEADSTART_TEST_LAYOUT"); dir != "" {
		for i := 0; ; i++ { // until it is killed
			img := newImage(t, int64(os.Getpid()*1000+i), "amd64", 100_000)
			publish(t, fmt.Sprintf("oci:%s:p%d", dir, os.Getpid()%2), img, remote.Options{})
		}
	}
	dir := t.TempDir()
	old := newImage(t, 1, "amd64", 1000)
	publish(t, "oci:"+dir+":old", old, remote.Options{})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for k := range 6 {
				cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestLayoutWriterProcesses$")
				cmd.Env = append(os.Environ(), "HEADSTART_TEST_LAYOUT="+dir)
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Duration(60+w*13+k*29) * time.Millisecond)
				_ = cmd.Process.Kill()
				_ = cmd.Wait() // killed
			}
		})
	}
	wg.Wait()
	fresh := newImage(t, 2, "amd64", 1000)
	publish(t, "oci:"+dir+":new", fresh, remote.Options{}) // opening cleans up
	checkImage(t, openSource(t, "oci:"+dir+":old", remote.Options{}), old)
	checkImage(t, openSource(t, "oci:"+dir+":new", remote.Options{}), fresh)
	index, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var parsed ocispec.Index
	if err := json.Unmarshal(index, &parsed); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d entries after the kills", len(parsed.Manifests))
	checkLayout(t, dir, len(parsed.Manifests))
}

// TestLayoutKeepsEntries tags images beside others, with and without names.
func TestLayoutKeepsEntries(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	publish(t, "oci:"+dir+":a", newImage(t, 1, "amd64", 10), remote.Options{})
	publish(t, "oci:"+dir, newImage(t, 2, "amd64", 10), remote.Options{}) // without a name
	publish(t, "oci:"+dir, newImage(t, 3, "amd64", 10), remote.Options{})
	publish(t, "oci:"+dir, newImage(t, 3, "amd64", 10), remote.Options{}) // again
	publish(t, "oci:"+dir+":a", newImage(t, 4, "amd64", 10), remote.Options{})
	checkLayout(t, dir, 3)
	checkImage(t, openSource(t, "oci:"+dir+":a", remote.Options{}), newImage(t, 4, "amd64", 10))
	wantError(t, "two without a name", readImage(t, "oci:"+dir), remote.ErrNotFound, "which image?")
}

// TestLayoutOfAnotherVersion is not written to.
func TestLayoutOfAnotherVersion(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := remote.OpenTarget(t.Context(), parse(t, "oci:"+dir), remote.Options{})
	wantError(t, "OpenTarget", err, remote.ErrUnsupported, "2.0.0", dir)
}

// TestLayoutBrokenIndex does not replace what it cannot read.
func TestLayoutBrokenIndex(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	img := newImage(t, 1, "amd64", 10)
	publish(t, "oci:"+dir+":a", img, remote.Options{})
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := remote.Publish(t.Context(), openTarget(t, "oci:"+dir+":b", remote.Options{}), img.blobs, img.config, img.manifest, remote.PublishOptions{})
	wantError(t, "Publish", err, remote.ErrInvalid, "index.json")
	if got, err := os.ReadFile(filepath.Join(dir, "index.json")); err != nil || string(got) != "{" {
		t.Errorf("index.json = %q, %v: it was replaced", got, err)
	}
}

// TestFullDisk writes to a file system that is full soon.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	testenv.MountNamespace(t, func() error {
		dir := t.TempDir()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
			return err
		}
		defer func() {
			if err := syscall.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}()
		small, large := newImage(t, 1, "amd64", 1000), newImage(t, 2, "amd64", 3<<20)
		for _, ref := range []string{"oci:" + dir + "/layout:v", "oci-archive:" + dir + "/a.tar:v"} {
			if err := fullDisk(ref, small, large); err != nil {
				return fmt.Errorf("%s: %w", ref, err)
			}
			if err := readImage(t, ref); err != nil {
				return err
			}
		}
		return nil
	})
}

// fullDisk publishes small, and large to no effect.
func fullDisk(s string, small, large testImage) error {
	ref, err := remote.Parse(s)
	if err != nil {
		return err
	}
	for _, img := range []testImage{small, large} {
		dst, err := remote.OpenTarget(context.Background(), ref, remote.Options{})
		if err != nil {
			return err
		}
		_, err = remote.Publish(context.Background(), dst, img.blobs, img.config, img.manifest, remote.PublishOptions{})
		if cerr := dst.Close(); cerr != nil {
			return cerr
		}
		if full := errors.Is(err, syscall.ENOSPC); full != (len(img.data[0]) > 1<<20) {
			return fmt.Errorf("Publish of %d bytes: %w", len(img.data[0]), err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(ref.Path))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			return fmt.Errorf("%s was left", e.Name())
		}
	}
	return nil
}

// TestLockedLayout gives up waiting for another writer's lock when its context ends.
func TestLockedLayout(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := contextWithTimeout(t, 50*time.Millisecond)
	defer cancel()
	_, err = remote.OpenTarget(ctx, parse(t, "oci:"+dir), remote.Options{})
	wantError(t, "OpenTarget", err, context.DeadlineExceeded, "another writer", dir)
}

// TestFetchIsBounded reads no more than it is asked to.
func TestFetchIsBounded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	img := newImage(t, 1, "amd64", 1000)
	publish(t, "oci:"+dir+":v", img, remote.Options{})
	src := openSource(t, "oci:"+dir, remote.Options{})
	rc, err := src.Fetch(t.Context(), img.blobs[0].Descriptor)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(rc)
	if err := errors.Join(err, rc.Close()); err != nil || len(data) != len(img.data[0]) {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if _, err := remote.ReadAll(t.Context(), src, img.blobs[0].Descriptor, 10); !errors.Is(err, remote.ErrTooLarge) {
		t.Errorf("ReadAll with limit 10: %v, want %v", err, remote.ErrTooLarge)
	}
}

// TestLayoutLinksFiles makes sure that a verified file becomes the blob itself, that the layout
// outlives it, and that a file of another size is not taken.
func TestLayoutLinksFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	target, err := remote.OpenTarget(t.Context(), remote.Layout(filepath.Join(dir, "layout"), "x"), remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	data := []byte("the bytes of a blob")
	desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(data), Size: int64(len(data))}
	blob := filepath.Join(dir, "layout", "blobs", "sha256", desc.Digest.Encoded())
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	for name, c := range map[string]struct {
		content string
		linked  bool
	}{"file": {string(data), true}, "short": {"other", false}} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := target.Push(t.Context(), remote.Blob{Descriptor: desc, File: file, Open: open}); err != nil || got != remote.Uploaded {
			t.Fatalf("Push of %s = %v, %v", name, got, err)
		}
		a, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.Stat(blob)
		if err != nil {
			t.Fatal(err)
		}
		if os.SameFile(a, b) != c.linked || b.Mode().Perm() != 0o644 {
			t.Errorf("%s: same file %v, mode %v; want %v and 0644", name, os.SameFile(a, b), b.Mode(), c.linked)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(blob); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: the blob holds %q, %v", name, got, err)
		}
		if err := os.Remove(blob); err != nil {
			t.Fatal(err)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, "layout", ".headstart-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
