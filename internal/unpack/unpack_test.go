package unpack_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/unpack"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// cmpTree lets the fixtures' own program compare dir with the tree they mean.
func cmpTree(t *testing.T, dir string) {
	t.Helper()
	fixtures := testenv.Fixtures(t)
	python := testenv.Tool(t, "python3")
	out, err := exec.Command(python, filepath.Join(fixtures, "cmp_tree.py"), dir, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if err != nil {
		t.Errorf("cmp_tree.py: %v\n%s", err, out)
	}
}

func variant(t *testing.T, name string) (*nydusimage.Image, unpack.Source) {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", name)
	img, err := nydusimage.OpenFilesBy(rafs.OpenStrict, filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	chunks := img.Chunks()
	t.Cleanup(func() {
		if err := errors.Join(chunks.Close(), img.Close()); err != nil {
			t.Error(err)
		}
	})
	return img, unpack.Source{Image: img.RAFS, Read: chunks.ReadInto}
}

var variants = []string{"v6-zstd", "v6-lz4_block", "v6-zstd-sha256-64k", "v6-zstd-batch"}

// Images by the real nydus-image, unpacked, are the tree that they were made of.
func TestDirOfFixtures(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	for _, v := range variants {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			_, src := variant(t, v)
			dir := filepath.Join(t.TempDir(), "root")
			if err := unpack.Dir(t.Context(), src, dir); err != nil {
				t.Fatal(err)
			}
			cmpTree(t, dir)
		})
	}
}

// The archive, unpacked by GNU tar, is the tree too.
func TestTarOfFixtures(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	gnu := testenv.Tool(t, "tar")
	_, src := variant(t, variants[0])
	var b bytes.Buffer
	skipped, err := unpack.Tar(t.Context(), src, &b)
	if err != nil || skipped != 0 {
		t.Fatalf("Tar = %d, %v", skipped, err)
	}
	dir := t.TempDir()
	cmd := exec.Command(gnu, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-", "-C", dir)
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	cmpTree(t, dir)
}

func leaf(mode uint32) *rafs.Inode { return &rafs.Inode{Mode: mode} }

func dirOf(entries ...rafs.Dirent) *rafs.Inode {
	return &rafs.Inode{Mode: 0o040755, Children: entries}
}

func source(root *rafs.Inode) unpack.Source {
	return unpack.Source{
		Image: &rafs.Image{Root: root},
		Read: func(_ context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error {
			buf.Raw = bytes.Repeat([]byte{'x'}, int(c.UncompressedSize))
			return nil
		},
	}
}

// A tree that no reader would give out must not write outside the directory, and what was
// written before the fault goes away.
func TestHostileTrees(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	loop := dirOf()
	loop.Children = []rafs.Dirent{{Name: "again", Inode: loop}}
	deep := dirOf()
	for range 5000 {
		deep = dirOf(rafs.Dirent{Name: "d", Inode: deep})
	}
	chunk := []rafs.Chunk{{UncompressedSize: 10}}
	first := rafs.Dirent{Name: "a-first", Inode: leaf(0o100644)}
	for name, c := range map[string]struct {
		root *rafs.Inode
		want string
	}{
		"parent":         {dirOf(first, rafs.Dirent{Name: "..", Inode: leaf(0o100644)}), `name ".."`},
		"slash":          {dirOf(first, rafs.Dirent{Name: "../../escape", Inode: leaf(0o100644)}), `name "../../escape"`},
		"absolute":       {dirOf(first, rafs.Dirent{Name: "/etc/passwd", Inode: leaf(0o100644)}), `name "/etc/passwd"`},
		"empty":          {dirOf(first, rafs.Dirent{Name: "", Inode: leaf(0o100644)}), `name ""`},
		"NUL":            {dirOf(first, rafs.Dirent{Name: "a\x00b", Inode: leaf(0o100644)}), `name "a\x00b"`},
		"long":           {dirOf(first, rafs.Dirent{Name: strings.Repeat("x", 256), Inode: leaf(0o100644)}), `name "xxx`},
		"link then file": {dirOf(rafs.Dirent{Name: "a", Inode: &rafs.Inode{Mode: 0o120777, Target: "../escape"}}, rafs.Dirent{Name: "a", Inode: leaf(0o100644)}), `/a: file exists`},
		"link then dir":  {dirOf(rafs.Dirent{Name: "a", Inode: &rafs.Inode{Mode: 0o120777, Target: ".."}}, rafs.Dirent{Name: "a", Inode: dirOf(rafs.Dirent{Name: "escape", Inode: leaf(0o100644)})}), `/a: file exists`},
		"loop":           {loop, `/again: invalid tree: `},
		"deep":           {deep, `more than 4096 levels`},
		"too few bytes":  {dirOf(first, rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, Size: 11, Chunks: chunk}}), `/f: invalid tree: chunks hold 10 bytes, the file has 11`},
		"too many bytes": {dirOf(first, rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, Size: 9, Chunks: chunk}}), `/f: invalid tree: chunks hold more than the file's 9 bytes`},
		"huge":           {dirOf(first, rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, Size: 1 << 63}}), `/f: invalid tree: `},
		"no type":        {dirOf(first, rafs.Dirent{Name: "f", Inode: leaf(0o644)}), `/f: invalid tree: type 0`},
		"root's xattr":   {&rafs.Inode{Mode: 0o040755, Xattrs: []rafs.Xattr{{Name: "nonsense"}}}, `/: set extended attribute nonsense: operation not supported`},
		"no owner":       {dirOf(first, rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, UID: 1<<32 - 1}}), `/f: invalid tree: owner 4294967295:0, at most 4294967294`},
		"no group":       {dirOf(first, rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, GID: 1<<32 - 1}}), `/f: invalid tree: owner 0:4294967295, at most 4294967294`},
		"bad xattr":      {dirOf(first, rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, Xattrs: []rafs.Xattr{{Name: "nonsense"}}}}), `/f: set extended attribute nonsense: operation not supported`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			outer := t.TempDir()
			dir := filepath.Join(outer, "root")
			err := unpack.Dir(t.Context(), source(c.root), dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Dir = %v, want an error with %s", err, c.want)
			}
			if left, err := os.ReadDir(outer); err != nil || len(left) != 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			if strings.Contains(name, "link then") || strings.Contains(c.want, "attribute") || strings.Contains(c.want, "owner") {
				return // an archive can hold this
			}
			if _, err := unpack.Tar(t.Context(), source(c.root), io.Discard); err == nil {
				t.Error("Tar: no error")
			}
		})
	}
}

func TestDirNotEmpty(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := unpack.Dir(t.Context(), source(dirOf()), dir)
	if !errors.Is(err, unpack.ErrNotEmpty) || !strings.Contains(err.Error(), `it holds "mine"`) {
		t.Errorf("Dir = %v, want ErrNotEmpty", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "mine")); err != nil {
		t.Error(err)
	}
}

// An error in the middle leaves a directory that was there empty as it was.
func TestDirKeepsTheDirectory(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	dir := t.TempDir()
	broken := errors.New("broken chunk")
	src := source(dirOf(
		rafs.Dirent{Name: "d", Inode: dirOf(rafs.Dirent{Name: "f", Inode: &rafs.Inode{Mode: 0o100644, Size: 1, Chunks: []rafs.Chunk{{UncompressedSize: 1}}}})},
	))
	src.Read = func(context.Context, rafs.Chunk, *rafs.ChunkBuffer) error { return broken }
	if err := unpack.Dir(t.Context(), src, dir); !errors.Is(err, broken) || err.Error() != "/d/f: broken chunk" {
		t.Errorf("Dir = %v, want /d/f: %v", err, broken)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestCancel(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	_, src := variant(t, variants[0])
	src.Progress = func(done int64) {
		if done > 1<<20 {
			cancel()
		}
	}
	dir := filepath.Join(t.TempDir(), "root")
	if err := unpack.Dir(ctx, src, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("Dir = %v, want context.Canceled", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is there: %v", err)
	}
}

// The full range of what an inode can say survives both ways.
func TestAttributes(t *testing.T) {
	testenv.Root(t)
	t.Parallel()
	shared := &rafs.Inode{Mode: 0o106755, UID: 70000, GID: 4294967294, Mtime: -1, MtimeNsec: 999999999, Size: 3, Chunks: []rafs.Chunk{{UncompressedSize: 3}}}
	root := dirOf(
		rafs.Dirent{Name: "a", Inode: shared},
		rafs.Dirent{Name: "b", Inode: dirOf(rafs.Dirent{Name: "hard", Inode: shared})},
		rafs.Dirent{Name: "dev", Inode: &rafs.Inode{Mode: 0o020620, Rdev: 0x12300000 | 0x45<<8 | 0x67}},
		rafs.Dirent{Name: "link", Inode: &rafs.Inode{Mode: 0o120777, Target: strings.Repeat("y/", 2000), UID: 5, Mtime: 1 << 33}},
		rafs.Dirent{Name: "sock", Inode: leaf(0o140600)},
		rafs.Dirent{Name: "sticky", Inode: &rafs.Inode{Mode: 0o041777, Mtime: 7}},
	)
	dir := filepath.Join(t.TempDir(), "root")
	if err := unpack.Dir(t.Context(), source(root), dir); err != nil {
		t.Fatal(err)
	}
	stat := func(name string) unix.Stat_t {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	a, hard, dev, link := stat("a"), stat("b/hard"), stat("dev"), stat("link")
	if a.Ino != hard.Ino || a.Nlink != 2 || a.Mode != 0o106755 || a.Uid != 70000 || a.Gid != 4294967294 || a.Mtim.Sec != -1 || a.Mtim.Nsec != 999999999 {
		t.Errorf("a: %+v", a)
	}
	if unix.Major(dev.Rdev) != 0x45 || unix.Minor(dev.Rdev) != 0x12367 || dev.Mode != 0o020620 {
		t.Errorf("dev: %d:%d %#o", unix.Major(dev.Rdev), unix.Minor(dev.Rdev), dev.Mode)
	}
	if link.Uid != 5 || link.Mtim.Sec != 1<<33 || link.Size != 4000 || stat("sock").Mode != 0o140600 || stat("sticky").Mode != 0o041777 || stat("sticky").Mtim.Sec != 7 {
		t.Errorf("link: %+v", link)
	}
	var b bytes.Buffer
	skipped, err := unpack.Tar(t.Context(), source(root), &b)
	if err != nil || skipped != 1 {
		t.Fatalf("Tar = %d, %v, want 1 socket skipped", skipped, err)
	}
	var got []string
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		got = append(got, fmt.Sprintf("%c %s %#o %d:%d %d:%d %d", h.Typeflag, h.Name, h.Mode, h.Uid, h.Gid, h.Devmajor, h.Devminor, h.ModTime.UnixNano()))
	}
	want := "5 ./ 0755 0:0 0:0 0|0 a 06755 70000:4294967294 0:0 -1|5 b/ 0755 0:0 0:0 0|1 b/hard 06755 70000:4294967294 0:0 -1|" +
		fmt.Sprintf("3 dev 0620 0:0 %d:%d 0|", unix.Major(dev.Rdev), unix.Minor(dev.Rdev)) +
		"2 link 0777 5:0 0:0 8589934592000000000|5 sticky/ 01777 0:0 0:0 7000000000"
	if s := strings.Join(got, "|"); s != want {
		t.Errorf("archive\n%s\nwant\n%s", s, want)
	}
}

func TestEntriesAndBytes(t *testing.T) {
	t.Parallel()
	f := &rafs.Inode{Mode: 0o100644, Size: 5}
	img := &rafs.Image{Root: dirOf(rafs.Dirent{Name: "a", Inode: f}, rafs.Dirent{Name: "d", Inode: dirOf(rafs.Dirent{Name: "b", Inode: f})})}
	var got []string
	for p := range unpack.Entries(img) {
		got = append(got, p)
	}
	if s := strings.Join(got, " "); s != "/ /a /d /d/b" || unpack.Bytes(img) != 5 {
		t.Errorf("Entries: %s, Bytes: %d", s, unpack.Bytes(img))
	}
	for range unpack.Entries(img) {
		break
	}
}
