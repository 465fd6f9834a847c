package rafs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"strconv"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// v5Tables is a v5 bootstrap with its tables read and checked, without its tree.
type v5Tables struct {
	src      *pagedReader
	super    disk.SuperV5
	hints    []v5Hint // one per blob
	ext      []disk.ExtBlobV5
	blobs    []Blob
	prefetch []uint32 // inode numbers up to the first 0
}

// v5Hint is what stands before a blob id in the blob table, with its place.
type v5Hint struct {
	offset                          uint64
	readaheadOffset, readaheadBytes uint32
}

// openV5 reads and checks the tables, in the order and by the rules of the readers of the format.
func openV5(src *pagedReader) (*v5Tables, error) {
	t := &v5Tables{src: src}
	for _, step := range []func() error{t.readSuper, t.readExtended, t.readBlobs, t.readPrefetch} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// v5Range is a table {offset, length}; an empty one lies nowhere.
func (t *v5Tables) v5Ranges() (inodes, prefetch, blobs, ext [2]uint64) {
	s := &t.super
	return [2]uint64{s.InodeTableOffset, uint64(s.InodeTableEntries) * disk.V5InodeEntry},
		[2]uint64{s.PrefetchTableOffset, uint64(s.PrefetchEntries) * disk.V5InodeEntry},
		[2]uint64{s.BlobTableOffset, uint64(s.BlobTableSize)},
		[2]uint64{s.ExtBlobOffset, uint64(s.ExtBlobEntries) * disk.SizeExtBlobV5}
}

func (t *v5Tables) readSuper() error {
	const section = "superblock"
	s := &t.super
	if t.src.size <= disk.SizeSuperV5 {
		return invalid("bootstrap", -1, "size", t.src.size, fmt.Sprintf("more than %d", disk.SizeSuperV5))
	}
	p := make([]byte, disk.SizeSuperV5)
	if err := t.src.readAt(p, 0, section); err != nil {
		return err
	}
	if _, err := binary.Decode(p, binary.LittleEndian, s); err != nil {
		return err
	}
	const compressors = disk.FlagCompressNone | disk.FlagCompressLZ4 | disk.FlagCompressGzip | disk.FlagCompressZstd
	const hashes = disk.FlagHashBLAKE3 | disk.FlagHashSHA256
	err := firstBroken(section, 0, []rule{
		{s.Magic == disk.V5Magic, "magic", fmt.Sprintf("%#x", s.Magic), fmt.Sprintf("%#x", disk.V5Magic)},
		{s.Version == disk.V5Version, "version", fmt.Sprintf("%#x", s.Version), fmt.Sprintf("%#x", disk.V5Version)},
		{s.Size == disk.SizeSuperV5, "sb_size", s.Size, disk.SizeSuperV5},
		{t.src.size <= disk.V5MaxSize, "file size", t.src.size, fmt.Sprintf("at most %d", uint64(disk.V5MaxSize))},
		{t.src.size%disk.V5Align == 0, "file size", t.src.size, "a multiple of 8"},
		{validChunkSize(s.ChunkSize), "block_size", s.ChunkSize, fmt.Sprintf("a power of two from %d to %d", MinChunkSize, MaxChunkSize)},
		{s.Flags&^disk.FlagKnownV5 == 0, "flags", fmt.Sprintf("%#x", s.Flags), "known bits"},
		{bits.OnesCount64(s.Flags&compressors) == 1, "flags", fmt.Sprintf("%#x", s.Flags), "one compressor"},
		{bits.OnesCount64(s.Flags&hashes) == 1, "flags", fmt.Sprintf("%#x", s.Flags), "one digester"},
		{s.InodeTableEntries > 0, "inode_table_entries", s.InodeTableEntries, "not 0"},
		{s.InodesCount <= uint64(s.InodeTableEntries), "inodes_count", s.InodesCount, fmt.Sprintf("at most %d", s.InodeTableEntries)},
	})
	if err != nil {
		return err
	}
	return t.checkRanges(section)
}

// checkRanges makes sure that the tables lie behind the superblock, in the file and apart from each other.
func (t *v5Tables) checkRanges(section string) error {
	inodes, prefetch, blobs, ext := t.v5Ranges()
	tables := []struct {
		name string
		at   [2]uint64
	}{{"inode table", inodes}, {"prefetch table", prefetch}, {"blob table", blobs}, {"extended blob table", ext}}
	for i, a := range tables {
		if a.at[1] == 0 {
			continue
		}
		err := firstBroken(section, 0, []rule{
			{a.at[0] >= disk.SizeSuperV5 && inside(a.at, t.src.size), a.name, a.at, "behind the superblock and inside the file"},
			{a.at[0]%disk.V5Align == 0, a.name + " offset", a.at[0], "a multiple of 8"},
		})
		if err != nil {
			return err
		}
		for _, b := range tables[:i] {
			if overlap(a.at, b.at) {
				return invalid(section, 0, a.name, a.at, fmt.Sprintf("apart from the %s at %d", b.name, b.at))
			}
		}
	}
	return nil
}

func (t *v5Tables) readExtended() error {
	_, _, blobs, ext := t.v5Ranges()
	// A blob table entry has more than 8 bytes; more extended entries than that are only in the way.
	if ext[1] == 0 || blobs[1] == 0 {
		return nil
	}
	if t.super.ExtBlobEntries > maxReadBlobs {
		return invalid("superblock", 0, "extended_blob_table_entries", t.super.ExtBlobEntries, fmt.Sprintf("at most %d", maxReadBlobs))
	}
	for i := range uint64(t.super.ExtBlobEntries) {
		var e disk.ExtBlobV5
		if err := t.src.record(&e, ext[0]+i*disk.SizeExtBlobV5, "extended blob table"); err != nil {
			return err
		}
		t.ext = append(t.ext, e)
	}
	return nil
}

// maxBlobTableV5 bounds the blob table: an id is a file name.
const maxBlobTableV5 = maxReadBlobs * (disk.V5BlobHints + 256)

// readBlobs reads ids, each behind two hints for reading ahead and, but for the last, ended by a NUL.
func (t *v5Tables) readBlobs() error {
	start, size := t.super.BlobTableOffset, t.super.BlobTableSize
	if size > maxBlobTableV5 {
		return invalid("superblock", 0, "blob_table_size", size, fmt.Sprintf("at most %d", maxBlobTableV5))
	}
	p := make([]byte, size)
	if err := t.src.readAt(p, start, "blob table"); err != nil {
		return err
	}
	seen := map[string]bool{}
	for at := 0; len(p)-at > disk.V5BlobHints; {
		i, offset := len(t.blobs), start+uint64(at)
		section := fmt.Sprintf("blob table entry %d", i)
		id := p[at+disk.V5BlobHints:]
		if end := bytes.IndexByte(id, 0); end >= 0 {
			id = id[:end]
		}
		err := firstBroken(section, clampOffset(offset), []rule{
			{i < maxReadBlobs, "number of blobs", i + 1, fmt.Sprintf("at most %d", maxReadBlobs)},
			{len(id) > 0 && utf8.Valid(id), "blob_id", fmt.Sprintf("%.80q", id), "UTF-8, not empty"},
			{!seen[string(id)], "blob_id", fmt.Sprintf("%.80q", id), "one that no other blob has"},
			{len(t.ext) == 0 || i < len(t.ext), "extended blob table", fmt.Sprintf("of %d entries", len(t.ext)), "an entry for every blob"},
		})
		if err != nil {
			return err
		}
		seen[string(id)] = true
		t.hints = append(t.hints, v5Hint{offset, binary.LittleEndian.Uint32(p[at:]), binary.LittleEndian.Uint32(p[at+4:])})
		if err := t.addBlob(string(id), section, offset); err != nil {
			return err
		}
		at += disk.V5BlobHints + len(id) + 1
	}
	return nil
}

func (t *v5Tables) addBlob(id, section string, offset uint64) error {
	b := Blob{ID: id, ChunkSize: t.super.ChunkSize, Compressor: t.compressor(), Digester: t.digester()}
	if len(t.ext) > 0 {
		e := &t.ext[len(t.blobs)]
		b.ChunkCount, b.Features = e.ChunkCount, e.Features
		b.UncompressedSize, b.CompressedSize = e.UncompressedSize, e.CompressedSize
		if err := b.checkV5(section, clampOffset(offset), t.super.ChunkSize); err != nil {
			return err
		}
	}
	t.blobs = append(t.blobs, b)
	return nil
}

func (t *v5Tables) readPrefetch() error {
	_, prefetch, _, _ := t.v5Ranges()
	var p [disk.V5InodeEntry]byte
	for at := uint64(0); at < prefetch[1]; at += disk.V5InodeEntry {
		if err := t.src.readAt(p[:], prefetch[0]+at, "prefetch table"); err != nil {
			return err
		}
		ino := binary.LittleEndian.Uint32(p[:])
		if ino == 0 {
			break
		}
		t.prefetch = append(t.prefetch, ino)
	}
	return nil
}

// compressor and digester are those of the superblock; exactly one bit of each is set.
func (t *v5Tables) compressor() Compressor { return compressorOf(t.super.Flags) }
func (t *v5Tables) digester() Digester     { return digesterOf(t.super.Flags) }

// entryOffset returns where the record of entry number n, from 1, lies.
func (t *v5Tables) entryOffset(n uint32) (uint64, error) {
	section := "inode table entry " + strconv.FormatUint(uint64(n), 10)
	if n == 0 || n > t.super.InodeTableEntries {
		return 0, invalid(section, -1, "number", n, fmt.Sprintf("1 to %d", t.super.InodeTableEntries))
	}
	at := t.super.InodeTableOffset + uint64(n-1)*disk.V5InodeEntry
	var p [disk.V5InodeEntry]byte
	if err := t.src.readAt(p[:], at, section); err != nil {
		return 0, err
	}
	units := binary.LittleEndian.Uint32(p[:])
	if units <= disk.SizeSuperV5>>disk.V5OffsetShift || units >= disk.V5OffsetLimit {
		return 0, invalid(section, clampOffset(at), "offset / 8", units, fmt.Sprintf("above %d and below %d", disk.SizeSuperV5>>disk.V5OffsetShift, disk.V5OffsetLimit))
	}
	return uint64(units) << disk.V5OffsetShift, nil
}
