package rafs

import (
	"fmt"
	"io"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// Info is what the tables of a bootstrap say, with their places; it marshals to JSON. Offsets are
// bytes from the beginning of the bootstrap.
type Info struct {
	Version  string        `json:"version"` // "v5" or "v6"
	Size     int64         `json:"size"`
	Sections []SectionInfo `json:"sections"` // in order of place
	Blobs    []BlobInfo    `json:"blobs"`

	// Of v6 only.
	Superblock *SuperInfo    `json:"superblock,omitempty"`
	Extended   *ExtendedInfo `json:"extended_superblock,omitempty"`
	Devices    []DeviceInfo  `json:"devices,omitempty"`
	Prefetch   []uint32      `json:"prefetch_nids,omitempty"`

	// Of v5 only.
	SuperblockV5   *SuperInfoV5 `json:"superblock_v5,omitempty"`
	PrefetchInodes []uint32     `json:"prefetch_inodes,omitempty"` // inode numbers
}

// SuperInfo is the EROFS superblock.
type SuperInfo struct {
	Offset          int64  `json:"offset"`
	BlockSize       int    `json:"block_size"`
	RootNid         uint16 `json:"root_nid"`
	Inodes          uint64 `json:"inos"`
	BuildTime       uint64 `json:"build_time"`
	Blocks          uint32 `json:"blocks"`
	MetaBlock       uint32 `json:"meta_blkaddr"`
	FeatureCompat   uint32 `json:"feature_compat"`
	FeatureIncompat uint32 `json:"feature_incompat"`
}

// ExtendedInfo is the RAFS extended superblock.
type ExtendedInfo struct {
	Offset     int64      `json:"offset"`
	Flags      uint64     `json:"flags"`
	FlagNames  []string   `json:"flag_names"`
	Compressor Compressor `json:"compressor"`
	Digester   Digester   `json:"digester"`
	ChunkSize  uint32     `json:"chunk_size"`
}

// SectionInfo is the place of one table.
type SectionInfo struct {
	Name    string `json:"name"`
	Offset  uint64 `json:"offset"`
	Size    uint64 `json:"size"`
	Entries uint64 `json:"entries"`
}

// DeviceInfo is one device slot.
type DeviceInfo struct {
	Offset      int64  `json:"offset"`
	Tag         string `json:"tag"`
	Blocks      uint32 `json:"blocks"`
	MappedBlock uint32 `json:"mapped_blkaddr"`
}

// BlobInfo is one entry of the blob table.
type BlobInfo struct {
	Offset       uint64   `json:"offset"`
	Index        int      `json:"index"`
	FeatureNames []string `json:"feature_names"`
	// The readahead hints of a v5 blob table: bytes at the head of the blob.
	ReadaheadOffset uint32 `json:"readahead_offset,omitempty"`
	ReadaheadSize   uint32 `json:"readahead_size,omitempty"`
	Blob
}

// Inspect reads the tables of a bootstrap without its tree, with the checks and errors of [Open].
func Inspect(r io.ReaderAt, size int64) (*Info, error) {
	b, err := openBootstrap(r, size)
	if err != nil {
		return nil, fmt.Errorf("inspect bootstrap: %w", err)
	}
	return b.info(), nil
}

// info implements bootstrapReader.
func (t *v6Tables) info() *Info {
	s, e := &t.super, &t.ext
	info := &Info{
		Version: "v6",
		Size:    clampOffset(t.src.size),
		Superblock: &SuperInfo{
			Offset: disk.SuperOffset, BlockSize: int(t.block), RootNid: s.RootNid, Inodes: s.Inos, BuildTime: s.BuildTime, //nolint:gosec // 512 or 4096
			Blocks: s.Blocks, MetaBlock: s.MetaBlock, FeatureCompat: s.FeatureCompat, FeatureIncompat: s.FeatureIncompat,
		},
		Extended: &ExtendedInfo{
			Offset: disk.ExtSuperOffset, Flags: e.Flags, FlagNames: names(e.Flags, superFlagNames),
			Compressor: t.compressor(), Digester: t.digester(), ChunkSize: e.ChunkSize,
		},
		Sections: t.sections(),
		Devices:  []DeviceInfo{},
		Blobs:    []BlobInfo{},
		Prefetch: append([]uint32{}, t.prefetch...),
	}
	for i := range t.blobs {
		slot := &t.slots[i]
		info.Devices = append(info.Devices, DeviceInfo{
			Offset: disk.DeviceSlotOffset + int64(i)*disk.SizeDeviceSlot,
			Tag:    cString(slot.Tag[:]), Blocks: slot.Blocks, MappedBlock: slot.MappedBlock,
		})
		info.Blobs = append(info.Blobs, BlobInfo{
			Offset: e.BlobTableOffset + uint64(i)*disk.SizeBlobEntry, Index: i,
			FeatureNames: names(uint64(t.blobs[i].Features), featureNames), Blob: t.blobs[i],
		})
	}
	return info
}

func (t *v6Tables) sections() []SectionInfo {
	s, e := &t.super, &t.ext
	sections := []SectionInfo{
		{"superblock", disk.SuperOffset, disk.SizeSuper, 1},
		{"extended superblock", disk.ExtSuperOffset, disk.SizeExtSuper, 1},
		{"device slots", disk.DeviceSlotOffset, uint64(len(t.slots)) * disk.SizeDeviceSlot, uint64(len(t.slots))},
		{"blob table", e.BlobTableOffset, uint64(e.BlobTableSize), uint64(len(t.blobs))},
	}
	if e.PrefetchTableOffset != 0 {
		sections = append(sections, SectionInfo{"prefetch table", e.PrefetchTableOffset, uint64(e.PrefetchTableSize), uint64(len(t.prefetch))})
	}
	meta := uint64(s.MetaBlock) * t.block
	end := e.ChunkTableOffset
	if end < meta {
		end = t.src.size
	}
	return append(sections,
		SectionInfo{"metadata", meta, end - meta, s.Inos},
		SectionInfo{"chunk table", e.ChunkTableOffset, e.ChunkTableSize, e.ChunkTableSize / disk.SizeChunkRecord})
}

// bitName names one flag.
type bitName struct {
	bit  uint64
	name string
}

// superFlagNames are the names upstream gives the superblock flags.
var superFlagNames = []bitName{
	{disk.FlagCompressNone, "COMPRESSION_NONE"},
	{disk.FlagCompressLZ4, "COMPRESSION_LZ4"},
	{disk.FlagHashBLAKE3, "HASH_BLAKE3"},
	{disk.FlagHashSHA256, "HASH_SHA256"},
	{disk.FlagExplicitIDs, "EXPLICIT_UID_GID"},
	{disk.FlagHasXattr, "HAS_XATTR"},
	{disk.FlagCompressGzip, "COMPRESSION_GZIP"},
	{disk.FlagCompressZstd, "COMPRESSION_ZSTD"},
	{disk.FlagInlinedDigest, "INLINED_CHUNK_DIGEST"},
	{disk.FlagTarfs, "TARTFS_MODE"},
	{disk.FlagEncryptNone, "ENCRYPTION_NONE"},
	{disk.FlagEncryptAES, "ENCRYPTION_AES_128_XTS"},
}

// featureNames are the names upstream gives the blob features.
var featureNames = []bitName{
	{disk.FeatureAligned, "ALIGNED"},
	{disk.FeatureInlinedMeta, "INLINED_FS_META"},
	{disk.FeatureV2, "CHUNK_INFO_V2"},
	{disk.FeatureZran, "ZRAN"},
	{disk.FeatureSeparate, "SEPARATE"},
	{disk.FeatureInlinedDigest, "INLINED_CHUNK_DIGEST"},
	{disk.FeatureTarfs, "TARFS"},
	{disk.FeatureBatch, "BATCH"},
	{disk.FeatureEncrypted, "ENCRYPTED"},
	{disk.FeatureChunkDict, "IS_CHUNKDICT_GENERATED"},
	{disk.FeaturePrefetch, "IS_SEPARATED_WITH_PREFETCH_FILES"},
	{disk.FeatureExternal, "EXTERNAL"},
	{disk.FeatureTarHeader, "HAS_TAR_HEADER"},
	{disk.FeatureTOC, "HAS_TOC"},
	{disk.FeatureCapTOC, "CAP_TAR_TOC"},
}

// names lists the names of the bits set in v; bits without a name as one number.
func names(v uint64, bits []bitName) []string {
	list := []string{}
	for _, b := range bits {
		if v&b.bit != 0 {
			list = append(list, b.name)
			v &^= b.bit
		}
	}
	if v != 0 {
		list = append(list, fmt.Sprintf("%#x", v))
	}
	return list
}
