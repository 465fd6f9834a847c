// Package gunzip decompresses gzip streams of any number of members. It is there for speed
// alone: reading the layers of an image is a third of a conversion, and this takes 0.6 of
// the time of the fastest library (see BenchmarkReader).
//
// Its memory is constant, about 320 KiB.
//
// Why this is not the decoder of pkg/rafs/internal/inflate too: that one stops at every deflate block, knows after each piece, to the bit,
// what it was made from, hands out all that lies before a cut, and can begin inside a stream. This one runs over blocks, takes bits
// it may not need, sees a cut one refill late, and notes matches; that is where its speed comes from: it takes 0.77 of inflate's CPU time
// (100 MB of Go programs and sources, gzip level 6). Both are held against the standard library's decoder by fuzz tests.
package gunzip

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

var (
	// ErrHeader is returned where a gzip member should begin and does not.
	ErrHeader = errors.New("no gzip header")
	// ErrChecksum is returned when a member does not have the checksum or size at its end.
	ErrChecksum = errors.New("gzip checksum mismatch")
)

// Match says that Length bytes at Pos equal those Back bytes before.
type Match struct {
	Pos          uint32 // bytes
	Length, Back uint16 // bytes, 3 to 258 and 1 to 32768
}

// Reader decompresses a gzip stream. Not safe for concurrent use.
type Reader struct {
	d       *decoder
	crc     uint32
	size    uint32
	members int
	inside  bool
	hasty   bool  // the member was made by the fastest algorithm there is
	err     error // sticky

	delivered int // place in the decoder's output of what Next returned
}

// NewReader returns a Reader of src, which it reads ahead.
func NewReader(src io.Reader) *Reader { return &Reader{d: newDecoder(src)} }

// Next returns decompressed bytes, at least one, valid until the next call. At the end of the stream
// it returns io.EOF; ErrHeader for bytes behind a member that are no member, and for an
// empty input; io.ErrUnexpectedEOF for a stream that is cut off; ErrChecksum, a
// [CorruptError], or the error of the source.
func (z *Reader) Next() ([]byte, error) {
	for z.err == nil {
		if !z.inside {
			z.err = z.header()
			continue
		}
		p, err := z.d.next()
		if err == nil {
			z.crc = crc32.Update(z.crc, crc32.IEEETable, p)
			z.size += uint32(len(p)) //nolint:gosec // modulo 2^32, as the format counts
			z.delivered = z.d.o - len(p)
			return p, nil
		}
		if !errors.Is(err, io.EOF) {
			z.err = z.d.deeper(err)
			break
		}
		z.err = z.trailer()
	}
	return nil, z.err
}

// Matches returns the matches that the last bytes of [Reader.Next] were made from, in order,
// Pos counted from the first of them; valid until the next call of Next. There may be more than it
// knows of, and none are known where the stream was made in haste.
func (z *Reader) Matches() []Match {
	if z.hasty {
		return nil
	}
	for i := range z.d.matches {
		z.d.matches[i].Pos -= uint32(z.delivered) //nolint:gosec // a place in the output
	}
	z.delivered = 0
	return z.d.matches
}

// xflFastest says that the compressor used its fastest algorithm. Source: RFC 1952, 2.3.1.
const xflFastest = 4

// The flags of a member's header. Source: RFC 1952, 2.3.1.
const (
	flagCRC     = 1 << 1
	flagExtra   = 1 << 2
	flagName    = 1 << 3
	flagComment = 1 << 4
)

// header reads the header of the next member, or returns io.EOF where the input ends.
func (z *Reader) header() error {
	d := z.d
	d.fill(10)
	if d.w == d.r && errors.Is(d.srcErr, io.EOF) && z.members > 0 {
		return io.EOF
	}
	var sum headerSum
	head, err := d.take(10, &sum)
	if err != nil {
		if d.w-d.r > 0 && d.in[d.r] != 0x1f {
			return ErrHeader
		}
		return err
	}
	flags, hasty := head[3], head[8] == xflFastest
	if head[0] != 0x1f || head[1] != 0x8b || head[2] != 8 {
		return ErrHeader
	}
	if flags&flagExtra != 0 {
		n, err := d.take(2, &sum)
		if err != nil {
			return err
		}
		if _, err := d.take(int(binary.LittleEndian.Uint16(n)), &sum); err != nil {
			return err
		}
	}
	for _, f := range []byte{flagName, flagComment} {
		if flags&f == 0 {
			continue
		}
		if err := d.skipString(&sum); err != nil {
			return err
		}
	}
	if flags&flagCRC != 0 {
		want := uint16(sum)
		got, err := d.take(2, &sum)
		if err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(got) != want {
			return ErrHeader
		}
	}
	d.reset()
	z.crc, z.size, z.inside, z.hasty = 0, 0, true, hasty
	z.members++
	return nil
}

// maxString bounds a name or a comment, its NUL included, as compress/gzip does.
const maxString = 512

func (d *decoder) skipString(sum *headerSum) error {
	for range maxString {
		c, err := d.take(1, sum)
		if err != nil {
			return err
		}
		if c[0] == 0 {
			return nil
		}
	}
	return ErrHeader
}

// headerSum is the checksum of the bytes taken.
type headerSum uint32

// take returns the next n bytes of the input, at most 64 KiB, valid until it is used again.
func (d *decoder) take(n int, sum *headerSum) ([]byte, error) {
	d.fill(n)
	if d.w-d.r < n {
		return nil, d.eof()
	}
	p := d.in[d.r : d.r+n]
	d.r += n
	*sum = headerSum(crc32.Update(uint32(*sum), crc32.IEEETable, p))
	return p, nil
}

// trailer compares what follows a member's data.
func (z *Reader) trailer() error {
	var sum headerSum
	p, err := z.d.take(8, &sum)
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(p) != z.crc || binary.LittleEndian.Uint32(p[4:]) != z.size {
		return ErrChecksum
	}
	z.inside = false
	return nil
}
