package rafs

import (
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v5Loader reads the tree of a v5 bootstrap.
type v5Loader struct {
	*v5Tables
	faults *faultList
	img    *Image
	// budget is how many bytes of records may still be read: no two records of a real image
	// share bytes. It bounds memory and time for images whose records do.
	budget  uint64
	broke   bool                     // more was asked for than the budget: reading ends
	visited bitset                   // by entry number
	links   map[uint32]*v5Link       // files with several names, by inode number
	wanted  map[uint32]*Inode        // inodes of the prefetch table, nil until they are met
	inodes  uint64                   // distinct ones so far
	chunks  []Chunk                  // distinct ones, in the order of the files
	special map[uint32]bool          // symlinks, FIFOs and devices with several names, by entry number
	apart   map[uint32]*specialLinks // the same by inode number
	lookup  map[uint32]uint32        // chunkID → place in chunks
	stack   []v5Dir                  // directories still to be read
	deep    bool                     // compare digests and counts too, as Check wants
	tally   *tally                   // nil: keep the tree
}

// v5Link is a file with several names.
type v5Link struct {
	inode *Inode
	head  disk.InodeV5 // of the name met first
	names uint32
	own   bool // the name whose entry number is the inode number was met
}

// v5Dir is a directory to be read.
type v5Dir struct {
	inode *Inode
	head  disk.InodeV5
	path  *v6Path
}

// bare implements bootstrapReader.
func (t *v5Tables) bare() *Image {
	return &Image{
		Version: V5, Blobs: slices.Clone(t.blobs), ChunkSize: t.super.ChunkSize,
		Compressor: t.compressor(), Digester: t.digester(),
	}
}

// load implements bootstrapReader.
func (t *v5Tables) load(faults *faultList, tally *tally) (*Image, []Chunk, error) {
	l := &v5Loader{
		v5Tables: t, faults: faults, deep: faults.links, tally: tally, budget: t.src.size,
		visited: newBitset(uint64(t.super.InodeTableEntries) + 1), // the table itself has 32 times that
		links:   map[uint32]*v5Link{}, special: map[uint32]bool{}, apart: map[uint32]*specialLinks{}, wanted: map[uint32]*Inode{}, lookup: map[uint32]uint32{},
		img: t.bare(),
	}
	err := l.run()
	return l.img, l.chunks, err
}

func (l *v5Loader) run() error {
	for _, ino := range l.prefetch {
		l.wanted[ino] = nil
	}
	if err := l.readRoot(); err != nil {
		return err
	}
	for len(l.stack) > 0 {
		d := l.stack[len(l.stack)-1]
		l.stack = l.stack[:len(l.stack)-1]
		err := l.readDir(&d)
		if errors.Is(err, errTooManyFaults) {
			return err
		}
		if err != nil {
			if err := l.faults.add(fmt.Errorf("directory %q: %w", d.path, err)); err != nil {
				return err
			}
		}
	}
	if err := l.checkLinks(); err != nil {
		return err
	}
	if err := l.checkCounts(); err != nil {
		return err
	}
	if len(l.ext) == 0 {
		l.describeBlobs()
	}
	return l.resolvePrefetch()
}

// spend takes n bytes from the budget.
func (l *v5Loader) spend(n uint64, section string, offset uint64) error {
	if n > l.budget {
		l.broke = true
		return invalid(section, clampOffset(offset), "size", n, "records that do not overlap")
	}
	l.budget -= n
	return nil
}

// visit marks entry n; every entry belongs to one directory.
func (l *v5Loader) visit(n uint32) error {
	if l.visited.has(uint64(n)) {
		return invalid(fmt.Sprintf("inode %d", n), -1, "number", n, "an entry of one directory only")
	}
	l.visited.set(uint64(n))
	return nil
}

func (l *v5Loader) readRoot() error {
	r, err := l.readRecord(disk.V5RootIno)
	if err != nil {
		return fmt.Errorf("root: %w", err)
	}
	err = firstBroken("root inode", clampOffset(r.offset), []rule{
		{r.inode.IsDir(), "mode", fmt.Sprintf("%#o", r.head.Mode), "a directory"},
		{r.head.Ino == disk.V5RootIno, "ino", r.head.Ino, disk.V5RootIno},
		{r.head.Parent == 0, "parent", r.head.Parent, 0},
	})
	if err != nil {
		return err
	}
	if err := l.visit(disk.V5RootIno); err != nil {
		return err
	}
	l.img.Root = r.inode
	l.met(disk.V5RootIno, r.inode)
	l.stack = append(l.stack, v5Dir{inode: r.inode, head: r.head, path: &v6Path{}})
	return nil
}

// met counts an inode that was met first, and keeps it if the prefetch table has it.
func (l *v5Loader) met(ino uint32, inode *Inode) {
	l.inodes++
	if l.tally != nil {
		l.tally.add(inode)
	}
	if have, ok := l.wanted[ino]; ok && have == nil {
		l.wanted[ino] = inode
	}
}

// readDir reads the records of d's children, which have consecutive numbers.
func (l *v5Loader) readDir(d *v5Dir) error {
	h := &d.head
	section := fmt.Sprintf("inode %d", h.Ino)
	if end := uint64(h.ChildIndex) + uint64(h.ChildCount); h.ChildCount > 0 &&
		(uint64(h.ChildIndex) <= h.Ino || end-1 > uint64(l.super.InodeTableEntries)) {
		return invalid(section, -1, "children", fmt.Sprintf("%d to %d", h.ChildIndex, end-1), fmt.Sprintf("numbers from %d to %d", h.Ino+1, l.super.InodeTableEntries))
	}
	dirAt, last, whole := len(l.stack), "", true
	var sum hash.Hash // only Check wants it
	if l.deep {
		sum = l.img.Digester.hash()
	}
	for i := range h.ChildCount {
		r, err := l.child(d, h.ChildIndex+i, last)
		if err != nil {
			whole = false
			if errors.Is(err, errTooManyFaults) {
				return err
			}
			if err := l.faults.add(fmt.Errorf("file %q: %w", &v6Path{d.path, r.name}, err)); err != nil || l.broke {
				return errTooManyFaults
			}
			continue
		}
		last = r.name
		if l.deep {
			sum.Write(r.head.Digest[:]) // never fails
		}
	}
	// Subdirectories are read in name order, as they lie in the file.
	slices.Reverse(l.stack[dirAt:])
	if !l.deep || !whole {
		return nil
	}
	subdirs := uint32(len(l.stack) - dirAt) //nolint:gosec // at most ChildCount
	if h.Nlink != 2+subdirs {
		if err := l.faults.add(invalid(section, -1, "nlink", h.Nlink, 2+subdirs)); err != nil {
			return err
		}
	}
	return checkInodeDigest(section, h, Digest(sum.Sum(nil)), l.img.Digester)
}

// checkInodeDigest compares the digest of an inode record with that of what it covers.
func checkInodeDigest(section string, h *disk.InodeV5, got Digest, d Digester) error {
	if got == h.Digest {
		return nil
	}
	return &FormatError{Class: ErrDigest, Section: section, Offset: -1, Field: d.String() + " of its content", Got: got, Want: Digest(h.Digest)}
}

// child adds entry number n to the directory d; last is the name before it.
func (l *v5Loader) child(d *v5Dir, n uint32, last string) (v5Record, error) {
	r, err := l.readRecord(n)
	if err != nil {
		return r, err
	}
	section, at := r.section, clampOffset(r.offset)
	switch {
	case !validName(r.name):
		return r, invalid(section, at, "name", fmt.Sprintf("%.300q", r.name), "1 to 255 bytes without / and NUL, not . or ..")
	case last != "" && r.name <= last:
		return r, invalid(section, at, "name", fmt.Sprintf("%.300q after %.300q", r.name, last), "sorted names, each once")
	case r.head.Parent != d.head.Ino:
		return r, invalid(section, at, "parent", r.head.Parent, d.head.Ino)
	case r.head.Nlink == 0:
		return r, invalid(section, at, "nlink", 0, "not 0")
	}
	if err := l.visit(n); err != nil {
		return r, err
	}
	switch linked, regular := r.head.Ino != uint64(n), r.inode.IsRegular(); {
	case linked && r.inode.IsDir():
		return r, invalid(section, clampOffset(r.offset), "ino", r.head.Ino, fmt.Sprintf("%d: directories have no hard links", n))
	case !regular && (linked || !r.inode.IsDir() && r.head.Nlink > 1):
		// nydus-image links symlinks, FIFOs and devices too: here each name is an inode of its own.
		if r.head.Ino == 0 || r.head.Ino > uint64(l.super.InodeTableEntries) {
			return r, invalid(section, clampOffset(r.offset), "ino", r.head.Ino, fmt.Sprintf("1 to %d", l.super.InodeTableEntries))
		}
		l.special[n] = true
		a := linksOf(l.apart, uint32(r.head.Ino), r.inode) //nolint:gosec // checked above
		if a.names++; a.names > 1 && r.head.Nlink != a.nlink {
			a.differ = "several counts"
		}
		a.nlink = r.head.Nlink
		a.own = a.own || !linked
		l.met(n, r.inode)
		if linked {
			l.inodes-- // nydus-image counts files
		}
	case linked || regular && r.head.Nlink > 1:
		if r.inode, err = l.link(n, &r); err != nil {
			return r, err
		}
	default:
		l.met(n, r.inode)
	}
	if l.deep && !r.inode.IsDir() {
		if err := checkInodeDigest(section, &r.head, r.sum, l.img.Digester); err != nil {
			if err := l.faults.add(fmt.Errorf("file %q: %w", &v6Path{d.path, r.name}, err)); err != nil {
				return r, err
			}
		}
	}
	if r.inode.IsDir() {
		l.stack = append(l.stack, v5Dir{inode: r.inode, head: r.head, path: &v6Path{d.path, r.name}})
	}
	if l.tally != nil {
		return r, nil
	}
	if d.inode.Children == nil {
		// The count is no promise: records of a child have 136 bytes at least.
		d.inode.Children = make([]Dirent, 0, min(uint64(d.head.ChildCount), l.src.size/disk.SizeInodeV5))
	}
	d.inode.Children = append(d.inode.Children, Dirent{Name: r.name, Inode: r.inode})
	return r, nil
}

// link returns the inode of a file with several names. The record of every name says the same of its data; where the
// attributes differ, as nydus-image makes them of a tar whose headers differ, those of the file's own number count.
func (l *v5Loader) link(n uint32, r *v5Record) (*Inode, error) {
	section := fmt.Sprintf("inode %d", n)
	if r.head.Ino == 0 || r.head.Ino > uint64(l.super.InodeTableEntries) {
		return nil, invalid(section, clampOffset(r.offset), "ino", r.head.Ino, fmt.Sprintf("1 to %d", l.super.InodeTableEntries))
	}
	ino := uint32(r.head.Ino) //nolint:gosec // checked above
	f, ok := l.links[ino]
	if !ok {
		f = &v5Link{inode: r.inode, head: r.head}
		l.links[ino] = f
		l.met(ino, r.inode)
	} else if !sameFile(&f.head, &r.head) || !slices.Equal(f.inode.Chunks, r.inode.Chunks) {
		return nil, invalid(section, clampOffset(r.offset), "record", "not that of the file's other names", fmt.Sprintf("that of inode %d", ino))
	}
	f.names++
	if n == ino {
		f.own = true
		f.inode.Mode, f.inode.UID, f.inode.GID = r.inode.Mode, r.inode.UID, r.inode.GID
		f.inode.Mtime, f.inode.MtimeNsec, f.inode.Xattrs = r.inode.Mtime, r.inode.MtimeNsec, r.inode.Xattrs
	}
	return f.inode, nil
}

// sameFile reports whether two records of names of one file agree in all but attributes.
func sameFile(a, b *disk.InodeV5) bool {
	x, y := *a, *b
	for _, h := range []*disk.InodeV5{&x, &y} {
		h.Parent, h.NameSize, h.Flags = 0, 0, h.Flags&^(disk.V5InodeHardlink|disk.V5InodeXattr)
		h.UID, h.GID, h.ProjectID, h.Mode, h.Mtime, h.MtimeNsec = 0, 0, 0, 0, 0, 0
	}
	return x == y
}

// checkLinks makes sure that every number of a file with several names is that of one of them.
func (l *v5Loader) checkLinks() error {
	var bad []uint32
	for ino, f := range l.links {
		if l.special[ino] {
			l.inodes--
			if a := l.apart[ino]; a != nil && (f.inode.Size == 0 || !l.deep) {
				a.names += f.names
				continue // of a tar's link to a FIFO or device nydus-image makes an empty file with that one's number
			}
		}
		if !f.own || l.deep && f.names != f.head.Nlink {
			bad = append(bad, ino)
		}
	}
	slices.Sort(bad)
	for _, ino := range bad {
		f, section := l.links[ino], fmt.Sprintf("inode %d", ino)
		err := invalid(section, -1, "nlink", f.head.Nlink, f.names)
		if !f.own {
			err = invalid(section, -1, "hard links", f.names, "one with the number of the file")
		}
		if err := l.faults.add(err); err != nil {
			return err
		}
	}
	return l.checkSpecialLinks()
}

// checkSpecialLinks compares the link counts of symlinks, FIFOs and devices; only Check asks for it.
func (l *v5Loader) checkSpecialLinks() error {
	if !l.deep {
		return nil
	}
	for _, ino := range slices.Sorted(maps.Keys(l.apart)) {
		a, section := l.apart[ino], fmt.Sprintf("inode %d", ino)
		err := a.fault(section, a.nlink)
		if !a.own {
			err = invalid(section, -1, "hard links", a.names, "one with the number of the file")
		}
		if err := l.faults.add(err); err != nil {
			return err
		}
	}
	return nil
}

// checkCounts compares the superblock's numbers with what was found; only Check asks for it.
func (l *v5Loader) checkCounts() error {
	if !l.deep || len(l.faults.faults) > 0 {
		return nil // faults of entries make the counts wrong too
	}
	// nydus-image 2.2 does not count the root.
	if n := l.super.InodesCount; n != l.inodes && n != l.inodes-1 {
		if err := l.faults.add(invalid("superblock", 0, "inodes_count", l.super.InodesCount, l.inodes)); err != nil {
			return err
		}
	}
	for n := uint32(1); n <= l.super.InodeTableEntries && n != 0; n++ {
		if !l.visited.has(uint64(n)) {
			return l.faults.add(invalid(fmt.Sprintf("inode %d", n), -1, "number", "in no directory", "one"))
		}
	}
	return nil
}

// describeBlobs fills in what the extended blob table of newer images says, from the chunks.
func (l *v5Loader) describeBlobs() {
	for i := range l.chunks {
		c := &l.chunks[i]
		b := &l.img.Blobs[c.Blob]
		b.ChunkCount = max(b.ChunkCount, c.Index+1)
		b.UncompressedSize = max(b.UncompressedSize, c.UncompressedOffset+uint64(c.UncompressedSize))
		b.CompressedSize = max(b.CompressedSize, c.CompressedOffset+uint64(c.CompressedSize))
	}
}

func (l *v5Loader) resolvePrefetch() error {
	for i, ino := range l.prefetch {
		inode := l.wanted[ino]
		if inode == nil {
			offset := l.super.PrefetchTableOffset + uint64(i)*disk.V5InodeEntry
			err := invalid(fmt.Sprintf("prefetch entry %d", i), clampOffset(offset), "ino", ino, "an inode of the tree")
			if err := l.faults.add(err); err != nil {
				return err
			}
			continue
		}
		l.img.Prefetch = append(l.img.Prefetch, inode)
	}
	return nil
}
