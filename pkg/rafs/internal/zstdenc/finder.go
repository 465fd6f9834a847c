package zstdenc

import (
	"encoding/binary"
	"math/bits"
)

// finder finds matches with two tables: where a string of 8 bytes was last, and where one of 5
// bytes was. An entry is a position and, above it, a tag: further bits of the string's hash, which
// tell most other strings apart with no look at them. Positions count from base, which grows by every
// frame, so that those of earlier frames are below it and the tables are rarely cleared.
type finder struct {
	long  [1 << longBits]uint32
	short [1 << shortBits]uint32
	base  uint32 // position of the frame's first byte; at least 1
	next  uint32 // base of the next frame; 0 before the first

	longShift, shortShift uint8 // make an index of a hash
}

const (
	// Both tables together fit a cache of 512 KiB.
	longBits  = 16
	shortBits = 15
	leastBits = 10 // entries used for the smallest chunks, log2

	positionBits = 25 // twice MaxSize
	tagMask      = 1<<32 - 1<<positionBits
	tagShift     = 15 // puts bits 40 to 46 of a hash where the tag is, below those of an index

	longString = 8 // bytes that the long table tells apart
	lookahead  = longString + 1

	// skipShift: the finder hurries through bytes without a match, by one byte more for
	// every 64.
	skipShift = 6

	// Odd numbers with half their bits set spread strings over 64 bits: the fraction of the
	// golden ratio, and one made by chance.
	longPrime  = 0x9E3779B97F4A7C15
	shortPrime = 0xC2B2AE3D27D4EB4F
)

// begin prepares for a frame of size bytes.
func (f *finder) begin(size int) {
	n := uint32(size) //nolint:gosec // at most MaxSize
	if f.next == 0 || f.next > 1<<positionBits-n {
		clear(f.long[:])
		clear(f.short[:])
		f.next = 1
	}
	f.base = f.next
	f.next += n
	// Small chunks use the front of the tables only, which stays in the cache.
	log := max(leastBits, bits.Len(uint(size)))
	f.longShift = uint8(64 - min(longBits, log))   // 48 to 54
	f.shortShift = uint8(64 - min(shortBits, log)) // 49 to 54
}

func load32(b []byte, i int) uint32 { return binary.LittleEndian.Uint32(b[i:]) }
func load64(b []byte, i int) uint64 { return binary.LittleEndian.Uint64(b[i:]) }

func hashLong(v uint64) uint64  { return v * longPrime }
func hashShort(v uint64) uint64 { return v << 24 * shortPrime } // the low 5 bytes

func (f *finder) longAt(h uint64) *uint32 { return &f.long[h>>(f.longShift&63)&(1<<longBits-1)] }
func (f *finder) shortAt(h uint64) *uint32 {
	return &f.short[h>>(f.shortShift&63)&(1<<shortBits-1)]
}

// tag returns the tag of hash h, in its place above a position.
func tag(h uint64) uint32 { return uint32(h>>tagShift) & tagMask } //nolint:gosec // cut on purpose

// putLong enters the string of 8 bytes at i.
func (f *finder) putLong(src []byte, i int) {
	h := hashLong(load64(src, i))
	*f.longAt(h) = (f.base + uint32(i)) | tag(h) //nolint:gosec // below 1<<positionBits
}

// putShort enters the string of 5 bytes at i.
func (f *finder) putShort(src []byte, i int) {
	h := hashShort(load64(src, i))
	*f.shortAt(h) = (f.base + uint32(i)) | tag(h) //nolint:gosec // below 1<<positionBits
}

// matchLen returns how many bytes from a on equal those from b on; a < b.
func matchLen(src []byte, a, b int) int {
	start := b
	for b+8 <= len(src) {
		if x := load64(src, a) ^ load64(src, b); x != 0 {
			return b - start + bits.TrailingZeros64(x)>>3
		}
		a, b = a+8, b+8
	}
	for b < len(src) && src[a] == src[b] {
		a, b = a+1, b+1
	}
	return b - start
}

// putInside enters strings of a match from first to end, for what follows.
func (f *finder) putInside(src []byte, first, end int) {
	f.putLong(src, first+2)
	f.putShort(src, first+2)
	f.putLong(src, end-2)
	f.putShort(src, end-1)
}

// longAfter returns where the string of 8 bytes behind that at i, whose position is pos, was before, and enters it.
func (f *finder) longAfter(src []byte, i int, pos uint32) (at int, found bool) {
	v := load64(src, i+1)
	h := hashLong(v)
	p, t := f.longAt(h), tag(h)
	c := *p - (t | f.base)
	*p = (pos + 1) | t
	return int(c), c <= uint32(i) && load64(src, int(c)) == v //nolint:gosec // at most MaxSize
}

// find makes sequences and literals of src from start on; matches begin anywhere before.
//
// An entry less tag and base is the string's place in the frame. One of another tag or
// of an earlier frame gives a number that is not below i: it is off by at least the size of the
// frame, because positions end below 1<<positionBits. Repeated offsets never exceed i: they were used before it,
// and what a frame begins with is below 5.
//
// It is one long function with its state in local variables on purpose: this loop is most of
// the encoder's time.
func (f *finder) find(src []byte, start int, reps *reps, out *block) {
	base, limit := f.base, len(src)-lookahead
	rep0, rep1, rep2 := reps[0], reps[1], reps[2]
	anchor, i := start, max(start, 1)
	for i < limit {
		v := load64(src, i)
		pos := base + uint32(i) //nolint:gosec // below 1<<positionBits
		hl, hs := hashLong(v), hashShort(v)
		tl, ts := tag(hl), tag(hs)
		pl, ps := f.longAt(hl), f.shortAt(hs)
		cl, cs := *pl-(tl|base), *ps-(ts|base)
		*pl, *ps = pos|tl, pos|ts
		var at, n int
		switch {
		case load32(src, i+1-int(rep0)) == uint32(v>>8): //nolint:gosec // cut on purpose
			i++
			n = 4 + matchLen(src, i+4-int(rep0), i+4)
			out.add(src, anchor, i, n, 1)
			goto matched
		case cl < uint32(i) && load64(src, int(cl)) == v: //nolint:gosec // at most MaxSize
			at = int(cl)
			n = 8 + matchLen(src, at+8, i+8)
		case cs < uint32(i) && load32(src, int(cs)) == uint32(v): //nolint:gosec // at most MaxSize; cut on purpose
			at = int(cs)
			if next, longer := f.longAfter(src, i, pos); longer {
				i, at = i+1, next
				n = 8 + matchLen(src, at+8, i+8)
			} else {
				n = 4 + matchLen(src, at+4, i+4)
			}
		default:
			i += (i-anchor)>>skipShift + 1
			continue
		}
		rep0, rep1, rep2 = uint32(i-at), rep0, rep1 //nolint:gosec // at most MaxSize
		for at > 0 && i > anchor && src[at-1] == src[i-1] {
			at, i, n = at-1, i-1, n+1
		}
		out.add(src, anchor, i, n, rep0+repeats)
	matched:
		first := i
		i, anchor = i+n, i+n
		if i >= limit {
			break
		}
		f.putInside(src, first, i)
		for i < limit && load32(src, i-int(rep1)) == load32(src, i) {
			n := 4 + matchLen(src, i+4-int(rep1), i+4)
			rep0, rep1 = rep1, rep0
			f.putLong(src, i)
			f.putShort(src, i)
			out.add(src, i, i, n, 1)
			i += n
			anchor = i
		}
	}
	*reps = [repeats]uint32{rep0, rep1, rep2}
	out.literals = append(out.literals, src[anchor:]...)
}
