package disk

import "encoding/binary"

// The records of a tree are many: package binary, which goes through reflection, took an eighth of the time of
// reading one. TestLoad holds what follows against it.

// cursor takes little-endian fields from the front of a record.
type cursor struct{ p []byte }

func (c *cursor) u16() uint16 {
	v := binary.LittleEndian.Uint16(c.p)
	c.p = c.p[2:]
	return v
}

func (c *cursor) u32() uint32 {
	v := binary.LittleEndian.Uint32(c.p)
	c.p = c.p[4:]
	return v
}

func (c *cursor) u64() uint64 {
	v := binary.LittleEndian.Uint64(c.p)
	c.p = c.p[8:]
	return v
}

func (c *cursor) bytes(to []byte) { c.p = c.p[copy(to, c.p):] }

// Load decodes p, of at least [SizeChunkRecord] bytes.
func (r *ChunkRecord) Load(p []byte) {
	c := cursor{p[:SizeChunkRecord]}
	c.bytes(r.Digest[:])
	r.Blob, r.Flags, r.CompressedSize, r.UncompressedSize = c.u32(), c.u32(), c.u32(), c.u32()
	r.CompressedOffset, r.UncompressedOffset, r.FileOffset = c.u64(), c.u64(), c.u64()
	r.Index, r.CRC32 = c.u32(), c.u32()
}

// Load decodes p, of at least [SizeInodeV5] bytes.
func (i *InodeV5) Load(p []byte) {
	c := cursor{p[:SizeInodeV5]}
	c.bytes(i.Digest[:])
	i.Parent, i.Ino = c.u64(), c.u64()
	i.UID, i.GID, i.ProjectID, i.Mode = c.u32(), c.u32(), c.u32(), c.u32()
	i.Size, i.Blocks, i.Flags = c.u64(), c.u64(), c.u64()
	i.Nlink, i.ChildIndex, i.ChildCount = c.u32(), c.u32(), c.u32()
	i.NameSize, i.SymlinkSize = c.u16(), c.u16()
	i.Rdev, i.MtimeNsec, i.Mtime = c.u32(), c.u32(), c.u64()
	c.bytes(i.Reserved[:])
}

// Load decodes p, of at least [SizeInodeExtended] bytes.
func (i *InodeExtended) Load(p []byte) {
	c := cursor{p[:SizeInodeExtended]}
	i.Format, i.XattrCount, i.Mode, i.Reserved = c.u16(), c.u16(), c.u16(), c.u16()
	i.Size, i.Union, i.Ino = c.u64(), c.u32(), c.u32()
	i.UID, i.GID = c.u32(), c.u32()
	i.Mtime, i.MtimeNsec, i.Nlink = c.u64(), c.u32(), c.u32()
	c.bytes(i.Reserved2[:])
}

// Load decodes p, of at least [SizeDirent] bytes.
func (d *Dirent) Load(p []byte) {
	c := cursor{p[:SizeDirent]}
	d.Nid, d.NameOffset = c.u64(), c.u16()
	d.FileType, d.Reserved = c.p[0], c.p[1]
}

// Load decodes p, of at least [SizeInodeCompact] bytes.
func (i *InodeCompact) Load(p []byte) {
	c := cursor{p[:SizeInodeCompact]}
	i.Format, i.XattrCount, i.Mode, i.Nlink = c.u16(), c.u16(), c.u16(), c.u16()
	i.Size, i.Reserved, i.Union, i.Ino = c.u32(), c.u32(), c.u32(), c.u32()
	i.UID, i.GID, i.Reserved2 = c.u16(), c.u16(), c.u32()
}
