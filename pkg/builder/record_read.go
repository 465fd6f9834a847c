package builder

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// errMagic is what is wrong with a stream of enough other bytes.
var errMagic = errors.New("no layer record")

// maxRecord bounds what a record decompresses to: that of [MaxEntries] usual files.
const maxRecord = 4 << 30

// maxRecordDepth bounds the recursion: maxPath bytes are at most half as many names.
const maxRecordDepth = maxPath / 2

// recordReader reads a tree. After the first error it reads zeros; every loop asks for err.
type recordReader struct {
	r       *bufio.Reader
	layer   uint16
	base    int
	dict    *dict
	tree    *tree
	inodes  []*rafs.Inode // that may come again
	entries int
	chunks  int
	err     error
}

func decodeRecord(r io.Reader, layer, base int, d *dict) (recordHeader, *tree, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return recordHeader{}, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	defer z.Close()
	e := &recordReader{
		r: bufio.NewReaderSize(io.LimitReader(z, maxRecord), storedBuffer), layer: uint16(layer), base: base, dict: d, //nolint:gosec // completeLayers bounds it
		tree: &tree{shared: map[*rafs.Inode]struct{}{}},
	}
	magic := make([]byte, len(recordMagic))
	if _, err := io.ReadFull(e.r, magic); err != nil || string(magic) != recordMagic {
		return recordHeader{}, nil, fmt.Errorf("%w: it begins with %q, want %q: %w", ErrInvalid, magic, recordMagic, cmp.Or(err, errMagic))
	}
	var h recordHeader
	if err := json.Unmarshal(e.bytes(1<<20), &h); err != nil && e.err == nil {
		e.fail("header: %v", err)
	}
	for range e.count(MaxEntries) {
		l := &lowerLink{name: string(e.bytes(16 * maxPath)), target: string(e.bytes(16 * maxPath))}
		l.attrs = attrsOfInode(e.inode())
		e.tree.links = append(e.tree.links, l)
		if e.err != nil {
			break
		}
	}
	e.tree.root = e.entry(0)
	if e.err == nil && e.tree.root.dir == nil {
		e.fail("the root is no directory")
	}
	if e.err == nil {
		if _, err := e.r.ReadByte(); !errors.Is(err, io.EOF) {
			e.fail("bytes behind the tree (%v)", err)
		}
	}
	if e.err != nil {
		return recordHeader{}, nil, e.err
	}
	return h, e.tree, nil
}

func attrsOfInode(ino *rafs.Inode) attrs {
	return attrs{perm: ino.Mode, uid: ino.UID, gid: ino.GID, mtime: ino.Mtime, nsec: ino.MtimeNsec, xattrs: ino.Xattrs}
}

func (e *recordReader) fail(format string, args ...any) {
	if e.err == nil {
		e.err = fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
	}
}

func (e *recordReader) uint() uint64 {
	if e.err != nil {
		return 0
	}
	v, err := binary.ReadUvarint(e.r)
	if err != nil {
		e.fail("cut off: %v", err)
		return 0
	}
	return v
}

// count reads a number that is at most most.
func (e *recordReader) count(most uint64) int {
	v := e.uint()
	if v > most {
		e.fail("a count of %d, at most %d", v, most)
		return 0
	}
	return int(v) //nolint:gosec // below most
}

func (e *recordReader) u32() uint32 { return uint32(e.count(math.MaxUint32)) } //nolint:gosec // bounded

func (e *recordReader) bytes(most uint64) []byte {
	p := make([]byte, e.count(most))
	if e.err == nil {
		if _, err := io.ReadFull(e.r, p); err != nil {
			e.fail("cut off: %v", err)
		}
	}
	return p
}

func (e *recordReader) name() string {
	n := string(e.bytes(maxName))
	if e.err == nil && (n == "" || n == "." || n == "..") {
		e.fail("name %q", n)
	}
	return n
}

func (e *recordReader) entry(depth int) entry {
	if e.entries++; e.entries > MaxEntries || depth > maxRecordDepth {
		e.fail("more than %d entries or %d directories deep", MaxEntries, maxRecordDepth)
		return entry{}
	}
	switch kind := e.uint(); kind {
	case kindInode:
		return entry{ino: e.inode()}
	case kindShared:
		ino := e.inode()
		e.inodes = append(e.inodes, ino)
		e.tree.shared[ino] = struct{}{}
		return entry{ino: ino}
	case kindAgain:
		if i := e.uint(); i < uint64(len(e.inodes)) {
			return entry{ino: e.inodes[i]}
		}
	case kindLower:
		if i := e.uint(); i < uint64(len(e.tree.links)) {
			return entry{link: e.tree.links[i]}
		}
	case kindDir:
		n := newDir(e.inode())
		e.dir(n.dir, depth)
		return n
	}
	e.fail("entry %d is of no known kind or refers to none before it", e.entries)
	return entry{}
}

func (e *recordReader) dir(d *dir, depth int) {
	d.opaque, d.explicit = e.count(1) == 1, e.count(1) == 1
	for range e.count(MaxEntries) {
		d.whiteout(e.name())
		if e.err != nil {
			return
		}
	}
	for range e.count(MaxEntries) {
		d.put(e.name(), e.entry(depth+1))
		if e.err != nil {
			return
		}
	}
}

func (e *recordReader) inode() *rafs.Inode {
	ino := &rafs.Inode{Mode: e.u32(), UID: e.u32(), GID: e.u32(), MtimeNsec: e.u32(), Rdev: e.u32()}
	if e.err == nil {
		var err error
		if ino.Mtime, err = binary.ReadVarint(e.r); err != nil {
			e.fail("cut off: %v", err)
		}
	}
	ino.Size = e.uint()
	ino.Target = string(e.bytes(maxSymlink))
	for range e.count(math.MaxUint16) {
		ino.Xattrs = append(ino.Xattrs, rafs.Xattr{Name: string(e.bytes(maxXattrName)), Value: e.bytes(maxXattrValue)})
		if e.err != nil {
			return ino
		}
	}
	n := e.count(rafs.MaxChunks)
	if e.chunks += n; e.chunks > MaxEntries+rafs.MaxChunks {
		e.fail("more than %d chunks", MaxEntries+rafs.MaxChunks)
	}
	if n > 0 && ino.Mode&unix.S_IFMT != unix.S_IFREG {
		e.fail("chunks of what is no regular file")
	}
	for range n {
		ino.Chunks = append(ino.Chunks, e.chunk())
		if e.err != nil {
			return ino
		}
	}
	return ino
}

func (e *recordReader) chunk() rafs.Chunk {
	c := rafs.Chunk{Blob: e.layer}
	if e.err == nil {
		if _, err := io.ReadFull(e.r, c.Digest[:]); err != nil {
			e.fail("cut off: %v", err)
		}
	}
	if blob := e.uint(); blob != 0 {
		if e.dict == nil || blob > uint64(len(e.dict.blobs)) {
			e.fail("a chunk of blob %d of a dictionary that has fewer", blob)
			return c
		}
		c.Blob = uint16(e.base + int(blob)) //nolint:gosec // a blob's number
	}
	flags := e.count(recordCompressed | recordBatch)
	c.Compressed, c.Batch = flags&recordCompressed != 0, flags&recordBatch != 0
	c.Index = e.u32()
	c.CompressedOffset, c.UncompressedOffset = e.uint(), e.uint()
	c.CompressedSize, c.UncompressedSize = e.u32(), e.u32()
	return c
}
