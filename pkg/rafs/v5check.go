package rafs

import (
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// checkTables implements bootstrapReader: what no reader refuses, but no writer should write.
func (t *v5Tables) checkTables(faults *faultList) error {
	inodes, _, _, ext := t.v5Ranges()
	rules := []rule{
		{zero(t.super.Reserved[:]), "reserved bytes", "not zero", "zero"},
		{inodes[0] == disk.SizeSuperV5, "inode_table_offset", inodes[0], disk.SizeSuperV5},
		{len(t.blobs) == 0 || len(t.ext) == len(t.blobs), "extended_blob_table_entries", t.super.ExtBlobEntries, fmt.Sprintf("%d, one per blob", len(t.blobs))},
	}
	for _, r := range rules {
		if err := faults.add(firstBroken("superblock", 0, []rule{r})); err != nil {
			return err
		}
	}
	for i := range t.ext {
		e := &t.ext[i]
		section := fmt.Sprintf("extended blob table entry %d", i)
		for _, r := range []rule{
			{zero(e.Reserved[:]), "reserved bytes", "not zero", "zero"},
			{e.ChunkCount > 0, "chunk_count", e.ChunkCount, "not 0"},
			{e.CompressedSize > 0 && e.UncompressedSize > 0, "sizes", [2]uint64{e.CompressedSize, e.UncompressedSize}, "not 0"},
		} {
			at := ext[0] + uint64(i)*disk.SizeExtBlobV5
			if err := faults.add(firstBroken(section, clampOffset(at), []rule{r})); err != nil {
				return err
			}
		}
	}
	return nil
}
