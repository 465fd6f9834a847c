package rafs

import (
	"cmp"
	"encoding/binary"
	"math"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// write emits the plan; it decides nothing.
func (p *v6Plan) write(out *placedWriter) {
	out.at(disk.SuperOffset, appendRecord(nil, p.super()))
	out.at(disk.ExtSuperOffset, appendRecord(nil, p.extSuper()))
	out.at(disk.DeviceSlotOffset, appendRecord(nil, p.slots))
	for i := range p.img.Blobs {
		entry := blobEntry(&p.img.Blobs[i], uint32(i))
		out.at(p.sizes.blobs+uint64(i)*disk.SizeBlobEntry, appendRecord(nil, &entry))
	}
	if p.sizes.prefetch != 0 {
		var nids []byte
		for _, ino := range p.img.Prefetch {
			nids = binary.LittleEndian.AppendUint32(nids, uint32(p.nidOf(ino))) //nolint:gosec // v6Node.unit
		}
		out.at(p.sizes.prefetch, nids)
	}
	p.writeMeta(out)
	var buf []byte
	for i, r := range p.chunk {
		buf = appendRecord(buf[:0], chunkRecord(p.chunkOf(r), uint64(r.at)*uint64(p.img.ChunkSize)))
		out.at(p.sizes.chunks+uint64(i)*disk.SizeChunkRecord, buf)
	}
	out.at(p.sizes.total, nil)
}

func (p *v6Plan) super() *disk.Super {
	var blocks uint32
	for _, s := range p.slots {
		blocks += s.Blocks // the plan keeps the last mapped block below 2^32
	}
	return &disk.Super{
		Magic:           disk.SuperMagic,
		FeatureCompat:   disk.CompatRafsV6,
		BlockBits:       disk.BlockBits,
		RootNid:         disk.RootNid,
		Inos:            p.names,
		Blocks:          blocks,
		MetaBlock:       uint32(p.sizes.meta / disk.BlockSize), //nolint:gosec // tables of 254 blobs and a u32 of nids
		FeatureIncompat: disk.IncompatRequired,
		ExtraDevices:    uint16(len(p.slots)), //nolint:gosec // at most MaxBlobs
		DeviceSlotOff:   disk.DeviceSlotNumber,
	}
}

func (p *v6Plan) extSuper() *disk.ExtSuper {
	e := &disk.ExtSuper{
		Flags:            p.flags(),
		BlobTableOffset:  p.sizes.blobs,
		BlobTableSize:    uint32(len(p.img.Blobs)) * disk.SizeBlobEntry, //nolint:gosec // at most MaxBlobs
		ChunkSize:        p.img.ChunkSize,
		ChunkTableOffset: p.sizes.chunks,
		ChunkTableSize:   uint64(len(p.chunk)) * disk.SizeChunkRecord,
	}
	if p.sizes.prefetch != 0 {
		e.PrefetchTableOffset = p.sizes.prefetch
		e.PrefetchTableSize = uint32(len(p.img.Prefetch)) * sizeNid //nolint:gosec // at most one per inode
	}
	return e
}

func (p *v6Plan) flags() uint64 {
	flags := uint64(disk.FlagExplicitIDs | disk.FlagEncryptNone | disk.FlagInlinedDigest)
	for i := range p.img.Blobs {
		if p.img.Blobs[i].Features&disk.FeatureInlinedDigest == 0 {
			flags &^= disk.FlagInlinedDigest
		}
	}
	if p.xattr {
		flags |= disk.FlagHasXattr
	}
	flags |= compressorFlags[p.img.Compressor]
	return flags | digesterFlags[p.img.Digester]
}

// Superblock flags of each algorithm, by code.
var (
	compressorFlags = [...]uint64{disk.FlagCompressNone, disk.FlagCompressLZ4, disk.FlagCompressGzip, disk.FlagCompressZstd}
	digesterFlags   = [...]uint64{disk.FlagHashBLAKE3, disk.FlagHashSHA256}
)

func blobEntry(b *Blob, index uint32) disk.BlobEntry {
	features := b.Features
	inside := b.ID == PlaceholderID
	if features&disk.FeatureSeparate != 0 { // the ID is the layer's; that of the file which the bootstrap is in is not known there
		inside = b.MetaBlobDigest == Digest{}
	}
	if !inside { // this bootstrap is not the one in the blob
		features &^= disk.FeatureInlinedMeta
	}
	e := disk.BlobEntry{
		Index: index, ChunkSize: b.ChunkSize, ChunkCount: b.ChunkCount,
		Compressor: uint32(b.Compressor), Digester: uint32(b.Digester), Features: features,
		CompressedSize: b.CompressedSize, UncompressedSize: b.UncompressedSize,
		TOCSize: b.TOCSize, TOCDigest: b.TOCDigest,
		MetaCompressor: uint32(b.MetaCompressor), MetaOffset: b.MetaOffset,
		MetaCompressed: b.MetaCompressed, MetaUncompressed: b.MetaUncompressed,
		MetaBlobDigest: b.MetaBlobDigest, MetaBlobSize: b.MetaBlobSize,
	}
	copy(e.ID[:], b.ID)
	return e
}

// chunkRecord returns the record of c, as v6 has it in the chunk table and v5 in the inode.
func chunkRecord(c *Chunk, fileOffset uint64) *disk.ChunkRecord {
	r := &disk.ChunkRecord{
		Digest: c.Digest, Blob: uint32(c.Blob), Index: c.Index,
		CompressedSize: c.CompressedSize, UncompressedSize: c.UncompressedSize,
		CompressedOffset: c.CompressedOffset, UncompressedOffset: c.UncompressedOffset,
		FileOffset: fileOffset,
	}
	if c.Compressed {
		r.Flags |= disk.ChunkCompressed
	}
	if c.Batch {
		r.Flags |= disk.ChunkBatch
	}
	return r
}

// v6Piece is one run of bytes of the metadata area: an inode with what follows it (even), or
// the whole blocks of its data (odd); half of it is its place in nodes.
type v6Piece uint32

func (p *v6Plan) pieceOffset(piece v6Piece) uint64 {
	n := &p.nodes[piece/2]
	if piece%2 == 1 {
		return n.data()
	}
	return n.offset()
}

// writeMeta writes the metadata area in order of place, which is not the order of layout.
func (p *v6Plan) writeMeta(out *placedWriter) {
	count := len(p.nodes)
	for i := range p.nodes {
		if hasBlocks(&p.nodes[i]) {
			count++
		}
	}
	pieces := make([]v6Piece, 0, count)
	for i := range p.nodes {
		pieces = append(pieces, v6Piece(2*i)) // nodes are far below 2^31
		if hasBlocks(&p.nodes[i]) {
			pieces = append(pieces, v6Piece(2*i+1)) // as above
		}
	}
	slices.SortFunc(pieces, func(a, b v6Piece) int { return cmp.Compare(p.pieceOffset(a), p.pieceOffset(b)) })
	var record, data []byte
	for _, piece := range pieces {
		n, blocks := &p.nodes[piece/2], piece%2 == 1
		data = p.flatData(data[:0], n, blocks)
		if blocks {
			out.at(p.sizes.meta+n.data(), data)
			continue
		}
		record = p.appendInode(record[:0], n)
		out.at(p.sizes.meta+n.offset(), append(record, data...))
	}
}

// hasBlocks reports whether node n has data outside its inode.
func hasBlocks(n *v6Node) bool {
	switch fileType(n.inode.Mode) {
	case modeDir, modeSymlink:
		return n.size > 0 && (!n.inline || n.size >= disk.BlockSize)
	}
	return false
}

// flatData appends the directory or symlink bytes that belong to the whole blocks, or those behind the inode.
func (p *v6Plan) flatData(dst []byte, n *v6Node, blocks bool) []byte {
	switch fileType(n.inode.Mode) {
	case modeDir:
		if !blocks && !n.inline {
			return dst
		}
		dst = p.dirData(dst, n)
	case modeSymlink:
		dst = append(dst, n.inode.Target...)
	default:
		return dst
	}
	whole := len(dst)
	if n.inline {
		whole = len(dst) &^ (disk.BlockSize - 1)
	}
	if blocks {
		return dst[:whole]
	}
	return dst[whole:]
}

// appendInode appends the inode, its xattrs and its chunk index entries.
func (p *v6Plan) appendInode(dst []byte, n *v6Node) []byte {
	ino := n.inode
	layout := uint16(disk.LayoutPlain)
	var union uint32
	switch fileType(ino.Mode) {
	case modeRegular:
		layout, union = disk.LayoutChunk, chunkFormat(ino, p.img.ChunkSize)
	case modeDir, modeSymlink:
		if n.inline {
			layout = disk.LayoutInline
		}
		union = uint32((p.sizes.meta + n.data()) / disk.BlockSize) //nolint:gosec // below 2^32 blocks by maxMeta
	default:
		union = ino.Rdev
	}
	dst = appendRecord(dst, &disk.InodeExtended{
		Format:     disk.FormatExtended | layout<<disk.FormatLayoutShift,
		XattrCount: n.xattrs,
		Mode:       uint16(ino.Mode), //nolint:gosec // checked by checkInode
		Size:       n.size,
		Union:      union,
		Ino:        n.ino & math.MaxInt32,
		UID:        ino.UID,
		GID:        ino.GID,
		Mtime:      uint64(ino.Mtime), //nolint:gosec // two's complement on purpose
		MtimeNsec:  ino.MtimeNsec,
		Nlink:      n.nlink,
	})
	dst = appendXattrs(dst, ino.Xattrs)
	if len(ino.Chunks) == 0 {
		return dst
	}
	for len(dst)%disk.SizeChunkIndex != 0 { // the inode is at a multiple of 32
		dst = append(dst, 0)
	}
	for i := range ino.Chunks {
		dst = appendChunkIndex(dst, &ino.Chunks[i])
	}
	return dst
}

// appendChunkIndex appends c as a [disk.ChunkIndex]. It is written by hand because a large
// file has one per chunk; TestChunkIndexEncoding holds it against the record.
func appendChunkIndex(dst []byte, c *Chunk) []byte {
	device := (c.Blob+1)&disk.ChunkDeviceMask | uint16(c.Index>>disk.ChunkIndexLowBits)<<disk.ChunkIndexHighShift
	dst = binary.LittleEndian.AppendUint16(dst, uint16(c.Index)) //nolint:gosec // the low half
	dst = binary.LittleEndian.AppendUint16(dst, device)
	return binary.LittleEndian.AppendUint32(dst, uint32(c.UncompressedOffset/disk.BlockSize)) //nolint:gosec // below 2^44 bytes
}

func (p *v6Plan) info() BootstrapInfo {
	info := BootstrapInfo{
		Size:    int64(p.sizes.total),                                                        //nolint:gosec // far below 2^63
		RootNid: p.nid(0), Inodes: len(p.nodes), Entries: int(p.names), Chunks: len(p.chunk), //nolint:gosec // below 2^31
	}
	if p.sizes.prefetch != 0 {
		info.Prefetch = len(p.img.Prefetch)
	}
	return info
}
