package zstdenc

import (
	"math"
	"math/bits"
	"slices"
)

// Modes of a sequence table. Source: RFC 8878 section 3.1.1.3.2.1.
const (
	modePredefined = iota
	modeRLE
	modeCompressed
	modeRepeat
)

// kind is one of the three alphabets of a sequence.
type kind struct {
	symbols    int
	log        uint8 // most
	predefined fseTable
}

const (
	kindLiterals = iota
	kindOffset
	kindMatch
	kinds
)

// tables are those of one block.
type tables [kinds]*fseTable

// single is the table of an alphabet of one symbol: one state, no bits.
var single fseTable

// Default distributions. Source: RFC 8878 section 3.1.1.3.2.2.
var (
	defaultLiterals = []int16{
		4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1,
		-1, -1, -1, -1,
	}
	defaultOffsets = []int16{1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1}
	defaultMatches = []int16{
		1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
		1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
	}
)

// kindsOf holds the limits and default tables. Source: RFC 8878 section 3.1.1.3.2.1.
var kindsOf = func() (k [kinds]kind) {
	for i, d := range []struct {
		norm []int16
		log  uint8
		most uint8
	}{{defaultLiterals, 6, 9}, {defaultOffsets, 5, 8}, {defaultMatches, 6, 9}} {
		k[i].symbols, k[i].log = len(d.norm), d.most
		k[i].predefined.build(d.norm, d.log)
	}
	return k
}()

// Codes of lengths. Source: RFC 8878 section 3.1.1.3.2.1.1.
var (
	literalsBits = [64]uint8{16: 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	matchBits    = [64]uint8{32: 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

	literalsCodes = [64]uint8(codesOf(64, literalsBits[:]))
	matchCodes    = [128]uint8(codesOf(128, matchBits[:]))
)

// codesOf returns the code of each length below n.
func codesOf(n int, extra []uint8) []uint8 {
	var codes []uint8
	for code, b := range extra {
		for range 1 << b {
			if len(codes) == n {
				return codes
			}
			codes = append(codes, uint8(code)) // below maxSymbols
		}
	}
	return codes
}

func literalsCode(n uint32) uint8 {
	if n < 64 {
		return literalsCodes[n]
	}
	return uint8(bits.Len32(n) - 1 + 19) //nolint:gosec // 64 has code 25
}

func matchCode(n uint32) uint8 {
	if n < 128 {
		return matchCodes[n]
	}
	return uint8(bits.Len32(n) - 1 + 36) //nolint:gosec // 128 has code 43
}

// codes are those of one sequence.
type codes struct{ literals, offset, match uint8 }

// appendSections writes the body of a block of size bytes. ok is false when it is not worth it.
func (e *Encoder) appendSections(dst []byte, size int) (_ []byte, ok bool) {
	start := len(dst)
	dst = e.appendLiterals(dst)
	if len(dst)-start >= size {
		return dst, false
	}
	return e.appendSequences(dst), true
}

// appendSequences writes the sequences section. Source: RFC 8878 section 3.1.1.3.2.
func (e *Encoder) appendSequences(dst []byte) []byte {
	seqs := e.block.sequences
	n := len(seqs)
	switch {
	case n == 0:
		return append(dst, 0)
	case n < 128:
		dst = append(dst, byte(n))
	case n < 0x7f00:
		dst = append(dst, byte(n>>8|0x80), byte(n)) //nolint:gosec // one byte of a field at a time
	default:
		dst = append(dst, 0xff, byte(n-0x7f00), byte((n-0x7f00)>>8)) //nolint:gosec // one byte of a field at a time
	}
	var counts [kinds][64]uint32
	e.codes = slices.Grow(e.codes[:0], n)[:n]
	for i, s := range seqs {
		c := codes{literalsCode(s.literals), uint8(bits.Len32(s.offset) - 1), matchCode(s.match)} //nolint:gosec // offsets are at least 1
		counts[kindLiterals][c.literals&63]++
		counts[kindOffset][c.offset&63]++
		counts[kindMatch][c.match&63]++
		e.codes[i] = c
	}
	modes := len(dst)
	dst = append(dst, 0)
	for k := range kinds {
		var mode byte
		dst, mode = e.appendTable(dst, k, counts[k][:kindsOf[k].symbols], uint32(n)) //nolint:gosec // below 128 Ki
		dst[modes] |= mode << (6 - 2*k)
	}
	return e.appendBits(dst)
}

// appendTable chooses and describes the table of alphabet k, and keeps it in e.prev and e.use.
// total is the sum of counts, greater than 0.
func (e *Encoder) appendTable(dst []byte, k int, counts []uint32, total uint32) ([]byte, byte) {
	last := len(counts) - 1
	for counts[last] == 0 {
		last--
	}
	counts = counts[:last+1]
	if counts[last] == total {
		e.prev[k], e.use[k] = nil, &single
		return append(dst, byte(last)), modeRLE //nolint:gosec // one byte of a field at a time
	}
	best, mode, table := kindsOf[k].predefined.cost(counts), byte(modePredefined), &kindsOf[k].predefined
	if p := e.prev[k]; p != nil {
		if c := p.cost(counts); c < best {
			best, mode, table = c, modeRepeat, p
		}
	}
	var space [maxSymbols]int16
	norm, log := space[:last+1], tableLog(total, last, kindsOf[k].log)
	normalize(norm, counts, total, log)
	e.desc = appendNorm(e.desc[:0], norm, log)
	if cost(norm, counts, log)+int64(8*len(e.desc))*bitCost < best {
		mode, table = modeCompressed, &e.own[k]
		table.build(norm, log)
		dst = append(dst, e.desc...)
	}
	e.prev[k], e.use[k] = table, table
	return dst, mode
}

const (
	bitCost    = 1 << 10 // a bit, in the unit of costs
	impossible = 1 << 30 // cost of a symbol that a table lacks: above all a block can take
)

// costs are what a symbol with n of 1<<maxTableLog states takes. Integers, so that every
// machine chooses the same tables.
var costs = func() (c [1<<maxTableLog + 1]int64) {
	c[0] = impossible
	for n := 1; n < len(c); n++ {
		c[n] = int64(math.Round((maxTableLog - math.Log2(float64(n))) * bitCost))
	}
	return c
}()

// cost returns what symbols in such numbers take with table t.
func (t *fseTable) cost(counts []uint32) int64 {
	if len(counts) > t.count {
		return impossible
	}
	return cost(t.norm[:len(counts)], counts, t.log)
}

func cost(norm []int16, counts []uint32, log uint8) int64 {
	sum, less := int64(0), int64(maxTableLog-log)*bitCost
	for s, c := range counts {
		if c > 0 {
			sum += int64(c) * (costs[abs(int(norm[s]))] - less)
		}
	}
	return sum
}

// appendBits writes the sequences, the last first. Source: RFC 8878 section 3.1.1.3.2.1.
//
// Its state is in local variables on purpose: that of a struct of so many fields would be in memory, and every sequence
// would wait for that.
func (e *Encoder) appendBits(dst []byte) []byte {
	const (
		most  = 12 // bytes a sequence takes: 3 states of 9 bits, lengths of 16, an offset of 24
		empty = 30 // bits that word has room for when 7 and those of three states are in it: 9, 8 and 9
	)
	seqs := e.block.sequences
	codes := e.codes[:len(seqs)]
	dst = slices.Grow(dst, len(seqs)*most+32)
	w := bitWriter(dst[len(dst):cap(dst)])
	ll, of, ml := e.use[kindLiterals], e.use[kindOffset], e.use[kindMatch]

	i := len(seqs) - 1
	c, s := codes[i], seqs[i]
	sl, so, sm := ll.first(c.literals), of.first(c.offset), ml.first(c.match)
	var word, v uint64
	var used, n uint
	for {
		lb, mb, ob := uint(literalsBits[c.literals&63]), uint(matchBits[c.match&63]), uint(c.offset)
		word |= (uint64(s.literals) & (1<<(lb&63) - 1)) << (used & 63)
		if used += lb; lb+mb+ob > empty {
			w, word, used = w.flush(word, used)
		}
		word |= (uint64(s.match) & (1<<(mb&63) - 1)) << (used & 63)
		used += mb
		word |= (uint64(s.offset) & (1<<(ob&63) - 1)) << (used & 63)
		w, word, used = w.flush(word, used+ob)
		if i--; i < 0 {
			break
		}
		c, s = codes[i], seqs[i]
		v, n, so = of.next(so, c.offset)
		word, used = word|v<<(used&63), used+n
		v, n, sm = ml.next(sm, c.match)
		word, used = word|v<<(used&63), used+n
		v, n, sl = ll.next(sl, c.literals)
		word, used = word|v<<(used&63), used+n
	}
	for _, last := range [kinds]struct {
		t     *fseTable
		state uint32
	}{{ml, sm}, {of, so}, {ll, sl}} {
		word |= uint64(last.state) & (1<<last.t.log - 1) << used
		used += uint(last.t.log)
	}
	word |= 1 << used
	w, _, used = w.flush(word, used+1)
	size := cap(dst) - len(dst) - len(w)
	if used > 0 {
		size++ // flush wrote the rest already
	}
	return dst[:len(dst)+size]
}
