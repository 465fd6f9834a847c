package rafs

import "github.com/headstart-oci/headstart/pkg/rafs/internal/disk"

// SuperInfoV5 is the superblock of a v5 bootstrap.
type SuperInfoV5 struct {
	Offset            int64      `json:"offset"`
	Flags             uint64     `json:"flags"`
	FlagNames         []string   `json:"flag_names"`
	Compressor        Compressor `json:"compressor"`
	Digester          Digester   `json:"digester"`
	ChunkSize         uint32     `json:"chunk_size"`
	Inodes            uint64     `json:"inodes_count"`
	InodeTableEntries uint32     `json:"inode_table_entries"`
}

// info implements bootstrapReader.
func (t *v5Tables) info() *Info {
	s := &t.super
	inodes, prefetch, blobs, ext := t.v5Ranges()
	end := uint64(disk.SizeSuperV5)
	for _, r := range [][2]uint64{inodes, prefetch, blobs, ext} {
		if r[1] > 0 {
			end = max(end, alignUp(r[0]+r[1], disk.V5Align))
		}
	}
	end = min(end, t.src.size)
	info := &Info{
		Version: "v5",
		Size:    clampOffset(t.src.size),
		SuperblockV5: &SuperInfoV5{
			Flags: s.Flags, FlagNames: names(s.Flags, superFlagNames), Compressor: t.compressor(), Digester: t.digester(),
			ChunkSize: s.ChunkSize, Inodes: s.InodesCount, InodeTableEntries: s.InodeTableEntries,
		},
		Sections: []SectionInfo{
			{"superblock", 0, disk.SizeSuperV5, 1},
			{"inode table", inodes[0], inodes[1], uint64(s.InodeTableEntries)},
			{"prefetch table", prefetch[0], prefetch[1], uint64(len(t.prefetch))},
			{"blob table", blobs[0], blobs[1], uint64(len(t.blobs))},
			{"extended blob table", ext[0], ext[1], uint64(s.ExtBlobEntries)},
			{"inodes", end, t.src.size - end, uint64(s.InodeTableEntries)},
		},
		Devices:        []DeviceInfo{},
		Blobs:          []BlobInfo{},
		PrefetchInodes: append([]uint32{}, t.prefetch...),
	}
	for i := range t.blobs {
		h := &t.hints[i]
		info.Blobs = append(info.Blobs, BlobInfo{
			Offset: h.offset, Index: i, FeatureNames: names(uint64(t.blobs[i].Features), featureNames),
			ReadaheadOffset: h.readaheadOffset, ReadaheadSize: h.readaheadBytes, Blob: t.blobs[i],
		})
	}
	return info
}
