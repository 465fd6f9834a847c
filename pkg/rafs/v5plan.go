package rafs

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v5Plan is a v5 bootstrap with every number, place and digest decided: pure data, written by [v5Plan.write].
type v5Plan struct {
	img     *Image
	nodes   []v5Node          // by entry number - 1; 0 is the root
	files   map[*Inode]uint32 // regular files: place of the first name
	dirs    map[*Inode]uint32 // directories: place
	digests []Digest          // of directories, by v5Node.extra
	chunks  []*Chunk          // distinct ones
	sizes   v5Sizes
	inodes  uint64 // distinct ones
	xattr   bool   // some inode has xattrs
}

// v5Sizes are the places of the sections, in bytes from the beginning.
type v5Sizes struct {
	prefetch uint64
	blobs    uint64
	blobsEnd uint64 // of the blob table, padded; the extended one begins here
	inodes   uint64 // first record
	total    uint64
}

// v5Node is one directory entry with its places. A place is an entry number - 1.
type v5Node struct {
	inode  *Inode
	name   string
	parent uint32 // place of the directory
	first  uint32 // place of the file's first name; its own but for hard links
	child  uint32 // directories: place of the first child
	extra  uint32 // directories: place in digests; else, at the first name: names of the file
	units  uint32 // offset of the record / 8
}

// planV5 decides everything about img's bootstrap. It does not change img.
func planV5(img *Image) (*v5Plan, error) {
	p := &v5Plan{img: img}
	if err := p.checkImage(); err != nil {
		return nil, err
	}
	entries, chunks := countTree(img.Root)
	p.nodes = make([]v5Node, 0, entries)
	p.chunks = make([]*Chunk, 0, chunks)
	p.files, p.dirs = map[*Inode]uint32{}, map[*Inode]uint32{}
	if err := p.number(); err != nil {
		return nil, err
	}
	if err := p.checkShared(); err != nil {
		return nil, err
	}
	if err := p.checkPrefetch(); err != nil {
		return nil, err
	}
	if err := p.place(); err != nil {
		return nil, err
	}
	p.digest()
	return p, nil
}

func (p *v5Plan) checkImage() error {
	img := p.img
	if err := img.checkHead(); err != nil {
		return err
	}
	seen := map[string]bool{}
	for i := range img.Blobs {
		b := &img.Blobs[i]
		section := fmt.Sprintf("blob %d", i)
		if err := b.checkV5(section, -1, img.ChunkSize); err != nil {
			return err
		}
		switch {
		case b.Features&disk.FeatureTarfs != 0:
			return unsupported(section, -1, "features", fmt.Sprintf("%#x", b.Features), "no tarfs")
		case len(b.ID) == 0 || len(b.ID) > MaxName || !validTag(b.ID):
			return invalid(section, -1, "id", fmt.Sprintf("%.80q", b.ID), "1 to 255 characters")
		case seen[b.ID]:
			return invalid(section, -1, "id", b.ID, "one that no other blob has")
		case b.ChunkCount == 0:
			return invalid(section, -1, "chunk count", 0, "at least 1")
		case b.UncompressedSize == 0 || b.CompressedSize == 0:
			return invalid(section, -1, "sizes", [2]uint64{b.CompressedSize, b.UncompressedSize}, "not 0")
		case b.Digester != img.Digester:
			return invalid(section, -1, "digester", b.Digester, img.Digester)
		case b.Compressor != img.Compressor:
			return invalid(section, -1, "compressor", b.Compressor, fmt.Sprintf("%s: a v5 image has one", img.Compressor))
		}
		seen[b.ID] = true
	}
	return nil
}

// v5Walk numbers the entries: the children of a directory one after another, then those of its
// subdirectories, without recursion.
type v5Walk struct {
	plan  *v5Plan
	stack []v5Frame
}

// v5Frame is a directory whose subdirectories are being visited.
type v5Frame struct {
	node uint32
	next uint32 // child to look at
}

func (p *v5Plan) number() error {
	w := &v5Walk{plan: p}
	if err := w.node(v5Node{inode: p.img.Root, name: "/"}); err != nil {
		return err
	}
	if err := w.dir(0); err != nil {
		return err
	}
	for len(w.stack) > 0 {
		at, ok := p.nextDir(&w.stack)
		if !ok {
			continue
		}
		if err := w.dir(at); err != nil {
			return err
		}
	}
	return nil
}

// nextDir returns the next subdirectory of the directory at the top of the stack, or takes that from the stack.
func (p *v5Plan) nextDir(stack *[]v5Frame) (at uint32, ok bool) {
	f := &(*stack)[len(*stack)-1]
	n := &p.nodes[f.node]
	for count := uint32(len(n.inode.Children)); f.next < count; { //nolint:gosec // bounded by dir
		at := n.child + f.next
		f.next++
		if p.nodes[at].inode.IsDir() {
			return at, true
		}
	}
	*stack = (*stack)[:len(*stack)-1]
	return 0, false
}

// path names a child of the directory at the top of the stack, for errors.
func (w *v5Walk) path(name string) string {
	var b strings.Builder
	for _, f := range w.stack[min(1, len(w.stack)):] {
		b.WriteString("/" + w.plan.nodes[f.node].name)
	}
	b.WriteString("/" + strings.TrimPrefix(name, "/"))
	return clip(b.String())
}

// dir numbers the children of the directory at place at, and pushes it.
func (w *v5Walk) dir(at uint32) error {
	p := w.plan
	n := &p.nodes[at]
	ino := n.inode
	if _, err := checkChildren(ino, func() string { return w.path(n.name) }); err != nil {
		return err
	}
	if uint64(len(p.nodes))+uint64(len(ino.Children)) >= maxEntriesV5 {
		return invalid("image", -1, "number of directory entries", len(p.nodes)+len(ino.Children), fmt.Sprintf("below %d", maxEntriesV5))
	}
	n.child = uint32(len(p.nodes)) //nolint:gosec // checked above
	w.stack = append(w.stack, v5Frame{node: at})
	for _, c := range ino.Children {
		if err := w.node(v5Node{inode: c.Inode, name: c.Name, parent: at}); err != nil {
			return err
		}
	}
	return nil
}

// maxEntriesV5 is more entries than a bootstrap of V5MaxSize bytes can hold.
const maxEntriesV5 = disk.V5MaxSize / disk.SizeInodeV5

// node checks one entry and appends it.
func (w *v5Walk) node(n v5Node) error {
	p := w.plan
	at := uint32(len(p.nodes)) //nolint:gosec // below maxEntriesV5
	n.first = at
	switch fileType(n.inode.Mode) {
	case modeDir:
		if _, ok := p.dirs[n.inode]; ok {
			return invalid("inode "+w.path(n.name), -1, "directory", "in the tree twice", "one entry")
		}
		n.extra = uint32(len(p.dirs)) //nolint:gosec // below maxEntriesV5
		p.dirs[n.inode] = at
	case modeRegular:
		if first, ok := p.files[n.inode]; ok {
			n.first = first
			p.nodes[first].extra++
			p.nodes = append(p.nodes, n)
			return nil
		}
		p.files[n.inode] = at
		n.extra = 1
	}
	err := checkInode(n.inode)
	if err == nil {
		_, err = xattrSizeV5(n.inode.Xattrs)
	}
	if err == nil {
		err = checkChunks(p.img, n.inode)
	}
	if err != nil {
		return fmt.Errorf("inode %q: %w", w.path(n.name), err)
	}
	for i := range n.inode.Chunks {
		if n.inode.Chunks[i].Batch {
			return unsupported("inode "+w.path(n.name), -1, fmt.Sprintf("chunk %d", i), "part of a batch", nil)
		}
		p.chunks = append(p.chunks, &n.inode.Chunks[i])
	}
	p.inodes++
	p.xattr = p.xattr || len(n.inode.Xattrs) > 0
	p.nodes = append(p.nodes, n)
	return nil
}

// checkShared makes sure that chunks of the same number are the same chunk, and keeps each once.
func (p *v5Plan) checkShared() error {
	place := func(a, b *Chunk) int { return cmp.Or(cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.Index, b.Index)) }
	slices.SortFunc(p.chunks, place)
	kept := p.chunks[:0]
	for _, c := range p.chunks {
		if n := len(kept); n > 0 && place(kept[n-1], c) == 0 {
			if *kept[n-1] != *c {
				return fmt.Errorf("%w: chunk %d of blob %d has two different records", ErrInvalid, c.Index, c.Blob)
			}
			continue
		}
		kept = append(kept, c)
	}
	p.chunks = kept
	return nil
}

func (p *v5Plan) checkPrefetch() error {
	for i, ino := range p.img.Prefetch {
		if _, ok := p.find(ino); !ok {
			return invalid(fmt.Sprintf("prefetch entry %d", i), -1, "inode", "not in the tree, or neither file nor directory", nil)
		}
	}
	return nil
}

// find returns the place of a regular file or directory.
func (p *v5Plan) find(ino *Inode) (uint32, bool) {
	if ino == nil {
		return 0, false
	}
	if ino.IsDir() {
		at, ok := p.dirs[ino]
		return at, ok
	}
	at, ok := p.files[ino]
	return at, ok
}

// place fixes where every table and record begins. Records follow each other as a walk meets
// them: a directory, then each child with all below it.
func (p *v5Plan) place() error {
	s := &p.sizes
	s.prefetch = disk.SizeSuperV5 + alignUp(uint64(len(p.nodes))*disk.V5InodeEntry, disk.V5Align)
	s.blobs = s.prefetch + alignUp(uint64(len(p.img.Prefetch))*disk.V5InodeEntry, disk.V5Align)
	s.blobsEnd = s.blobs + alignUp(uint64(len(p.blobTable())), disk.V5Align)
	s.inodes = s.blobsEnd + uint64(len(p.img.Blobs))*disk.SizeExtBlobV5
	at := s.inodes
	p.walk(func(n *v5Node) {
		n.units = uint32(at >> disk.V5OffsetShift) //nolint:gosec // checked below
		at += recordSizeV5(n)
	})
	s.total = at
	if at > disk.V5MaxSize {
		return invalid("image", -1, "size of the bootstrap", at, fmt.Sprintf("at most %d: use larger chunks, or v6", uint64(disk.V5MaxSize)))
	}
	return nil
}

// walk calls each for every node, in the order of the records.
func (p *v5Plan) walk(each func(n *v5Node)) {
	each(&p.nodes[0])
	stack := []v5Frame{{}}
	for len(stack) > 0 {
		f := &stack[len(stack)-1]
		n := &p.nodes[f.node]
		if int(f.next) == len(n.inode.Children) {
			stack = stack[:len(stack)-1]
			continue
		}
		at := n.child + f.next
		f.next++
		each(&p.nodes[at])
		if p.nodes[at].inode.IsDir() {
			stack = append(stack, v5Frame{node: at})
		}
	}
}

// recordSizeV5 returns the bytes of a record, a multiple of 8.
func recordSizeV5(n *v5Node) uint64 {
	size := uint64(disk.SizeInodeV5) + alignUp(uint64(len(n.name)), disk.V5Align) + alignUp(uint64(len(n.inode.Target)), disk.V5Align)
	if len(n.inode.Xattrs) > 0 {
		xattrs, err := xattrSizeV5(n.inode.Xattrs)
		if err != nil {
			panic("rafs: unchecked xattr: " + err.Error())
		}
		size += disk.SizeXattrsV5 + alignUp(xattrs, disk.V5Align)
	}
	return size + uint64(len(n.inode.Chunks))*disk.SizeChunkRecord
}

// xattrSizeV5 returns the bytes of all pairs and checks them. Names are those v6 can say too: other tools refuse the rest.
func xattrSizeV5(xattrs []Xattr) (uint64, error) {
	var total uint64
	for i := range xattrs {
		x := &xattrs[i]
		if _, _, err := splitXattr(x.Name); err != nil {
			return 0, err
		}
		switch {
		case len(x.Name) > MaxName || strings.ContainsRune(x.Name, 0):
			return 0, invalid("xattr", -1, "name", fmt.Sprintf("%.300q", x.Name), fmt.Sprintf("at most %d bytes without NUL", MaxName))
		case len(x.Value) > maxXattrValueV5:
			return 0, invalid("xattr "+x.Name, -1, "length of the value", len(x.Value), fmt.Sprintf("at most %d", maxXattrValueV5))
		}
		for j := range i {
			if xattrs[j].Name == x.Name {
				return 0, invalid("xattr "+x.Name, -1, "name", "there twice", "once")
			}
		}
		total += uint64(disk.SizeXattrPairV5 + len(x.Name) + 1 + len(x.Value))
	}
	return total, nil
}

// maxXattrValueV5 is the longest value of an xattr, one byte more than in v6.
// Source: nydus rafs/src/metadata/layout/mod.rs RAFS_XATTR_VALUE_MAX.
const maxXattrValueV5 = MaxXattrValue + 1

// digest computes the digests of all directories, the deepest first: children have
// higher numbers than their directory.
func (p *v5Plan) digest() {
	p.digests = make([]Digest, len(p.dirs))
	for i := len(p.nodes) - 1; i >= 0; i-- {
		n := &p.nodes[i]
		if !n.inode.IsDir() {
			continue
		}
		sum := p.img.Digester.hash()
		for j := range n.inode.Children {
			d := p.digestOf(&p.nodes[n.child+uint32(j)])
			sum.Write(d[:]) // never fails
		}
		p.digests[n.extra] = Digest(sum.Sum(nil))
	}
}

// digestOf returns the digest of a node: over the digests of its chunks or children, or over its target.
func (p *v5Plan) digestOf(n *v5Node) Digest {
	switch fileType(n.inode.Mode) {
	case modeDir:
		return p.digests[n.extra]
	case modeRegular:
		return p.img.Digester.Sum(digestsOf(n.inode.Chunks))
	case modeSymlink:
		return p.img.Digester.Sum([]byte(n.inode.Target))
	}
	return p.img.Digester.Sum(nil)
}

// info describes the written bootstrap.
func (p *v5Plan) info() BootstrapInfo {
	return BootstrapInfo{
		Size: clampOffset(p.sizes.total), RootNid: disk.V5RootIno, Inodes: int(p.inodes), Entries: len(p.nodes), //nolint:gosec // at most len(p.nodes)
		Chunks: len(p.chunks), Prefetch: len(p.img.Prefetch),
	}
}
