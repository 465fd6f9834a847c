package zstdenc

import (
	"encoding/binary"
	"math/bits"
)

// bitWriter is where bits are written, from the lowest on, as RFC 8878 section 4.1 has them: the decoder
// reads them backwards. flush needs 8 bytes of it.
type bitWriter []byte

// flush moves whole bytes of the used bits of word out, so that at most 7 bits stay. used is below 64.
func (w bitWriter) flush(word uint64, used uint) (bitWriter, uint64, uint) {
	binary.LittleEndian.PutUint64(w, word)
	return w[used>>3&7:], word >> (used &^ 7 & 63), used & 7
}

// symbolTransform says how a symbol moves the state. Source: RFC 8878 section 4.1;
// the arithmetic is that of Duda's tANS with precomputed sums.
type symbolTransform struct {
	bits uint32 // (bits put out, rounded up) << 16, less the first state that needs so many
	find int32  // added to the shifted state: index of the next state
}

// fseTable encodes one alphabet of at most 64 symbols, log2 of whose states is at most 9.
type fseTable struct {
	log    uint8
	states [1 << maxTableLog]uint16
	symbol [64]symbolTransform // as many as are told apart without a check
	norm   [maxSymbols]int16
	count  int // symbols: 1 + the largest
}

const (
	maxTableLog = 9 // RFC 8878 section 3.1.1.3.2.1: literal and match lengths
	minTableLog = 5
	maxSymbols  = 53 // of match lengths, the largest alphabet
)

// build makes the table of norm, whose values sum to 1<<log; -1 counts as 1.
// Source: RFC 8878 section 4.1.1.
func (t *fseTable) build(norm []int16, log uint8) {
	var (
		size  = 1 << log
		mask  = size - 1
		step  = size>>1 + size>>3 + 3
		high  = size - 1
		cells [1 << maxTableLog]uint8
		first [maxSymbols + 1]uint16
	)
	t.log, t.count = log, len(norm)
	copy(t.norm[:], norm)
	for s, n := range norm {
		if n == -1 {
			first[s+1] = first[s] + 1
			cells[high] = uint8(s) // below maxSymbols
			high--
			continue
		}
		first[s+1] = first[s] + uint16(n) //nolint:gosec // not negative
	}
	pos := 0
	for s, n := range norm {
		for range n { // none for -1
			cells[pos] = uint8(s) // below maxSymbols
			pos = (pos + step) & mask
			for pos > high {
				pos = (pos + step) & mask
			}
		}
	}
	for i, s := range cells[:size] {
		t.states[first[s]] = uint16(size + i) //nolint:gosec // below 1<<10
		first[s]++
	}
	total := int32(0)
	for s, n := range norm {
		switch n {
		case 0:
			t.symbol[s] = symbolTransform{}
		case 1, -1:
			t.symbol[s] = symbolTransform{uint32(log)<<16 - uint32(size), total - 1} //nolint:gosec // size is at most 512
			total++
		default:
			out := uint32(log) - uint32(bits.Len16(uint16(n-1))-1)                    //nolint:gosec // n is from 2 to 512
			t.symbol[s] = symbolTransform{out<<16 - uint32(n)<<out, total - int32(n)} //nolint:gosec // same
			total += int32(n)
		}
	}
}

// first returns the state for the first symbol, which costs no bits.
func (t *fseTable) first(s uint8) uint32 {
	tr := t.symbol[s&63]
	out := (tr.bits + 1<<15) >> 16
	v := out<<16 - tr.bits
	return uint32(t.states[int32(v>>out)+tr.find]) //nolint:gosec // a state
}

// next returns the n bits of going to symbol s, and the state there.
func (t *fseTable) next(state uint32, s uint8) (bits uint64, n uint, to uint32) {
	tr := t.symbol[s&63]
	out := (state + tr.bits) >> 16
	to = uint32(t.states[(int32(state>>(out&31))+tr.find)&(1<<maxTableLog-1)]) //nolint:gosec // a state
	return uint64(state) & (1<<(out&63) - 1), uint(out), to
}

// normalize makes counts, whose sum is total, sum to 1<<log, which is at least their number;
// a symbol that occurs keeps at least 1.
func normalize(norm []int16, counts []uint32, total uint32, log uint8) {
	left, most := 1<<log, 0
	for s, c := range counts {
		n := int((uint64(c)<<log + uint64(total/2)) / uint64(total)) //nolint:gosec // at most 1<<log
		if c > 0 {
			n = max(n, 1)
		}
		norm[s] = int16(n) //nolint:gosec // at most 512
		left -= n
		if c > counts[most] {
			most = s
		}
	}
	if left > 0 {
		norm[most] += int16(left) //nolint:gosec // at most 512
	}
	// Rare symbols took more than their share: the largest give it back.
	for left < 0 {
		largest := 0
		for s, n := range norm {
			if n > norm[largest] {
				largest = s
			}
		}
		n := min(-left, int(norm[largest]>>2)+1) // leaves at least 1 of at least 2
		norm[largest] -= int16(n)                //nolint:gosec // at most 512
		left += n
	}
}

// tableLog chooses the number of states for total symbols, the largest of which is last.
func tableLog(total uint32, last int, most uint8) uint8 {
	log := bits.Len32(total-1) - 3
	log = max(log, bits.Len32(uint32(last))+1, minTableLog) //nolint:gosec // not negative
	return uint8(min(log, int(most)))                       //nolint:gosec // 5 to 9
}

// appendNorm writes the description of a table. Source: RFC 8878 section 4.1.1.
func appendNorm(dst []byte, norm []int16, log uint8) []byte {
	var word, used uint64
	put := func(v, n uint64) {
		word |= v << used
		for used += n; used >= 8; used -= 8 {
			dst = append(dst, byte(word)) //nolint:gosec // one byte of a field at a time
			word >>= 8
		}
	}
	put(uint64(log-minTableLog), 4)
	left := int(1)<<log + 1 // one more than what is not yet given away
	for s := 0; s < len(norm) && left > 1; {
		// A value from 0 to left is written; small ones save a bit.
		n := bits.Len(uint(left))
		most := 1<<n - 1 - left
		v := int(norm[s]) + 1
		switch {
		case v < most:
			put(uint64(v), uint64(n-1)) //nolint:gosec // not negative
		case v >= 1<<(n-1):
			put(uint64(v+most), uint64(n)) //nolint:gosec // not negative
		default:
			put(uint64(v), uint64(n)) //nolint:gosec // not negative
		}
		left -= abs(int(norm[s]))
		s++
		if v != 1 {
			continue
		}
		zeros := 0
		for s < len(norm) && norm[s] == 0 {
			s, zeros = s+1, zeros+1
		}
		for ; zeros >= 3; zeros -= 3 {
			put(3, 2)
		}
		put(uint64(zeros), 2) //nolint:gosec // below 3
	}
	if used > 0 {
		dst = append(dst, byte(word))
	}
	return dst
}

func abs(n int) int {
	if n < 0 {
		return -n
	}
	return n
}
