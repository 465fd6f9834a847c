package disk

// i_format: bit 0 version, bits 1..3 data layout, others 0.
const (
	FormatExtended    = 0x1
	FormatLayoutShift = 1
	FormatLayoutMask  = 0x7
	FormatKnown       = FormatExtended | FormatLayoutMask<<FormatLayoutShift

	LayoutPlain  = 0 // EROFS_INODE_FLAT_PLAIN
	LayoutInline = 2 // EROFS_INODE_FLAT_INLINE
	LayoutChunk  = 4 // EROFS_INODE_CHUNK_BASED
)

// Chunk format of a regular file's i_u.
const (
	ChunkFormatBitsMask = 0x1f // log2(chunk bytes) - blkszbits
	ChunkFormatIndexes  = 0x20 // 8-byte index entries
	ChunkFormatKnown    = ChunkFormatBitsMask | ChunkFormatIndexes
)

// InodeExtended is the 64-byte inode. Source: fs/erofs/erofs_fs.h struct erofs_inode_extended.
type InodeExtended struct {
	Format     uint16 // i_format
	XattrCount uint16 // i_xattr_icount
	Mode       uint16 // i_mode
	Reserved   uint16
	Size       uint64 // i_size
	Union      uint32 // i_u: start block, rdev or chunk format
	Ino        uint32 // i_ino
	UID        uint32 // i_uid
	GID        uint32 // i_gid
	Mtime      uint64 // i_mtime, seconds
	MtimeNsec  uint32 // i_mtime_nsec
	Nlink      uint32 // i_nlink
	Reserved2  [16]byte
}

// SizeInodeExtended is the size of [InodeExtended] in bytes.
const SizeInodeExtended = 64

// InodeCompact is the 32-byte inode; it has no time. Source: fs/erofs/erofs_fs.h struct erofs_inode_compact.
type InodeCompact struct {
	Format     uint16 // i_format
	XattrCount uint16 // i_xattr_icount
	Mode       uint16 // i_mode
	Nlink      uint16 // i_nlink
	Size       uint32 // i_size
	Reserved   uint32
	Union      uint32 // i_u
	Ino        uint32 // i_ino
	UID        uint16 // i_uid
	GID        uint16 // i_gid
	Reserved2  uint32
}

// SizeInodeCompact is the size of [InodeCompact] in bytes.
const SizeInodeCompact = 32

// ChunkIndex is one unit of a regular file. Source: struct erofs_inode_chunk_index; RafsV6InodeChunkAddr in nydus.
type ChunkIndex struct {
	IndexLow uint16 // advise: chunk index bits 0..15
	Device   uint16 // device_id: low byte blob index + 1, high byte chunk index bits 16..23
	Block    uint32 // blkaddr: uncompressed offset / block size
}

// SizeChunkIndex is the size of [ChunkIndex] in bytes.
const SizeChunkIndex = 8

// Parts of [ChunkIndex].
const (
	ChunkDeviceMask     = 0xff // Device: blob index + 1
	ChunkIndexHighShift = 8    // Device: chunk index bits 16..23
	ChunkIndexLowBits   = 16
)

// Dirent is one directory entry, without its name. Source: struct erofs_dirent.
type Dirent struct {
	Nid        uint64
	NameOffset uint16 // nameoff, from the block's beginning
	FileType   uint8  // Type… values
	Reserved   uint8
}

// SizeDirent is the size of [Dirent] in bytes.
const SizeDirent = 12

// File types of [Dirent].
const (
	TypeUnknown = 0
	TypeRegular = 1
	TypeDir     = 2
	TypeChar    = 3
	TypeBlock   = 4
	TypeFifo    = 5
	TypeSocket  = 6
	TypeSymlink = 7
)

// XattrHeader precedes the inline xattrs of an inode. Source: struct erofs_xattr_ibody_header.
type XattrHeader struct {
	NameFilter  uint32
	SharedCount uint8 // 0: RAFS has no shared xattrs
	Reserved    [7]byte
}

// SizeXattrHeader is the size of [XattrHeader] in bytes.
const SizeXattrHeader = 12

// XattrEntry precedes one xattr's name remainder and value. Source: struct erofs_xattr_entry.
type XattrEntry struct {
	NameLen     uint8 // e_name_len, without the prefix
	PrefixIndex uint8 // e_name_index
	ValueSize   uint16
}

// SizeXattrEntry is the size of [XattrEntry] in bytes.
const SizeXattrEntry = 4

// XattrAlign is the alignment of each xattr entry.
const XattrAlign = 4

// Prefix numbers of [XattrEntry].
const (
	XattrUser       = 1 // "user."
	XattrACLAccess  = 2 // "system.posix_acl_access", the whole name
	XattrACLDefault = 3 // "system.posix_acl_default", the whole name
	XattrTrusted    = 4 // "trusted."
	XattrSecurity   = 6 // "security."
)
