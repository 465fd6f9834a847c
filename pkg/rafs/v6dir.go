package rafs

import (
	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v6Entry is one directory entry with its number, "." and ".." included.
type v6Entry struct {
	name string
	nid  uint64
	kind uint8
}

// dirSize returns i_size of a directory with these children.
func dirSize(children []Dirent) uint64 {
	var size uint64
	add := func(name string) {
		n := uint64(disk.SizeDirent + len(name))
		if size%disk.BlockSize+n > disk.BlockSize {
			size = alignUp(size, disk.BlockSize)
		}
		size += n
	}
	walkSorted(children, add, func(i int) { add(children[i].Name) })
	return size
}

// walkSorted visits "." and ".." at their places among the sorted children.
func walkSorted(children []Dirent, dot func(name string), child func(i int)) {
	i := 0
	for _, name := range [...]string{".", ".."} {
		for i < len(children) && children[i].Name < name {
			child(i)
			i++
		}
		dot(name)
	}
	for ; i < len(children); i++ {
		child(i)
	}
}

// dirData appends the dirent blocks of directory node n to p.
func (p *v6Plan) dirData(dst []byte, n *v6Node) []byte {
	start := len(dst)
	var block []v6Entry
	used := 0
	flush := func() {
		for (len(dst)-start)%disk.BlockSize != 0 { // never more than one short block before the last
			dst = append(dst, 0)
		}
		dst = appendDirBlock(dst, block)
		block, used = block[:0], 0
	}
	add := func(e v6Entry) {
		if used+disk.SizeDirent+len(e.name) > disk.BlockSize {
			flush()
		}
		block = append(block, e)
		used += disk.SizeDirent + len(e.name)
	}
	children := n.inode.Children
	walkSorted(children, func(name string) {
		nid := uint64(n.unit)
		if name == ".." {
			nid = p.nid(n.parent)
		}
		add(v6Entry{name, nid, disk.TypeDir})
	}, func(i int) {
		c := children[i]
		add(v6Entry{c.Name, p.nidOf(c.Inode), direntType(c.Inode.Mode)})
	})
	flush()
	return dst
}

// appendDirBlock appends all dirents of a block, then all names.
func appendDirBlock(p []byte, block []v6Entry) []byte {
	nameOffset := len(block) * disk.SizeDirent
	for _, e := range block {
		p = appendRecord(p, &disk.Dirent{Nid: e.nid, NameOffset: uint16(nameOffset), FileType: e.kind}) //nolint:gosec // below 4096
		nameOffset += len(e.name)
	}
	for _, e := range block {
		p = append(p, e.name...)
	}
	return p
}
