package rafs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// readInode reads inode nid with xattrs, symlink target and chunks, but without children.
func (l *v6Loader) readInode(nid uint64) (*Inode, v6Head, error) {
	section := fmt.Sprintf("inode %d", nid)
	h, err := l.readHead(nid, section)
	if err != nil {
		return nil, h, err
	}
	ino := &Inode{
		Mode: uint32(h.Mode), UID: h.UID, GID: h.GID,
		Mtime: int64(h.Mtime), MtimeNsec: h.MtimeNsec, //nolint:gosec // two's complement on purpose
	}
	if direntType(ino.Mode) == disk.TypeUnknown {
		return nil, h, invalid(section, clampOffset(h.offset), "mode", fmt.Sprintf("%#o", ino.Mode), "a known file type")
	}
	if h.MtimeNsec >= 1e9 {
		return nil, h, invalid(section, clampOffset(h.offset), "mtime nanoseconds", h.MtimeNsec, "below 1e9")
	}
	if h.XattrCount > 0 {
		if ino.Xattrs, err = l.readXattrs(&h, section); err != nil {
			return nil, h, err
		}
	}
	switch fileType(ino.Mode) {
	case modeRegular:
		ino.Size = h.Size
		ino.Chunks, err = l.readChunks(&h, section)
	case modeSymlink:
		ino.Size = h.Size
		ino.Target, err = l.readTarget(&h, section)
	case modeDir:
		err = l.checkFlat(&h, section)
	default:
		ino.Rdev = h.Union
	}
	if err != nil {
		return nil, h, err
	}
	return ino, h, nil
}

// readHead reads the fixed part of an inode, whatever its form.
func (l *v6Loader) readHead(nid uint64, section string) (v6Head, error) {
	offset, err := l.inodeOffset(nid)
	if err != nil {
		return v6Head{}, err
	}
	h := v6Head{offset: offset}
	var c disk.InodeCompact
	if err := l.src.record(&c, offset, section); err != nil {
		return h, err
	}
	if c.Format&^disk.FormatKnown != 0 {
		return h, unsupported(section, clampOffset(offset), "i_format", fmt.Sprintf("%#x", c.Format), "known bits")
	}
	size := uint64(disk.SizeInodeCompact)
	if c.Format&disk.FormatExtended != 0 {
		size = disk.SizeInodeExtended
		if err := l.src.record(&h.InodeExtended, offset, section); err != nil {
			return h, err
		}
	} else {
		h.InodeExtended = disk.InodeExtended{
			Format: c.Format, XattrCount: c.XattrCount, Mode: c.Mode, Size: uint64(c.Size), Union: c.Union,
			Ino: c.Ino, UID: uint32(c.UID), GID: uint32(c.GID), Nlink: uint32(c.Nlink),
			// The kernel gives compact inodes the build time.
			Mtime: l.super.BuildTime, MtimeNsec: l.super.BuildTimeNsec,
		}
	}
	h.tail = offset + size
	if h.XattrCount > 0 {
		h.tail += disk.SizeXattrHeader + (uint64(h.XattrCount)-1)*disk.XattrAlign
	}
	if err := l.src.bounds(offset, h.tail-offset, section); err != nil {
		return h, err
	}
	return h, l.spend(h.tail-offset, section, offset)
}

func (l *v6Loader) readXattrs(h *v6Head, section string) ([]Xattr, error) {
	size := disk.SizeXattrHeader + (int(h.XattrCount)-1)*disk.XattrAlign
	start := h.tail - uint64(size) //nolint:gosec // positive
	p := make([]byte, size)
	if err := l.src.readAt(p, start, section); err != nil {
		return nil, err
	}
	xattrs, at, err := parseXattrs(p)
	if err != nil {
		return nil, fmt.Errorf("%s: xattrs at byte %d: %w", section, start+uint64(at), err) //nolint:gosec // an index
	}
	return xattrs, nil
}

// parseXattrs reads an inline xattr area; at is where a fault is.
func parseXattrs(p []byte) (xattrs []Xattr, at int, err error) {
	var h disk.XattrHeader
	if _, err := binary.Decode(p, binary.LittleEndian, &h); err != nil {
		return nil, 0, invalid("xattr header", -1, "length", len(p), disk.SizeXattrHeader)
	}
	if h.SharedCount != 0 {
		return nil, 0, invalid("xattr header", -1, "shared xattrs", h.SharedCount, 0)
	}
	for at = disk.SizeXattrHeader; at < len(p); {
		var e disk.XattrEntry
		if _, err := binary.Decode(p[at:], binary.LittleEndian, &e); err != nil {
			return nil, at, invalid("xattr", -1, "header", "cut short", nil)
		}
		body := p[at+disk.SizeXattrEntry:]
		n := int(e.NameLen)
		if n+int(e.ValueSize) > len(body) {
			return nil, at, invalid("xattr", -1, "size", n+int(e.ValueSize), fmt.Sprintf("at most %d", len(body)))
		}
		name, err := joinXattr(e.PrefixIndex, string(body[:n]))
		if err != nil {
			return nil, at, err
		}
		value := make([]byte, e.ValueSize)
		copy(value, body[n:])
		xattrs = append(xattrs, Xattr{Name: name, Value: value})
		at += int(alignUp(uint64(disk.SizeXattrEntry+n+int(e.ValueSize)), disk.XattrAlign)) //nolint:gosec // small
	}
	if at != len(p) {
		return nil, at, invalid("xattrs", -1, "length", at, len(p))
	}
	return xattrs, 0, nil
}

// joinXattr returns the full name of a stored one.
func joinXattr(index uint8, rest string) (string, error) {
	for _, p := range xattrPrefixes {
		if p.index == index && (rest == "") == p.full && !strings.ContainsRune(rest, 0) && len(p.prefix)+len(rest) <= MaxName {
			return p.prefix + rest, nil
		}
	}
	return "", invalid("xattr", -1, "name", fmt.Sprintf("prefix %d, rest %.300q", index, rest), "a known prefix and a name of at most 255 bytes")
}

// checkFlat makes sure that directory or symlink data lies in the file, and spends its bytes.
func (l *v6Loader) checkFlat(h *v6Head, section string) error {
	if err := l.spend(h.Size, section, h.offset); err != nil {
		return err
	}
	whole, tail := h.Size, uint64(0)
	switch h.layout() {
	case disk.LayoutPlain:
	case disk.LayoutInline:
		tail = h.Size % l.block
		whole -= tail
	default:
		return unsupported(section, clampOffset(h.offset), "data layout", h.layout(), "0 or 2 for this file type")
	}
	if whole > 0 {
		if err := l.src.bounds(uint64(h.Union)*l.block, whole, section); err != nil {
			return err
		}
	}
	if tail > 0 && h.tail%l.block+tail > l.block {
		return invalid(section, clampOffset(h.tail), "inline data", tail, "bytes inside one block")
	}
	return l.src.bounds(h.tail, tail, section)
}

// readFlat fills p, at most a block, with block number i of directory or symlink data.
func (l *v6Loader) readFlat(h *v6Head, p []byte, i uint64, section string) error {
	if h.layout() == disk.LayoutInline && i == h.Size/l.block {
		return l.src.readAt(p, h.tail, section)
	}
	return l.src.readAt(p, (uint64(h.Union)+i)*l.block, section)
}

func (l *v6Loader) readTarget(h *v6Head, section string) (string, error) {
	if h.Size == 0 || h.Size > MaxTarget {
		return "", invalid(section, clampOffset(h.offset), "size of the symlink", h.Size, fmt.Sprintf("1 to %d", MaxTarget))
	}
	if err := l.checkFlat(h, section); err != nil {
		return "", err
	}
	target := make([]byte, h.Size)
	for at := uint64(0); at < h.Size; at += l.block {
		if err := l.readFlat(h, target[at:min(at+l.block, h.Size)], at/l.block, section); err != nil {
			return "", err
		}
	}
	if strings.ContainsRune(string(target), 0) {
		return "", invalid(section, clampOffset(h.offset), "symlink target", "holding NUL", nil)
	}
	return string(target), nil
}

func (l *v6Loader) readChunks(h *v6Head, section string) ([]Chunk, error) {
	if h.Size == 0 && h.layout() == disk.LayoutPlain {
		return nil, nil
	}
	format := h.Union
	switch {
	case h.layout() != disk.LayoutChunk:
		return nil, unsupported(section, clampOffset(h.offset), "data layout", h.layout(), "chunks")
	case format&^disk.ChunkFormatKnown != 0:
		return nil, unsupported(section, clampOffset(h.offset), "chunk format", fmt.Sprintf("%#x", format), "known bits")
	case format&disk.ChunkFormatIndexes == 0:
		return nil, unsupported(section, clampOffset(h.offset), "chunk format", fmt.Sprintf("%#x", format), "8-byte entries")
	}
	unit := uint64(l.ext.ChunkSize)
	count := h.Size / unit
	if h.Size%unit != 0 {
		count++
	}
	start := alignUp(h.tail, disk.SizeChunkIndex)
	if start > l.src.size || count > (l.src.size-start)/disk.SizeChunkIndex {
		return nil, invalid(section, clampOffset(h.offset), "size", h.Size, fmt.Sprintf("at most %d chunks of %d", (l.src.size-min(start, l.src.size))/disk.SizeChunkIndex, unit))
	}
	if err := l.spend(count*disk.SizeChunkIndex, section, start); err != nil {
		return nil, err
	}
	if count == 0 {
		return nil, nil
	}
	var chunks []Chunk
	if l.tally == nil && count > 1 {
		chunks = make([]Chunk, 0, count)
	}
	var p [disk.SizeChunkIndex]byte
	for i := range count {
		at := start + i*disk.SizeChunkIndex
		if err := l.src.readAt(p[:], at, section); err != nil {
			return nil, err
		}
		c, err := l.findChunk(parseChunkIndex(p[:]), min(unit, h.Size-i*unit))
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: chunk %d at byte %d: %w", section, i, at, err)
		case l.tally != nil:
		case count == 1:
			return l.lend(c), nil
		default:
			chunks = append(chunks, l.chunks[c])
		}
	}
	return chunks, nil
}

// lend returns the chunk at a place of the chunk table for an inode that has no other: the record itself
// the first time, so that an image of small files has one record per file in memory, then copies.
func (l *v6Loader) lend(place uint32) []Chunk {
	if i := uint64(place); l.lent != nil && !l.lent.has(i) {
		l.lent.set(i)
		return l.chunks[i : i+1 : i+1]
	}
	return []Chunk{l.chunks[place]}
}

// parseChunkIndex is the other direction of appendChunkIndex.
func parseChunkIndex(p []byte) disk.ChunkIndex {
	le := binary.LittleEndian
	return disk.ChunkIndex{IndexLow: le.Uint16(p), Device: le.Uint16(p[2:]), Block: le.Uint32(p[4:])}
}

// findChunk returns the place in the chunk table of the record that an index entry points to; size is what
// its file needs.
func (l *v6Loader) findChunk(x disk.ChunkIndex, size uint64) (uint32, error) {
	device := x.Device & disk.ChunkDeviceMask
	if device == 0 || int(device) > len(l.blobs) {
		return 0, invalid("chunk index", -1, "device", device, fmt.Sprintf("1 to %d", len(l.blobs)))
	}
	index := uint32(x.Device)>>disk.ChunkIndexHighShift<<disk.ChunkIndexLowBits | uint32(x.IndexLow)
	if l.ext.Flags&disk.FlagTarfs != 0 {
		return l.tarfsChunk(device-1, index, x.Block, size)
	}
	i, ok := l.places.find(device-1, index)
	if !ok {
		return 0, invalid("chunk index", -1, "chunk", fmt.Sprintf("%d of blob %d", index, device-1), "one of the chunk table")
	}
	c := &l.chunks[i]
	if c.UncompressedOffset/l.block != uint64(x.Block) {
		return 0, invalid("chunk index", -1, "block", x.Block, c.UncompressedOffset/l.block)
	}
	if uint64(c.UncompressedSize) != size {
		return 0, invalid("chunk index", -1, "size of the chunk", c.UncompressedSize, size)
	}
	if l.tally != nil {
		l.tally.used.set(uint64(i))
	}
	return i, nil
}

// tarfsChunk makes the record of a chunk of a tarfs image, whose data are the tar itself: the index entry
// says where. Such images have no use for their chunk table, in which every digest is zero.
// Source: TarfsChunkInfoV6 in nydus' rafs/src/metadata/direct_v6.rs.
func (l *v6Loader) tarfsChunk(blob uint16, index, block uint32, size uint64) (uint32, error) {
	place := uint64(block) * l.block
	c := Chunk{
		Blob: blob, Index: index, CompressedOffset: place, UncompressedOffset: place,
		CompressedSize: uint32(size), UncompressedSize: uint32(size), //nolint:gosec // at most the chunk size
	}
	if l.blobs[blob].Features&disk.FeatureTarfs == 0 {
		return 0, invalid("chunk index", -1, "features of its blob", fmt.Sprintf("%#x", l.blobs[blob].Features), "TARFS in a tarfs image")
	}
	if err := l.blobs[blob].checkChunk(&c); err != nil {
		return 0, err
	}
	l.chunks = append(l.chunks, c)
	return uint32(len(l.chunks) - 1), nil //nolint:gosec // one for 8 bytes of a file that is far below 32 GiB
}

// readDir reads the entries of d and the inodes behind them.
func (l *v6Loader) readDir(d *v6Dir) error {
	section := fmt.Sprintf("inode %d", d.nid)
	buf := make([]byte, l.block)
	dirAt := len(l.stack)
	state := v6DirState{loader: l, dir: d}
	for at := uint64(0); at < d.head.Size; at += l.block {
		block := buf[:min(l.block, d.head.Size-at)]
		if err := l.readFlat(&d.head, block, at/l.block, section); err != nil {
			return err
		}
		if n := estimateEntries(block, d.head.Size); at == 0 && n > 0 && l.tally == nil {
			d.inode.Children = make([]Dirent, 0, n)
		}
		if err := readDirBlock(block, state.entry); err != nil {
			return fmt.Errorf("block %d: %w", at/l.block, err)
		}
	}
	if !state.self || !state.up {
		return invalid(section, clampOffset(d.head.offset), "entries", "without . or ..", nil)
	}
	// Subdirectories are read in name order, as they lie in the file.
	for i, j := dirAt, len(l.stack)-1; i < j; i, j = i+1, j-1 {
		l.stack[i], l.stack[j] = l.stack[j], l.stack[i]
	}
	return nil
}

// estimateEntries returns about how many entries a directory of size bytes has besides . and .., from its first
// block; at most one for each dirent that fits in.
func estimateEntries(block []byte, size uint64) uint64 {
	var d disk.Dirent
	if _, err := binary.Decode(block, binary.LittleEndian, &d); err != nil {
		return 0 // readDirBlock says why
	}
	first := min(uint64(d.NameOffset), uint64(len(block))) / disk.SizeDirent
	return max(first*size/uint64(len(block)), 2) - 2
}

// v6DirState is what is known of a directory while its entries come in.
type v6DirState struct {
	loader   *v6Loader
	dir      *v6Dir
	last     string
	any      bool
	self, up bool
}

func (s *v6DirState) entry(e disk.Dirent, name string) error {
	if name == "" || len(name) > MaxName || strings.ContainsAny(name, "/\x00") {
		return invalid("dirent", -1, "name", fmt.Sprintf("%.300q", name), "1 to 255 bytes without / and NUL")
	}
	if s.any && name <= s.last {
		return invalid("dirent", -1, "name", fmt.Sprintf("%.300q after %.300q", name, s.last), "sorted names, each once")
	}
	s.last, s.any = name, true
	switch name {
	case ".":
		s.self = true
		if e.Nid != s.dir.nid {
			return invalid("dirent .", -1, "nid", e.Nid, s.dir.nid)
		}
		return nil
	case "..":
		s.up = true
		if e.Nid != s.dir.parent {
			return invalid("dirent ..", -1, "nid", e.Nid, s.dir.parent)
		}
		return nil
	}
	err := s.loader.child(s.dir, e, name)
	if err == nil || errors.Is(err, errMoreNames) {
		return err
	}
	return s.loader.faults.add(fmt.Errorf("file %q: %w", &v6Path{s.dir.path, name}, err))
}

// child adds the inode of one entry to the directory d.
func (l *v6Loader) child(d *v6Dir, e disk.Dirent, name string) error {
	f, ok := l.inodes[e.Nid]
	if !ok && !l.keepAll && l.met.has(e.Nid) {
		return errMoreNames
	}
	if ok {
		if f.inode.IsDir() {
			return invalid("dirent", -1, "nid", e.Nid, "a directory that has no other entry")
		}
		f.names++
		l.inodes[e.Nid] = f
	} else {
		ino, head, err := l.readInode(e.Nid)
		if err != nil {
			return err
		}
		f = v6Loaded{inode: ino, ino: head.Ino, nlink: head.Nlink, names: 1}
		if l.tally != nil {
			l.tally.add(ino)
		}
		if ino.IsDir() {
			f.names = 2
			parent := l.inodes[d.nid]
			parent.names++
			l.inodes[d.nid] = parent
			l.stack = append(l.stack, v6Dir{inode: ino, nid: e.Nid, parent: d.nid, head: head, path: &v6Path{d.path, name}})
		}
		if ino.IsDir() {
			l.inodes[e.Nid] = f
		} else {
			l.keep(e.Nid, f)
		}
	}
	if e.FileType != disk.TypeUnknown && e.FileType != direntType(f.inode.Mode) {
		return invalid("dirent", -1, "file type", e.FileType, direntType(f.inode.Mode))
	}
	if l.tally == nil {
		d.inode.Children = append(d.inode.Children, Dirent{Name: name, Inode: f.inode})
	}
	return nil
}
