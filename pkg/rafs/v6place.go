package rafs

import (
	"fmt"
	"math"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v6Allocator hands out space in the metadata area, filling gaps at block ends the way
// upstream's builder does, so that equal trees have equal bytes.
type v6Allocator struct {
	off  uint64
	free [disk.BlockSize / disk.NidSize]fifo // blocks with k*32 bytes left at their end
}

// fifo is a queue of block offsets.
type fifo struct {
	items []uint64
	head  int
}

func (f *fifo) push(v uint64) { f.items = append(f.items, v) }

func (f *fifo) pop() (uint64, bool) {
	if f.head == len(f.items) {
		f.items, f.head = f.items[:0], 0
		return 0, false
	}
	f.head++
	return f.items[f.head-1], true
}

// take returns size bytes at the end of an earlier block.
func (a *v6Allocator) take(size uint64) (uint64, bool) {
	if size >= disk.BlockSize {
		return 0, false
	}
	m := alignUp(size, disk.NidSize) / disk.NidSize
	for k := m; k < uint64(len(a.free)); k++ {
		if block, ok := a.free[k].pop(); ok {
			at := block + disk.BlockSize - k*disk.NidSize
			a.add(at + m*disk.NidSize)
			return at, true
		}
	}
	return 0, false
}

// add keeps the rest of the block from o on for later.
func (a *v6Allocator) add(o uint64) {
	if used := o % disk.BlockSize; used != 0 {
		a.free[(disk.BlockSize-used)/disk.NidSize].push(o - used)
	}
}

func (a *v6Allocator) nextBlock() {
	a.add(a.off)
	a.off = alignUp(a.off, disk.BlockSize)
}

// takeOrAppend returns size bytes from a gap or at the cursor.
func (a *v6Allocator) takeOrAppend(size uint64) uint64 {
	if at, ok := a.take(size); ok {
		return at
	}
	at := a.off
	a.off += size
	return at
}

// place decides the node's offsets; data is its directory or symlink bytes.
func (a *v6Allocator) place(n *v6Node, chunks int) {
	size := disk.SizeInodeExtended + n.xattrBytes()
	var at, data uint64
	switch fileType(n.inode.Mode) {
	case modeRegular:
		at = a.takeOrAppend(alignUp(size, disk.SizeChunkIndex) + uint64(chunks)*disk.SizeChunkIndex) //nolint:gosec // a length
	case modeDir, modeSymlink:
		at, data = a.placeData(n, size)
	default:
		at = a.off
		a.off += size
	}
	a.off = alignUp(a.off, disk.NidSize)
	if at%disk.NidSize != 0 || data%disk.BlockSize != 0 {
		panic(fmt.Sprintf("rafs: inode at %d, its data at %d", at, data))
	}
	n.unit, n.block = uint32(at/disk.NidSize), uint32(data/disk.BlockSize) //nolint:gosec // the caller compares a.off with maxMeta
}

// placeData returns the places of an inode with data and of that data's whole blocks.
func (a *v6Allocator) placeData(n *v6Node, size uint64) (at, data uint64) {
	tail := n.size % disk.BlockSize
	n.inline = tail != 0 && size+tail <= disk.BlockSize
	if !n.inline {
		at = a.takeOrAppend(size)
		a.nextBlock()
		data = a.off
		a.off = alignUp(a.off+n.size, disk.BlockSize)
		return at, data
	}
	at, ok := a.take(size + tail)
	if !ok {
		if disk.BlockSize-a.off%disk.BlockSize < size+tail {
			a.nextBlock()
		}
		at = a.off
		a.off += size + tail
	}
	if n.size > tail {
		a.nextBlock()
	}
	data = a.off &^ (disk.BlockSize - 1)
	a.off += n.size - tail
	return at, data
}

// v6Walk is the state of a walk in layout order: a directory, its other children, then
// its subdirectories, without recursion.
type v6Walk struct {
	plan  *v6Plan
	alloc v6Allocator
	stack []v6Frame
}

// v6Frame is a directory whose subdirectories are being visited.
type v6Frame struct {
	node uint32
	base uint32 // number of the first child
	next int    // child to look at
	name string
}

func (p *v6Plan) placeTree() error {
	w := &v6Walk{plan: p, alloc: v6Allocator{off: disk.BlockSize}}
	p.names = 1
	if err := w.dir(v6Node{inode: p.img.Root, ino: 1}, ""); err != nil {
		return err
	}
	for len(w.stack) > 0 {
		f := &w.stack[len(w.stack)-1]
		children := p.nodes[f.node].inode.Children
		for f.next < len(children) && fileType(children[f.next].Inode.Mode) != modeDir {
			f.next++
		}
		if f.next == len(children) {
			w.stack = w.stack[:len(w.stack)-1]
			continue
		}
		c := children[f.next]
		n := v6Node{inode: c.Inode, parent: f.node, ino: f.base + uint32(f.next)} //nolint:gosec // bounded by dir
		f.next++
		if err := w.dir(n, c.Name); err != nil {
			return err
		}
	}
	p.sizes.end = w.alloc.off
	return p.checkPrefetch()
}

// path names a child of the directory being visited, for errors.
func (w *v6Walk) path(name string) string {
	var b strings.Builder
	for _, f := range w.stack[min(1, len(w.stack)):] {
		b.WriteString("/" + f.name)
	}
	b.WriteString("/" + name)
	return clip(b.String())
}

// clip keeps the beginning and the end of a long path, so that messages stay short.
func clip(path string) string {
	const keep = 500
	if len(path) > 2*keep+5 {
		return path[:keep] + " ... " + path[len(path)-keep:]
	}
	return path
}

// dir places a directory and its children that are none, and pushes it. Inode numbers
// go to all children when their directory is visited, one per name, as upstream has it.
func (w *v6Walk) dir(n v6Node, name string) error {
	p := w.plan
	ino := n.inode
	if _, ok := p.index.Find(ino); ok {
		return invalid("inode "+w.path(name), -1, "directory", "in the tree twice", "one entry")
	}
	subdirs, err := checkChildren(ino, func() string { return w.path(name) })
	if err != nil {
		return err
	}
	base := p.names + 1
	p.names += uint64(len(ino.Children))
	if p.names > math.MaxInt32 {
		return invalid("image", -1, "number of directory entries", p.names, fmt.Sprintf("at most %d", math.MaxInt32))
	}
	n.nlink, n.size = 2+subdirs, dirSize(ino.Children)
	node, err := w.add(n, name)
	if err != nil {
		return err
	}
	w.stack = append(w.stack, v6Frame{node: node, base: uint32(base), name: name})
	for i, c := range ino.Children {
		if fileType(c.Inode.Mode) == modeDir {
			continue
		}
		if err := w.file(c, uint32(base)+uint32(i)); err != nil {
			return err
		}
	}
	return nil
}

// file places a child that is no directory, or counts one more name of it.
func (w *v6Walk) file(c Dirent, number uint32) error {
	p := w.plan
	if i, ok := p.index.Find(c.Inode); ok {
		p.nodes[i].nlink++
		return nil
	}
	n := v6Node{inode: c.Inode, ino: number, nlink: 1}
	switch fileType(c.Inode.Mode) {
	case modeRegular:
		n.size = c.Inode.Size
	case modeSymlink:
		n.size = uint64(len(c.Inode.Target))
	}
	_, err := w.add(n, c.Name)
	return err
}

// add checks one inode and gives it its place.
func (w *v6Walk) add(n v6Node, name string) (uint32, error) {
	p := w.plan
	err := checkInode(n.inode)
	var xattrs uint32
	if err == nil {
		xattrs, err = xattrSize(n.inode.Xattrs)
	}
	if err == nil {
		err = checkChunks(p.img, n.inode)
	}
	if err != nil {
		return 0, fmt.Errorf("inode %q: %w", w.path(name), err)
	}
	n.xattrs = xattrWords(xattrs)
	p.xattr = p.xattr || n.xattrs > 0
	w.alloc.place(&n, len(n.inode.Chunks))
	if w.alloc.off > maxMeta {
		return 0, invalid("image", -1, "size of the metadata", w.alloc.off, fmt.Sprintf("at most %d", uint64(maxMeta)))
	}
	at := uint32(len(p.nodes)) //nolint:gosec // at most p.names
	p.nodes = append(p.nodes, n)
	p.index.Add(n.inode)
	for i := range n.inode.Chunks {
		p.chunk = append(p.chunk, v6ChunkRef{at, uint32(i)})
	}
	return at, nil
}

// checkPrefetch makes sure that every entry of the prefetch table is in the tree.
func (p *v6Plan) checkPrefetch() error {
	for i, ino := range p.img.Prefetch {
		if _, ok := p.index.Find(ino); !ok {
			return invalid(fmt.Sprintf("prefetch entry %d", i), -1, "inode", "not in the tree", nil)
		}
	}
	return nil
}
