package zstdenc

import "github.com/klauspost/compress/huff0"

// Types of a literals section. Source: RFC 8878 section 3.1.1.3.1.1.
const (
	literalsRaw = iota
	literalsRLE
	literalsCompressed
	literalsTreeless
)

// appendLiterals writes the literals section. Source: RFC 8878 section 3.1.1.3.1.
func (e *Encoder) appendLiterals(dst []byte) []byte {
	lits := e.block.literals
	const (
		worth  = 32   // fewer are not worth a table
		single = 1024 // up to here one stream
	)
	if len(lits) < worth {
		return appendRawLiterals(dst, lits)
	}
	compress := huff0.Compress4X
	if len(lits) < single {
		compress = huff0.Compress1X
	}
	out, reused, err := compress(lits, &e.literals)
	switch {
	case err == huff0.ErrUseRLE: //nolint:errorlint // returned as it is
		return append(appendLiteralsSize(dst, literalsRLE, len(lits)), lits[0])
	case err != nil || len(out)+3 >= len(lits):
		if err == nil {
			e.literals.Reuse = huff0.ReusePolicyNone
		}
		return appendRawLiterals(dst, lits)
	}
	e.literals.Reuse = huff0.ReusePolicyAllow
	typ := literalsCompressed
	if reused {
		typ = literalsTreeless
	}
	n, c := uint64(len(lits)), uint64(len(out))
	switch most := max(n, c); {
	case len(lits) < single:
		v := uint64(typ) | n<<4 | c<<14 //nolint:gosec // 0 to 3
		dst = append(dst, byte(v), byte(v>>8), byte(v>>16))
	case most < 1<<14:
		v := uint64(typ) | 2<<2 | n<<4 | c<<18 //nolint:gosec // 0 to 3
		dst = append(dst, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
	default:
		v := uint64(typ) | 3<<2 | n<<4 | c<<22 //nolint:gosec // 0 to 3
		dst = append(dst, byte(v), byte(v>>8), byte(v>>16), byte(v>>24), byte(v>>32))
	}
	return append(dst, out...)
}

func appendRawLiterals(dst, lits []byte) []byte {
	return append(appendLiteralsSize(dst, literalsRaw, len(lits)), lits...)
}

// appendLiteralsSize writes the header of literals that are not compressed.
func appendLiteralsSize(dst []byte, typ, n int) []byte {
	switch {
	case n < 1<<5:
		return append(dst, byte(typ|n<<3)) //nolint:gosec // one byte of a field at a time
	case n < 1<<12:
		v := typ | 1<<2 | n<<4
		return append(dst, byte(v), byte(v>>8)) //nolint:gosec // one byte of a field at a time
	}
	v := typ | 3<<2 | n<<4
	return append(dst, byte(v), byte(v>>8), byte(v>>16)) //nolint:gosec // one byte of a field at a time
}
