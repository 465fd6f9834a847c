package rafs

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v6Loader reads the tree of a v6 bootstrap.
type v6Loader struct {
	*v6Tables
	faults *faultList
	img    *Image
	// inodes are, by nid, the directories, the files that say they have several names, and those of the
	// prefetch table. Of all others met tells that they were: an image has many.
	inodes  map[uint64]v6Loaded
	met     bitset          // by nid
	wanted  map[uint64]bool // nids of the prefetch table
	keepAll bool            // inodes has every inode; met is not used
	// budget is how many bytes of metadata may still be read: no two inodes, directories or
	// xattrs of a real image share bytes, so all of them together fit in the file. It
	// bounds memory and time for images whose parts overlap.
	budget uint64
	chunks []Chunk     // the chunk table
	places chunkPlaces // of chunks
	lent   bitset      // chunks that are an inode's own, by place
	stack  []v6Dir     // directories still to be read
	tally  *tally      // nil: keep the tree
}

// v6Loaded is an inode that was met, with what Check compares at the end.
type v6Loaded struct {
	inode *Inode
	ino   uint32 // i_ino
	nlink uint32 // as stored
	names uint32 // as found; directories: 2 + subdirectories
}

// v6Dir is a directory to be read. parts name the way to it for errors.
type v6Dir struct {
	inode  *Inode
	nid    uint64
	parent uint64
	head   v6Head
	path   *v6Path
}

// v6Path is a path as a list from the leaf up, so that deep trees need no long strings.
type v6Path struct {
	parent *v6Path
	name   string
}

func (p *v6Path) String() string {
	var names []string
	for n := 0; p != nil && p.parent != nil && n < 1000; p, n = p.parent, n+1 {
		names = append(names, p.name)
	}
	var b strings.Builder
	for _, name := range slices.Backward(names) {
		b.WriteString("/" + name)
	}
	if b.Len() == 0 {
		return "/"
	}
	return clip(b.String())
}

// v6Head is an inode of either form.
type v6Head struct {
	disk.InodeExtended
	offset uint64 // of the inode
	tail   uint64 // of what follows inode and xattrs
}

func (h *v6Head) layout() uint16 {
	return h.Format >> disk.FormatLayoutShift & disk.FormatLayoutMask
}

// chunkID packs the place of a chunk: 8 bits of blob, 24 of index.
func chunkID(blob uint16, index uint32) uint32 { return uint32(blob)<<24 | index }

// bare implements bootstrapReader.
func (t *v6Tables) bare() *Image {
	return &Image{Version: V6, Blobs: t.blobs, ChunkSize: t.ext.ChunkSize, Compressor: t.compressor(), Digester: t.digester()}
}

// load implements bootstrapReader.
func (t *v6Tables) load(faults *faultList, tally *tally) (*Image, []Chunk, error) {
	l := newV6Loader(t, faults, tally, t.src.size > maxMetSize)
	before := len(faults.faults)
	err := l.run()
	if errors.Is(err, errMoreNames) {
		faults.faults = faults.faults[:before]
		l = newV6Loader(t, faults, tally, true)
		err = l.run()
	}
	return l.img, l.chunks, err
}

// maxMetSize bounds the memory of v6Loader.met, a bit for every 32 bytes of the file.
const maxMetSize = 4 << 30

// errMoreNames: a file whose link count is 1 has a second name. No reader cares, so it is read again with all inodes kept.
var errMoreNames = errors.New("rafs: more names than links")

func newV6Loader(t *v6Tables, faults *faultList, counts *tally, keepAll bool) *v6Loader {
	if counts != nil {
		*counts = tally{}
	}
	l := &v6Loader{
		v6Tables: t, faults: faults, tally: counts, inodes: map[uint64]v6Loaded{}, wanted: map[uint64]bool{}, keepAll: keepAll, budget: t.src.size,
		img: t.bare(),
	}
	if !keepAll {
		l.met = newBitset(t.src.size/disk.NidSize + 1)
		for _, nid := range t.prefetch {
			l.wanted[uint64(nid)] = true
		}
	}
	return l
}

// keep remembers an inode that was met first.
func (l *v6Loader) keep(nid uint64, f v6Loaded) {
	if l.keepAll || f.nlink != 1 || l.wanted[nid] {
		l.inodes[nid] = f
		return
	}
	l.met.set(nid)
}

func (l *v6Loader) run() error {
	if err := l.readChunkTable(); err != nil {
		return err
	}
	if err := l.readRoot(); err != nil {
		return err
	}
	for len(l.stack) > 0 {
		d := l.stack[len(l.stack)-1]
		l.stack = l.stack[:len(l.stack)-1]
		err := l.readDir(&d)
		if errors.Is(err, errTooManyFaults) || errors.Is(err, errMoreNames) {
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
	return l.resolvePrefetch()
}

// spend takes n bytes from the budget.
func (l *v6Loader) spend(n uint64, section string, offset uint64) error {
	if n > l.budget {
		return invalid(section, clampOffset(offset), "size", n, "metadata that does not overlap")
	}
	l.budget -= n
	return nil
}

func (l *v6Loader) readRoot() error {
	nid := uint64(l.super.RootNid)
	ino, head, err := l.readInode(nid)
	if err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if !ino.IsDir() {
		return invalid("root inode", clampOffset(head.offset), "mode", fmt.Sprintf("%#o", ino.Mode), "a directory")
	}
	l.img.Root = ino
	if l.tally != nil {
		l.tally.add(ino)
	}
	l.inodes[nid] = v6Loaded{inode: ino, ino: head.Ino, nlink: head.Nlink, names: 2}
	l.stack = append(l.stack, v6Dir{inode: ino, nid: nid, parent: nid, head: head, path: &v6Path{}})
	return nil
}

// readChunkTable reads every record and makes each findable by blob and index.
func (l *v6Loader) readChunkTable() error {
	n := l.ext.ChunkTableSize / disk.SizeChunkRecord
	if n == 0 || l.ext.Flags&disk.FlagTarfs != 0 {
		return nil
	}
	if err := l.spend(l.ext.ChunkTableSize, "chunk table", l.ext.ChunkTableOffset); err != nil {
		return err
	}
	l.chunks = make([]Chunk, 0, n)
	l.places = newChunkPlaces(l.blobs, n)
	used := newBitset(n)
	if l.tally != nil {
		l.tally.used = used
	} else {
		l.lent = used
	}
	for i := range n {
		offset := l.ext.ChunkTableOffset + i*disk.SizeChunkRecord
		c, err := l.readChunkRecord(i, offset)
		if err == nil {
			err = l.keepChunk(c, i, offset)
		}
		if err := l.faults.add(err); err != nil {
			return err
		}
	}
	return nil
}

func (l *v6Loader) readChunkRecord(i, offset uint64) (Chunk, error) {
	section := "chunk table"
	var r disk.ChunkRecord
	if err := l.src.record(&r, offset, section); err != nil {
		return Chunk{}, err
	}
	section = "chunk table record " + strconv.FormatUint(i, 10)
	c, err := parseChunkRecord(&r, l.blobs, l.ext.ChunkSize, section, offset)
	if err != nil {
		return Chunk{}, err
	}
	if err := l.blobs[r.Blob].checkChunk(&c); err != nil {
		return Chunk{}, fmt.Errorf("%s at byte %d: %w", section, offset, err)
	}
	return c, nil
}

// parseChunkRecord checks one record of a chunk table or of a v5 inode and gives it back as a Chunk.
func parseChunkRecord(r *disk.ChunkRecord, blobs []Blob, chunkSize uint32, section string, offset uint64) (Chunk, error) {
	switch {
	case uint64(r.Blob) >= uint64(len(blobs)):
		return Chunk{}, invalid(section, clampOffset(offset), "blob_index", r.Blob, fmt.Sprintf("below %d", len(blobs)))
	case r.Index >= maxReadChunks:
		return Chunk{}, invalid(section, clampOffset(offset), "index", r.Index, fmt.Sprintf("below %d", maxReadChunks))
	case r.UncompressedSize == 0 || r.UncompressedSize > chunkSize:
		return Chunk{}, invalid(section, clampOffset(offset), "uncompressed_size", r.UncompressedSize, fmt.Sprintf("1 to %d", chunkSize))
	case r.CompressedSize > maxCompressed(chunkSize) && blobs[r.Blob].Features&disk.FeatureZran == 0:
		return Chunk{}, invalid(section, clampOffset(offset), "compressed_size", r.CompressedSize, fmt.Sprintf("at most %d", maxCompressed(chunkSize)))
	case r.Flags&disk.ChunkEncrypted != 0:
		return Chunk{}, unsupported(section, clampOffset(offset), "flags", fmt.Sprintf("%#x", r.Flags), "no encryption")
	}
	return Chunk{
		Digest: r.Digest, Blob: uint16(r.Blob), Index: r.Index, //nolint:gosec // checked above
		Compressed: r.Flags&disk.ChunkCompressed != 0, Batch: r.Flags&disk.ChunkBatch != 0,
		CompressedOffset: r.CompressedOffset, CompressedSize: r.CompressedSize,
		UncompressedOffset: r.UncompressedOffset, UncompressedSize: r.UncompressedSize,
	}, nil
}

// maxCompressed is the largest stored size of a chunk that is read. Builders keep what does not shrink as it is; estimates
// for gzip streams may be larger.
func maxCompressed(chunkSize uint32) uint32 { return 2*chunkSize + 4096 }

func (l *v6Loader) keepChunk(c Chunk, i, offset uint64) error {
	if first, ok := l.places.find(c.Blob, c.Index); ok {
		if l.chunks[first] != c {
			return invalid(fmt.Sprintf("chunk table record %d", i), clampOffset(offset), "record",
				fmt.Sprintf("of chunk %d of blob %d again, differing", c.Index, c.Blob), nil)
		}
		return nil
	}
	l.places.set(c.Blob, c.Index, uint32(len(l.chunks))) //nolint:gosec // fewer than 2^32 records
	l.chunks = append(l.chunks, c)
	return nil
}

// checkLinks compares stored link counts with the names found; only Check and OpenStrict ask for it.
func (l *v6Loader) checkLinks() error {
	if !l.faults.links {
		return nil
	}
	var bad []uint64
	apart := map[uint32]*specialLinks{}
	for nid, f := range l.inodes {
		switch {
		case f.nlink == f.names:
		case f.inode.IsDir(), f.inode.IsRegular():
			bad = append(bad, nid)
		default:
			// nydus-image gives each name of a symlink, FIFO or device with several an inode of its own, with the number
			// and the count of all.
			linksOf(apart, f.ino, f.inode).names += f.names
			bad = append(bad, nid)
		}
	}
	slices.Sort(bad)
	for _, nid := range bad {
		f, section := l.inodes[nid], fmt.Sprintf("inode %d", nid)
		err := invalid(section, -1, "nlink", f.nlink, f.names)
		if !f.inode.IsDir() && !f.inode.IsRegular() {
			err = apart[f.ino].fault(section, f.nlink)
		}
		if err := l.faults.add(err); err != nil {
			return err
		}
	}
	return nil
}

// specialLinks are the names of a symlink, FIFO, device or socket that are inodes of their own.
type specialLinks struct {
	inode  *Inode // of one of them
	names  uint32
	nlink  uint32 // v5: as the last of them has it
	own    bool   // v5: the name whose entry number is the inode number was met
	differ string // what they must not be of
}

// linksOf returns what all has of the names with the number ino, to which inode belongs.
func linksOf(all map[uint32]*specialLinks, ino uint32, inode *Inode) *specialLinks {
	a := all[ino]
	if a == nil {
		a = &specialLinks{inode: inode}
		all[ino] = a
	}
	switch b := a.inode; {
	case fileType(b.Mode) != fileType(inode.Mode):
		a.differ = "several types"
	case b.Target != inode.Target:
		a.differ = "several targets"
	case b.Rdev != inode.Rdev:
		a.differ = "several devices"
	}
	return a
}

// fault says what is wrong with an inode of a that has the count nlink.
func (a *specialLinks) fault(section string, nlink uint32) error {
	switch {
	case a.differ != "":
		return invalid(section, -1, "hard links", "of "+a.differ, "names of one file")
	case a.names != nlink:
		return invalid(section, -1, "nlink", nlink, a.names)
	}
	return nil
}

func (l *v6Loader) resolvePrefetch() error {
	for i, nid := range l.prefetch {
		f, ok := l.inodes[uint64(nid)]
		if !ok {
			offset := l.ext.PrefetchTableOffset + uint64(i)*sizeNid
			err := invalid(fmt.Sprintf("prefetch entry %d", i), clampOffset(offset), "nid", nid, "an inode of the tree")
			if err := l.faults.add(err); err != nil {
				return err
			}
			continue
		}
		l.img.Prefetch = append(l.img.Prefetch, f.inode)
	}
	return nil
}

// readDirBlock parses one dirent block and calls each for every entry.
func readDirBlock(block []byte, each func(d disk.Dirent, name string) error) error {
	if len(block) < disk.SizeDirent {
		return invalid("dirent block", -1, "length", len(block), fmt.Sprintf("at least %d", disk.SizeDirent))
	}
	var d disk.Dirent
	d.Load(block)
	first := int(d.NameOffset)
	if first < disk.SizeDirent || first%disk.SizeDirent != 0 || first >= len(block) {
		return invalid("dirent block", -1, "first nameoff", first, fmt.Sprintf("a multiple of %d below %d", disk.SizeDirent, len(block)))
	}
	names := string(block[first:]) // one allocation for all names of the block
	count := first / disk.SizeDirent
	for i := range count {
		start, end := int(d.NameOffset)-first, len(names)
		entry := d
		if i+1 < count {
			d.Load(block[(i+1)*disk.SizeDirent:])
			end = int(d.NameOffset) - first
		}
		if start < 0 || end <= start || end > len(names) {
			return invalid(fmt.Sprintf("dirent %d", i), -1, "nameoff", entry.NameOffset, "ascending offsets inside the block")
		}
		name := names[start:end]
		if i+1 == count {
			name, _, _ = strings.Cut(name, "\x00")
		}
		if err := each(entry, name); err != nil {
			return err
		}
	}
	return nil
}
