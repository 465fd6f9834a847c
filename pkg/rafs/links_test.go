package rafs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// linkedUID is the owner of the first thing of a [linkedTree], which is how its records are found in a bootstrap.
const linkedUID = 0x5eed1000

// linkedTree makes a directory with a second name of everything that can have one. Every file has an owner of its own.
func linkedTree(t *testing.T) (root string, owners int) {
	t.Helper()
	root = t.TempDir()
	in := func(name string) string { return filepath.Join(root, name) }
	must(t, os.Mkdir(in("d"), 0o755))
	must(t, os.WriteFile(in("file"), []byte("data"), 0o600))
	must(t, os.WriteFile(in("alone"), []byte("other data"), 0o600))
	must(t, os.Symlink("nowhere", in("symlink")))
	must(t, os.Symlink("alone", in("symlink-alone")))
	must(t, unix.Mkfifo(in("fifo"), 0o600))
	must(t, unix.Mkfifo(in("fifo-alone"), 0o600))
	must(t, unix.Mknod(in("device"), unix.S_IFCHR|0o600, 1<<8|3))
	for _, name := range []string{"d", "file", "alone", "symlink", "symlink-alone", "fifo", "fifo-alone", "device"} {
		must(t, os.Lchown(in(name), linkedUID+owners, 0))
		owners++
	}
	for _, name := range []string{"file", "symlink", "fifo", "device"} {
		must(t, os.Link(in(name), in("d/"+name)))
		must(t, os.Link(in(name), in("z-"+name)))
	}
	return root, owners
}

// ourLinkedTree is a [linkedTree] as we write it, with names of regular files alone.
func ourLinkedTree(t *testing.T, version rafs.Version) (s *stored, owners int) {
	t.Helper()
	b := newBuilder(t, smallCombo)
	b.img.Version = version
	b.add("d", &rafs.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: 1, UID: linkedUID})
	f := b.file("file", 0, []byte("data"))
	f.UID = linkedUID + 1
	b.add("d/file", f)
	b.add("z-file", f)
	b.file("alone", 0, []byte("other data")).UID = linkedUID + 2
	b.add("symlink", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "x", Size: 1, Mtime: 1, UID: linkedUID + 3})
	b.add("fifo", &rafs.Inode{Mode: unix.S_IFIFO | 0o600, Mtime: 1, UID: linkedUID + 4})
	return b.build(), 5
}

// TestWrongLinkCounts changes the link count of every inode record there is, in images of ours and of nydus-image: none passes the
// check. Nor do names of one file that are not of one type.
func TestWrongLinkCounts(t *testing.T) {
	testenv.Root(t)
	nydus := testenv.Tool(t, "nydus-image")
	tree, owners := linkedTree(t)
	for _, version := range []rafs.Version{rafs.V5, rafs.V6} {
		t.Run(fmt.Sprintf("ours v%v", version), func(t *testing.T) {
			s, owners := ourLinkedTree(t, version)
			s.wrongLinks(t, owners)
		})
		t.Run(fmt.Sprintf("nydus-image v%v", version), func(t *testing.T) {
			s := runNydus(t, nydus, tree, []string{"--fs-version", fmt.Sprint(version)})
			s.wrongLinks(t, owners)
		})
	}
}

func (s *stored) wrongLinks(t *testing.T, owners int) {
	t.Helper()
	if _, err := s.check(rafs.CheckOptions{}); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	good := s.bootstrap
	defer func() { s.bootstrap = good }()
	uid, links, mode := 24, 44, 4 // places in a record of v6; rafs-format.md
	if s.open(t).Version == rafs.V5 {
		uid, links, mode = 48, 88, 60
	}
	refused := func(what string, p []byte) {
		t.Helper()
		s.bootstrap = p
		_, err := s.check(rafs.CheckOptions{})
		if !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrUnsupported) {
			t.Errorf("%s: Check = %v, want a fault", what, err)
		}
		if strings.HasPrefix(what, "links") && (err == nil || !strings.Contains(err.Error(), "link") && !strings.Contains(err.Error(), "other names")) {
			t.Errorf("%s: Check = %v, want a fault about links", what, err)
		}
	}
	for i := range owners {
		found := 0
		for at := 0; ; at++ {
			n := bytes.Index(good[at:], le.AppendUint32(nil, uint32(linkedUID+i)))
			if n < 0 {
				break
			}
			at += n
			found++
			place := at - uid + links
			have := le.Uint32(good[place:])
			for _, count := range []uint32{0, have - 1, have + 1, 1 << 20} {
				p := bytes.Clone(good)
				le.PutUint32(p[place:], count)
				refused(fmt.Sprintf("links of record %d of owner %d: %d in place of %d", found, i, count, have), p)
			}
			p := bytes.Clone(good)
			if kind := le.Uint16(p[at-uid+mode:]); have > 1 && kind&unix.S_IFMT == unix.S_IFIFO {
				le.PutUint16(p[at-uid+mode:], kind&^unix.S_IFMT|unix.S_IFSOCK)
				refused(fmt.Sprintf("a socket in record %d of owner %d", found, i), p)
			}
		}
		if found == 0 {
			t.Errorf("no record of owner %d", i)
		}
	}
}
