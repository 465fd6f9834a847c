package inflate

import "math/bits"

// Limits of RFC 1951.
const (
	maxBits    = 15  // longest Huffman code
	maxLit     = 288 // literal and length symbols; 286 and 287 never occur in data
	maxDist    = 32  // distance symbols; 30 and 31 never occur in data
	endOfBlock = 256
	maxMatch   = 258
)

// An entry says what a code means: how many bits it has, and the literal, length or distance behind it.
//
//	bits 0..3  length of the code (of the rest of it, in a second-level table)
//	bits 4..7  number of extra bits; in a link: index bits of the second-level table
//	bits 8..27 literal, base length, base distance, or first entry of the second-level table
//
// An entry without a kind is a code that does not exist.
type entry uint32

const (
	kindLiteral entry = 1 << 28
	kindLength  entry = 2 << 28 // or distance
	kindEnd     entry = 3 << 28
	kindLink    entry = 4 << 28
	kindMask    entry = 15 << 28
)

func makeEntry(kind entry, extra, value int) entry {
	return kind | entry(value)<<8 | entry(extra)<<4 //nolint:gosec // small numbers
}

func (e entry) kind() entry   { return e & kindMask }
func (e entry) length() uint  { return uint(e & 15) }
func (e entry) extra() uint   { return uint(e >> 4 & 15) }
func (e entry) value() uint32 { return uint32(e >> 8 & 0xfffff) }

// Meanings of the symbols, without the lengths of their codes.
var (
	litSymbols  = makeLitSymbols()
	distSymbols = makeDistSymbols()
	lenSymbols  = makeLenSymbols()
)

// makeLitSymbols: RFC 1951, 3.2.5. From symbol 265 on every four share a number of extra bits.
func makeLitSymbols() (s [maxLit]entry) {
	for i := range endOfBlock {
		s[i] = makeEntry(kindLiteral, 0, i)
	}
	s[endOfBlock] = makeEntry(kindEnd, 0, 0)
	base := 3
	for i := 257; i < 285; i++ {
		extra := max(0, (i-261)/4)
		s[i] = makeEntry(kindLength, extra, base)
		base += 1 << extra
	}
	s[285] = makeEntry(kindLength, 0, maxMatch)
	return s
}

// makeDistSymbols: from symbol 4 on every two share a number of extra bits.
func makeDistSymbols() (s [maxDist]entry) {
	base := 1
	for i := range 30 {
		extra := max(0, (i-2)/2)
		s[i] = makeEntry(kindLength, extra, base)
		base += 1 << extra
	}
	return s
}

// makeLenSymbols are those of the code that the other two codes are written in.
func makeLenSymbols() (s [19]entry) {
	for i := range s {
		s[i] = makeEntry(kindLiteral, 0, i)
	}
	return s
}

// table decodes one Huffman code: an index of the next primary bits, whose entry is the symbol or links
// to a second-level table for the bits behind them.
type table struct {
	primary uint
	entries []entry
}

// build makes the table of the code with these lengths; 0 is an unused symbol. It reports false for
// lengths that are no code: over-subscribed, or incomplete with more than one symbol (as zlib does).
func (t *table) build(primary uint, lengths []uint8, symbols []entry) bool {
	var count, next [maxBits + 1]int
	longest := 0
	for _, n := range lengths {
		count[n]++
		longest = max(longest, int(n))
	}
	count[0] = 0
	code, used := 0, 0
	for n := 1; n <= maxBits; n++ {
		code <<= 1
		next[n] = code
		code += count[n]
		used += count[n]
		if code > 1<<n {
			return false
		}
	}
	if code != 1<<maxBits && (used > 1 || longest > 1) {
		return false
	}
	t.primary = primary
	size := 1 << primary
	if cap(t.entries) < size {
		t.entries = make([]entry, size, 2*size)
	}
	t.entries = t.entries[:size]
	clear(t.entries)
	for symbol, n := range lengths {
		if n == 0 {
			continue
		}
		c := bits.Reverse16(uint16(next[n])) >> (16 - n) //nolint:gosec // at most 15 bits
		next[n]++
		t.insert(uint(c), uint(n), symbols[symbol], uint(longest))
	}
	return true
}

// insert adds the code c of n bits, first bit lowest.
func (t *table) insert(c, n uint, meaning entry, longest uint) {
	if n <= t.primary {
		for i := c; i < 1<<t.primary; i += 1 << n {
			t.entries[i] = meaning | entry(n) //nolint:gosec // a small number
		}
		return
	}
	second := longest - t.primary
	link := &t.entries[c&(1<<t.primary-1)]
	if link.kind() == 0 {
		*link = makeEntry(kindLink, int(second), len(t.entries)) | entry(t.primary) //nolint:gosec // at most 15
		for range 1 << second {
			t.entries = append(t.entries, 0)
		}
		link = &t.entries[c&(1<<t.primary-1)] // append may have moved it
	}
	part := t.entries[link.value():]
	for i := c >> t.primary; i < 1<<second; i += 1 << (n - t.primary) {
		part[i] = meaning | entry(n-t.primary) //nolint:gosec // a small number
	}
}

// fixedTables are those of block type 1.
func fixedTables() (lit, dist table) {
	var l [maxLit]uint8
	for i := range l {
		switch {
		case i < 144:
			l[i] = 8
		case i < 256:
			l[i] = 9
		case i < 280:
			l[i] = 7
		default:
			l[i] = 8
		}
	}
	var d [maxDist]uint8
	for i := range d {
		d[i] = 5
	}
	if !lit.build(litBits, l[:], litSymbols[:]) || !dist.build(distBits, d[:], distSymbols[:]) {
		panic("inflate: fixed tables")
	}
	return lit, dist
}
