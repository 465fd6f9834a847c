package rafs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// stored is an image with its bytes.
type stored struct {
	bootstrap []byte
	blobs     map[string][]byte // by id
}

func (s *stored) open(t testing.TB) *rafs.Image {
	t.Helper()
	img, err := rafs.Open(bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func (s *stored) file(b rafs.Blob) (io.ReaderAt, error) {
	p, ok := s.blobs[b.ID]
	if !ok {
		return nil, fmt.Errorf("no blob %s", b.ID)
	}
	return bytes.NewReader(p), nil
}

func (s *stored) reader(b rafs.Blob) (*rafs.BlobReader, error) {
	return rafs.OpenBlobFrom(s.file, b)
}

func (s *stored) check(o rafs.CheckOptions) (rafs.Report, error) {
	return rafs.Check(context.Background(), bytes.NewReader(s.bootstrap), int64(len(s.bootstrap)), s.file, o)
}

// write puts the image into dir: the bootstrap, the blobs by id, and each blob expanded.
func (s *stored) write(t testing.TB, dir string) (bootstrap, blobDir string, devices []string) {
	t.Helper()
	bootstrap, blobDir = filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs")
	must(t, os.WriteFile(bootstrap, s.bootstrap, 0o600))
	must(t, os.MkdirAll(blobDir, 0o700))
	img := s.open(t)
	for i, b := range img.Blobs {
		must(t, os.WriteFile(filepath.Join(blobDir, b.ID), s.blobs[b.ID], 0o600))
		if meta, separate := b.MetaBlob(); separate {
			must(t, os.WriteFile(filepath.Join(blobDir, meta.ID), s.blobs[meta.ID], 0o600))
		}
		r, err := s.reader(b)
		must(t, err)
		name := filepath.Join(dir, fmt.Sprintf("device%d", i))
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		must(t, err)
		must(t, img.ExpandBlob(t.Context(), i, r, f))
		info, err := f.Stat()
		must(t, err)
		if uint64(info.Size()) != b.UncompressedSize {
			t.Errorf("expanded blob %d has %d bytes, want %d", i, info.Size(), b.UncompressedSize)
		}
		must(t, f.Close())
		devices = append(devices, name)
	}
	return bootstrap, blobDir, devices
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entry is one path of a tree with all there is to compare.
type entry struct {
	Path          string
	Mode          uint32
	UID, GID      uint32
	Mtime         int64
	Nsec          uint32
	Size          uint64
	Major, Minor  uint32
	Target, Link  string // Link: the first path of the same file
	Nlink         int
	Xattrs        map[string]string
	ContentSHA256 string
}

// flatten lists an image's tree. Without a file system there are no content digests.
func flatten(t testing.TB, img *rafs.Image, fsys *rafs.FS) []entry {
	t.Helper()
	var list []entry
	first := map[*rafs.Inode]int{}
	must(t, img.Walk(func(path string, ino *rafs.Inode) error {
		if i, ok := first[ino]; ok {
			e := list[i]
			e.Link, e.Path = list[i].Path, path
			list = append(list, e)
			for j := range list {
				if list[j].Path == list[i].Path || list[j].Link == list[i].Path {
					list[j].Nlink = list[i].Nlink + 1
				}
			}
			return nil
		}
		first[ino] = len(list)
		e := entry{
			Path: path, Mode: ino.Mode, UID: ino.UID, GID: ino.GID, Mtime: ino.Mtime, Nsec: ino.MtimeNsec,
			Size: ino.Size, Target: ino.Target, Xattrs: map[string]string{}, Nlink: 1,
		}
		switch {
		case ino.IsDir():
			e.Size, e.Nlink = 0, 2
			for _, c := range ino.Children {
				if c.Inode.IsDir() {
					e.Nlink++
				}
			}
		case ino.Mode&unix.S_IFMT == unix.S_IFCHR, ino.Mode&unix.S_IFMT == unix.S_IFBLK:
			e.Major, e.Minor = ino.Device()
		}
		for _, x := range ino.Xattrs {
			e.Xattrs[x.Name] = string(x.Value)
		}
		if ino.IsRegular() && fsys != nil {
			h := sha256.New()
			if err := fsys.CopyFile(t.Context(), h, ino); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			e.ContentSHA256 = hex.EncodeToString(h.Sum(nil))
		}
		list = append(list, e)
		return nil
	}))
	for i := range list { // links counted after their first name was listed
		if list[i].Link != "" {
			list[i].Nlink = list[indexOf(list, list[i].Link)].Nlink
		}
	}
	return list
}

func indexOf(list []entry, path string) int {
	for i := range list {
		if list[i].Path == path {
			return i
		}
	}
	return -1
}

// flattenDir lists a mounted tree the same way, in the image's order.
func flattenDir(t testing.TB, root string, like []entry) []entry {
	t.Helper()
	type id struct{ dev, ino uint64 }
	var list []entry
	first := map[id]string{}
	seen := map[string]bool{}
	for _, want := range like {
		seen[want.Path] = true
		name := filepath.Join(root, want.Path)
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			t.Errorf("%s: %v", want.Path, err)
			continue
		}
		e := entry{
			Path: want.Path, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec),
			Size: uint64(st.Size), Nlink: int(st.Nlink), Xattrs: readXattrs(t, name),
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			e.Size = 0
		case unix.S_IFCHR, unix.S_IFBLK:
			e.Major, e.Minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
		case unix.S_IFLNK:
			target, err := os.Readlink(name)
			must(t, err)
			e.Target = target
		case unix.S_IFREG:
			e.ContentSHA256 = hashFile(t, name)
		}
		key := id{st.Dev, st.Ino}
		if link, ok := first[key]; ok && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			e.Link = link
		} else {
			first[key] = want.Path
		}
		list = append(list, e)
	}
	must(t, filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/"); !seen[rel] {
			t.Errorf("%q is in the mount and not in the image", rel)
		}
		return nil
	}))
	return list
}

func hashFile(t testing.TB, name string) string {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	h := sha256.New()
	_, err = io.Copy(h, f)
	must(t, err)
	must(t, f.Close())
	return hex.EncodeToString(h.Sum(nil))
}

func readXattrs(t testing.TB, name string) map[string]string {
	t.Helper()
	m := map[string]string{}
	buf := make([]byte, 1<<20)
	n, err := unix.Llistxattr(name, buf)
	must(t, err)
	for key := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if key == "" {
			continue
		}
		value := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(name, key, value)
		if err != nil {
			t.Errorf("getxattr %s of %s: %v", key, name, err)
		}
		m[key] = string(value[:max(n, 0)])
	}
	return m
}

// diff reports where two lists differ, and not more than a screen of it.
func diff(t testing.TB, what string, got, want []entry) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s differs (-want +got):\n%.4000s", what, d)
	}
}

// mount mounts the image in the kernel and compares every entry.
func (s *stored) compareMount(t *testing.T) {
	t.Helper()
	bootstrap, _, devices := s.write(t, t.TempDir())
	dir := testenv.MountEROFS(t, bootstrap, devices...)
	img := s.open(t)
	want := flatten(t, img, img.FS(s.reader))
	diff(t, "mounted tree", flattenDir(t, dir, want), want)
}
