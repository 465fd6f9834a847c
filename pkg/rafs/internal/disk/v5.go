package disk

// Fixed places and limits of a v5 bootstrap. Source: nydus rafs/src/metadata/layout/v5.rs.
const (
	V5Magic       = 0x52414653 // bytes "SFAR"
	V5Version     = 0x500
	V5Align       = 8           // of every table and record
	V5MaxSize     = 0x8000_0000 // bytes of a bootstrap, RAFS_MAX_METADATA_SIZE
	V5OffsetShift = 3           // an inode table entry is an offset in units of 8 bytes
	V5OffsetLimit = 1 << 29     // of an inode table entry
	V5RootIno     = 1
	V5BlobHints   = 8 // bytes in front of a blob id: readahead offset and size
	V5InodeEntry  = 4 // bytes of an entry of the inode and of the prefetch table
)

// SuperV5 is the superblock at byte 0 of a v5 bootstrap. Source: RafsV5SuperBlock in nydus.
type SuperV5 struct {
	Magic               uint32 // s_magic
	Version             uint32 // s_fs_version
	Size                uint32 // s_sb_size, SizeSuperV5
	ChunkSize           uint32 // s_block_size
	Flags               uint64 // s_flags, Flag… bits
	InodesCount         uint64 // s_inodes_count, hard links count once
	InodeTableOffset    uint64
	PrefetchTableOffset uint64
	BlobTableOffset     uint64
	InodeTableEntries   uint32 // one per directory entry, the root included
	PrefetchEntries     uint32
	BlobTableSize       uint32 // bytes
	ExtBlobEntries      uint32 // 0: images that are older than the table
	ExtBlobOffset       uint64
	Reserved            [8112]byte
}

// SizeSuperV5 is the size of [SuperV5] in bytes.
const SizeSuperV5 = 8192

// FlagKnownV5 are the superblock flags that a v5 reader takes.
const FlagKnownV5 = FlagCompressNone | FlagCompressLZ4 | FlagCompressGzip | FlagCompressZstd |
	FlagHashBLAKE3 | FlagHashSHA256 | FlagExplicitIDs | FlagHasXattr | FlagPreserved

// ExtBlobV5 is one entry of the extended blob table. Source: RafsV5ExtBlobEntry in nydus.
type ExtBlobV5 struct {
	ChunkCount       uint32
	Features         uint32 // Feature… bits
	UncompressedSize uint64
	CompressedSize   uint64
	Reserved         [40]byte
}

// SizeExtBlobV5 is the size of [ExtBlobV5] in bytes.
const SizeExtBlobV5 = 64

// InodeV5 is an inode record; name, symlink target, xattrs and chunk records follow it, each padded to
// 8 bytes. Source: RafsV5Inode in nydus.
type InodeV5 struct {
	Digest      [32]byte // i_digest
	Parent      uint64   // i_parent, number of the directory; 0 for the root
	Ino         uint64   // i_ino, its own number or that of the first name of the file
	UID         uint32   // i_uid
	GID         uint32   // i_gid
	ProjectID   uint32   // i_projid, 0
	Mode        uint32   // i_mode
	Size        uint64   // i_size
	Blocks      uint64   // i_blocks, of 512 bytes
	Flags       uint64   // i_flags, V5Inode… bits
	Nlink       uint32   // i_nlink
	ChildIndex  uint32   // i_child_index, number of the first child
	ChildCount  uint32   // i_child_count: children, or chunks
	NameSize    uint16   // i_name_size
	SymlinkSize uint16   // i_symlink_size
	Rdev        uint32   // i_rdev, of devices
	MtimeNsec   uint32   // i_mtime_nsec
	Mtime       uint64   // i_mtime, seconds
	Reserved    [8]byte
}

// SizeInodeV5 is the size of [InodeV5] in bytes.
const SizeInodeV5 = 128

// Flags of [InodeV5].
const (
	V5InodeSymlink  = 0x1
	V5InodeHardlink = 0x2
	V5InodeXattr    = 0x4
	V5InodeHole     = 0x8
)

// Sizes around xattrs of a v5 inode: a length of all, and one of each pair of name and value.
const (
	SizeXattrsV5    = 8
	SizeXattrPairV5 = 4
)

// What directories of a v5 image claim to occupy: a block, filled by entries of a name and 8 bytes.
// Source: nydus builder/src/core/v5.rs RAFS_V5_VIRTUAL_ENTRY_SIZE.
const (
	V5DirBlock  = 4096
	V5DirEntry  = 8
	V5BlockSize = 512 // unit of InodeV5.Blocks
)
