package rafs

import (
	"cmp"
	"slices"
	"strings"
)

// walkFrame is a directory whose children are being visited.
type walkFrame struct {
	children []Dirent
	length   int // of the path up to and with this directory
}

// Walk calls fn for every directory entry, parents first and siblings in order; the root is "/".
// A file with several names is visited once per name. An error of fn ends the walk
// and is returned as it is. It does not recurse, so any depth works.
func (img *Image) Walk(fn func(path string, ino *Inode) error) error {
	if img.Root == nil {
		return nil
	}
	if err := fn("/", img.Root); err != nil {
		return err
	}
	var path []byte
	stack := []walkFrame{{children: img.Root.Children}}
	for len(stack) > 0 {
		f := &stack[len(stack)-1]
		if len(f.children) == 0 {
			stack = stack[:len(stack)-1]
			continue
		}
		c := f.children[0]
		f.children = f.children[1:]
		path = append(append(path[:f.length], '/'), c.Name...)
		if err := fn(string(path), c.Inode); err != nil {
			return err
		}
		if len(c.Inode.Children) > 0 {
			stack = append(stack, walkFrame{c.Inode.Children, len(path)})
		}
	}
	return nil
}

// walkInodes calls fn for every inode, in no particular order, and again for every further name of a file.
func (img *Image) walkInodes(fn func(ino *Inode)) {
	if img.Root == nil {
		return
	}
	stack := []*Inode{img.Root}
	for len(stack) > 0 {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		fn(dir)
		for _, c := range dir.Children {
			if c.Inode.IsDir() {
				stack = append(stack, c.Inode)
			} else {
				fn(c.Inode)
			}
		}
	}
}

// Lookup returns the inode at path, slash-separated and relative to the root, without following
// symlinks; nil when there is none. Empty elements and "." are skipped.
func (img *Image) Lookup(path string) *Inode {
	ino := img.Root
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." {
			continue
		}
		if ino = ino.Child(name); ino == nil {
			return nil
		}
	}
	return ino
}

// Child returns the inode of entry name; nil when there is none, also of a nil inode or one that is no directory.
func (i *Inode) Child(name string) *Inode {
	if i == nil {
		return nil
	}
	at, ok := slices.BinarySearchFunc(i.Children, name, func(d Dirent, n string) int { return cmp.Compare(d.Name, n) })
	if !ok {
		return nil
	}
	return i.Children[at].Inode
}

// BlobChunks returns the distinct chunks of blob index that the tree uses, in the order
// of their Index, which is that of both offsets. Chunks that no file uses are not known to the image.
func (img *Image) BlobChunks(index int) []Chunk {
	var chunks []Chunk
	seen := map[uint32]bool{}
	img.walkInodes(func(ino *Inode) {
		for i := range ino.Chunks {
			if c := &ino.Chunks[i]; int(c.Blob) == index && !seen[c.Index] {
				seen[c.Index] = true
				chunks = append(chunks, *c)
			}
		}
	})
	slices.SortFunc(chunks, func(a, b Chunk) int { return cmp.Compare(a.Index, b.Index) })
	return chunks
}
