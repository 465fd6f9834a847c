package gunzip

import "math/bits"

// A decoding table maps the next bits of the input to an entry:
//
//	bits  0..7   code length; in a pointer to a subtable the bits of the main table
//	bits  8..11  extra bits of a length or distance; in a pointer the bits of the subtable
//	bits 12..15  what the entry is
//	bits 16..31  the literal, the base of the length or distance, or the start of the subtable
//
// The zero entry is no code.
const (
	entryLiteral = 1 << 12
	entryBase    = 1 << 13
	entryEnd     = 1 << 14
	entryPointer = 1 << 15

	litBits  = 11 // bits of the main table of literals and lengths
	distBits = 8  // bits of the main table of distances

	maxCode  = 15 // bits of the longest code
	maxLit   = 286
	maxDist  = 30
	maxCLen  = 19
	clenBits = 7 // bits of the longest code of code lengths

	// Tables that no set of codes outgrows: a subtable for each main entry whose code is
	// longer would be 2^4 and 2^7 entries; the sum of complete codes is far less.
	// Source: zlib's enough.c, for 286 codes, 11 and 15 bits: 2342; for 30 codes, 8 and 15
	// bits: 402.
	litTable  = 2342
	distTable = 402
)

// The values of the symbols above 255 and of the distances. Source: RFC 1951, 3.2.5.
func lengthEntry(sym uint32) uint32 {
	switch {
	case sym == 256:
		return entryEnd
	case sym < 265:
		return entryBase | (sym-254)<<16
	case sym == 285:
		return entryBase | 258<<16
	case sym < 285:
		extra := (sym - 261) / 4
		return entryBase | extra<<8 | (((sym-261)%4+4)<<extra+3)<<16
	}
	return 0 // 286 and 287 have codes in the fixed set and no meaning
}

func distEntry(sym uint32) uint32 {
	switch {
	case sym < 4:
		return entryBase | (sym+1)<<16
	case sym < maxDist:
		extra := (sym - 2) / 2
		return entryBase | extra<<8 | ((sym%2+2)<<extra+1)<<16
	}
	return 0
}

func litEntry(sym uint32) uint32 {
	if sym < 256 {
		return entryLiteral | sym<<16
	}
	return lengthEntry(sym)
}

func clenEntry(sym uint32) uint32 { return entryLiteral | sym<<16 }

// buildTable fills table from the lengths of the codes. It reports whether the codes are
// a set that may be used: complete, or a single code of one bit, or none at all (which
// a block without matches may have for distances).
func buildTable(table []uint32, mainBits uint32, lengths []uint8, entry func(sym uint32) uint32) bool {
	var count [maxCode + 1]uint32
	for _, n := range lengths {
		count[n]++
	}
	used := len(lengths) - int(count[0])
	clear(table[:1<<mainBits])
	if used == 0 {
		return true
	}
	var next [maxCode + 2]uint32
	code := uint32(0)
	for n := uint32(1); n <= maxCode; n++ {
		code <<= 1
		next[n] = code
		code += count[n]
		if code > 1<<n {
			return false
		}
	}
	if code != 1<<maxCode && (used != 1 || count[1] != 1) {
		return false
	}
	free := uint32(1) << mainBits // of the table, for subtables
	for n := uint32(1); n <= maxCode; n++ {
		if count[n] == 0 {
			continue
		}
		for sym, l := range lengths {
			if uint32(l) != n {
				continue
			}
			rev := bits.Reverse32(next[n]) >> (32 - n)
			next[n]++
			e := entry(uint32(sym))
			if n <= mainBits {
				for i := rev; i < 1<<mainBits; i += 1 << n {
					table[i] = e | n
				}
				continue
			}
			slot := &table[rev&(1<<mainBits-1)]
			if *slot == 0 {
				size := subtableBits(next[n]-1, n, mainBits, count[:])
				*slot = entryPointer | free<<16 | size<<8 | mainBits
				clear(table[free : free+1<<size])
				free += 1 << size
			}
			start, size := *slot>>16, *slot>>8&0xf
			for i := rev >> mainBits; i < 1<<size; i += 1 << (n - mainBits) {
				table[start+i] = e | (n - mainBits)
			}
		}
	}
	return true
}

// subtableBits is the size of the subtable that begins with a code of n bits: large enough
// for the longest code that shares its first mainBits bits.
func subtableBits(code, n, mainBits uint32, count []uint32) uint32 {
	size := n - mainBits
	room := uint32(1) << size // codes of this length that fit
	need := count[n] - (code - firstOf(count, n))
	for room > need && mainBits+size < maxCode {
		size++
		room = (room - need) << 1
		need = count[mainBits+size]
	}
	return size
}

// firstOf is the first code of n bits.
func firstOf(count []uint32, n uint32) uint32 {
	code := uint32(0)
	for i := uint32(1); i <= n; i++ {
		code <<= 1
		if i < n {
			code += count[i]
		}
	}
	return code
}
