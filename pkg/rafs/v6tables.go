package rafs

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v6Tables is a v6 bootstrap with its tables read and checked, without its tree.
type v6Tables struct {
	src      *pagedReader
	super    disk.Super
	ext      disk.ExtSuper
	slots    []disk.DeviceSlot
	entries  []disk.BlobEntry
	blobs    []Blob
	prefetch []uint32 // up to the first 0
	block    uint64   // block size
}

// openV6 reads and checks the tables, in the order and by the rules of the readers of the format.
func openV6(src *pagedReader) (*v6Tables, error) {
	t := &v6Tables{src: src}
	for _, step := range []func() error{t.readSuper, t.readExtSuper, t.readSlots, t.readBlobs, t.readPrefetch} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// rule is one condition on a field; got and want are for the error.
type rule struct {
	ok    bool
	field string
	got   any
	want  any
}

// firstBroken returns the error of the first rule that does not hold.
func firstBroken(section string, offset int64, rules []rule) error {
	for _, r := range rules {
		if !r.ok {
			return invalid(section, offset, r.field, r.got, r.want)
		}
	}
	return nil
}

func (t *v6Tables) readSuper() error {
	const section = "superblock"
	s := &t.super
	if err := t.src.record(s, disk.SuperOffset, section); err != nil {
		return err
	}
	t.block = 1 << (s.BlockBits & 0xf)
	return firstBroken(section, disk.SuperOffset, []rule{
		{s.Magic == disk.SuperMagic, "magic", fmt.Sprintf("%#x", s.Magic), fmt.Sprintf("%#x", uint32(disk.SuperMagic))},
		{s.Checksum == 0, "checksum", s.Checksum, 0},
		{s.BlockBits == disk.BlockBits || s.BlockBits == disk.TarfsBlockBits, "blkszbits", s.BlockBits, "12 or 9"},
		{t.src.size%t.block == 0, "file size", t.src.size, fmt.Sprintf("a multiple of %d", t.block)},
		{(t.src.size-disk.BlockSize)%8 == 0, "file size", t.src.size, "a multiple of 8"},
		{uint64(s.MetaBlock)*t.block <= t.src.size, "meta_blkaddr", s.MetaBlock, fmt.Sprintf("at most %d", t.src.size/t.block)},
		{s.ExtSlots == 0, "sb_extslots", s.ExtSlots, 0},
		{s.Inos != 0, "inos", s.Inos, "not 0"},
		{s.Union == 0, "compression", s.Union, 0},
		{s.XattrBlock == 0, "xattr_blkaddr", s.XattrBlock, 0},
		{s.ExtraDevices > 0 || s.Blocks == 0 || s.Blocks == disk.BlockSize, "blocks without devices", s.Blocks, 0},
		{s.DeviceSlotOff == disk.DeviceSlotNumber, "devt_slotoff", s.DeviceSlotOff, disk.DeviceSlotNumber},
		{s.FeatureIncompat == disk.IncompatRequired, "feature_incompat", fmt.Sprintf("%#x", s.FeatureIncompat), fmt.Sprintf("%#x", disk.IncompatRequired)},
		{s.FeatureCompat&disk.CompatRafsV6 != 0, "feature_compat", fmt.Sprintf("%#x", s.FeatureCompat), fmt.Sprintf("bit %#x", disk.CompatRafsV6)},
	})
}

func (t *v6Tables) readExtSuper() error {
	const section = "extended superblock"
	e := &t.ext
	if err := t.src.record(e, disk.ExtSuperOffset, section); err != nil {
		return err
	}
	const compressors = disk.FlagCompressNone | disk.FlagCompressLZ4 | disk.FlagCompressGzip | disk.FlagCompressZstd
	const hashes = disk.FlagHashBLAKE3 | disk.FlagHashSHA256
	slotsEnd := uint64(disk.DeviceSlotOffset) + uint64(t.super.ExtraDevices)*disk.SizeDeviceSlot
	hasChunks := e.ChunkTableSize > 0
	hasPrefetch := e.PrefetchTableSize > 0 && e.PrefetchTableOffset > 0
	blobs := [2]uint64{e.BlobTableOffset, uint64(e.BlobTableSize)}
	chunks := [2]uint64{e.ChunkTableOffset, e.ChunkTableSize}
	prefetch := [2]uint64{e.PrefetchTableOffset, uint64(e.PrefetchTableSize)}
	err := firstBroken(section, disk.ExtSuperOffset, []rule{
		{e.Flags&^disk.FlagKnown == 0, "flags", fmt.Sprintf("%#x", e.Flags), "known bits"},
		{bits.OnesCount64(e.Flags&compressors) == 1, "flags", fmt.Sprintf("%#x", e.Flags), "one compressor"},
		{bits.OnesCount64(e.Flags&hashes) == 1, "flags", fmt.Sprintf("%#x", e.Flags), "one digester"},
		{(e.Flags&disk.FlagTarfs != 0) == (t.super.BlockBits == disk.TarfsBlockBits), "flags", fmt.Sprintf("%#x", e.Flags), "tarfs with 512-byte blocks only"},
		{validChunkSize(e.ChunkSize), "chunk_size", e.ChunkSize, fmt.Sprintf("a power of two from %d to %d", MinChunkSize, MaxChunkSize)},
		{e.BlobTableOffset%disk.BlockSize == 0 && e.BlobTableOffset >= disk.BlockSize, "blob_table_offset", e.BlobTableOffset, "a multiple of 4096, not 0"},
		{e.BlobTableSize == 0 || e.BlobTableOffset >= slotsEnd, "blob_table_offset", e.BlobTableOffset, fmt.Sprintf("at least %d", slotsEnd)},
		{e.BlobTableSize%disk.SizeBlobEntry == 0, "blob_table_size", e.BlobTableSize, "a multiple of 256"},
		{e.BlobTableSize/disk.SizeBlobEntry == uint32(t.super.ExtraDevices), "blob_table_size", e.BlobTableSize, fmt.Sprintf("%d entries", t.super.ExtraDevices)},
		{t.super.ExtraDevices <= maxReadBlobs, "extra_devices", t.super.ExtraDevices, fmt.Sprintf("at most %d", maxReadBlobs)},
		{inside(blobs, t.src.size), "blob table", blobs, "inside the file"},
		{!hasChunks || e.ChunkTableOffset%disk.BlockSize == 0, "chunk_table_offset", e.ChunkTableOffset, "a multiple of 4096"},
		{e.ChunkTableSize%disk.SizeChunkRecord == 0, "chunk_table_size", e.ChunkTableSize, "a multiple of 80"},
		{!hasChunks || inside(chunks, t.src.size), "chunk table", chunks, "inside the file"},
		{!hasChunks || !overlap(chunks, blobs), "chunk table", chunks, "apart from the blob table"},
		{!hasPrefetch || e.PrefetchTableOffset%8 == 0, "prefetch_table_offset", e.PrefetchTableOffset, "a multiple of 8"},
		{!hasPrefetch || e.PrefetchTableSize%sizeNid == 0, "prefetch_table_size", e.PrefetchTableSize, "a multiple of 4"},
		{!hasPrefetch || inside(prefetch, t.src.size), "prefetch table", prefetch, "inside the file"},
		{!hasPrefetch || !overlap(prefetch, blobs) && (!hasChunks || !overlap(prefetch, chunks)), "prefetch table", prefetch, "apart from the other tables"},
	})
	if err != nil {
		return err
	}
	if e.Flags&disk.FlagEncryptAES != 0 {
		return unsupported(section, disk.ExtSuperOffset, "flags", fmt.Sprintf("%#x", e.Flags), "no encryption")
	}
	return nil
}

// maxReadBlobs is how many blobs a chunk index entry can tell apart.
const maxReadBlobs = 255

// inside reports whether the range {offset, length} lies in a file of size bytes.
func inside(r [2]uint64, size uint64) bool { return r[0] <= size && r[1] <= size-r[0] }

// overlap reports whether two ranges {offset, length} inside a file share a byte.
func overlap(a, b [2]uint64) bool {
	return a[1] > 0 && b[1] > 0 && a[0] < b[0]+b[1] && b[0] < a[0]+a[1]
}

func (t *v6Tables) readSlots() error {
	seen := map[string]int{}
	for i := range int(t.super.ExtraDevices) {
		offset := uint64(disk.DeviceSlotOffset + i*disk.SizeDeviceSlot)
		section := fmt.Sprintf("device slot %d", i)
		var s disk.DeviceSlot
		if err := t.src.record(&s, offset, section); err != nil {
			return err
		}
		tag := string(s.Tag[:])
		first, dup := seen[tag]
		err := firstBroken(section, clampOffset(offset), []rule{
			{utf8.ValidString(tag), "tag", fmt.Sprintf("%.80q", tag), "UTF-8"},
			{s.Blocks != 0, "blocks", s.Blocks, "not 0"},
			{!dup, "tag", fmt.Sprintf("that of slot %d", first), "distinct tags"},
		})
		if err != nil {
			return err
		}
		seen[tag] = i
		t.slots = append(t.slots, s)
	}
	return nil
}

func (t *v6Tables) readBlobs() error {
	for i := range t.super.ExtraDevices {
		offset := t.ext.BlobTableOffset + uint64(i)*disk.SizeBlobEntry
		section := fmt.Sprintf("blob table entry %d", i)
		var e disk.BlobEntry
		if err := t.src.record(&e, offset, section); err != nil {
			return err
		}
		b := Blob{
			ID: cString(e.ID[:]), ChunkSize: e.ChunkSize, ChunkCount: e.ChunkCount,
			Compressor: Compressor(e.Compressor), Digester: Digester(e.Digester), Features: e.Features,
			CompressedSize: e.CompressedSize, UncompressedSize: e.UncompressedSize,
			TOCSize: e.TOCSize, TOCDigest: e.TOCDigest,
			MetaCompressor: Compressor(e.MetaCompressor), MetaOffset: e.MetaOffset,
			MetaCompressed: e.MetaCompressed, MetaUncompressed: e.MetaUncompressed,
			MetaBlobDigest: e.MetaBlobDigest, MetaBlobSize: e.MetaBlobSize,
		}
		if e.Index != uint32(i) {
			return invalid(section, clampOffset(offset), "blob_index", e.Index, i)
		}
		if !utf8.ValidString(b.ID) || b.ID == "" {
			return invalid(section, clampOffset(offset), "blob_id", fmt.Sprintf("%.80q", b.ID), "UTF-8, not empty")
		}
		if err := b.check(section, clampOffset(offset), t.ext.ChunkSize); err != nil {
			return err
		}
		if b.Features&disk.FeatureEncrypted != 0 || e.CipherAlgorithm != 0 {
			return unsupported(section, clampOffset(offset), "features", fmt.Sprintf("%#x, cipher %d", b.Features, e.CipherAlgorithm), "no encryption")
		}
		t.entries = append(t.entries, e)
		t.blobs = append(t.blobs, b)
	}
	return nil
}

func (t *v6Tables) readPrefetch() error {
	if t.ext.PrefetchTableOffset == 0 { // old images have a size without an offset
		return nil
	}
	var p [sizeNid]byte
	for i := range uint64(t.ext.PrefetchTableSize / sizeNid) {
		if err := t.src.readAt(p[:], t.ext.PrefetchTableOffset+i*sizeNid, "prefetch table"); err != nil {
			return err
		}
		nid := binary.LittleEndian.Uint32(p[:])
		if nid == 0 {
			break
		}
		t.prefetch = append(t.prefetch, nid)
	}
	return nil
}

// compressor and digester are those of the superblock; exactly one bit of each is set.
func (t *v6Tables) compressor() Compressor { return compressorOf(t.ext.Flags) }
func (t *v6Tables) digester() Digester     { return digesterOf(t.ext.Flags) }

// compressorOf and digesterOf read the superblock flags of either version.
func compressorOf(flags uint64) Compressor {
	for c, flag := range compressorFlags {
		if flags&flag != 0 {
			return Compressor(c)
		}
	}
	return CompressorNone
}

func digesterOf(flags uint64) Digester {
	if flags&disk.FlagHashSHA256 != 0 {
		return DigesterSHA256
	}
	return DigesterBLAKE3
}

// inodeOffset is the byte offset of inode nid.
func (t *v6Tables) inodeOffset(nid uint64) (uint64, error) {
	hi, lo := bits.Mul64(nid, disk.NidSize)
	offset, carry := bits.Add64(lo, uint64(t.super.MetaBlock)*t.block, 0)
	if hi != 0 || carry != 0 || offset > t.src.size {
		return 0, invalid(fmt.Sprintf("inode %d", nid), -1, "nid", nid, fmt.Sprintf("an offset below %d", t.src.size))
	}
	return offset, nil
}
