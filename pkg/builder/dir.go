package builder

import (
	"hash/maphash"
	"iter"
	"slices"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// entry is what a name in a directory stands for.
type entry struct {
	ino  *rafs.Inode // attributes; shared by hard links; nil while link is not resolved
	dir  *dir        // directories only
	link *lowerLink  // a hard link to a file of a lower layer
}

func (e entry) exists() bool { return e.ino != nil || e.link != nil }

// dir is the content of a directory while trees are built and merged. An image may have a million
// names: each takes 24 bytes here, which become the inode's in the end, and 5 to 11 in the index.
type dir struct {
	names []rafs.Dirent    // in the order they came; of those removed the name is empty
	index *nameIndex       // nil: there are few
	other map[uint32]other // of names by place: what is no plain inode
	gone  int              // removed ones among names
	// What follows concerns a layer's tree only; merging consumes it.
	whiteouts map[string]struct{} // names of lower layers to remove
	opaque    bool                // nothing of lower layers shows through
	explicit  bool                // the layer has an entry for the directory itself
}

// other is the rest of an [entry].
type other struct {
	dir  *dir
	link *lowerLink
}

// fewNames are found as fast without an index.
const fewNames = 8

// find returns the place of name.
func (d *dir) find(name string) (uint32, bool) {
	if d.index != nil {
		s := *d.index.slot(d.names, name)
		return s - 1, s != 0
	}
	for i := range d.names {
		if d.names[i].Name == name && name != "" {
			return uint32(i), true
		}
	}
	return 0, false
}

// get returns the entry called name; the zero value when there is none.
func (d *dir) get(name string) entry {
	at, ok := d.find(name)
	if !ok {
		return entry{}
	}
	return d.at(at)
}

func (d *dir) at(i uint32) entry {
	e := entry{ino: d.names[i].Inode}
	if d.other != nil {
		o := d.other[i]
		e.dir, e.link = o.dir, o.link
	}
	return e
}

// put enters e, in place of what is called name.
func (d *dir) put(name string, e entry) {
	at, ok := d.find(name)
	if !ok {
		at = uint32(len(d.names)) //nolint:gosec // at most MaxEntries for each layer
		d.names = append(d.names, rafs.Dirent{Name: name})
		switch {
		case d.index != nil:
			d.index.add(d.names)
		case len(d.names) > fewNames:
			d.index = newNameIndex(d.names)
		}
	}
	d.names[at].Inode = e.ino
	if e.dir == nil && e.link == nil {
		delete(d.other, at)
		return
	}
	if d.other == nil {
		d.other = map[uint32]other{}
	}
	d.other[at] = other{e.dir, e.link}
}

// remove takes name out, if it is there.
func (d *dir) remove(name string) {
	at, ok := d.find(name)
	if !ok {
		return
	}
	// The slot stays taken, by a name that nothing is equal to.
	d.names[at] = rafs.Dirent{}
	delete(d.other, at)
	if d.gone++; d.gone > fewNames && d.gone > len(d.names)/2 {
		d.compact()
	}
}

// clear takes all names out.
func (d *dir) clear() { d.names, d.index, d.other, d.gone = nil, nil, nil, 0 }

// compact forgets removed names.
func (d *dir) compact() {
	if d.gone == 0 {
		return
	}
	old := *d
	d.clear()
	for name, e := range old.all() {
		d.put(name, e)
	}
}

// len returns the number of names.
func (d *dir) len() int { return len(d.names) - d.gone }

// all yields every name with its entry, in the order they came. Names that are entered meanwhile
// may be yielded or not.
func (d *dir) all() iter.Seq2[string, entry] {
	return func(yield func(string, entry) bool) {
		for i := range d.names {
			if name := d.names[i].Name; name != "" && !yield(name, d.at(uint32(i))) {
				return
			}
		}
	}
}

// sorted returns the names in the order of their bytes.
func (d *dir) sorted() []string {
	out := make([]string, 0, d.len())
	for name := range d.all() {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// take returns what is in d as the sorted content of an inode, and the directories in it. d is empty
// afterwards.
func (d *dir) take() ([]rafs.Dirent, map[*rafs.Inode]*dir) {
	d.compact()
	var subdirs map[*rafs.Inode]*dir
	for i, o := range d.other {
		if o.dir != nil {
			if subdirs == nil {
				subdirs = make(map[*rafs.Inode]*dir, len(d.other))
			}
			subdirs[d.names[i].Inode] = o.dir
		}
	}
	names := d.names
	d.clear()
	slices.SortFunc(names, func(a, b rafs.Dirent) int { return strings.Compare(a.Name, b.Name) })
	return names, subdirs
}

func (d *dir) whiteout(name string) {
	if d.whiteouts == nil {
		d.whiteouts = map[string]struct{}{}
	}
	d.whiteouts[name] = struct{}{}
}

// nameIndex finds names in a list that it does not hold.
type nameIndex struct {
	seed  maphash.Seed
	slots []uint32 // 1 + place, 0: free; a power of two of them, at most ¾ taken
}

func newNameIndex(names []rafs.Dirent) *nameIndex {
	x := &nameIndex{seed: maphash.MakeSeed()}
	x.grow(names)
	return x
}

// slot returns where name is, or the free slot where it belongs.
func (x *nameIndex) slot(names []rafs.Dirent, name string) *uint32 {
	mask := uint64(len(x.slots) - 1) //nolint:gosec // a power of two
	for i := maphash.String(x.seed, name); ; i++ {
		s := &x.slots[i&mask]
		if *s == 0 || names[*s-1].Name == name {
			return s
		}
	}
}

// add enters the last of names.
func (x *nameIndex) add(names []rafs.Dirent) {
	if len(names) > len(x.slots)*3/4 {
		x.grow(names)
		return
	}
	n := len(names)
	*x.slot(names, names[n-1].Name) = uint32(n) //nolint:gosec // bounded by put
}

// grow makes room for names and enters all of them.
func (x *nameIndex) grow(names []rafs.Dirent) {
	size := 2 * fewNames
	for size*3/4 < len(names) {
		size *= 2
	}
	x.slots = make([]uint32, size)
	for i := range names {
		if name := names[i].Name; name != "" {
			*x.slot(names, name) = uint32(i + 1)
		}
	}
}
