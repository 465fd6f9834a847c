package fuse

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Where a byte of a file is is what its chunks say, one by one, however they lie.
func TestExtents(t *testing.T) {
	const unit = 10
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		size := random.Uint64N(60)
		f := &rafs.Inode{Mode: modeFile, Size: size}
		next := uint64(0)
		for at := uint64(0); at < size; at += unit {
			c := rafs.Chunk{Blob: uint16(random.IntN(2)), UncompressedOffset: next, UncompressedSize: uint32(min(unit, size-at))}
			switch random.IntN(8) {
			case 0:
				c.UncompressedOffset = random.Uint64N(1000)
			case 1:
				c.UncompressedSize = uint32(random.IntN(unit)) // shorter than what it should have, mostly
			case 2:
				c.UncompressedOffset = 1<<48 - 5
			}
			next = c.UncompressedOffset + uint64(c.UncompressedSize)
			f.Chunks = append(f.Chunks, c)
		}
		if random.IntN(8) == 0 && len(f.Chunks) > 0 {
			f.Chunks = f.Chunks[:len(f.Chunks)-1]
		}
		tree, err := NewTree(&rafs.Image{ChunkSize: unit, Root: &rafs.Inode{Mode: modeDir, Children: []rafs.Dirent{{Name: "f", Inode: f}}}})
		if err != nil {
			t.Fatal(err)
		}
		// at returns the blob and the offset of a byte; -1: it is nowhere.
		at := func(off uint64) (int, int64) {
			i := int(off / unit)
			if i >= len(f.Chunks) {
				return -1, 0
			}
			c := f.Chunks[i]
			if n := min(unit, size-off/unit*unit); uint64(c.UncompressedSize) < n || c.UncompressedOffset >= 1<<48-n {
				return -1, 0
			}
			return int(c.Blob), int64(c.UncompressedOffset + off%unit)
		}
		for range 30 {
			off, n := random.Int64N(70), random.Int64N(70)
			got, length, ok := tree.extents(tree.node(2), off, n, nil)
			want, there := min(n, max(0, int64(size)-off)), true
			for i := off; i < off+want; i++ {
				if blob, _ := at(uint64(i)); blob < 0 {
					there = false
				}
			}
			if ok != there || ok && length != want {
				t.Fatalf("round %d: extents(%d, %d) of %d bytes = %v, %d, %v; want %d, %v", round, off, n, size, got, length, ok, want, there)
			}
			if !ok {
				continue
			}
			i := off
			for k, e := range got {
				if k > 0 && got[k-1].blob == e.blob && got[k-1].off+got[k-1].n == e.off {
					t.Errorf("round %d: %v and %v are one", round, got[k-1], e)
				}
				for j := range e.n {
					if blob, place := at(uint64(i)); blob != e.blob || place != e.off+j {
						t.Fatalf("round %d: byte %d is in %d at %d, want %d at %d", round, i, e.blob, e.off+j, blob, place)
					}
					i++
				}
			}
			if i != off+want {
				t.Fatalf("round %d: extents of %d bytes, want %d", round, i-off, want)
			}
		}
	}
}

// Names, links, targets and xattrs are what the image has, by lookup and by listing.
func TestTree(t *testing.T) {
	var files []rafs.Dirent
	for i := range 500 {
		files = append(files, rafs.Dirent{Name: fmt.Sprintf("f%04d%s", i, strings.Repeat("x", i%200)), Inode: &rafs.Inode{Mode: modeFile | 0o600, UID: uint32(i)}})
	}
	files = append(files, rafs.Dirent{Name: "g", Inode: files[7].Inode}, rafs.Dirent{Name: "h", Inode: &rafs.Inode{Mode: modeLink, Target: "../g", Size: 4, Xattrs: []rafs.Xattr{{Name: "system.posix_acl_access", Value: []byte("a")}}}})
	dir := &rafs.Inode{Mode: modeDir | 0o711, Children: files}
	tree, err := NewTree(&rafs.Image{ChunkSize: 4096, Root: &rafs.Inode{Mode: modeDir | 0o755, Children: []rafs.Dirent{{Name: "d", Inode: dir}}}})
	if err != nil {
		t.Fatal(err)
	}
	if !tree.acls {
		t.Error("the ACL is not seen")
	}
	id := tree.child(1, []byte("d"))
	seen := map[uint64]int{}
	for _, f := range files {
		got := tree.child(id, []byte(f.Name))
		seen[got]++
		n := tree.node(got)
		if n == nil || n.mode != f.Inode.Mode || n.uid != f.Inode.UID || n.mode&modeType == modeLink && string(tree.target(n)) != f.Inode.Target {
			t.Errorf("%s is %d: %+v", f.Name, got, n)
		}
	}
	if len(seen) != len(files)-1 || tree.node(tree.child(id, []byte("g"))).links != 2 || tree.node(id).links != 2 || tree.node(1).links != 3 {
		t.Errorf("%d inodes, links of g %d, of d %d, of the root %d", len(seen), tree.node(tree.child(id, []byte("g"))).links, tree.node(id).links, tree.node(1).links)
	}
	for _, none := range []string{"", "f", "f0000x", "g\x00", "zz", "."} {
		if got := tree.child(id, []byte(none)); got != 0 {
			t.Errorf("%q is %d", none, got)
		}
	}
	if tree.child(id, []byte("..")) != 1 || tree.child(tree.child(id, []byte("g")), []byte("x")) != 0 {
		t.Error("the parent of d is not the root, or a file has entries")
	}
	count := 0
	for offset := uint64(0); offset < uint64(len(files))+2; count++ { // one at a time
		out := fuse.NewDirEntryList(make([]byte, 300), offset)
		tree.list(id, offset, false, out)
		if len(out.Bytes()) == 0 {
			t.Fatalf("nothing is listed from %d", offset)
		}
		offset = out.Offset
	}
	if count == 0 {
		t.Error("nothing is listed")
	}
}
