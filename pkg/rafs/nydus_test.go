package rafs_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// sourceTree makes a directory for nydus-image to convert.
func sourceTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(21, 21))
	must(t, os.MkdirAll(filepath.Join(dir, "a/b/c"), 0o755))
	for i, n := range []int{0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20, 1<<20 + 1, 3 << 20} {
		must(t, os.WriteFile(filepath.Join(dir, "a", fmt.Sprintf("f%d", i)), content(r, n), 0o640))
		must(t, os.WriteFile(filepath.Join(dir, "a/b", fmt.Sprintf("g%d", i)), content(r, n), 0o755))
	}
	for i := range 600 {
		must(t, os.WriteFile(filepath.Join(dir, "a/b/c", fmt.Sprintf("entry%s%d", strings.Repeat("-", i%40), i)), nil, 0o600))
	}
	must(t, os.Symlink("/a/b/f1", filepath.Join(dir, "a/link")))
	must(t, os.Link(filepath.Join(dir, "a/f3"), filepath.Join(dir, "hard")))
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	must(t, unix.Setxattr(filepath.Join(dir, "a/f4"), "trusted.x", []byte("value"), 0))
	return dir
}

// TestReadNydusImage opens and checks what nydus-image 2.2.0 writes, and compares it with its source.
func TestReadNydusImage(t *testing.T) {
	testenv.Root(t)
	nydus := testenv.Tool(t, "nydus-image")
	source := sourceTree(t)
	for _, args := range [][]string{
		{},
		{"--compressor", "lz4_block", "--digester", "sha256"},
		{"--compressor", "none", "--chunk-size", "0x10000"},
		{"--chunk-size", "0x1000", "--prefetch-policy", "fs"},
		{"--chunk-size", "0x1000000"},
		// Not blob-toc: what 2.2.0 merges of such a blob, 2.2.0 itself refuses. TestOCIFixture has one of 2.4.4.
		{"--blob-inline-meta", "--compressor", "lz4_block"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			s := runNydus(t, nydus, source, args)
			report, err := s.check(rafs.CheckOptions{Data: true})
			if err != nil {
				t.Error(err)
			}
			t.Logf("%+v", report)
			img := s.open(t)
			got := flatten(t, img, img.FS(s.reader))
			want := flattenDir(t, source, got)
			got[0].Mtime, got[0].Nsec = want[0].Mtime, want[0].Nsec // nydus-image forces the root's to 0
			diff(t, "tree", got, want)
			s.compareMount(t)
		})
	}
}

// TestReadLinkedSpecials reads what nydus-image makes of symlinks, FIFOs and devices with several names: an inode each.
func TestReadLinkedSpecials(t *testing.T) {
	testenv.Root(t)
	nydus := testenv.Tool(t, "nydus-image")
	source := t.TempDir()
	in := func(name string) string { return filepath.Join(source, name) }
	must(t, os.WriteFile(in("file"), []byte("data"), 0o644))
	must(t, os.Link(in("file"), in("hard")))
	must(t, os.Symlink("file", in("s1")))
	must(t, os.Link(in("s1"), in("s2")))
	must(t, unix.Mkfifo(in("p1"), 0o600))
	must(t, os.Link(in("p1"), in("p2")))
	must(t, unix.Mknod(in("c1"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(t, os.Link(in("c1"), in("c2")))
	for _, version := range []string{"5", "6"} {
		s := runNydus(t, nydus, source, []string{"--fs-version", version})
		if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
			t.Errorf("v%s: %v", version, err)
		}
		if _, err := rafs.OpenStrict(bytes.NewReader(s.bootstrap), int64(len(s.bootstrap))); err != nil {
			t.Errorf("v%s: OpenStrict = %v", version, err)
		}
		img := s.open(t)
		got := flatten(t, img, img.FS(s.reader))
		want := flattenDir(t, source, got)
		got[0].Mtime, got[0].Nsec = want[0].Mtime, want[0].Nsec
		for i := range want {
			if m := want[i].Mode & unix.S_IFMT; m != unix.S_IFREG && m != unix.S_IFDIR {
				want[i].Link, want[i].Nlink = "", 1
			}
		}
		diff(t, "tree of v"+version, got, want)
	}
}

// TestReadLinkAttributes reads v5 images of tars whose hard links have headers that differ from the file's: those of the name
// whose number all have count, which is the first in the tree's order.
func TestReadLinkAttributes(t *testing.T) {
	nydus := testenv.Tool(t, "nydus-image")
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Name: "f", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 5, ModTime: time.Unix(1000, 0)},
		{Name: "a", Typeflag: tar.TypeLink, Linkname: "f", Mode: 0o755, Gid: 7, ModTime: time.Unix(5, 0)},
		{Name: "z", Typeflag: tar.TypeLink, Linkname: "f", Mode: 0o711, ModTime: time.Unix(6, 0)},
	} {
		must(t, w.WriteHeader(&h))
	}
	must(t, w.Close())
	source := filepath.Join(t.TempDir(), "layer.tar")
	must(t, os.WriteFile(source, b.Bytes(), 0o600))
	s := runNydus(t, nydus, source, []string{"--fs-version", "5", "--type", "tar-rafs"})
	if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	img := s.open(t)
	f := img.Lookup("f")
	if f == nil || f.Mode != unix.S_IFREG|0o755 || f.UID != 0 || f.GID != 7 || f.Mtime != 5 {
		t.Fatalf("f = %+v, want what the header of a says", f)
	}
	if img.Lookup("a") != f || img.Lookup("z") != f {
		t.Error("the names are of several files")
	}
}

func runNydus(t *testing.T, nydus, source string, args []string) *stored {
	t.Helper()
	dir := t.TempDir()
	blobs := filepath.Join(dir, "blobs")
	must(t, os.Mkdir(blobs, 0o700))
	inline := len(args) > 0 && args[0] == "--blob-inline-meta"
	bootstrap := filepath.Join(dir, "image.boot")
	all := append([]string{"create", "--blob-dir", blobs}, args...)
	if !inline {
		all = append(all, "--bootstrap", bootstrap)
	}
	out, err := exec.Command(nydus, append(all, source)...).CombinedOutput()
	if err != nil {
		t.Fatalf("nydus-image create: %v\n%s", err, out)
	}
	names, err := filepath.Glob(filepath.Join(blobs, "*"))
	must(t, err)
	if inline { // merge makes a bootstrap of the one in the blob
		out, err := exec.Command(nydus, append([]string{"merge", "--bootstrap", bootstrap, "--blob-dir", blobs}, names...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("nydus-image merge: %v\n%s", err, out)
		}
	}
	s := &stored{blobs: map[string][]byte{}}
	s.bootstrap, err = os.ReadFile(bootstrap)
	must(t, err)
	for _, n := range names {
		s.blobs[filepath.Base(n)], err = os.ReadFile(n)
		must(t, err)
	}
	return s
}

// TestReadChunkDict reads an image whose chunks are partly in the blob of another one.
func TestReadChunkDict(t *testing.T) {
	testenv.Root(t)
	nydus := testenv.Tool(t, "nydus-image")
	dict, source := t.TempDir(), sourceTree(t)
	shared := content(newRand(6), 3<<20)
	must(t, os.WriteFile(filepath.Join(dict, "base"), shared, 0o644))
	must(t, os.WriteFile(filepath.Join(source, "copy"), shared, 0o644))
	base := runNydus(t, nydus, dict, nil)
	bootstrap := filepath.Join(t.TempDir(), "base.boot")
	must(t, os.WriteFile(bootstrap, base.bootstrap, 0o600))
	s := runNydus(t, nydus, source, []string{"--chunk-dict", "bootstrap=" + bootstrap})
	img := s.open(t)
	if len(img.Blobs) != 2 {
		t.Fatalf("%d blobs, want the image's and the dictionary's", len(img.Blobs))
	}
	if _, err := s.check(rafs.CheckOptions{Data: true}); err == nil {
		t.Error("Check says nothing of the blob that is not there")
	}
	maps.Copy(s.blobs, base.blobs)
	if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	got := flatten(t, img, img.FS(s.reader))
	want := flattenDir(t, source, got)
	got[0].Mtime, got[0].Nsec = want[0].Mtime, want[0].Nsec
	diff(t, "tree", got, want)
	s.compareMount(t)
}
