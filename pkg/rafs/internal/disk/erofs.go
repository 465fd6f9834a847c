// Package disk declares the on-disk records of RAFS v5 and v6 images and Nydus data blobs: constants,
// sizes and structs, no logic. Every integer is little-endian. One declaration serves
// reading (binary.Decode) and writing (binary.Append).
package disk

// Fixed places of a v6 bootstrap, in bytes.
const (
	SuperOffset      = 1024                              // EROFS superblock
	ExtSuperOffset   = SuperOffset + SizeSuper           // 1152, RAFS extended superblock
	DeviceSlotOffset = ExtSuperOffset + SizeExtSuper     // 1408, first device slot
	DeviceSlotNumber = DeviceSlotOffset / SizeDeviceSlot // 11, devt_slotoff
	BlockSize        = 4096                              // alignment of every table
	BlockBits        = 12
	TarfsBlockBits   = 9 // blkszbits of tarfs images
	NidSize          = 32
	NidBits          = 5
	RootNid          = BlockSize / NidSize // 128: the first block of the metadata area stays empty
	MappedAlign      = 0x80000             // alignment of DeviceSlot.MappedBlock, in bytes
)

// Superblock values.
const (
	SuperMagic        = 0xE0F5E1E2
	CompatRafsV6      = 0x4000_0000 // private feature_compat bit
	CompatChecksum    = 0x1         // EROFS_FEATURE_COMPAT_SB_CHKSUM
	IncompatChunked   = 0x4         // EROFS_FEATURE_INCOMPAT_CHUNKED_FILE
	IncompatDevTable  = 0x8         // EROFS_FEATURE_INCOMPAT_DEVICE_TABLE
	IncompatRequired  = IncompatChunked | IncompatDevTable
	FlagCompressNone  = 0x1
	FlagCompressLZ4   = 0x2
	FlagHashBLAKE3    = 0x4
	FlagHashSHA256    = 0x8
	FlagExplicitIDs   = 0x10
	FlagHasXattr      = 0x20
	FlagCompressGzip  = 0x40
	FlagCompressZstd  = 0x80
	FlagInlinedDigest = 0x100 // every blob has a blob.digest section
	FlagTarfs         = 0x200 // data blobs are raw tar files, block size 512
	FlagEncryptNone   = 0x0100_0000
	FlagEncryptAES    = 0x0200_0000
	FlagPreserved     = 0xfc00_0000 // PRESERVED_COMPAT_0..5: accepted, ignored
	FlagKnown         = 0x3ff | FlagEncryptNone | FlagEncryptAES | FlagPreserved
)

// Super is the EROFS superblock at byte 1024 of a v6 bootstrap.
// Source: fs/erofs/erofs_fs.h struct erofs_super_block; RafsV6SuperBlock in nydus.
type Super struct {
	Magic           uint32    // magic, SuperMagic
	Checksum        uint32    // checksum, 0 in RAFS
	FeatureCompat   uint32    // feature_compat
	BlockBits       uint8     // blkszbits, 12 or 9
	ExtSlots        uint8     // sb_extslots, 0
	RootNid         uint16    // root_nid
	Inos            uint64    // inos, inode numbers handed out, not 0
	BuildTime       uint64    // build_time
	BuildTimeNsec   uint32    // build_time_nsec
	Blocks          uint32    // blocks, sum of the device slots'
	MetaBlock       uint32    // meta_blkaddr
	XattrBlock      uint32    // xattr_blkaddr, 0
	UUID            [16]byte  // uuid
	VolumeName      [16]byte  // volume_name
	FeatureIncompat uint32    // feature_incompat, IncompatRequired
	Union           uint16    // union of compression fields, 0
	ExtraDevices    uint16    // extra_devices
	DeviceSlotOff   uint16    // devt_slotoff in units of 128 bytes
	Reserved        [38]uint8 // dirblkbits and later fields, 0
}

// SizeSuper is the size of [Super] in bytes.
const SizeSuper = 128

// ExtSuper is the RAFS extended superblock at byte 1152. Source: RafsV6SuperBlockExt in nydus.
type ExtSuper struct {
	Flags               uint64 // Flag… bits
	BlobTableOffset     uint64
	BlobTableSize       uint32 // bytes, 256 per blob
	ChunkSize           uint32
	ChunkTableOffset    uint64
	ChunkTableSize      uint64 // bytes, 80 per record
	PrefetchTableOffset uint64 // 0: absent
	PrefetchTableSize   uint32 // bytes, 4 per nid
	Padding             uint32
	Reserved            [200]uint8
}

// SizeExtSuper is the size of [ExtSuper] in bytes.
const SizeExtSuper = 256

// DeviceSlot is one entry of the EROFS device table at byte 1408.
// Source: fs/erofs/erofs_fs.h struct erofs_deviceslot.
type DeviceSlot struct {
	Tag         [64]byte // blob id
	Blocks      uint32   // blocks of the cache file
	MappedBlock uint32   // uniaddr: start in the flat address space
	Reserved    [56]byte
}

// SizeDeviceSlot is the size of [DeviceSlot] in bytes.
const SizeDeviceSlot = 128

// DeviceMappedOffset is where [DeviceSlot] has MappedBlock: behind Tag and Blocks.
const DeviceMappedOffset = 64 + 4

// BlobEntry is one entry of the blob table. Source: RafsV6Blob in nydus.
type BlobEntry struct {
	ID               [64]byte // blob_id
	Index            uint32   // blob_index, its own position
	ChunkSize        uint32
	ChunkCount       uint32
	Compressor       uint32 // compression_algo
	Digester         uint32 // digest_algo
	Features         uint32 // Feature… bits
	CompressedSize   uint64 // bytes of the blob file
	UncompressedSize uint64 // bytes of the cache file
	TOCSize          uint32 // blob_toc_size
	MetaCompressor   uint32 // ci_compressor
	MetaOffset       uint64 // ci_offset
	MetaCompressed   uint64 // ci_compressed_size
	MetaUncompressed uint64 // ci_uncompressed_size
	TOCDigest        [32]byte
	MetaBlobDigest   [32]byte // blob_meta_digest
	MetaBlobSize     uint64   // blob_meta_size
	CipherIV         uint64
	CipherAlgorithm  uint32
	Reserved         [36]byte
}

// SizeBlobEntry is the size of [BlobEntry] in bytes.
const SizeBlobEntry = 256

// Blob feature bits.
const (
	FeatureAligned       = 0x0000_0001 // uncompressed chunk offsets are multiples of 4096
	FeatureInlinedMeta   = 0x0000_0002 // the blob also holds a bootstrap
	FeatureV2            = 0x0000_0004 // blob.meta has 24-byte records
	FeatureZran          = 0x0000_0008
	FeatureSeparate      = 0x0000_0010 // chunk data and blob.meta are in two blobs
	FeatureInlinedDigest = 0x0000_0020 // the blob has a blob.digest section
	FeatureTarfs         = 0x0000_0040
	FeatureBatch         = 0x0000_0080
	FeatureEncrypted     = 0x0000_0100
	FeatureChunkDict     = 0x0000_0200 // IS_CHUNKDICT_GENERATED
	FeaturePrefetch      = 0x0000_0400 // IS_SEPARATED_WITH_PREFETCH_FILES
	FeatureExternal      = 0x0000_0800
	FeatureTarHeader     = 0x1000_0000 // sections are followed by tar headers
	FeatureTOC           = 0x2000_0000 // the blob ends in a table of contents
	FeatureCapTOC        = 0x4000_0000 // made by a builder that knows the two above
	FeatureRefused       = 0x8000_f000 // bits that no reader may accept
)

// ChunkRecord is one record of the chunk table. Source: RafsV5ChunkInfo in nydus.
type ChunkRecord struct {
	Digest             [32]byte // block_id
	Blob               uint32   // blob_index
	Flags              uint32   // Chunk… bits
	CompressedSize     uint32
	UncompressedSize   uint32
	CompressedOffset   uint64
	UncompressedOffset uint64
	FileOffset         uint64
	Index              uint32 // inside its blob
	CRC32              uint32
}

// SizeChunkRecord is the size of [ChunkRecord] in bytes.
const SizeChunkRecord = 80

// Flags of [ChunkRecord].
const (
	ChunkCompressed = 0x1
	ChunkHole       = 0x2
	ChunkEncrypted  = 0x4
	ChunkBatch      = 0x8
	ChunkCRC32      = 0x10
)
