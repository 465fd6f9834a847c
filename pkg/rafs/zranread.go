package rafs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
	"github.com/headstart-oci/headstart/pkg/rafs/internal/inflate"
)

// parseZran reads the contexts of a ZRAN table of size bytes, and their dictionaries if table has them.
func (t *metaTable) parseZran(h disk.MetaHeader, table []byte, size uint64) error {
	p, err := t.contexts(h, table, size)
	if err != nil {
		return err
	}
	t.zran = make([]disk.ZranContext, h.ContextCount)
	if _, err := binary.Decode(p, binary.LittleEndian, t.zran); err != nil {
		return err
	}
	t.dictsAt, t.dictEnd = uint64(len(t.records)+len(p)), h.ContextSize-uint64(len(p))
	if uint64(len(table)) == size {
		t.dicts = table[t.dictsAt:][:t.dictEnd]
	}
	var total uint64
	for i := range t.zran {
		c := &t.zran[i]
		section := fmt.Sprintf("ZRAN context %d of %s", i, short(t.blob.ID))
		at := int64(len(t.records)) + int64(i)*disk.SizeZranContext
		in := [2]uint64{c.InOffset, uint64(c.InSize)}
		dict := [2]uint64{c.DictOffset, uint64(c.DictSize)}
		total += uint64(c.InSize)
		err := firstBroken(section, at, []rule{
			{inside(in, t.blob.CompressedSize), "place in the compressed data", in, fmt.Sprintf("inside %d bytes", t.blob.CompressedSize)},
			{c.DictSize <= inflate.WindowSize, "dict_size", c.DictSize, fmt.Sprintf("at most %d", inflate.WindowSize)},
			{inside(dict, t.dictEnd), "place of the dictionary", dict, fmt.Sprintf("inside %d bytes", t.dictEnd)},
			{c.Bits < 8, "ctx_bits", c.Bits, "at most 7"},
			{uint64(c.OutSize) <= maxInflated(c.InSize), "out_len", c.OutSize, fmt.Sprintf("at most %d", maxInflated(c.InSize))},
			// Contexts overlap by a chunk or a deflate block; many that claim the same bytes would be work without end.
			{total <= 4*t.blob.CompressedSize+1<<20, "in_len of all contexts", total, fmt.Sprintf("at most %d", 4*t.blob.CompressedSize+1<<20)},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// maxDeflateRatio is what a byte of deflate data can become: 258 bytes for a length and a distance of a bit each. RFC 1951, 3.2.5.
const maxDeflateRatio = 258 * 8 / 2

// maxInflated is what size bytes of deflate data can become, and the bits before them.
func maxInflated(size uint32) uint64 { return (uint64(size) + 1) * maxDeflateRatio }

// checkZran verifies record i, which lies in a gzip stream.
func (t *metaTable) checkZran(i uint32, r metaRecord, section string, at int64) error {
	if uint64(r.batchIndex) >= uint64(len(t.zran)) {
		return invalid(section, at, "ZRAN context", r.batchIndex, fmt.Sprintf("below %d", len(t.zran)))
	}
	c := &t.zran[r.batchIndex]
	if end := uint64(r.batchOffset) + uint64(r.uncompressedSize); end > uint64(c.OutSize) {
		return invalid(section, at, "end in its ZRAN context", end, fmt.Sprintf("at most %d", c.OutSize))
	}
	if i == 0 {
		return nil
	}
	// Chunks come in the order of the stream and none overlaps the next, so that reading all of them is one pass.
	prev := t.record(i - 1)
	switch least := uint64(prev.batchOffset) + uint64(prev.uncompressedSize); {
	case !prev.zran:
		return invalid(section, at, "flags", "ZRAN", "none, as the record before")
	case prev.batchIndex > r.batchIndex:
		return invalid(section, at, "ZRAN context", r.batchIndex, fmt.Sprintf("at least %d", prev.batchIndex))
	case prev.batchIndex == r.batchIndex && uint64(r.batchOffset) < least:
		return invalid(section, at, "offset in its ZRAN context", r.batchOffset, fmt.Sprintf("at least %d", least))
	}
	return nil
}

// zranCursors are decoders at rest in the middle of a stream. The zero value is ready. Safe for concurrent use.
type zranCursors struct {
	mu   sync.Mutex // guards list
	list []*zranCursor
}

// maxCursors bounds the decoders that one blob keeps; each takes about 150 KiB. As many
// readers in ascending order do not disturb each other.
const maxCursors = 8

// zranCursor is a decoder inside a context.
type zranCursor struct {
	context uint32
	decoder *inflate.Decoder
	at      uint64 // where pending begins in the context's output
	pending []byte // decompressed and not used
}

// take returns the cursor of a context that is nearest before offset; nil when there is none.
func (c *zranCursors) take(context uint32, offset uint64) *zranCursor {
	c.mu.Lock()
	defer c.mu.Unlock()
	best := -1
	for i, k := range c.list {
		if k.context == context && k.at <= offset && (best < 0 || k.at > c.list[best].at) {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	k := c.list[best]
	c.list = append(c.list[:best], c.list[best+1:]...)
	return k
}

// give keeps a cursor for later, in place of the one unused for longest.
func (c *zranCursors) give(k *zranCursor) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.list) >= maxCursors {
		c.list = append(c.list[:0], c.list[1:]...)
	}
	c.list = append(c.list, k)
}

// readZran decompresses a chunk of a gzip stream; r has been checked.
func (b *BlobReader) readZran(r metaRecord) ([]byte, error) {
	k := b.zran.take(r.batchIndex, uint64(r.batchOffset))
	if k == nil {
		c := &b.meta.zran[r.batchIndex]
		in := io.NewSectionReader(b.r, clampOffset(c.InOffset), int64(c.InSize))
		dict, err := b.dictionary(c)
		if err != nil {
			return nil, err
		}
		k = &zranCursor{context: r.batchIndex, decoder: inflate.Resume(in, c.Byte, uint(c.Bits), dict)}
	}
	p := make([]byte, r.uncompressedSize)
	if err := k.read(p, uint64(r.batchOffset)); err != nil {
		if errors.Is(err, inflate.ErrFormat) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("%w: gzip data of ZRAN context %d: %w", ErrInvalid, r.batchIndex, err)
		}
		return nil, fmt.Errorf("gzip data of ZRAN context %d: %w", r.batchIndex, err)
	}
	b.zran.give(k)
	return p, nil
}

// read fills p from offset of the context's output, which must not be before k.at.
func (k *zranCursor) read(p []byte, offset uint64) error {
	for {
		skip := min(offset-k.at, uint64(len(k.pending)))
		k.at, k.pending = k.at+skip, k.pending[skip:]
		if k.at == offset {
			n := copy(p, k.pending)
			p, offset = p[n:], offset+uint64(n) //nolint:gosec // a length
			k.at, k.pending = offset, k.pending[n:]
			if len(p) == 0 {
				return nil
			}
		}
		var err error
		if k.pending, err = k.decoder.Next(); err != nil {
			return err
		}
	}
}
