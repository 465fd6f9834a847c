package store

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sort"

	"github.com/headstart-oci/headstart/internal/atomicfile"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// errConflict is returned for chunks that cannot share a data file.
var errConflict = errors.New("chunks differ at the same place")

// table is the chunk table of a data file: in memory the chunks' first blocks alone,
// the records in the file. It does not change.
type table struct {
	file   *os.File
	starts []uint32
}

// records returns the chunks as records by offset, and refuses what the kernel cannot
// read from a data file of size bytes.
func records(chunks []rafs.Chunk, size uint64) ([]chunkRecord, error) {
	out := make([]chunkRecord, len(chunks))
	for i, c := range chunks {
		out[i] = record(c)
	}
	slices.SortFunc(out, func(a, b chunkRecord) int { return cmp.Compare(a.Offset, b.Offset) })
	end := uint64(0)
	for i := range out {
		r := &out[i]
		switch {
		case r.Offset%BlockSize != 0:
			return nil, fmt.Errorf("%w: chunk %d at %d, want a multiple of %d", ErrUnsupported, r.Index, r.Offset, BlockSize)
		case r.Size == 0 || r.Size > rafs.MaxChunkSize || r.Offset > size || r.end()*BlockSize > size:
			return nil, fmt.Errorf("%w: chunk %d of %d bytes at %d, in a blob of %d", rafs.ErrInvalid, r.Index, r.Size, r.Offset, size)
		case r.first() < end:
			return nil, fmt.Errorf("%w: chunk %d at %d lies in another chunk", rafs.ErrInvalid, r.Index, r.Offset)
		}
		end = r.end()
	}
	return out, nil
}

// merge returns old with what more has besides, and whether that is anything.
// errConflict when a chunk of more overlaps another one of old.
func merge(old, more []chunkRecord) (all []chunkRecord, added bool, err error) {
	all = make([]chunkRecord, 0, len(old))
	for len(more) > 0 {
		switch {
		case len(old) > 0 && old[0] == more[0]:
			all, old, more = append(all, old[0]), old[1:], more[1:]
		case len(old) > 0 && old[0].first() < more[0].end() && more[0].first() < old[0].end():
			return nil, false, errConflict
		case len(old) > 0 && old[0].Offset < more[0].Offset:
			all, old = append(all, old[0]), old[1:]
		default:
			all, more, added = append(all, more[0]), more[1:], true
		}
	}
	return append(all, old...), added, nil
}

// writeTable puts the table of b in place and opens it.
func writeTable(dir *os.Root, b rafs.Blob, recs []chunkRecord) (*table, error) {
	h := header{Magic: magicChunks, Records: uint32(len(recs)), Size: b.UncompressedSize, Blob: identity(b)} //nolint:gosec // at most rafs.MaxChunks
	body, err := binary.Append(make([]byte, 0, len(recs)*sizeChunkRecord), binary.LittleEndian, recs)
	if err != nil {
		return nil, err
	}
	p, err := encode(h, body)
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(dir, ".", "chunks", 0o600, func(w io.Writer) error {
		_, err := w.Write(p)
		return err
	}); err != nil {
		return nil, err
	}
	return openTable(dir, recs)
}

// openTable opens the file that holds recs.
func openTable(dir *os.Root, recs []chunkRecord) (*table, error) {
	f, err := dir.Open("chunks")
	if err != nil {
		return nil, err
	}
	t := &table{file: f, starts: make([]uint32, len(recs))}
	for i := range recs {
		t.starts[i] = uint32(recs[i].first()) //nolint:gosec // below maxBlocks
	}
	return t, nil
}

// readTable returns the records of a table file; errCorrupt when it is not what
// writeTable writes.
func readTable(dir *os.Root, blob [32]byte) (size uint64, recs []chunkRecord, err error) {
	p, err := readState(dir, "chunks", sizeChunkRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil, fmt.Errorf("%w: %w", errCorrupt, err)
	}
	if err != nil {
		return 0, nil, err
	}
	return parseTable(p, blob)
}

// parseTable is readTable for the bytes of the file.
func parseTable(p []byte, blob [32]byte) (size uint64, recs []chunkRecord, err error) {
	h, body, err := decode(p, magicChunks, blob, sizeChunkRecord)
	if err != nil {
		return 0, nil, fmt.Errorf("chunks: %w", err)
	}
	if recs, err = decodeRecords(body); err != nil {
		return 0, nil, fmt.Errorf("chunks: %w", err)
	}
	end := uint64(0)
	for i := range recs {
		r := &recs[i]
		if r.Offset%BlockSize != 0 || r.Offset > h.Size || r.first() < end || r.Size == 0 || r.Size > rafs.MaxChunkSize || r.end()*BlockSize > h.Size ||
			r.Flags&^(flagCompressed|flagBatch) != 0 {
			return 0, nil, fmt.Errorf("chunks: %w: record %d: %d bytes at %d of %d, flags %#x", errCorrupt, i, r.Size, r.Offset, h.Size, r.Flags)
		}
		end = r.end()
	}
	return h.Size, recs, nil
}

// blobOf reads whose table it is, without comparing.
func blobOf(dir *os.Root) ([32]byte, error) {
	var h header
	f, err := dir.Open("chunks")
	if err != nil {
		return h.Blob, err
	}
	err = binary.Read(io.NewSectionReader(f, 0, sizeHeader), binary.LittleEndian, &h)
	return h.Blob, errors.Join(err, f.Close())
}

// lookup returns the chunks that lie in the blocks [first, end), by offset.
func (t *table) lookup(first, end uint64) ([]rafs.Chunk, error) {
	lo := sort.Search(len(t.starts), func(i int) bool { return uint64(t.starts[i]) >= first })
	hi := lo + sort.Search(len(t.starts)-lo, func(i int) bool { return uint64(t.starts[lo+i]) >= end })
	from := lo
	if lo > 0 {
		from-- // it may reach into the range
	}
	if from == hi {
		return nil, nil
	}
	p := make([]byte, (hi-from)*sizeChunkRecord)
	if _, err := t.file.ReadAt(p, sizeHeader+int64(from)*sizeChunkRecord); err != nil {
		return nil, fmt.Errorf("read chunk table: %w", err)
	}
	recs, err := decodeRecords(p)
	if err != nil {
		return nil, err
	}
	if from < lo && recs[0].end() <= first {
		recs = recs[1:]
	}
	out := make([]rafs.Chunk, len(recs))
	for i := range recs {
		out[i] = recs[i].chunk()
	}
	return out, nil
}

// has reports whether a chunk begins at a block.
func (t *table) has(block uint64) bool {
	_, ok := slices.BinarySearchFunc(t.starts, block, func(s uint32, b uint64) int { return cmp.Compare(uint64(s), b) })
	return ok
}
