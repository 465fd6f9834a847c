package rafs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// bootstrapReader is what each version of the format can do with a bootstrap.
type bootstrapReader interface {
	// checkTables looks at what opening does not refuse. Faults go to the list, which says when to stop.
	checkTables(faults *faultList) error
	// load reads the whole tree and the chunk table. Faults go to the list; where it lets it go
	// on, the image has what could be read. With a tally the tree is counted and not kept; without one
	// the chunk table may share memory with the tree.
	load(faults *faultList, tally *tally) (*Image, []Chunk, error)
	// info describes the tables.
	info() *Info
	// bare returns an image with all but a tree and its prefetch table.
	bare() *Image
}

// openBootstrap finds the version and reads the tables, without the tree.
func openBootstrap(r io.ReaderAt, size int64) (bootstrapReader, error) {
	src, err := newPagedReader(r, size)
	if err != nil {
		return nil, err
	}
	var magic [4]byte
	if err := src.readAt(magic[:], 0, "superblock"); err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint32(magic[:]) == disk.V5Magic {
		t, err := openV5(src)
		if err != nil {
			return nil, err
		}
		return t, nil
	}
	t, err := openV6(src)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Open reads a bootstrap of size bytes whole, of either version: the tree, the blobs and the prefetch table.
// Every bound is checked; memory is bounded by a small multiple of size. It reads what nydus-image 2.2 to 2.4
// writes, batch chunks, 512-byte blocks and compact inodes included.
//
// ErrInvalid when bytes break the format: a table outside the file, a directory reached twice, names that
// are not sorted, a chunk that is not in the chunk table, names of one file that disagree. ErrUnsupported for encryption
// and for v5 files with holes. The digests of v5 inodes are not compared: see [Check]. Open does not keep r. Several calls may overlap.
func Open(r io.ReaderAt, size int64) (*Image, error) { return open(r, size, faultList{limit: 1}) }

// OpenStrict is [Open] for who writes the tree out: it compares link counts with the names found and, in v5
// images, the digests of inodes too, so that it does not take a damaged directory or name for another file's. The
// other metadata of a bootstrap have no redundancy: only a digest of the whole file, as a manifest has it, tells.
// The differences are ErrInvalid and ErrDigest.
func OpenStrict(r io.ReaderAt, size int64) (*Image, error) {
	return open(r, size, faultList{limit: 1, links: true})
}

// OpenTables is [Open] without the tree: Root and Prefetch are nil, and faults of the tree and of the chunk table are
// not found. It is for who has the tree read by others, as [Check] does.
func OpenTables(r io.ReaderAt, size int64) (*Image, error) {
	b, err := openBootstrap(r, size)
	if err != nil {
		return nil, fmt.Errorf("open bootstrap: %w", err)
	}
	return b.bare(), nil
}

func open(r io.ReaderAt, size int64, faults faultList) (*Image, error) {
	b, err := openBootstrap(r, size)
	if err != nil {
		return nil, fmt.Errorf("open bootstrap: %w", err)
	}
	img, _, err := b.load(&faults, nil)
	if err != nil && !errors.Is(err, errTooManyFaults) {
		faults.faults = append(faults.faults, err)
	}
	if err := faults.err(); err != nil {
		return nil, fmt.Errorf("open bootstrap: %w", err)
	}
	return img, nil
}

// faultList gathers faults up to a limit.
type faultList struct {
	limit  int
	links  bool // compare link counts too, and digests of v5 inodes
	faults []error
}

// add keeps err and returns a non-nil error when no more faults are wanted.
func (f *faultList) add(err error) error {
	if err == nil {
		return nil
	}
	f.faults = append(f.faults, err)
	if len(f.faults) >= f.limit {
		return errTooManyFaults
	}
	return nil
}

func (f *faultList) err() error {
	if len(f.faults) == 1 {
		return f.faults[0]
	}
	return errors.Join(f.faults...)
}

var errTooManyFaults = errors.New("rafs: too many faults")

// bitset is a set of small numbers.
type bitset []uint64

// newBitset returns a set for the numbers below n.
func newBitset(n uint64) bitset { return make(bitset, n/64+1) }

// has reports whether n is in the set; numbers beyond its size are not.
func (b bitset) has(n uint64) bool { return n/64 < uint64(len(b)) && b[n/64]>>(n%64)&1 != 0 }

// set adds n, which must be below the set's size.
func (b bitset) set(n uint64) { b[n/64] |= 1 << (n % 64) }

// count returns how many numbers are in the set.
func (b bitset) count() (n int) {
	for _, word := range b {
		n += bits.OnesCount64(word)
	}
	return n
}

// pagedReader reads a file through a small cache of pages. Not safe for concurrent use.
type pagedReader struct {
	r     io.ReaderAt
	size  uint64
	pages [pageCount]page
}

type page struct {
	valid bool
	index uint64
	data  []byte
}

const (
	pageSize  = 64 << 10
	pageCount = 32 // 2 MiB: the tree is mostly read front to back
)

func newPagedReader(r io.ReaderAt, size int64) (*pagedReader, error) {
	if size < disk.BlockSize {
		return nil, invalid("bootstrap", -1, "size", size, fmt.Sprintf("at least %d", disk.BlockSize))
	}
	return &pagedReader{r: r, size: uint64(size)}, nil
}

// readAt fills p from offset; section is for the error.
func (s *pagedReader) readAt(p []byte, offset uint64, section string) error {
	if err := s.bounds(offset, uint64(len(p)), section); err != nil {
		return err
	}
	for len(p) > 0 {
		data, err := s.page(offset / pageSize)
		if err != nil {
			return fmt.Errorf("read %s: %w", section, err)
		}
		n := copy(p, data[offset%pageSize:])
		p, offset = p[n:], offset+uint64(n) //nolint:gosec // a length
	}
	return nil
}

// bounds makes sure that n bytes at offset lie in the file.
func (s *pagedReader) bounds(offset, n uint64, section string) error {
	if offset > s.size || n > s.size-offset {
		return invalid(section, clampOffset(offset), "end", fmt.Sprintf("%d bytes later", n), fmt.Sprintf("at most %d", s.size))
	}
	return nil
}

func clampOffset(offset uint64) int64 { return int64(min(offset, 1<<63-1)) }

func (s *pagedReader) page(index uint64) ([]byte, error) {
	p := &s.pages[index%pageCount]
	if p.valid && p.index == index {
		return p.data, nil
	}
	if p.data == nil {
		p.data = make([]byte, min(pageSize, s.size))
	}
	p.valid = false
	start := index * pageSize
	n := min(pageSize, s.size-start)
	p.data = p.data[:cap(p.data)][:n]
	got, err := s.r.ReadAt(p.data, clampOffset(start))
	if uint64(got) < n { //nolint:gosec // not negative
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%d bytes at %d: %w", n, start, err)
	}
	p.valid, p.index = true, index
	return p.data, nil
}

// record reads the fixed-size record v at offset.
func (s *pagedReader) record(v any, offset uint64, section string) error {
	var scratch [disk.SizeInodeV5]byte // the largest of those below
	var err error
	switch v := v.(type) { // concrete types, so that scratch stays on the stack
	case *disk.ChunkRecord:
		if err = s.readAt(scratch[:disk.SizeChunkRecord], offset, section); err == nil {
			v.Load(scratch[:])
		}
	case *disk.InodeV5:
		if err = s.readAt(scratch[:disk.SizeInodeV5], offset, section); err == nil {
			v.Load(scratch[:])
		}
	case *disk.InodeExtended:
		if err = s.readAt(scratch[:disk.SizeInodeExtended], offset, section); err == nil {
			v.Load(scratch[:])
		}
	case *disk.InodeCompact:
		if err = s.readAt(scratch[:disk.SizeInodeCompact], offset, section); err == nil {
			v.Load(scratch[:])
		}
	default:
		return s.anyRecord(v, offset, section)
	}
	return err
}

// anyRecord is record for those of which there are few.
func (s *pagedReader) anyRecord(v any, offset uint64, section string) error {
	var scratch [disk.SizeBlobEntry]byte
	p := scratch[:binary.Size(v)]
	if err := s.readAt(p, offset, section); err != nil {
		return err
	}
	_, err := binary.Decode(p, binary.LittleEndian, v)
	return err
}
