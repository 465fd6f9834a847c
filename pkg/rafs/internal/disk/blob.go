package disk

// Blob.meta values.
const (
	MetaMagic        = 0xb10bb10b
	MaxBlobStored    = 1 << 40 // bytes of a blob file: compressed offsets have 40 bits
	MaxBlobExpanded  = 1 << 44 // bytes of a cache file: V1 uncompressed offsets have 44 bits
	TarHeaderSize    = 512
	SizeDigestRecord = 32 // one chunk digest of the blob.digest section
)

// MetaHeader is the 4096-byte header behind the blob.meta table. Source: BlobCompressionContextHeader in nydus.
type MetaHeader struct {
	Magic            uint32
	Features         uint32 // Feature… bits
	Compressor       uint32 // ci_compressor
	Entries          uint32 // ci_entries, chunk count
	Offset           uint64 // ci_offset
	CompressedSize   uint64
	UncompressedSize uint64
	ContextOffset    uint64 // ci_zran_offset: of batch or zran contexts inside the table
	ContextSize      uint64 // ci_zran_size
	ContextCount     uint32 // ci_zran_count
	Reserved         [4032]byte
	Magic2           uint32
}

// SizeMetaHeader is the size of [MetaHeader] in bytes.
const SizeMetaHeader = 4096

// MetaV1 is a 16-byte chunk record of blob.meta. Source: BlobChunkInfoV1Ondisk in nydus.
type MetaV1 struct {
	Uncompressed uint64
	Compressed   uint64
}

// SizeMetaV1 is the size of [MetaV1] in bytes.
const SizeMetaV1 = 16

// Parts of [MetaV1]: sizes are stored minus one in two pieces.
const (
	V1SizeLowBits        = 20
	V1SizeLowShift       = 44              // bits 44..63: size-1 bits 0..19
	V1UncompHighShift    = 8               // bits 8..11: size-1 bits 20..23
	V1UncompOffsetMask   = 0xfff_ffff_f000 // bits 12..43, the offset in place
	V1CompHighShift      = 40              // bits 40..43
	V1CompOffsetMask     = 0xff_ffff_ffff  // bits 0..39
	V1SizeHighMask       = 0xf
	V1SizeLowMask        = 0xf_ffff
	V1UncompReservedMask = 0xff // bits 0..7 are 0
)

// MetaV2 is a 24-byte chunk record of blob.meta. Source: BlobChunkInfoV2Ondisk in nydus.
type MetaV2 struct {
	Uncompressed uint64
	Compressed   uint64
	Data         uint64
}

// SizeMetaV2 is the size of [MetaV2] in bytes.
const SizeMetaV2 = 24

// Parts of [MetaV2].
const (
	V2FlagShift       = 56 // of Uncompressed
	V2UncompSizeShift = 32 // bits 32..55: size-1
	V2UncompSizeMask  = 0xff_ffff
	V2UncompBlockMask = 0xffff_ffff // bits 0..31: offset >> 12
	V2CompSizeShift   = 40          // bits 40..63: size, not minus one
	V2CompSizeMask    = 0xff_ffff   // the largest such size
	V2CompOffsetMask  = 0xff_ffff_ffff
	V2DataIndexShift  = 32 // of Data: batch or zran context
	V2DataOffsetMask  = 0xffff_ffff
	V2FlagCompressed  = 0x1
	V2FlagZran        = 0x2
	V2FlagBatch       = 0x4
	V2FlagEncrypted   = 0x8
	V2FlagCRC32       = 0x10
)

// BatchContext describes one batch. Source: BatchInflateContext in nydus.
type BatchContext struct {
	CompressedSize   uint32
	UncompressedSize uint32
	Reserved         [32]byte
}

// SizeBatchContext is the size of [BatchContext] in bytes.
const SizeBatchContext = 40

// ZranContext says where decompression of a gzip stream can begin. Source: ZranInflateContext in nydus.
type ZranContext struct {
	InOffset   uint64 // in the compressed file
	OutOffset  uint64 // in the decompressed stream
	DictOffset uint64 // among the dictionaries behind the contexts
	InSize     uint32 // in_len
	OutSize    uint32 // out_len
	DictSize   uint32 // at most 32768
	Byte       uint8  // ctx_byte: the byte before InOffset, when Bits is not 0
	Bits       uint8  // ctx_bits: how many of its highest bits are still to come
	Reserved   [2]byte
}

// SizeZranContext is the size of [ZranContext] in bytes.
const SizeZranContext = 40

// Section names of a blob.
const (
	SectionData       = "image.blob"
	SectionMeta       = "blob.meta"
	SectionMetaHeader = "blob.meta.header"
	SectionDigest     = "blob.digest"
	SectionBootstrap  = "image.boot"
	SectionTOC        = "rafs.blob.toc"
)

// TOCEntry is one entry of a blob's table of contents. Source: TocEntry in nydus.
type TOCEntry struct {
	Flags            uint32 // TOC… compressor bits
	Reserved         uint32
	Name             [16]byte
	Digest           [32]byte // sha256 of the uncompressed content
	Offset           uint64
	CompressedSize   uint64
	UncompressedSize uint64
	Reserved2        [48]byte // junk in files of nydus-image 2.2
}

// SizeTOCEntry is the size of [TOCEntry] in bytes.
const SizeTOCEntry = 128

// Flags of [TOCEntry].
const (
	TOCNone = 0x1
	TOCZstd = 0x2
	TOCLZ4  = 0x4
)

// TarHeader is the tar header behind each section. Source: POSIX ustar with GNU magic.
type TarHeader struct {
	Name     [100]byte
	Mode     [8]byte
	UID      [8]byte
	GID      [8]byte
	Size     [12]byte // 11 octal digits, NUL
	Mtime    [12]byte
	Checksum [8]byte // 6 octal digits and NUL
	Type     byte    // '0'
	LinkName [100]byte
	Magic    [8]byte // "ustar  \0"
	Rest     [247]byte
}
