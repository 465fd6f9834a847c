package rafs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v5Record is one entry of the inode table, read.
type v5Record struct {
	inode   *Inode
	head    disk.InodeV5
	name    string
	sum     Digest // of what the record's digest covers; not of directories
	offset  uint64
	section string // what errors call it
}

// v5Cursor reads the parts of a record one after another, each padded to 8 bytes.
type v5Cursor struct {
	loader  *v5Loader
	section string
	at      uint64
}

// next returns n bytes and passes their padding. The slice is the caller's.
func (c *v5Cursor) next(n uint64) ([]byte, error) {
	l := c.loader
	if err := l.src.bounds(c.at, n, c.section); err != nil {
		return nil, err
	}
	if err := l.spend(n, c.section, c.at); err != nil {
		return nil, err
	}
	p := make([]byte, n)
	if err := l.src.readAt(p, c.at, c.section); err != nil {
		return nil, err
	}
	c.at += alignUp(n, disk.V5Align)
	return p, nil
}

// readRecord reads entry number n whole, without its children.
func (l *v5Loader) readRecord(n uint32) (v5Record, error) {
	offset, err := l.entryOffset(n)
	if err != nil {
		return v5Record{}, err
	}
	r := v5Record{offset: offset}
	c := v5Cursor{l, "inode " + strconv.FormatUint(uint64(n), 10), offset}
	r.section = c.section
	if err := c.head(&r.head); err != nil {
		return r, err
	}
	h := &r.head
	name, err := c.next(uint64(h.NameSize))
	if err != nil {
		return r, err
	}
	r.name = string(name)
	ino := &Inode{Mode: h.Mode, UID: h.UID, GID: h.GID, Mtime: int64(h.Mtime), MtimeNsec: h.MtimeNsec} //nolint:gosec // two's complement on purpose
	target, err := c.next(uint64(h.SymlinkSize))
	if err != nil {
		return r, err
	}
	if h.Flags&disk.V5InodeXattr != 0 {
		if ino.Xattrs, err = c.xattrs(); err != nil {
			return r, err
		}
	}
	content := target // what the digest of a symlink covers
	switch fileType(ino.Mode) {
	case modeRegular:
		ino.Size = h.Size
		if ino.Chunks, err = c.chunks(h); err != nil {
			return r, err
		}
		content = digestsOf(ino.Chunks)
	case modeSymlink:
		ino.Target = string(target)
		ino.Size = uint64(len(target))
	case modeChar, modeBlock:
		ino.Rdev = h.Rdev
	}
	if err := checkInode(ino); err != nil {
		return r, fmt.Errorf("%s at byte %d: %w", c.section, offset, err)
	}
	r.inode = ino
	if l.deep && !ino.IsDir() {
		r.sum = l.img.Digester.Sum(content)
	}
	return r, nil
}

// digestsOf returns the digests of chunks one after another.
func digestsOf(chunks []Chunk) []byte {
	p := make([]byte, 0, len(chunks)*len(Digest{}))
	for i := range chunks {
		p = append(p, chunks[i].Digest[:]...)
	}
	return p
}

// head reads the fixed part and checks what needs nothing else.
func (c *v5Cursor) head(h *disk.InodeV5) error {
	at := clampOffset(c.at)
	if err := c.loader.src.bounds(c.at, disk.SizeInodeV5, c.section); err != nil {
		return err
	}
	if err := c.loader.spend(disk.SizeInodeV5, c.section, c.at); err != nil {
		return err
	}
	if err := c.loader.src.record(h, c.at, c.section); err != nil {
		return err
	}
	c.at += disk.SizeInodeV5
	const known = disk.V5InodeSymlink | disk.V5InodeHardlink | disk.V5InodeXattr | disk.V5InodeHole
	symlink := fileType(h.Mode) == modeSymlink
	switch { // a list of rules would make what they say of every inode
	case h.NameSize == 0:
		return invalid(c.section, at, "name_size", h.NameSize, "not 0")
	case h.NameSize > MaxName+1:
		return invalid(c.section, at, "name_size", h.NameSize, fmt.Sprintf("at most %d", MaxName+1))
	case h.Flags&^known != 0:
		return invalid(c.section, at, "flags", fmt.Sprintf("%#x", h.Flags), "known bits")
	case symlink != (h.SymlinkSize > 0):
		return invalid(c.section, at, "symlink_size", h.SymlinkSize, "of symlinks only, not 0")
	case !symlink && h.Flags&disk.V5InodeSymlink != 0:
		return invalid(c.section, at, "flags", fmt.Sprintf("%#x", h.Flags), "SYMLINK of symlinks only")
	case fileType(h.Mode) != modeDir && fileType(h.Mode) != modeRegular && h.ChildCount != 0:
		return invalid(c.section, at, "child_count", h.ChildCount, "0 for this file type")
	case h.Flags&disk.V5InodeHole != 0:
		return unsupported(c.section, at, "flags", fmt.Sprintf("%#x", h.Flags), "no holes")
	}
	return nil
}

// xattrs reads the area of extended attributes.
func (c *v5Cursor) xattrs() ([]Xattr, error) {
	start := c.at
	p, err := c.next(disk.SizeXattrsV5)
	if err != nil {
		return nil, err
	}
	size := binary.LittleEndian.Uint64(p)
	if size > c.loader.src.size {
		return nil, invalid(c.section, clampOffset(start), "size of the xattrs", size, fmt.Sprintf("at most %d", c.loader.src.size))
	}
	if p, err = c.next(size); err != nil {
		return nil, err
	}
	list, at, err := parseXattrsV5(p)
	if err != nil {
		return nil, fmt.Errorf("%s: xattrs at byte %d: %w", c.section, start+disk.SizeXattrsV5+uint64(at), err) //nolint:gosec // an index
	}
	return list, nil
}

// parseXattrsV5 reads pairs of name and value; at is where a fault is.
func parseXattrsV5(p []byte) (list []Xattr, at int, err error) {
	for at < len(p) {
		if len(p)-at < disk.SizeXattrPairV5 {
			return nil, at, invalid("xattr", -1, "size", "cut short", nil)
		}
		size := binary.LittleEndian.Uint32(p[at:])
		rest := p[at+disk.SizeXattrPairV5:]
		if uint64(size) > uint64(len(rest)) {
			return nil, at, invalid("xattr", -1, "size", size, fmt.Sprintf("at most %d", len(rest)))
		}
		name, value, ok := bytes.Cut(rest[:size], []byte{0})
		switch {
		case !ok, len(name) == 0, len(name) > MaxName:
			return nil, at, invalid("xattr", -1, "name", fmt.Sprintf("%.300q", name), fmt.Sprintf("1 to %d bytes and a NUL", MaxName))
		case len(value) > MaxXattrValue+1: // upstream's limit is one more than what v6 can say
			return nil, at, invalid("xattr", -1, "length of the value", len(value), fmt.Sprintf("at most %d", MaxXattrValue+1))
		}
		list = append(list, Xattr{Name: string(name), Value: bytes.Clone(value)})
		at += disk.SizeXattrPairV5 + int(size)
	}
	return list, 0, nil
}

// chunks reads the chunk records of a regular file.
func (c *v5Cursor) chunks(h *disk.InodeV5) ([]Chunk, error) {
	l := c.loader
	unit := uint64(l.super.ChunkSize)
	count := h.Size/unit + min(1, h.Size%unit)
	if count != uint64(h.ChildCount) {
		return nil, invalid(c.section, -1, "child_count", h.ChildCount, fmt.Sprintf("%d chunks for %d bytes", count, h.Size))
	}
	if count == 0 {
		return nil, nil
	}
	// Before memory is taken: all records must be there.
	if err := l.src.bounds(c.at, count*disk.SizeChunkRecord, c.section); err != nil {
		return nil, err
	}
	chunks := make([]Chunk, count)
	for i := range count {
		section := c.section + ": chunk " + strconv.FormatUint(i, 10)
		at := c.at
		if err := l.spend(disk.SizeChunkRecord, section, at); err != nil {
			return nil, err
		}
		var r disk.ChunkRecord
		if err := l.src.record(&r, at, section); err != nil {
			return nil, err
		}
		c.at += disk.SizeChunkRecord
		if r.FileOffset != i*unit {
			return nil, invalid(section, clampOffset(at), "file_offset", r.FileOffset, i*unit)
		}
		if want := min(unit, h.Size-i*unit); uint64(r.UncompressedSize) != want {
			return nil, invalid(section, clampOffset(at), "uncompressed_size", r.UncompressedSize, want)
		}
		chunk, err := parseChunkRecord(&r, l.blobs, l.super.ChunkSize, section, at)
		if err != nil {
			return nil, err
		}
		if len(l.ext) > 0 {
			if err := l.blobs[r.Blob].checkChunk(&chunk); err != nil {
				return nil, fmt.Errorf("%s at byte %d: %w", section, at, err)
			}
		}
		if err := l.keepChunk(chunk, section, at); err != nil {
			return nil, err
		}
		chunks[i] = chunk
	}
	return chunks, nil
}

// keepChunk remembers a chunk; files that share one have equal records of it.
func (l *v5Loader) keepChunk(c Chunk, section string, at uint64) error {
	id := chunkID(c.Blob, c.Index)
	if first, ok := l.lookup[id]; ok {
		if l.chunks[first] != c {
			return invalid(section, clampOffset(at), "record", fmt.Sprintf("of chunk %d of blob %d again, differing", c.Index, c.Blob), nil)
		}
		return nil
	}
	l.lookup[id] = uint32(len(l.chunks)) //nolint:gosec // fewer than 2^32 ids
	l.chunks = append(l.chunks, c)
	return nil
}
