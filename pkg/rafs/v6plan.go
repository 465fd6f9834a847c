package rafs

import (
	"bytes"
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/headstart-oci/headstart/internal/ordinal"
	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v6Plan is a v6 bootstrap with every place decided: pure data, written by [v6Plan.write].
type v6Plan struct {
	img   *Image
	nodes []v6Node              // in layout order; 0 is the root
	index *ordinal.Index[Inode] // place in nodes
	names uint64                // inode numbers handed out: one per directory entry, root included
	slots []disk.DeviceSlot     // one per blob
	chunk []v6ChunkRef          // the chunk table
	sizes v6Sizes
	xattr bool // some inode has xattrs
}

// v6Sizes are the places of the sections, in bytes from the beginning.
type v6Sizes struct {
	blobs    uint64 // blob table
	prefetch uint64 // prefetch table, 0: none
	meta     uint64 // metadata area
	end      uint64 // of the metadata area
	chunks   uint64 // chunk table
	total    uint64
}

// v6Node is one inode with its places, which count from the metadata area. It has 40 bytes: there
// is one per file.
type v6Node struct {
	inode  *Inode
	size   uint64 // i_size
	unit   uint32 // offset of the inode, in units of disk.NidSize
	block  uint32 // of the whole blocks of data (directories, symlinks)
	parent uint32 // directories: place in nodes
	ino    uint32 // i_ino
	nlink  uint32
	xattrs uint16 // i_xattr_icount: words of the inline xattrs, less two; 0: none
	inline bool   // tail behind the inode
}

// offset is the place of the inode in bytes, data that of the whole blocks.
func (n *v6Node) offset() uint64 { return uint64(n.unit) * disk.NidSize }
func (n *v6Node) data() uint64   { return uint64(n.block) * disk.BlockSize }

// maxMeta bounds the metadata area, so that inode numbers in it have 32 bits and v6Node can say every place.
const maxMeta = math.MaxUint32 * disk.NidSize

// xattrBytes is the size of the inline xattrs.
func (n *v6Node) xattrBytes() uint64 {
	if n.xattrs == 0 {
		return 0
	}
	return disk.SizeXattrHeader + (uint64(n.xattrs)-1)*disk.XattrAlign
}

// xattrWords is i_xattr_icount for so many bytes. Source: erofs_fs.h erofs_xattr_ibody_size.
func xattrWords(bytes uint32) uint16 {
	if bytes == 0 {
		return 0
	}
	return uint16((bytes-disk.SizeXattrHeader)/disk.XattrAlign + 1) //nolint:gosec // bounded by maxXattrBytes
}

// v6ChunkRef is a record of the chunk table to be: a chunk of a file.
type v6ChunkRef struct {
	node uint32 // place in nodes
	at   uint32 // place among the chunks of the inode
}

func (p *v6Plan) chunkOf(r v6ChunkRef) *Chunk { return &p.nodes[r.node].inode.Chunks[r.at] }

// planV6 decides everything about img's bootstrap. It does not change img.
func planV6(img *Image) (*v6Plan, error) {
	p := &v6Plan{img: img}
	if err := p.checkImage(); err != nil {
		return nil, err
	}
	entries, chunks := countTree(img.Root)
	p.nodes = make([]v6Node, 0, entries)
	p.index = ordinal.New(entries, func(i int) *Inode { return p.nodes[i].inode })
	p.chunk = make([]v6ChunkRef, 0, chunks)
	if err := p.placeTree(); err != nil {
		return nil, err
	}
	if err := p.sortChunks(); err != nil {
		return nil, err
	}
	if err := p.placeSections(); err != nil {
		return nil, err
	}
	return p, nil
}

// countTree counts directory entries and chunks, so that the plan's lists need not grow. It
// visits every directory once: nothing has been checked yet.
func countTree(root *Inode) (entries, chunks int) {
	seen := map[*Inode]bool{root: true}
	stack := []*Inode{root}
	for len(stack) > 0 {
		dir := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		entries++
		for _, c := range dir.Children {
			switch {
			case c.Inode == nil:
			case !c.Inode.IsDir():
				entries++
				chunks += len(c.Inode.Chunks)
			case !seen[c.Inode]:
				seen[c.Inode] = true
				stack = append(stack, c.Inode)
			}
		}
	}
	return entries, chunks
}

// checkHead applies the rules that hold for the image whatever its version.
func (img *Image) checkHead() error {
	switch {
	case img.Root == nil || fileType(img.Root.Mode) != modeDir:
		return fmt.Errorf("%w: image without a root directory", ErrInvalid)
	case !validChunkSize(img.ChunkSize):
		return invalid("image", -1, "chunk size", img.ChunkSize, fmt.Sprintf("a power of two from %d to %d", MinChunkSize, MaxChunkSize))
	case img.Compressor > CompressorZstd:
		return unsupported("image", -1, "compressor", img.Compressor, nil)
	case img.Digester > DigesterSHA256:
		return unsupported("image", -1, "digester", img.Digester, nil)
	case len(img.Blobs) > MaxBlobs:
		return invalid("image", -1, "number of blobs", len(img.Blobs), fmt.Sprintf("at most %d", MaxBlobs))
	}
	return nil
}

func (p *v6Plan) checkImage() error {
	img := p.img
	if err := img.checkHead(); err != nil {
		return err
	}
	seen := map[string]bool{}
	for i := range img.Blobs {
		b := &img.Blobs[i]
		section := fmt.Sprintf("blob %d", i)
		if err := b.check(section, -1, img.ChunkSize); err != nil {
			return err
		}
		const cannot = disk.FeatureTarfs | disk.FeatureEncrypted | disk.FeatureExternal
		switch {
		case b.Features&cannot != 0:
			return unsupported(section, -1, "features", fmt.Sprintf("%#x", b.Features), "no tarfs, encryption or external data")
		case len(b.ID) == 0 || len(b.ID) > len(disk.BlobEntry{}.ID) || !validTag(b.ID):
			return invalid(section, -1, "id", fmt.Sprintf("%.80q", b.ID), "1 to 64 characters")
		case seen[b.ID]:
			return invalid(section, -1, "id", b.ID, "one that no other blob has")
		case b.ChunkCount == 0:
			return invalid(section, -1, "chunk count", 0, "at least 1")
		case b.UncompressedSize < disk.BlockSize || b.UncompressedSize%disk.BlockSize != 0:
			return invalid(section, -1, "uncompressed size", b.UncompressedSize, "a multiple of 4096, not 0")
		case b.Digester != img.Digester:
			return invalid(section, -1, "digester", b.Digester, img.Digester)
		}
		seen[b.ID] = true
	}
	return nil
}

// sortChunks makes the chunk table: one record per chunk, sorted by digest, blob and
// index, with the file offset of the last use in layout order, as upstream has it.
func (p *v6Plan) sortChunks() error {
	place := func(a, b *Chunk) int { return cmp.Or(cmp.Compare(a.Blob, b.Blob), cmp.Compare(a.Index, b.Index)) }
	slices.SortFunc(p.chunk, func(a, b v6ChunkRef) int {
		return cmp.Or(place(p.chunkOf(a), p.chunkOf(b)), cmp.Compare(a.node, b.node), cmp.Compare(a.at, b.at))
	})
	kept := p.chunk[:0]
	for _, r := range p.chunk {
		if n := len(kept); n > 0 {
			last, c := p.chunkOf(kept[n-1]), p.chunkOf(r)
			if place(last, c) == 0 {
				if *last != *c {
					return fmt.Errorf("%w: chunk %d of blob %d has two different records", ErrInvalid, c.Index, c.Blob)
				}
				kept[n-1] = r
				continue
			}
		}
		kept = append(kept, r)
	}
	p.chunk = kept
	slices.SortFunc(p.chunk, func(a, b v6ChunkRef) int {
		x, y := p.chunkOf(a), p.chunkOf(b)
		return cmp.Or(bytes.Compare(x.Digest[:], y.Digest[:]), place(x, y))
	})
	return nil
}

// placeSections fixes where every table begins and the flat address of every blob.
func (p *v6Plan) placeSections() error {
	n := uint64(len(p.img.Blobs))
	s := &p.sizes
	s.blobs = alignUp(disk.DeviceSlotOffset+n*disk.SizeDeviceSlot, disk.BlockSize)
	if n > 0 {
		end := s.blobs + n*disk.SizeBlobEntry
		if len(p.img.Prefetch) > 0 {
			s.prefetch = end
			end += uint64(len(p.img.Prefetch)) * sizeNid
		}
		s.meta = alignUp(end, disk.BlockSize)
	}
	s.end += s.meta
	s.chunks = alignUp(s.end, disk.BlockSize)
	s.total = alignUp(s.chunks+uint64(len(p.chunk))*disk.SizeChunkRecord, disk.BlockSize)

	pos := s.total
	for i := range p.img.Blobs {
		b := &p.img.Blobs[i]
		pos = alignUp(pos, disk.MappedAlign)
		blocks := b.UncompressedSize / disk.BlockSize
		if pos/disk.BlockSize+blocks > math.MaxUint32 {
			return invalid(fmt.Sprintf("blob %d", i), -1, "flat address", pos+b.UncompressedSize, "below 16 TiB: use fewer or smaller blobs")
		}
		slot := disk.DeviceSlot{Blocks: uint32(blocks), MappedBlock: uint32(pos / disk.BlockSize)} //nolint:gosec // checked above
		copy(slot.Tag[:], b.ID)
		p.slots = append(p.slots, slot)
		pos += b.UncompressedSize
	}
	return nil
}

// sizeNid is the size of one entry of the prefetch table.
const sizeNid = 4

// nid returns the number that directory entries know node n by.
func (p *v6Plan) nid(n uint32) uint64 { return uint64(p.nodes[n].unit) }

// nidOf returns the number of an inode of the plan.
func (p *v6Plan) nidOf(ino *Inode) uint64 {
	i, ok := p.index.Find(ino)
	if !ok {
		panic("rafs: inode outside the plan")
	}
	return uint64(p.nodes[i].unit)
}

// chunkFormat returns i_u of a regular file: the chunk size as the kernel shall see it. A
// file whose chunks lie one behind the other becomes a single extent.
func chunkFormat(ino *Inode, chunkSize uint32) uint32 {
	size := uint64(chunkSize)
	if len(ino.Chunks) > 1 && ino.Size <= maxSingleExtent && contiguous(ino.Chunks, size) {
		size = 1 << bits.Len64(ino.Size-1)
	}
	return disk.ChunkFormatIndexes | uint32(bits.TrailingZeros64(size)-disk.BlockBits) //nolint:gosec // 0 to 31
}

// maxSingleExtent is the largest chunk that five bits above 4096 can say.
const maxSingleExtent = 1 << (disk.BlockBits + disk.ChunkFormatBitsMask)

func contiguous(chunks []Chunk, size uint64) bool {
	for i := 1; i < len(chunks); i++ {
		if chunks[i].Blob != chunks[i-1].Blob || chunks[i].UncompressedOffset != chunks[i-1].UncompressedOffset+size {
			return false
		}
	}
	return true
}
