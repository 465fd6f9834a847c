package rafs

// Version is a version of the bootstrap format.
type Version uint8

// The versions. Wherever a version is an option, 0 means V6.
const (
	V5 Version = 5 // a format of its own; chunk records in the inodes, blobs of nothing but chunks
	V6 Version = 6 // an EROFS image that the kernel can mount
)

// Compressor is the algorithm that chunks of a blob are stored with.
type Compressor uint32

// The compressors; the codes are those of the v6 blob table.
const (
	CompressorNone Compressor = 0
	CompressorLZ4  Compressor = 1 // raw LZ4 block
	CompressorGzip Compressor = 2 // one gzip member per chunk
	CompressorZstd Compressor = 3 // one zstd frame per chunk
)

// Digester is the algorithm of chunk digests.
type Digester uint32

// The digesters; the codes are those of the v6 blob table.
const (
	DigesterBLAKE3 Digester = 0
	DigesterSHA256 Digester = 1
)

// Sizes that every reader of the format enforces.
const (
	MinChunkSize     = 0x1000    // 4 KiB
	DefaultChunkSize = 0x100000  // 1 MiB
	MaxChunkSize     = 0x1000000 // 16 MiB
	MaxBlobs         = 254       // the chunk index entry has one byte for blob index + 1
	MaxChunks        = 0xffffff  // chunks of one blob
)

// Digest is a 32-byte digest of uncompressed chunk bytes.
type Digest [32]byte

// Chunk is the record of one chunk: where its bytes are and what they must hash to.
// Offsets are those of its blob: compressed in the blob file, uncompressed in the
// blob's cache file (the address space of v6 block addresses; v5 readers use it too).
type Chunk struct {
	Digest             Digest
	Blob               uint16 // index into Image.Blobs
	Compressed         bool   // stored compressed; false: stored as it is
	Batch              bool   // part of a batch, see blob.meta
	Index              uint32 // sequence number inside its blob, from 0
	CompressedOffset   uint64
	UncompressedOffset uint64
	CompressedSize     uint32
	UncompressedSize   uint32
}

// Xattr is one extended attribute with its full name ("user.x").
type Xattr struct {
	Name  string
	Value []byte
}

// Inode is one file of an image. Directory entries that point to the same Inode are
// hard links of each other; a directory has one entry. The order of the fields keeps
// an Inode at 128 bytes: an image has one in memory per file.
type Inode struct {
	Mode      uint32 // st_mode: type and permission bits, Linux values (unix.S_IFMT)
	UID, GID  uint32
	MtimeNsec uint32 // below 1e9
	Mtime     int64  // seconds since 1970, may be negative
	Size      uint64 // regular: bytes; symlink: length of Target; others: 0
	Rdev      uint32 // kernel dev_t encoding: minor&0xff | major<<8 | (minor&^0xff)<<12
	Target    string // symlink target, 1..4096 bytes
	Xattrs    []Xattr
	Chunks    []Chunk  // regular files, in file order, every unit of the chunk size (no holes)
	Children  []Dirent // directories: sorted by name bytes, without "." and ".."
}

// Dirent is one name in a directory.
type Dirent struct {
	Name  string
	Inode *Inode
}

// Blob describes one data blob as the bootstrap's blob table does. A v5 blob has no blob.meta: its
// chunk records are in the bootstrap alone, and the TOC and Meta fields are 0.
type Blob struct {
	ID               string     `json:"id"` // 64 hex digits: sha256 of the blob file
	ChunkSize        uint32     `json:"chunk_size"`
	ChunkCount       uint32     `json:"chunk_count"`
	Compressor       Compressor `json:"compressor"`
	Digester         Digester   `json:"digester"`
	Features         uint32     `json:"features"`          // blob feature flags
	CompressedSize   uint64     `json:"compressed_size"`   // bytes of the blob file
	UncompressedSize uint64     `json:"uncompressed_size"` // bytes of the cache file; v6: a multiple of 4096
	TOCSize          uint32     `json:"toc_size"`
	TOCDigest        Digest     `json:"toc_digest"`
	MetaCompressor   Compressor `json:"ci_compressor"`
	MetaOffset       uint64     `json:"ci_offset"`
	MetaCompressed   uint64     `json:"ci_compressed_size"`
	MetaUncompressed uint64     `json:"ci_uncompressed_size"`
	MetaBlobDigest   Digest     `json:"meta_blob_digest"` // SEPARATE blobs
	MetaBlobSize     uint64     `json:"meta_blob_size"`
}

// Image is everything a bootstrap says: the tree, the blobs and how they were made.
// The builder fills one and writes it; [Open] gives one back.
type Image struct {
	// Version is V5 or V6; 0 means V6.
	Version    Version
	Root       *Inode
	Blobs      []Blob
	ChunkSize  uint32
	Compressor Compressor
	Digester   Digester
	// Prefetch lists the inodes of the prefetch table, in order.
	Prefetch []*Inode
}
