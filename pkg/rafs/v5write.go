package rafs

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// write emits the plan; it decides nothing.
func (p *v5Plan) write(out *placedWriter) {
	le := binary.LittleEndian
	out.at(0, appendRecord(nil, p.super()))
	var buf []byte
	for i := range p.nodes {
		buf = le.AppendUint32(buf, p.nodes[i].units)
		if len(buf) >= writeBuffer {
			out.put(buf)
			buf = buf[:0]
		}
	}
	out.put(buf)
	buf = buf[:0]
	for _, ino := range p.img.Prefetch {
		at, _ := p.find(ino)
		buf = le.AppendUint32(buf, at+1)
	}
	out.at(p.sizes.prefetch, buf)
	out.at(p.sizes.blobs, p.blobTable())
	out.at(p.sizes.blobsEnd, nil)
	for i := range p.img.Blobs {
		out.put(appendRecord(nil, extBlobV5(&p.img.Blobs[i])))
	}
	p.walk(func(n *v5Node) {
		buf = p.appendInode(buf[:0], n)
		out.at(uint64(n.units)<<disk.V5OffsetShift, buf)
	})
	out.at(p.sizes.total, nil)
}

func (p *v5Plan) super() *disk.SuperV5 {
	flags := compressorFlags[p.img.Compressor] | digesterFlags[p.img.Digester] | disk.FlagExplicitIDs
	if p.xattr {
		flags |= disk.FlagHasXattr
	}
	return &disk.SuperV5{
		Magic: disk.V5Magic, Version: disk.V5Version, Size: disk.SizeSuperV5, ChunkSize: p.img.ChunkSize, Flags: flags,
		InodesCount: p.inodes, InodeTableOffset: disk.SizeSuperV5, InodeTableEntries: uint32(len(p.nodes)), //nolint:gosec // below maxEntriesV5
		PrefetchTableOffset: p.sizes.prefetch, PrefetchEntries: uint32(len(p.img.Prefetch)), //nolint:gosec // fits the file
		BlobTableOffset: p.sizes.blobs, BlobTableSize: uint32(p.sizes.blobsEnd - p.sizes.blobs), //nolint:gosec // at most MaxBlobs ids
		ExtBlobOffset: p.sizes.blobsEnd, ExtBlobEntries: uint32(len(p.img.Blobs)), //nolint:gosec // at most MaxBlobs
	}
}

// blobTable returns the blob table without its padding. There are no hints for reading ahead.
func (p *v5Plan) blobTable() []byte {
	var t []byte
	for i := range p.img.Blobs {
		if i > 0 {
			t = append(t, 0)
		}
		t = append(t, make([]byte, disk.V5BlobHints)...)
		t = append(t, p.img.Blobs[i].ID...)
	}
	return t
}

// extBlobV5 returns the extended entry of b. Of a v6 blob, which v5 readers take for its
// chunks, the features that concern its tables are left out.
func extBlobV5(b *Blob) *disk.ExtBlobV5 {
	const kept = disk.FeatureAligned | disk.FeatureTarHeader | disk.FeatureCapTOC | disk.FeaturePrefetch
	e := &disk.ExtBlobV5{ChunkCount: b.ChunkCount, Features: b.Features & kept, UncompressedSize: b.UncompressedSize, CompressedSize: b.CompressedSize}
	if b.Compressor == CompressorGzip {
		// It says of a v5 blob that it is none of an old stargz image, whose chunks have no sizes: nydusd 2.2.0 guesses them then,
		// compares no digests, and ends when it prefetches. Source: nydus storage/src/device.rs BlobInfo.compute_features.
		e.Features |= b.Features & disk.FeatureV2
	}
	if b.ID == PlaceholderID { // this is the bootstrap in the blob
		e.Features |= b.Features & disk.FeatureInlinedMeta
	}
	if !b.bare() {
		// The data ends before the tables; readers take the size, less the tar header, for its end.
		e.CompressedSize = b.dataEnd()
		if b.Features&disk.FeatureTarHeader != 0 && b.Features&disk.FeatureCapTOC != 0 {
			e.CompressedSize += disk.TarHeaderSize
		}
	}
	return e
}

// appendInode appends a whole record with its padding.
func (p *v5Plan) appendInode(buf []byte, n *v5Node) []byte {
	ino, first := n.inode, &p.nodes[n.first]
	h := disk.InodeV5{
		Digest: p.digestOf(n), Ino: uint64(n.first) + 1, UID: ino.UID, GID: ino.GID, Mode: ino.Mode, Size: ino.Size, Nlink: 1,
		NameSize: uint16(len(n.name)), SymlinkSize: uint16(len(ino.Target)), //nolint:gosec // checked by checkChildren, checkInode
		MtimeNsec: ino.MtimeNsec, Mtime: uint64(ino.Mtime), //nolint:gosec // two's complement on purpose
	}
	if n != &p.nodes[0] {
		h.Parent = uint64(n.parent) + 1
	}
	switch fileType(ino.Mode) {
	case modeDir:
		h.ChildIndex, h.ChildCount = n.child+1, uint32(len(ino.Children)) //nolint:gosec // below maxEntriesV5
		h.Size, h.Nlink = dirSizeV5(ino.Children), 2+subdirs(ino.Children)
	case modeRegular:
		h.ChildCount, h.Nlink = uint32(len(ino.Chunks)), first.extra //nolint:gosec // fits the file
		if first.extra > 1 {
			h.Flags |= disk.V5InodeHardlink
		}
	case modeSymlink:
		h.Flags |= disk.V5InodeSymlink
		h.Size = uint64(len(ino.Target))
	case modeChar, modeBlock:
		h.Rdev = ino.Rdev
	}
	var xattrs []byte
	if len(ino.Xattrs) > 0 {
		h.Flags |= disk.V5InodeXattr
		xattrs = appendXattrsV5(nil, ino.Xattrs)
	}
	h.Blocks = (h.Size + alignUp(uint64(len(xattrs)), disk.V5Align) + disk.V5BlockSize - 1) / disk.V5BlockSize
	buf = appendRecord(buf, &h)
	buf = appendPadded(buf, []byte(n.name))
	buf = appendPadded(buf, []byte(ino.Target))
	if xattrs != nil {
		buf = binary.LittleEndian.AppendUint64(buf, uint64(len(xattrs)))
		buf = appendPadded(buf, xattrs)
	}
	for i := range ino.Chunks {
		buf = appendRecord(buf, chunkRecord(&ino.Chunks[i], uint64(i)*uint64(p.img.ChunkSize)))
	}
	return buf
}

// appendPadded appends p and zeros up to a multiple of 8 bytes of it.
func appendPadded(buf, p []byte) []byte {
	buf = append(buf, p...)
	return append(buf, make([]byte, alignUp(uint64(len(p)), disk.V5Align)-uint64(len(p)))...)
}

// appendXattrsV5 appends the pairs of name and value, sorted by name.
func appendXattrsV5(buf []byte, xattrs []Xattr) []byte {
	sorted := slices.SortedFunc(slices.Values(xattrs), func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	for _, x := range sorted {
		buf = binary.LittleEndian.AppendUint32(buf, uint32(len(x.Name)+1+len(x.Value))) //nolint:gosec // checked by xattrSizeV5
		buf = append(append(buf, x.Name...), 0)
		buf = append(buf, x.Value...)
	}
	return buf
}

// dirSizeV5 is the size that a directory claims. Source: nydus builder/src/core/v5.rs v5_set_dir_size.
func dirSizeV5(children []Dirent) uint64 {
	var size uint64
	for i := range children {
		size += uint64(len(children[i].Name)) + disk.V5DirEntry
	}
	return max(alignUp(size, disk.V5DirBlock), disk.V5DirBlock)
}

func subdirs(children []Dirent) (n uint32) {
	for i := range children {
		if children[i].Inode.IsDir() {
			n++
		}
	}
	return n
}
