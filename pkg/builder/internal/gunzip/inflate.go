package gunzip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	windowSize = 32 << 10 // how far back a match may reach
	maxMatch   = 258
	slack      = 16          // bytes behind the output that copies may scribble on
	maxMatches = outSize / 4 // kept at once; the shortest match has 3 bytes, many have more

	inSize  = 128 << 10
	outSize = windowSize + 160<<10

	// lookahead is what a block's header needs at most: 14 bits, 19 code lengths of 3 bits,
	// 316 lengths of up to 14 bits. While that much is buffered, bytes need no counting.
	lookahead = 640
)

// decoder inflates one deflate stream after another from a buffered input.
type decoder struct {
	src    io.Reader
	srcErr error // sticky; io.EOF at the end
	in     []byte
	r, w   int // in[r:w] is unread
	over   int // zero bytes appended behind the end of the input

	bitbuf uint64 // the next bits, lowest first; what is above nbits is to be read again
	nbits  uint

	out   []byte
	start int // out[start:o] has not been delivered
	o     int

	state state
	final bool // the current block is the last
	left  int  // bytes left of a stored block

	// matches are those of out[start:o], with Pos in out. What its capacity does not hold is
	// dropped; it is 0 while nobody wants them.
	matches []Match

	lit  [litTable]uint32
	dist [distTable]uint32
}

type state int

const (
	atBlock state = iota
	inStored
	inHuffman
	atEnd
)

func newDecoder(src io.Reader) *decoder {
	return &decoder{
		src: src, in: make([]byte, inSize), out: make([]byte, outSize+slack),
		matches: make([]Match, 0, maxMatches),
	}
}

// fill reads until n bytes are buffered or the input has ended.
func (d *decoder) fill(n int) {
	if d.w-d.r >= n || d.srcErr != nil {
		return
	}
	// Bytes that are in bitbuf already may have to be given back.
	keep := max(d.r-8, 0)
	d.w = copy(d.in, d.in[keep:d.w])
	d.r -= keep
	for empty := 0; d.w-d.r < n && d.srcErr == nil; {
		var m int
		m, d.srcErr = d.src.Read(d.in[d.w:])
		d.w += m
		if m > 0 {
			empty = 0
		} else if empty++; empty > 100 && d.srcErr == nil {
			d.srcErr = io.ErrNoProgress
		}
	}
}

// refill makes nbits at least 56, with zeros behind the end of the input.
func (d *decoder) refill() error {
	d.fill(lookahead)
	if d.truncated() {
		return d.eof()
	}
	for d.nbits < 56 {
		if d.r < d.w {
			d.bitbuf |= uint64(d.in[d.r]) << d.nbits
			d.r++
		} else {
			d.over++
		}
		d.nbits += 8
	}
	return nil
}

// truncated reports whether bits were used that the input does not have.
func (d *decoder) truncated() bool { return uint(d.over)*8 > d.nbits }

// deeper returns the error of a stream that is cut off in place of one that came from the
// zeros behind its end.
func (d *decoder) deeper(err error) error {
	var c CorruptError
	if errors.As(err, &c) && d.over > 0 {
		return d.eof()
	}
	return err
}

// eof is the error for an input that ends too early.
func (d *decoder) eof() error {
	if d.srcErr != nil && !errors.Is(d.srcErr, io.EOF) {
		return d.srcErr
	}
	return io.ErrUnexpectedEOF
}

func (d *decoder) bits(n uint) uint32 {
	v := uint32(d.bitbuf & (1<<n - 1)) //nolint:gosec // n is at most 16
	d.bitbuf >>= n
	d.nbits -= n
	return v
}

// align drops bits up to the next byte and gives whole bytes back to the input.
func (d *decoder) align() error {
	if d.truncated() {
		return d.eof()
	}
	d.r -= int(d.nbits/8) - d.over
	d.bitbuf, d.nbits, d.over = 0, 0, 0
	return nil
}

// next returns inflated bytes, valid until the next call; io.EOF at the end of the stream, with the
// input behind it.
func (d *decoder) next() ([]byte, error) {
	d.matches = d.matches[:0]
	if d.o > windowSize {
		d.o = copy(d.out, d.out[d.o-windowSize:d.o])
		d.start = d.o
	}
	for d.o < outSize-maxMatch {
		var err error
		switch d.state {
		case atBlock:
			err = d.block()
		case inStored:
			err = d.stored()
		case inHuffman:
			err = d.huffman()
		case atEnd:
			if d.o > d.start {
				p := d.out[d.start:d.o]
				d.start = d.o
				return p, nil
			}
			return nil, io.EOF
		}
		if err != nil {
			return nil, err
		}
	}
	p := d.out[d.start:d.o]
	d.start = d.o
	return p, nil
}

// endBlock goes on to the next block or ends the stream.
func (d *decoder) endBlock() error {
	d.state = atBlock
	if !d.final {
		return nil
	}
	d.state = atEnd
	return d.align()
}

// reset makes d ready for another stream of the same input; its history is gone.
func (d *decoder) reset() { d.state, d.final, d.o, d.start = atBlock, false, 0, 0 }

func (d *decoder) block() error {
	if err := d.refill(); err != nil {
		return err
	}
	d.final = d.bits(1) == 1
	switch d.bits(2) {
	case 0:
		return d.storedHeader()
	case 1:
		d.fixedTables()
	case 2:
		if err := d.dynamicTables(); err != nil {
			return err
		}
	default:
		return corrupt("block type 3")
	}
	d.state = inHuffman
	return nil
}

func (d *decoder) storedHeader() error {
	if err := d.align(); err != nil {
		return err
	}
	d.fill(4)
	if d.w-d.r < 4 {
		return d.eof()
	}
	n, inverse := binary.LittleEndian.Uint16(d.in[d.r:]), binary.LittleEndian.Uint16(d.in[d.r+2:])
	if n != ^inverse {
		return corrupt("length of a stored block")
	}
	d.r += 4
	d.left = int(n)
	d.state = inStored
	return nil
}

func (d *decoder) stored() error {
	for d.left > 0 && d.o < outSize {
		d.fill(1)
		if d.r == d.w {
			return d.eof()
		}
		n := copy(d.out[d.o:outSize], d.in[d.r:min(d.w, d.r+d.left)])
		d.o += n
		d.r += n
		d.left -= n
	}
	if d.left > 0 {
		return nil
	}
	return d.endBlock()
}

func (d *decoder) fixedTables() {
	var lengths [288]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	buildTable(d.lit[:], litBits, lengths[:], litEntry)
	for i := range 32 {
		lengths[i] = 5
	}
	buildTable(d.dist[:], distBits, lengths[:32], distEntry)
}

// dynamicTables reads the codes of a block. Source: RFC 1951, 3.2.7.
func (d *decoder) dynamicTables() error {
	numLit := int(d.bits(5)) + 257
	numDist := int(d.bits(5)) + 1
	numCLen := int(d.bits(4)) + 4
	if numLit > maxLit || numDist > maxDist {
		return corrupt("number of codes")
	}
	var lengths [maxLit + maxDist]uint8
	if err := d.codeLengths(numCLen, lengths[:numLit+numDist]); err != nil {
		return err
	}
	if lengths[256] == 0 {
		return corrupt("no code for the end of the block")
	}
	if !buildTable(d.lit[:], litBits, lengths[:numLit], litEntry) {
		return corrupt("codes of literals and lengths")
	}
	if !buildTable(d.dist[:], distBits, lengths[numLit:numLit+numDist], distEntry) {
		return corrupt("codes of distances")
	}
	return nil
}

// codeLengths reads the lengths of codes, which have codes themselves, of which numCLen are told.
func (d *decoder) codeLengths(numCLen int, lengths []uint8) error {
	var clens [maxCLen]uint8
	order := [maxCLen]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
	for _, i := range order[:numCLen] {
		if d.nbits < 3 {
			if err := d.refill(); err != nil {
				return err
			}
		}
		clens[i] = uint8(d.bits(3)) //nolint:gosec // 3 bits
	}
	if !buildTable(d.lit[:], clenBits, clens[:], clenEntry) {
		return corrupt("codes of code lengths")
	}
	for i := 0; i < len(lengths); {
		if d.nbits < clenBits+7 {
			if err := d.refill(); err != nil {
				return err
			}
		}
		e := d.lit[d.bitbuf&(1<<clenBits-1)]
		if e == 0 {
			return corrupt("code length")
		}
		d.bits(uint(e & 0xff))
		sym := e >> 16
		if sym < 16 {
			lengths[i] = uint8(sym)
			i++
			continue
		}
		var value uint8
		var n int
		switch sym {
		case 16:
			if i == 0 {
				return corrupt("repeat of no code length")
			}
			value, n = lengths[i-1], 3+int(d.bits(2))
		case 17:
			n = 3 + int(d.bits(3))
		default:
			n = 11 + int(d.bits(7))
		}
		if i+n > len(lengths) {
			return corrupt("too many code lengths")
		}
		for range n {
			lengths[i] = value
			i++
		}
	}
	return nil
}

// CorruptError says what is wrong with a deflate stream.
type CorruptError string

func (e CorruptError) Error() string { return fmt.Sprintf("corrupt deflate stream: %s", string(e)) }

func corrupt(what string) error { return CorruptError(what) }

// huffman inflates the symbols of a block until it ends or the output is full. It is one
// long function with its state in local variables on purpose: this loop is the decoder's
// whole time, and calls that are not inlined cost it a third of its speed.
func (d *decoder) huffman() error {
	const litMask, distMask = 1<<litBits - 1, 1<<distBits - 1
	bitbuf, nbits, o := d.bitbuf, d.nbits, d.o
	in, out := d.in[:d.w], d.out
	r := d.r
	lit, dist := &d.lit, &d.dist
	matches := d.matches
	for o < outSize-maxMatch {
		if r+16 > len(in) {
			d.bitbuf, d.nbits, d.r, d.o, d.matches = bitbuf, nbits, r, o, matches
			if err := d.refill(); err != nil {
				return err
			}
			bitbuf, nbits, r, in = d.bitbuf, d.nbits, d.r, d.in[:d.w]
		} else {
			bitbuf |= binary.LittleEndian.Uint64(in[r:]) << (nbits & 63)
			r += int((63 - nbits) >> 3 & 7)
			nbits |= 56
		}
		e := lit[bitbuf&litMask]
		if e&entryLiteral != 0 {
			bitbuf >>= e & 63
			nbits -= uint(e & 63)
			out[o] = byte(e >> 16 & 0xff)
			o++
			e = lit[bitbuf&litMask]
			if e&entryLiteral != 0 {
				bitbuf >>= e & 63
				nbits -= uint(e & 63)
				out[o] = byte(e >> 16 & 0xff)
				o++
				e = lit[bitbuf&litMask]
				if e&entryLiteral != 0 {
					bitbuf >>= e & 63
					nbits -= uint(e & 63)
					out[o] = byte(e >> 16 & 0xff)
					o++
					continue
				}
			}
			if nbits < 48 {
				if r+8 > len(in) {
					continue // at the end of the input: refill there
				}
				bitbuf |= binary.LittleEndian.Uint64(in[r:]) << (nbits & 63)
				r += int((63 - nbits) >> 3 & 7)
				nbits |= 56
			}
		}
		if e&entryPointer != 0 {
			bitbuf >>= litBits
			nbits -= litBits
			i := uint64(e>>16) + bitbuf&(1<<(e>>8&0xf)-1)
			if i >= litTable {
				return corrupt("code")
			}
			e = lit[i]
		}
		bitbuf >>= e & 63
		nbits -= uint(e & 63)
		if e&entryBase == 0 {
			if e&entryLiteral != 0 {
				out[o] = byte(e >> 16 & 0xff)
				o++
				continue
			}
			d.bitbuf, d.nbits, d.r, d.o, d.matches = bitbuf, nbits, r, o, matches
			if e&entryEnd == 0 {
				return corrupt("code of a length")
			}
			if d.truncated() {
				return d.eof()
			}
			return d.endBlock()
		}
		extra := e >> 8 & 0xf
		length := int((uint64(e>>16) + bitbuf&(1<<extra-1)) & 0xffff)
		bitbuf >>= extra
		nbits -= uint(extra)

		e = dist[bitbuf&distMask]
		if e&entryPointer != 0 {
			bitbuf >>= distBits
			nbits -= distBits
			i := uint64(e>>16) + bitbuf&(1<<(e>>8&0xf)-1)
			if i >= distTable {
				return corrupt("code")
			}
			e = dist[i]
		}
		if e&entryBase == 0 {
			return corrupt("code of a distance")
		}
		bitbuf >>= e & 63
		nbits -= uint(e & 63)
		extra = e >> 8 & 0xf
		back := int((uint64(e>>16) + bitbuf&(1<<extra-1)) & 0xffff)
		bitbuf >>= extra
		nbits -= uint(extra)
		if back > o {
			return corrupt("distance behind the start")
		}
		from := o - back
		if len(matches) < cap(matches) {
			matches = append(matches, Match{uint32(o), uint16(length), uint16(back)}) //nolint:gosec // positions are below outSize, lengths at most 258, distances 32768
		}
		switch {
		case back >= 8:
			// Words, the first two of them always: few matches are longer. What is written beyond the match is overwritten later.
			src, dst := (*[maxMatch + 8]byte)(out[from:]), (*[maxMatch + 8]byte)(out[o:])
			binary.LittleEndian.PutUint64(dst[:], binary.LittleEndian.Uint64(src[:]))
			binary.LittleEndian.PutUint64(dst[8:], binary.LittleEndian.Uint64(src[8:]))
			for i := 16; i < length; i += 8 {
				binary.LittleEndian.PutUint64(dst[i:], binary.LittleEndian.Uint64(src[i:]))
			}
		case back == 1:
			c := out[from]
			dst := out[o : o+length]
			for i := range dst {
				dst[i] = c
			}
		default:
			for i := range length {
				out[o+i] = out[from+i]
			}
		}
		o += length
	}
	d.bitbuf, d.nbits, d.r, d.o, d.matches = bitbuf, nbits, r, o, matches
	return nil
}
