package fuse

import (
	"math"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	blockSize = 4096
	modeType  = 0o170000 // S_IFMT
	modeFile  = 0o100000 // S_IFREG
	modeLink  = 0o120000 // S_IFLNK

	// forever is how long the kernel may keep what it was told, in seconds: nothing changes. Longer than its clock
	// counts is as long as it counts (kernel/time/time.c timespec64_to_jiffies).
	forever = math.MaxInt32
)

// Tree is a file tree whose inodes have numbers: 1 is the root, others follow level by level. It does not change.
type Tree struct {
	img   *rafs.Image
	nodes []node // inode n is at n-1
	bytes uint64 // of all files
	acls  bool   // some inode has a POSIX ACL
}

// node is one inode.
type node struct {
	ino    *rafs.Inode
	parent uint64   // of a directory
	links  uint32   // st_nlink
	kids   []uint64 // of a directory: the numbers of its children, in their order
}

// NewTree numbers the inodes of img, which must not change any more.
func NewTree(img *rafs.Image) *Tree {
	t := &Tree{img: img, nodes: []node{{ino: img.Root, parent: fuse.FUSE_ROOT_ID, links: 2}}}
	known := map[*rafs.Inode]uint64{} // of those that may have several names
	for i := 0; i < len(t.nodes); i++ {
		ino := t.nodes[i].ino
		t.count(ino)
		if len(ino.Children) == 0 {
			continue
		}
		kids := make([]uint64, len(ino.Children))
		for k, c := range ino.Children {
			id := known[c.Inode]
			if id == 0 {
				t.nodes = append(t.nodes, node{ino: c.Inode})
				id = uint64(len(t.nodes))
				if !c.Inode.IsDir() {
					known[c.Inode] = id
				}
			}
			kids[k] = id
			if child := &t.nodes[id-1]; c.Inode.IsDir() {
				child.parent, child.links = uint64(i)+1, 2
				t.nodes[i].links++
			} else {
				child.links++
			}
		}
		t.nodes[i].kids = kids
	}
	return t
}

// count notes what ino has.
func (t *Tree) count(ino *rafs.Inode) {
	if ino.IsRegular() {
		t.bytes += ino.Size
	}
	for _, x := range ino.Xattrs {
		t.acls = t.acls || strings.HasPrefix(x.Name, "system.posix_acl_")
	}
}

// node returns inode id; nil when there is none.
func (t *Tree) node(id uint64) *node {
	if id == 0 || id > uint64(len(t.nodes)) {
		return nil
	}
	return &t.nodes[id-1]
}

// child returns the number of the entry name of directory id; 0 when there is none.
func (t *Tree) child(id uint64, name string) uint64 {
	n := t.node(id)
	if n == nil || !n.ino.IsDir() {
		return 0
	}
	if name == ".." { // fs/fuse/inode.c fuse_get_parent
		return n.parent
	}
	lo, hi := 0, len(n.kids)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if n.ino.Children[mid].Name < name {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == len(n.kids) || n.ino.Children[lo].Name != name {
		return 0
	}
	return n.kids[lo]
}

// attr fills in what stat(2) shows of inode id.
func (t *Tree) attr(id uint64, out *fuse.Attr) {
	n := t.node(id)
	size := n.ino.Size
	if n.ino.IsDir() {
		size = blockSize
	}
	seconds := uint64(n.ino.Mtime) //nolint:gosec // the kernel takes the same bits as signed
	*out = fuse.Attr{
		Ino: id, Size: size, Blocks: (size + 511) / 512, Mode: n.ino.Mode, Nlink: n.links, Rdev: n.ino.Rdev, Blksize: blockSize,
		Atime: seconds, Mtime: seconds, Ctime: seconds, Atimensec: n.ino.MtimeNsec, Mtimensec: n.ino.MtimeNsec, Ctimensec: n.ino.MtimeNsec,
		Owner: fuse.Owner{Uid: n.ino.UID, Gid: n.ino.GID},
	}
}

// entry fills in what a lookup of inode id tells.
func (t *Tree) entry(id uint64, out *fuse.EntryOut) {
	*out = fuse.EntryOut{NodeId: id, EntryValid: forever, AttrValid: forever}
	t.attr(id, &out.Attr)
}

// statfs fills in what statfs(2) shows: a full file system.
func (t *Tree) statfs(out *fuse.StatfsOut) {
	*out = fuse.StatfsOut{Blocks: (t.bytes + blockSize - 1) / blockSize, Files: uint64(len(t.nodes)), Bsize: blockSize, Frsize: blockSize, NameLen: rafs.MaxName}
}

// list fills out with the entries of directory id behind those that were listed already; plus: with what a lookup of each
// would tell.
func (t *Tree) list(id, offset uint64, plus bool, out *fuse.DirEntryList) {
	n := t.node(id)
	for at := offset; at < uint64(len(n.kids))+2; at++ {
		e := fuse.DirEntry{Off: at + 1}
		switch at {
		case 0:
			e.Name, e.Ino = ".", id
		case 1:
			e.Name, e.Ino = "..", n.parent
		default:
			e.Name, e.Ino = n.ino.Children[at-2].Name, n.kids[at-2]
		}
		e.Mode = t.node(e.Ino).ino.Mode
		if !plus {
			if !out.AddDirEntry(e) {
				return
			}
			continue
		}
		told := out.AddDirLookupEntry(e)
		if told == nil {
			return
		}
		if at >= 2 { // the kernel wants to hear nothing of the first two
			t.entry(e.Ino, told)
		}
	}
}

// extent is a piece of a blob's cache file.
type extent struct {
	blob   int
	off, n int64
}

// extents appends where the n bytes at off of a regular file are, at most what it has; false when they are nowhere.
func (t *Tree) extents(ino *rafs.Inode, off, n int64, into []extent) (_ []extent, length int64, ok bool) {
	size := int64(min(ino.Size, math.MaxInt64))
	if off < 0 || n < 0 || off >= size {
		return into, 0, true
	}
	n = min(n, size-off)
	unit := int64(t.img.ChunkSize)
	for done := int64(0); done < n; {
		index, from := (off+done)/unit, (off+done)%unit
		if index >= int64(len(ino.Chunks)) {
			return into, 0, false
		}
		c := &ino.Chunks[index]
		e := extent{int(c.Blob), int64(c.UncompressedOffset) + from, min(n-done, int64(c.UncompressedSize)-from)} //nolint:gosec // below 2^44
		if e.n <= 0 {
			return into, 0, false
		}
		done += e.n
		if last := len(into) - 1; last >= 0 && into[last].blob == e.blob && into[last].off+into[last].n == e.off {
			into[last].n += e.n
		} else {
			into = append(into, e)
		}
	}
	return into, n, true
}
