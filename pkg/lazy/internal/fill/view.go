package fill

import (
	"cmp"
	"context"
	"slices"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

const blockSize = 4096 // of EROFS; chunks begin at a multiple of it

// view is what is known of a blob's chunks. It does not change.
type view struct {
	chunks []rafs.Chunk     // those that images use, by UncompressedOffset
	reader *rafs.BlobReader // nil: the table is not there
	units  []place          // nil: each chunk is a unit
}

// place is a unit of a blob whose blob.meta says where chunks are.
type place struct {
	off  int64
	size int64
	lo   int // its first chunk
}

// unit is what is fetched together: chunks from [off, off+size) of the blob file. size is 0 where that is not known:
// decoding says why.
type unit struct {
	n      int // in its view
	off    int64
	size   int64
	chunks []rafs.Chunk
	reader *rafs.BlobReader // that knows it
}

func (u unit) end() int64 { return u.off + u.size }

// key tells units apart, in all views of a blob.
func (u unit) key() int64 {
	if u.size == 0 {
		return -1 - int64(u.chunks[0].UncompressedOffset) //nolint:gosec // below 2^44
	}
	return u.off
}

// inOrder sorts chunks by their place in the cache, each once.
func inOrder(chunks []rafs.Chunk) []rafs.Chunk {
	slices.SortStableFunc(chunks, func(x, y rafs.Chunk) int { return cmp.Compare(x.UncompressedOffset, y.UncompressedOffset) })
	return slices.Clip(slices.CompactFunc(chunks, func(x, y rafs.Chunk) bool { return x.UncompressedOffset == y.UncompressedOffset }))
}

// place finds the units of a blob whose table says where chunks are.
func (v *view) place(ctx context.Context) error {
	v.units = make([]place, 0, 1)
	for i, c := range v.chunks {
		var p place
		if off, size, err := v.reader.StoredRange(ctx, c); err == nil && off <= 1<<62 && size <= maxUnit {
			p = place{off: int64(off), size: int64(size)}
		} else if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if last := len(v.units) - 1; last >= 0 && p.size > 0 && v.units[last].off == p.off && v.units[last].size == p.size {
			continue
		}
		p.lo = i
		v.units = append(v.units, p)
	}
	return nil
}

// find returns which chunks have blocks in [off, off+n).
func (v *view) find(off, n int64) (lo, hi int) {
	if off < 0 || n <= 0 || n > 1<<62-off {
		return 0, 0
	}
	from, to := uint64(off), uint64(off+n)
	lo, _ = slices.BinarySearchFunc(v.chunks, from, func(c rafs.Chunk, at uint64) int {
		if blocksEnd(c) <= at {
			return -1
		}
		return 1
	})
	hi = lo
	for hi < len(v.chunks) && v.chunks[hi].UncompressedOffset < to {
		hi++
	}
	return lo, hi
}

// blocksEnd is the end of a chunk's last block.
func blocksEnd(c rafs.Chunk) uint64 {
	return (c.UncompressedOffset + uint64(c.UncompressedSize) + blockSize - 1) &^ (blockSize - 1)
}

// count returns how many units there are.
func (v *view) count() int {
	if v.units != nil {
		return len(v.units)
	}
	return len(v.chunks)
}

// unit returns the n-th unit.
func (v *view) unit(n int) unit {
	if v.units == nil {
		c := &v.chunks[n]
		u := unit{n: n, off: int64(min(c.CompressedOffset, 1<<62)), size: int64(c.CompressedSize), chunks: v.chunks[n : n+1], reader: v.reader}
		if u.size > maxUnit {
			u.size = 0 // which no reader takes
		}
		return u
	}
	p, hi := v.units[n], len(v.chunks)
	if n+1 < len(v.units) {
		hi = v.units[n+1].lo
	}
	return unit{n: n, off: p.off, size: p.size, chunks: v.chunks[p.lo:hi], reader: v.reader}
}

// unitOf returns the unit that chunk n is a part of.
func (v *view) unitOf(n int) int {
	if v.units == nil {
		return n
	}
	at, ok := slices.BinarySearchFunc(v.units, n, func(p place, n int) int { return cmp.Compare(p.lo, n) })
	if !ok {
		at--
	}
	return at
}

// place returns which of the chunks lies at c's place.
func (v *view) index(c *rafs.Chunk) (int, bool) {
	return slices.BinarySearchFunc(v.chunks, c.UncompressedOffset, func(x rafs.Chunk, at uint64) int {
		return cmp.Compare(x.UncompressedOffset, at)
	})
}
