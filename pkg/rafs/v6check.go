package rafs

import (
	"bytes"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// checkTables implements bootstrapReader: what no reader refuses, but no writer should
// write, and what the kernel would refuse.
func (t *v6Tables) checkTables(faults *faultList) error {
	var blocks uint64
	rules := []struct {
		section string
		offset  uint64
		rule    rule
	}{
		{"superblock", disk.SuperOffset, rule{zero(t.super.Reserved[:]), "reserved bytes", "not zero", "zero"}},
		{"superblock", disk.SuperOffset, rule{t.super.FeatureCompat&disk.CompatChecksum == 0, "feature_compat", fmt.Sprintf("%#x", t.super.FeatureCompat), "no checksum bit: there is none"}},
		{"extended superblock", disk.ExtSuperOffset, rule{zero(t.ext.Reserved[:]) && t.ext.Padding == 0, "reserved bytes", "not zero", "zero"}},
	}
	add := func(section string, offset uint64, r rule) {
		rules = append(rules, struct {
			section string
			offset  uint64
			rule    rule
		}{section, offset, r})
	}
	for i := range t.blobs {
		slot, entry, b := &t.slots[i], &t.entries[i], &t.blobs[i]
		blocks += uint64(slot.Blocks)
		section, at := fmt.Sprintf("device slot %d", i), uint64(disk.DeviceSlotOffset+i*disk.SizeDeviceSlot)
		add(section, at, rule{slot.Tag == entry.ID, "tag", cString(slot.Tag[:]), b.ID})
		add(section, at, rule{uint64(slot.Blocks) == b.UncompressedSize/t.block, "blocks", slot.Blocks, b.UncompressedSize / t.block})
		add(section, at, rule{zero(slot.Reserved[:]), "reserved bytes", "not zero", "zero"})
		section, at = fmt.Sprintf("blob table entry %d", i), t.ext.BlobTableOffset+uint64(i)*disk.SizeBlobEntry
		add(section, at, rule{zero(entry.Reserved[:]), "reserved bytes", "not zero", "zero"})
		add(section, at, rule{b.ChunkCount > 0, "chunk_count", b.ChunkCount, "not 0"})
		add(section, at, rule{b.Digester == t.digester(), "digest_algo", b.Digester, t.digester()})
	}
	add("superblock", disk.SuperOffset, rule{uint64(t.super.Blocks) == blocks || len(t.blobs) == 0, "blocks", t.super.Blocks, blocks})
	for _, r := range rules {
		if err := faults.add(firstBroken(r.section, clampOffset(r.offset), []rule{r.rule})); err != nil {
			return err
		}
	}
	return nil
}

func zero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }
