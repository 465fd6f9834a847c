package rafs

import (
	"encoding/binary"
	"fmt"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// metaRecord is a chunk record of blob.meta, of either version.
type metaRecord struct {
	uncompressedOffset uint64
	compressedOffset   uint64
	uncompressedSize   uint32
	compressedSize     uint32
	compressed         bool
	batch              bool
	zran               bool
	encrypted          bool
	batchIndex         uint32 // batch or zran context
	batchOffset        uint32 // of the chunk in the context's output
}

// encodeV1 packs a record; the caller has checked the limits.
func encodeV1(r metaRecord) disk.MetaV1 {
	u, s := uint64(r.uncompressedSize)-1, uint64(r.compressedSize)-1
	return disk.MetaV1{
		Uncompressed: (u&disk.V1SizeLowMask)<<disk.V1SizeLowShift | r.uncompressedOffset&disk.V1UncompOffsetMask |
			(u>>disk.V1SizeLowBits&disk.V1SizeHighMask)<<disk.V1UncompHighShift,
		Compressed: (s&disk.V1SizeLowMask)<<disk.V1SizeLowShift | r.compressedOffset&disk.V1CompOffsetMask |
			(s>>disk.V1SizeLowBits&disk.V1SizeHighMask)<<disk.V1CompHighShift,
	}
}

// encodeV2 packs a record; the caller has checked the limits.
func encodeV2(r metaRecord) disk.MetaV2 {
	var flags uint64
	for _, f := range []struct {
		set bool
		bit uint64
	}{
		{r.compressed, disk.V2FlagCompressed},
		{r.zran, disk.V2FlagZran},
		{r.batch, disk.V2FlagBatch},
	} {
		if f.set {
			flags |= f.bit
		}
	}
	return disk.MetaV2{
		Uncompressed: flags<<disk.V2FlagShift | uint64(r.uncompressedSize-1)<<disk.V2UncompSizeShift | r.uncompressedOffset>>disk.BlockBits,
		Compressed:   uint64(r.compressedSize)<<disk.V2CompSizeShift | r.compressedOffset&disk.V2CompOffsetMask,
		Data:         uint64(r.batchIndex)<<disk.V2DataIndexShift | uint64(r.batchOffset),
	}
}

func appendV1(p []byte, r metaRecord) []byte {
	m := encodeV1(r)
	p = binary.LittleEndian.AppendUint64(p, m.Uncompressed)
	return binary.LittleEndian.AppendUint64(p, m.Compressed)
}

func appendV2(p []byte, r metaRecord) []byte {
	m := encodeV2(r)
	p = binary.LittleEndian.AppendUint64(p, m.Uncompressed)
	p = binary.LittleEndian.AppendUint64(p, m.Compressed)
	return binary.LittleEndian.AppendUint64(p, m.Data)
}

func decodeV1(m disk.MetaV1) metaRecord {
	size := func(word uint64, highShift uint) uint32 {
		low := word >> disk.V1SizeLowShift & disk.V1SizeLowMask
		high := word >> highShift & disk.V1SizeHighMask
		return uint32(high<<disk.V1SizeLowBits|low) + 1 //nolint:gosec // 24 bits
	}
	r := metaRecord{
		uncompressedOffset: m.Uncompressed & disk.V1UncompOffsetMask,
		compressedOffset:   m.Compressed & disk.V1CompOffsetMask,
		uncompressedSize:   size(m.Uncompressed, disk.V1UncompHighShift),
		compressedSize:     size(m.Compressed, disk.V1CompHighShift),
	}
	r.compressed = r.compressedSize != r.uncompressedSize // V1 has no flags
	return r
}

func decodeV2(m disk.MetaV2) metaRecord {
	flags := m.Uncompressed >> disk.V2FlagShift
	r := metaRecord{
		uncompressedOffset: (m.Uncompressed & disk.V2UncompBlockMask) << disk.BlockBits,
		compressedOffset:   m.Compressed & disk.V2CompOffsetMask,
		uncompressedSize:   uint32(m.Uncompressed>>disk.V2UncompSizeShift&disk.V2UncompSizeMask) + 1,
		compressedSize:     uint32(m.Compressed >> disk.V2CompSizeShift),
		compressed:         flags&disk.V2FlagCompressed != 0,
		zran:               flags&disk.V2FlagZran != 0,
		batch:              flags&disk.V2FlagBatch != 0,
		encrypted:          flags&disk.V2FlagEncrypted != 0,
	}
	if r.batch || r.zran {
		r.batchIndex = uint32(m.Data >> disk.V2DataIndexShift)
		r.batchOffset = uint32(m.Data & disk.V2DataOffsetMask)
	}
	return r
}

// metaTable is a blob.meta table in memory, still in its on-disk form: 16 or 24 bytes a chunk.
type metaTable struct {
	blob    Blob
	records []byte
	size    uint32 // of one record
	count   uint32
	batches []disk.BatchContext
	zran    []disk.ZranContext
	dictsAt uint64 // where the dictionaries of zran begin in the table
	dictEnd uint64 // bytes of them
	dicts   []byte // nil: not in memory
}

// record returns record i, which must be below count.
func (t *metaTable) record(i uint32) metaRecord {
	p := t.records[uint64(i)*uint64(t.size):]
	le := binary.LittleEndian
	if t.size == disk.SizeMetaV1 {
		return decodeV1(disk.MetaV1{Uncompressed: le.Uint64(p), Compressed: le.Uint64(p[8:])})
	}
	return decodeV2(disk.MetaV2{Uncompressed: le.Uint64(p), Compressed: le.Uint64(p[8:]), Data: le.Uint64(p[16:])})
}

// parseMeta reads a decompressed table and its header and checks both against b. The table may end behind its contexts: size is
// that of all of it.
func parseMeta(b Blob, table []byte, size uint64, header []byte) (*metaTable, error) {
	h, err := parseMetaHeader(b, header)
	if err != nil {
		return nil, err
	}
	t := &metaTable{blob: b, size: uint32(b.metaRecordSize()), count: b.ChunkCount} //nolint:gosec // 16 or 24
	need := uint64(t.count) * uint64(t.size)
	if uint64(len(table)) < need {
		return nil, invalid("blob.meta of "+short(b.ID), -1, "table length", len(table), need)
	}
	t.records = table[:need]
	switch {
	case b.Features&disk.FeatureZran != 0:
		err = t.parseZran(h, table, size)
	case b.Features&disk.FeatureBatch != 0:
		err = t.parseBatches(h, table)
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// parseMetaHeader reads the header of a table and checks it against b.
func parseMetaHeader(b Blob, header []byte) (disk.MetaHeader, error) {
	var h disk.MetaHeader
	if _, err := binary.Decode(header, binary.LittleEndian, &h); err != nil {
		return disk.MetaHeader{}, invalid("blob.meta header", -1, "length", len(header), disk.SizeMetaHeader)
	}
	for _, f := range []struct {
		name      string
		got, want uint64
	}{
		{"magic", uint64(h.Magic), disk.MetaMagic},
		{"magic2", uint64(h.Magic2), disk.MetaMagic},
		{"ci_entries", uint64(h.Entries), uint64(b.ChunkCount)},
		{"ci_compressor", uint64(h.Compressor), uint64(b.MetaCompressor)},
		{"ci_offset", h.Offset, b.MetaOffset},
		{"ci_compressed_size", h.CompressedSize, b.MetaCompressed},
		{"ci_uncompressed_size", h.UncompressedSize, b.MetaUncompressed},
	} {
		if f.got != f.want {
			return disk.MetaHeader{}, invalid("blob.meta header of "+short(b.ID), -1, f.name, f.got, f.want)
		}
	}
	return h, nil
}

// contexts returns what lies behind the records: the contexts that the header counts. size is that of the whole table.
func (t *metaTable) contexts(h disk.MetaHeader, table []byte, size uint64) ([]byte, error) {
	section := "blob.meta header of " + short(t.blob.ID)
	records := uint64(len(t.records))
	need := uint64(h.ContextCount) * disk.SizeBatchContext // a ZranContext has the same size
	bad := func(field string, got, want any) ([]byte, error) { return nil, invalid(section, -1, field, got, want) }
	switch {
	case h.ContextOffset != records:
		return bad("ci_zran_offset", h.ContextOffset, records)
	case h.ContextCount > h.Entries:
		return bad("ci_zran_count", h.ContextCount, fmt.Sprintf("at most %d", h.Entries))
	case h.ContextSize < need || h.ContextSize > size-records:
		return bad("ci_zran_size", h.ContextSize, fmt.Sprintf("%d to %d", need, size-records))
	case uint64(len(table)) < records+need:
		return bad("table length", len(table), records+need)
	}
	return table[records:][:need], nil
}

// parseBatches reads the contexts of batches. Every byte of a batch is a chunk's: batches that hold more than all chunks
// would be work without end, as a chunk has all of its batch decompressed.
func (t *metaTable) parseBatches(h disk.MetaHeader, table []byte) error {
	p, err := t.contexts(h, table, uint64(len(table)))
	if err != nil {
		return err
	}
	t.batches = make([]disk.BatchContext, h.ContextCount)
	if _, err := binary.Decode(p, binary.LittleEndian, t.batches); err != nil {
		return err
	}
	var total uint64
	for _, c := range t.batches {
		total += uint64(c.UncompressedSize)
	}
	if most := min(alignUp(t.blob.UncompressedSize, disk.BlockSize), uint64(t.count)*uint64(t.blob.ChunkSize)); total > most {
		return invalid("blob.meta of "+short(t.blob.ID), int64(len(t.records)), "uncompressed size of all batches", total, fmt.Sprintf("at most %d", most))
	}
	return nil
}

// check verifies record i against the blob's limits and its predecessor, as readers of the format do.
func (t *metaTable) check(i uint32) error {
	r := t.record(i)
	section := fmt.Sprintf("blob.meta record %d of %s", i, short(t.blob.ID))
	at := int64(i) * int64(t.size)
	if reserved := t.records[at] & disk.V1UncompReservedMask; t.size == disk.SizeMetaV1 && reserved != 0 {
		return invalid(section, at, "reserved bits", reserved, 0)
	}
	if end := r.uncompressedOffset + uint64(r.uncompressedSize); end > alignUp(t.blob.UncompressedSize, disk.BlockSize) {
		return invalid(section, at, "uncompressed end", end, fmt.Sprintf("at most %d", t.blob.UncompressedSize))
	}
	if r.uncompressedSize > t.blob.ChunkSize {
		return invalid(section, at, "uncompressed size", r.uncompressedSize, fmt.Sprintf("at most %d", t.blob.ChunkSize))
	}
	if end := r.compressedOffset + uint64(r.compressedSize); t.blob.Features&disk.FeatureSeparate == 0 && end > t.blob.dataEnd() {
		return invalid(section, at, "compressed end", end, fmt.Sprintf("at most %d", t.blob.dataEnd()))
	}
	if r.compressedSize == 0 && !r.batch && t.blob.Features&disk.FeatureSeparate == 0 {
		return invalid(section, at, "compressed size", 0, "more than 0")
	}
	if !r.compressed && !r.encrypted && !r.batch && r.compressedSize != r.uncompressedSize {
		return invalid(section, at, "compressed size of a raw chunk", r.compressedSize, r.uncompressedSize)
	}
	var want uint64
	if i > 0 {
		prev := t.record(i - 1)
		want = alignUp(prev.uncompressedOffset+uint64(prev.uncompressedSize), disk.BlockSize)
	}
	if r.uncompressedOffset != want {
		return invalid(section, at, "uncompressed offset", r.uncompressedOffset, want)
	}
	switch {
	case r.batch && r.zran:
		return invalid(section, at, "flags", "batch and ZRAN", "one of them")
	case r.batch:
		return t.checkBatch(i, r, section, at)
	case r.zran:
		return t.checkZran(i, r, section, at)
	}
	return nil
}

// checkBatch verifies record i, which lies in a batch.
func (t *metaTable) checkBatch(i uint32, r metaRecord, section string, at int64) error {
	if uint64(r.batchIndex) >= uint64(len(t.batches)) {
		return invalid(section, at, "batch index", r.batchIndex, fmt.Sprintf("below %d", len(t.batches)))
	}
	c := t.batches[r.batchIndex]
	if end := r.compressedOffset + uint64(c.CompressedSize); end > t.blob.dataEnd() {
		return invalid(section, at, "batch end", end, fmt.Sprintf("at most %d", t.blob.dataEnd()))
	}
	if c.UncompressedSize > MaxChunkSize || c.CompressedSize > c.UncompressedSize {
		return invalid(section, at, "stored and uncompressed size of the batch", [2]uint32{c.CompressedSize, c.UncompressedSize}, fmt.Sprintf("ascending, at most %d", MaxChunkSize))
	}
	if end := uint64(r.batchOffset) + uint64(r.uncompressedSize); end > uint64(c.UncompressedSize) {
		return invalid(section, at, "end in its batch", end, fmt.Sprintf("at most %d", c.UncompressedSize))
	}
	if i == 0 {
		return nil
	}
	switch prev := t.record(i - 1); {
	case !prev.batch:
	case prev.batchIndex > r.batchIndex:
		return invalid(section, at, "batch index", r.batchIndex, fmt.Sprintf("at least %d", prev.batchIndex))
	case prev.batchIndex == r.batchIndex && prev.compressedOffset != r.compressedOffset:
		// The context does not say where its batch is: each of its records does.
		return invalid(section, at, "compressed offset of its batch", r.compressedOffset, prev.compressedOffset)
	}
	return nil
}
