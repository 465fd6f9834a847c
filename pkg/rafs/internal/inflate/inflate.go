// Package inflate decompresses gzip streams and lets its caller see where deflate blocks begin, to
// the bit, so that decompression can be taken up again there later. The decoders of the standard library and of
// klauspost/compress do not tell, which is why there is one here; it is held against them by a fuzz test.
//
// It is not the decoder that reads layers which are converted whole, pkg/builder/internal/gunzip: that one is faster because it
// keeps no such account; its package comment says more.
//
// A stop is the end of what one call of [Decoder.Next] gave. Where stops lie depends on the compressed bytes
// only, not on how the input's Read cuts them.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
)

// WindowSize is how far back a match reaches: what a decoder needs to start inside a stream.
const WindowSize = 1 << 15

// ErrFormat is wrapped by the errors for bytes that are no gzip stream; [io.ErrUnexpectedEOF] for one
// that ends early.
var ErrFormat = errors.New("inflate: invalid data")

const (
	litBits  = 10 // index bits of the first-level tables
	distBits = 8
	stepSize = 32 << 10 // bytes that Next gives at most, but for the end of a match
	inSize   = 32 << 10
)

type state uint8

const (
	stateGzip   state = iota // before a gzip header
	stateBlock               // before a block
	stateStored              // inside a stored block
	stateCodes               // inside a block of codes
	stateEnd                 // behind the last block of a member
)

// Decoder decompresses one stream. Not safe for concurrent use. It takes about 150 KiB.
type Decoder struct {
	src    io.Reader
	srcErr error
	in     [inSize + 8]byte // room for 8 bytes of padding behind the end
	ip, n  int
	fed    int64 // bytes that src gave
	pad    int   // zero bytes put behind the end of src
	hold   uint64
	nbits  uint // valid bits in hold

	out      [WindowSize + stepSize + maxMatch]byte
	wr       int   // end of what was decoded
	low      int   // matches of this member reach back to here
	total    int64 // bytes decoded
	state    state
	last     bool // the present block is the member's last
	stored   int  // bytes left of a stored block
	lit      *table
	dist     *table
	dynamic  [2]table
	members  int
	checksum hash.Hash32 // of the member; nil: not known from its beginning
	size     uint32      // of the member so far
	data     int64       // what was taken before the last block's end
	err      error
}

// NewReader decompresses the gzip stream src: one member or several, each with its checksum verified.
func NewReader(src io.Reader) *Decoder { return &Decoder{src: src} }

// Resume decompresses from a block boundary inside a gzip stream: the next block begins with the bits highest
// bits (0 to 7) of prev, then src. dict is the output before that place, at most WindowSize
// bytes of it. What follows the member at its end is read as with [NewReader], but the first
// member's checksum cannot be verified.
func Resume(src io.Reader, prev byte, bits uint, dict []byte) *Decoder {
	d := &Decoder{src: src, state: stateBlock, members: 1}
	if bits &= 7; bits > 0 {
		d.hold, d.nbits = uint64(prev>>(8-bits)), bits
		d.fed = 0
	}
	dict = dict[max(0, len(dict)-WindowSize):]
	d.wr = copy(d.out[:], dict)
	return d
}

// Position says where a decoder is: everything before In and Out has been taken and given.
type Position struct {
	In    int64 // bytes of the input of which some bit was taken
	Bits  uint  // how many of the highest bits of byte In-1 are not taken yet, 0 to 7
	Prev  byte  // that byte, when Bits is not 0
	Out   int64 // bytes of output
	Block bool  // a block begins here: see [Resume]
	End   bool  // a member ends here, but for its checksum
	// Data is In as it was behind the last byte of output, when End is set: before the code that ends the block.
	Data int64
	// Member counts members begun; together with Block it tells a new one.
	Member int
}

// Position returns where the decoder is. With Resume, In counts from the beginning of src.
func (d *Decoder) Position() Position {
	p := Position{Out: d.total, Block: d.state == stateBlock, End: d.state == stateEnd, Member: d.members}
	p.In = d.taken(d.nbits)
	if p.Data = p.In; p.End {
		p.Data = d.data
	}
	if p.Bits = d.nbits % 8; p.Bits != 0 {
		p.Prev = byte(d.hold<<(8-p.Bits)) & byte(0xff<<(8-p.Bits)) //nolint:gosec // the low byte is meant
	}
	return p
}

// taken returns of how many bytes some bit was taken, when hold has nbits bits.
func (d *Decoder) taken(nbits uint) int64 {
	return d.fed + int64(d.pad) - int64(d.n-d.ip) - int64(nbits/8) //nolint:gosec // at most 7
}

// Window returns the last output of this member, at most WindowSize bytes. It is valid until the next call of Next.
func (d *Decoder) Window() []byte { return d.out[max(d.low, d.wr-WindowSize):d.wr] }

// Next decompresses further and returns what came out: up to a block's end, at most about 32 KiB,
// and nothing at all where a member begins or a block is empty. The slice is valid until the next call.
// [io.EOF] at the end of the last member; after an error every call returns it. Data that was decoded before
// an error is returned first.
func (d *Decoder) Next() ([]byte, error) {
	if d.err != nil {
		return nil, d.err
	}
	if d.wr >= WindowSize+1 && d.wr+stepSize+maxMatch > len(d.out) {
		shift := d.wr - WindowSize
		copy(d.out[:], d.out[shift:d.wr])
		d.wr, d.low = WindowSize, max(0, d.low-shift)
	}
	start := d.wr
	err := d.step(start + stepSize)
	p := d.out[start:d.wr]
	d.total += int64(len(p))
	d.size += uint32(len(p)) //nolint:gosec // modulo 2^32
	if d.checksum != nil {
		d.checksum.Write(p)
	}
	if err != nil {
		d.err = err
		if len(p) == 0 {
			return nil, err
		}
	}
	return p, nil
}

// step runs one state until it ends or output reaches limit.
func (d *Decoder) step(limit int) error {
	switch d.state {
	case stateGzip:
		return d.header()
	case stateBlock:
		if err := d.block(); err != nil {
			return err
		}
		if d.state == stateStored {
			return d.copyStored(limit)
		}
		return d.codes(limit)
	case stateStored:
		return d.copyStored(limit)
	case stateCodes:
		return d.codes(limit)
	}
	return d.trailer()
}

// fill makes at least 56 bits available, or pads with zeros behind the end.
func (d *Decoder) fill() error {
	if d.ip+8 > d.n {
		if err := d.more(); err != nil {
			return err
		}
	}
	d.hold |= binary.LittleEndian.Uint64(d.in[d.ip:]) << d.nbits
	d.ip += int((63 - d.nbits) >> 3)
	d.nbits |= 56
	return nil
}

// more brings at least 8 bytes into the buffer. The 8 before them stay: bits of them may be in hold, and
// unhold gives them back.
func (d *Decoder) more() error {
	if d.overrun() {
		return d.endErr()
	}
	keep := min(d.ip, 8)
	copy(d.in[:], d.in[d.ip-keep:d.n])
	d.n, d.ip = d.n-d.ip+keep, keep
	for empty := 0; d.n-d.ip < 8 && d.srcErr == nil; {
		var n int
		n, d.srcErr = d.src.Read(d.in[d.n:inSize])
		d.n, d.fed = d.n+n, d.fed+int64(n)
		if n > 0 {
			empty = 0
		} else if empty++; empty > 100 && d.srcErr == nil {
			d.srcErr = io.ErrNoProgress
		}
	}
	for d.n-d.ip < 8 {
		d.in[d.n] = 0
		d.n++
		d.pad++
	}
	return nil
}

// overrun tells whether bits behind the end of src were taken.
func (d *Decoder) overrun() bool {
	return d.pad > 0 && d.pad > d.n-d.ip+int(d.nbits/8)
}

// endErr is the error for taking bits behind the end.
func (d *Decoder) endErr() error {
	if d.srcErr != nil && !errors.Is(d.srcErr, io.EOF) {
		return d.srcErr
	}
	return io.ErrUnexpectedEOF
}

// take returns the next n bits, n at most 32.
func (d *Decoder) take(n uint) (uint32, error) {
	if d.nbits < n {
		if err := d.fill(); err != nil {
			return 0, err
		}
	}
	v := uint32(d.hold & (1<<n - 1)) //nolint:gosec // at most 32 bits
	d.hold >>= n
	d.nbits -= n
	if d.overrun() {
		return 0, d.endErr()
	}
	return v, nil
}

// align drops the bits up to a byte boundary.
func (d *Decoder) align() {
	d.hold >>= d.nbits % 8
	d.nbits -= d.nbits % 8
}

// unhold gives whole bytes in hold back to the buffer.
func (d *Decoder) unhold() {
	d.align()
	d.ip -= int(d.nbits / 8)
	d.hold, d.nbits = 0, 0
}

func (d *Decoder) invalid(what string) error {
	return fmt.Errorf("%w: %s at byte %d", ErrFormat, what, d.Position().In)
}

// block reads a block header.
func (d *Decoder) block() error {
	h, err := d.take(3)
	if err != nil {
		return err
	}
	d.last = h&1 != 0
	switch h >> 1 {
	case 0:
		d.align()
		v, err := d.take(32)
		if err != nil {
			return err
		}
		if v&0xffff != ^v>>16 {
			return d.invalid("length of a stored block")
		}
		d.unhold()
		d.stored, d.state = int(v&0xffff), stateStored
		return nil
	case 1:
		fixed := fixedOnce()
		d.lit, d.dist = &fixed[0], &fixed[1]
	case 2:
		if err := d.readTables(); err != nil {
			return err
		}
	default:
		return d.invalid("type of a block")
	}
	d.state = stateCodes
	return nil
}

var fixedOnce = sync.OnceValue(func() *[2]table {
	lit, dist := fixedTables()
	return &[2]table{lit, dist}
})

// codeOrder is the order in which the lengths of the code lengths' code come. RFC 1951, 3.2.7.
var codeOrder = [...]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readTables reads the codes of a block with codes of its own.
func (d *Decoder) readTables() error {
	h, err := d.take(14)
	if err != nil {
		return err
	}
	lits, dists, codes := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if lits > 286 || dists > 30 {
		return d.invalid("number of codes")
	}
	var lengths [maxLit + maxDist]uint8
	for _, symbol := range codeOrder[:codes] {
		v, err := d.take(3)
		if err != nil {
			return err
		}
		lengths[symbol] = uint8(v) //nolint:gosec // 3 bits
	}
	t := &d.dynamic[0]
	if !t.build(7, lengths[:len(codeOrder)], lenSymbols[:]) {
		return d.invalid("code of code lengths")
	}
	clear(lengths[:])
	if err := d.readLengths(t, lengths[:lits+dists]); err != nil {
		return err
	}
	if lengths[endOfBlock] == 0 {
		return d.invalid("code without an end of block")
	}
	if !d.dynamic[0].build(litBits, lengths[:lits], litSymbols[:]) || !d.dynamic[1].build(distBits, lengths[lits:lits+dists], distSymbols[:]) {
		return d.invalid("code lengths")
	}
	d.lit, d.dist = &d.dynamic[0], &d.dynamic[1]
	return nil
}

func (d *Decoder) readLengths(t *table, lengths []uint8) error {
	for i := 0; i < len(lengths); {
		if d.nbits < 7 {
			if err := d.fill(); err != nil {
				return err
			}
		}
		e := t.entries[d.hold&(1<<7-1)]
		if e.kind() == 0 {
			return d.invalid("code length")
		}
		if _, err := d.take(e.length()); err != nil {
			return err
		}
		v, repeat, n := uint8(e.value()), uint32(1), uint(0) //nolint:gosec // below 19
		switch v {
		case 16:
			if i == 0 {
				return d.invalid("repeated code length")
			}
			v, repeat, n = lengths[i-1], 3, 2
		case 17:
			v, repeat, n = 0, 3, 3
		case 18:
			v, repeat, n = 0, 11, 7
		}
		if n > 0 {
			more, err := d.take(n)
			if err != nil {
				return err
			}
			repeat += more
		}
		if int(repeat) > len(lengths)-i {
			return d.invalid("repeated code length")
		}
		for range repeat {
			lengths[i] = v
			i++
		}
	}
	return nil
}

// endBlock is called behind a block.
func (d *Decoder) endBlock() {
	d.state = stateBlock
	if d.last {
		d.state = stateEnd
	}
}

func (d *Decoder) copyStored(limit int) error {
	for d.stored > 0 && d.wr < limit {
		if d.ip == d.n || d.pad > 0 {
			if d.pad > 0 && d.n-d.ip <= d.pad {
				return d.endErr()
			}
			if d.ip == d.n {
				if err := d.more(); err != nil {
					return err
				}
				continue
			}
		}
		n := copy(d.out[d.wr:min(limit, d.wr+d.stored)], d.in[d.ip:d.n-d.pad])
		d.wr, d.ip, d.stored = d.wr+n, d.ip+n, d.stored-n
	}
	if d.stored == 0 {
		d.data = d.taken(d.nbits)
		d.endBlock()
	}
	return nil
}

// codes decodes symbols up to limit or the end of the block.
func (d *Decoder) codes(limit int) error {
	lit, dist := d.lit.entries, d.dist.entries
	for d.wr < limit {
		if d.nbits < 48 { // a length and a distance with their extra bits take 15+5+15+13
			if err := d.fill(); err != nil {
				return err
			}
		}
		hold, nbits := d.hold, d.nbits
		e := lit[hold&(1<<litBits-1)]
		if e.kind() == kindLink {
			e2 := lit[e.value()+uint32(hold>>litBits)&(1<<e.extra()-1)] //nolint:gosec // masked
			hold, nbits, e = hold>>litBits, nbits-litBits, e2
		}
		hold, nbits = hold>>e.length(), nbits-e.length()
		if d.pad > 0 && d.pad > d.n-d.ip+int(nbits/8) {
			return d.endErr()
		}
		switch e.kind() {
		case kindLiteral:
			d.out[d.wr] = byte(e.value()) //nolint:gosec // a literal
			d.wr++
			d.hold, d.nbits = hold, nbits
			continue
		case kindEnd:
			d.data = d.taken(d.nbits)
			d.hold, d.nbits = hold, nbits
			d.endBlock()
			return nil
		case kindLength:
		default:
			return d.invalid("literal or length code")
		}
		length := int(e.value()) + int(hold&(1<<e.extra()-1)) //nolint:gosec // masked
		hold, nbits = hold>>e.extra(), nbits-e.extra()
		e = dist[hold&(1<<distBits-1)]
		if e.kind() == kindLink {
			e2 := dist[e.value()+uint32(hold>>distBits)&(1<<e.extra()-1)] //nolint:gosec // masked
			hold, nbits, e = hold>>distBits, nbits-distBits, e2
		}
		if e.kind() != kindLength {
			return d.invalid("distance code")
		}
		hold, nbits = hold>>e.length(), nbits-e.length()
		distance := int(e.value()) + int(hold&(1<<e.extra()-1)) //nolint:gosec // masked
		hold, nbits = hold>>e.extra(), nbits-e.extra()
		if d.pad > 0 && d.pad > d.n-d.ip+int(nbits/8) {
			return d.endErr()
		}
		if distance > d.wr-d.low {
			return d.invalid("distance")
		}
		d.hold, d.nbits = hold, nbits
		d.match(length, distance)
	}
	return nil
}

// match repeats length bytes from distance back.
func (d *Decoder) match(length, distance int) {
	from, to := d.wr-distance, d.wr
	d.wr += length
	if distance >= length {
		copy(d.out[to:d.wr], d.out[from:])
		return
	}
	// What is copied grows with every round.
	for to < d.wr {
		to += copy(d.out[to:d.wr], d.out[from:to])
	}
}
