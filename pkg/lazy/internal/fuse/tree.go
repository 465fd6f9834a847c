package fuse

import (
	"bytes"
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	blockSize = 4096
	modeType  = 0o170000 // S_IFMT
	modeDir   = 0o040000 // S_IFDIR
	modeFile  = 0o100000 // S_IFREG
	modeLink  = 0o120000 // S_IFLNK

	// forever is how long the kernel may keep what it was told, in seconds: nothing changes. Longer than its clock
	// counts is as long as it counts (kernel/time/time.c timespec64_to_jiffies).
	forever = math.MaxInt32
)

// Tree is a file tree whose inodes have numbers: 1 is the root, others follow level by level. It does not change, and has nothing of the
// image that it was made of: some 110 bytes for a file of one piece with a name of 12.
type Tree struct {
	nodes   []node  // inode n is at n-1
	entries []entry // of all directories, those of one side by side, in the order of their names
	pieces  []piece // of all files, those of one side by side, in the order of the file
	text    []byte  // names of entries and targets of links
	bytes   uint64  // of all files
	acls    bool    // some inode has a POSIX ACL
	xattrs  map[uint64][]rafs.Xattr
}

// node is one inode.
type node struct {
	size         uint64
	mtime        int64
	first, count uint32 // of a directory: its entries; of a file: its pieces; of a link: the bytes of its target
	parent       uint32 // of a directory
	links        uint32 // st_nlink
	mode         uint32
	uid, gid     uint32
	rdev, nsec   uint32
}

func (n *node) isDir() bool     { return n.mode&modeType == modeDir }
func (n *node) isRegular() bool { return n.mode&modeType == modeFile }

// entry is one name in a directory.
type entry struct {
	name   uint32 // where in the text
	length uint32
	id     uint32 // of its inode
}

// piece is where a part of a file begins, in the file and in the cache file of its blob. It ends where the next one begins, or the file ends.
type piece struct {
	at    uint64
	where uint64 // the blob in the upper bits; nowhere
}

const (
	pieceBits = 48        // of an offset in a blob; far above what a cache file may have
	nowhere   = 1<<64 - 1 // no blob of this index
	mostText  = 1<<32 - 1 // bytes, and entries, pieces and inodes
)

// NewTree numbers the inodes of img, which must not change meanwhile. It is ErrImage when there are more than 2^32 of anything.
func NewTree(img *rafs.Image) (*Tree, error) {
	t := &Tree{xattrs: map[uint64][]rafs.Xattr{}}
	inodes := []*rafs.Inode{img.Root}
	t.add(img.Root)
	t.nodes[0].parent, t.nodes[0].links = fuse.FUSE_ROOT_ID, 2
	known := map[*rafs.Inode]uint32{} // of those that may have several names
	for i := 0; i < len(inodes); i++ {
		ino := inodes[i]
		if err := t.fill(i, ino, uint64(img.ChunkSize)); err != nil {
			return nil, err
		}
		for _, c := range ino.Children {
			id := known[c.Inode]
			if id == 0 {
				t.add(c.Inode)
				inodes = append(inodes, c.Inode)
				id = uint32(len(inodes)) //nolint:gosec // fill bounds it
				if !c.Inode.IsDir() {
					known[c.Inode] = id
				}
			}
			t.entries = append(t.entries, entry{uint32(len(t.text)), uint32(len(c.Name)), id}) //nolint:gosec // fill bounds them
			t.text = append(t.text, c.Name...)
			if child := &t.nodes[id-1]; c.Inode.IsDir() {
				child.parent, child.links = uint32(i)+1, 2
				t.nodes[i].links++
			} else {
				child.links++
			}
		}
	}
	t.nodes, t.entries, t.pieces, t.text = slices.Clone(t.nodes), slices.Clone(t.entries), slices.Clone(t.pieces), slices.Clone(t.text)
	return t, nil
}

// add appends an inode, but for what fill knows.
func (t *Tree) add(ino *rafs.Inode) {
	t.nodes = append(t.nodes, node{size: ino.Size, mtime: ino.Mtime, mode: ino.Mode, uid: ino.UID, gid: ino.GID, rdev: ino.Rdev, nsec: ino.MtimeNsec})
	if ino.IsRegular() {
		t.bytes += ino.Size
	}
	if len(ino.Xattrs) == 0 {
		return
	}
	own := make([]rafs.Xattr, len(ino.Xattrs)) // the image's may lie in the bytes of all
	for i, x := range ino.Xattrs {
		own[i] = rafs.Xattr{Name: strings.Clone(x.Name), Value: slices.Clone(x.Value)}
		t.acls = t.acls || strings.HasPrefix(x.Name, "system.posix_acl_")
	}
	t.xattrs[uint64(len(t.nodes))] = own
}

// fill says where the entries, the pieces or the target of an inode are. Entries are appended after it.
func (t *Tree) fill(index int, ino *rafs.Inode, unit uint64) error {
	text := len(ino.Target)
	for _, c := range ino.Children {
		text += len(c.Name)
	}
	for _, n := range []int{len(t.text) + text, len(t.entries) + len(ino.Children), len(t.pieces) + len(ino.Chunks) + 1, len(t.nodes) + len(ino.Children)} {
		if n > mostText {
			return fmt.Errorf("%w: %d bytes of names, entries, chunks or inodes, want at most %d", ErrImage, n, uint64(mostText))
		}
	}
	n := &t.nodes[index]
	//nolint:gosec // all are below mostText
	switch {
	case n.isDir():
		n.first, n.count = uint32(len(t.entries)), uint32(len(ino.Children))
	case n.mode&modeType == modeLink:
		n.first, n.count = uint32(len(t.text)), uint32(len(ino.Target))
		t.text = append(t.text, ino.Target...)
	case n.isRegular():
		n.first = uint32(len(t.pieces))
		t.place(ino, unit)
		n.count = uint32(len(t.pieces)) - n.first
	}
	return nil
}

// place appends the pieces of a file: chunks that lie side by side are one.
func (t *Tree) place(ino *rafs.Inode, unit uint64) {
	last, end := uint64(nowhere), uint64(nowhere) // where of the last piece, and of its end
	put := func(at, where, n uint64) {
		if at == 0 || where == nowhere && last != nowhere || where != nowhere && (last == nowhere || where != end) {
			t.pieces = append(t.pieces, piece{at, where})
		}
		last, end = where, where+n
	}
	at := uint64(0)
	for i := range ino.Chunks {
		c := &ino.Chunks[i]
		if at >= ino.Size || unit == 0 {
			break
		}
		n := min(unit, ino.Size-at)
		if uint64(c.UncompressedSize) < n || c.UncompressedOffset >= 1<<pieceBits-n {
			put(at, nowhere, n)
		} else {
			put(at, uint64(c.Blob)<<pieceBits|c.UncompressedOffset, n)
		}
		at += n
	}
	if at < ino.Size {
		put(at, nowhere, 0)
	}
}

// node returns inode id; nil when there is none.
func (t *Tree) node(id uint64) *node {
	if id == 0 || id > uint64(len(t.nodes)) {
		return nil
	}
	return &t.nodes[id-1]
}

// of returns the entries of a directory.
func (t *Tree) of(n *node) []entry { return t.entries[n.first : uint64(n.first)+uint64(n.count)] }

func (t *Tree) name(e entry) []byte { return t.text[e.name : uint64(e.name)+uint64(e.length)] }

// target returns what a link points to.
func (t *Tree) target(n *node) []byte { return t.name(entry{name: n.first, length: n.count}) }

// child returns the number of the entry name of directory id; 0 when there is none.
func (t *Tree) child(id uint64, name []byte) uint64 {
	n := t.node(id)
	if n == nil || !n.isDir() {
		return 0
	}
	if string(name) == ".." { // fs/fuse/inode.c fuse_get_parent
		return uint64(n.parent)
	}
	all := t.of(n)
	at, found := slices.BinarySearchFunc(all, name, func(e entry, name []byte) int { return bytes.Compare(t.name(e), name) })
	if !found {
		return 0
	}
	return uint64(all[at].id)
}

// attr fills in what stat(2) shows of inode id.
func (t *Tree) attr(id uint64, out *fuse.Attr) {
	n := t.node(id)
	size := n.size
	if n.isDir() {
		size = blockSize
	}
	seconds := uint64(n.mtime) //nolint:gosec // the kernel takes the same bits as signed
	*out = fuse.Attr{
		Ino: id, Size: size, Blocks: size/512 + min(size%512, 1), Mode: n.mode, Nlink: n.links, Rdev: n.rdev, Blksize: blockSize,
		Atime: seconds, Mtime: seconds, Ctime: seconds, Atimensec: n.nsec, Mtimensec: n.nsec, Ctimensec: n.nsec,
		Owner: fuse.Owner{Uid: n.uid, Gid: n.gid},
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
	all := t.of(n)
	for at := offset; at < uint64(len(all))+2; at++ {
		e := fuse.DirEntry{Off: at + 1}
		switch at {
		case 0:
			e.Name, e.Ino = ".", id
		case 1:
			e.Name, e.Ino = "..", uint64(n.parent)
		default:
			e.Name, e.Ino = string(t.name(all[at-2])), uint64(all[at-2].id)
		}
		e.Mode = t.node(e.Ino).mode
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
func (t *Tree) extents(f *node, off, n int64, into []extent) (_ []extent, length int64, ok bool) {
	size := int64(min(f.size, math.MaxInt64))
	if off < 0 || n < 0 || off >= size {
		return into, 0, true
	}
	end := uint64(off + min(n, size-off)) //nolint:gosec // not negative
	all := t.pieces[f.first : uint64(f.first)+uint64(f.count)]
	// The last piece that begins at off or before; the first begins at 0.
	i, found := slices.BinarySearchFunc(all, uint64(off), func(p piece, at uint64) int { return cmp.Compare(p.at, at) })
	if !found {
		i--
	}
	for at := uint64(off); at < end; i++ {
		stop := end
		if i+1 < len(all) {
			stop = min(stop, all[i+1].at)
		}
		p := all[i]
		if p.where == nowhere {
			return into, 0, false
		}
		into = append(into, extent{int(p.where >> pieceBits), int64(p.where&(1<<pieceBits-1) + at - p.at), int64(stop - at)}) //nolint:gosec // below 2^48
		at = stop
	}
	return into, int64(end) - off, true //nolint:gosec // not negative
}
