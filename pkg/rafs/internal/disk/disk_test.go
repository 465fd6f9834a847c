package disk_test

import (
	"encoding/binary"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

func TestSizes(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		v    any
		size int
	}{
		"Super":         {disk.Super{}, disk.SizeSuper},
		"ExtSuper":      {disk.ExtSuper{}, disk.SizeExtSuper},
		"DeviceSlot":    {disk.DeviceSlot{}, disk.SizeDeviceSlot},
		"BlobEntry":     {disk.BlobEntry{}, disk.SizeBlobEntry},
		"ChunkRecord":   {disk.ChunkRecord{}, disk.SizeChunkRecord},
		"InodeExtended": {disk.InodeExtended{}, disk.SizeInodeExtended},
		"InodeCompact":  {disk.InodeCompact{}, disk.SizeInodeCompact},
		"ChunkIndex":    {disk.ChunkIndex{}, disk.SizeChunkIndex},
		"Dirent":        {disk.Dirent{}, disk.SizeDirent},
		"XattrHeader":   {disk.XattrHeader{}, disk.SizeXattrHeader},
		"XattrEntry":    {disk.XattrEntry{}, disk.SizeXattrEntry},
		"MetaHeader":    {disk.MetaHeader{}, disk.SizeMetaHeader},
		"MetaV1":        {disk.MetaV1{}, disk.SizeMetaV1},
		"MetaV2":        {disk.MetaV2{}, disk.SizeMetaV2},
		"BatchContext":  {disk.BatchContext{}, disk.SizeBatchContext},
		"ZranContext":   {disk.ZranContext{}, disk.SizeZranContext},
		"TOCEntry":      {disk.TOCEntry{}, disk.SizeTOCEntry},
		"SuperV5":       {disk.SuperV5{}, disk.SizeSuperV5},
		"ExtBlobV5":     {disk.ExtBlobV5{}, disk.SizeExtBlobV5},
		"InodeV5":       {disk.InodeV5{}, disk.SizeInodeV5},
		"TarHeader":     {disk.TarHeader{}, disk.TarHeaderSize},
	} {
		if got := binary.Size(c.v); got != c.size {
			t.Errorf("binary.Size(%s) = %d, want %d", name, got, c.size)
		}
	}
}

func TestDeviceMappedOffset(t *testing.T) {
	t.Parallel()
	b, err := binary.Append(nil, binary.LittleEndian, disk.DeviceSlot{MappedBlock: 0x01020304})
	if err != nil {
		t.Fatal(err)
	}
	if got := binary.LittleEndian.Uint32(b[disk.DeviceMappedOffset:]); got != 0x01020304 {
		t.Errorf("at DeviceMappedOffset is %#x, want the probe 0x01020304", got)
	}
}

// TestLoad: the records that are decoded by hand are what package binary makes of them.
func TestLoad(t *testing.T) {
	t.Parallel()
	r := rand.NewChaCha8([32]byte{1})
	for range 100 {
		p := make([]byte, disk.SizeInodeV5)
		if _, err := r.Read(p); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ got, want interface{ Load([]byte) } }{
			{new(disk.ChunkRecord), new(disk.ChunkRecord)},
			{new(disk.InodeV5), new(disk.InodeV5)},
			{new(disk.InodeExtended), new(disk.InodeExtended)},
			{new(disk.InodeCompact), new(disk.InodeCompact)},
			{new(disk.Dirent), new(disk.Dirent)},
		} {
			c.got.Load(p)
			if _, err := binary.Decode(p, binary.LittleEndian, c.want); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(c.got, c.want) {
				t.Fatalf("%x:\n got %+v\nwant %+v", p, c.got, c.want)
			}
		}
	}
}
