package inflate

import (
	"errors"
	"hash/crc32"
	"io"
)

// trailer verifies the member's trailer and looks for another member.
func (d *Decoder) trailer() error {
	d.align()
	sum, err := d.take(32)
	if err != nil {
		return err
	}
	size, err := d.take(32)
	if err != nil {
		return err
	}
	if d.checksum != nil && (d.checksum.Sum32() != sum || d.size != size) {
		return d.invalid("checksum or size of a member")
	}
	d.state = stateGzip
	return nil
}

// Flags of a gzip header. RFC 1952.
const (
	gzipCRC     = 0x2
	gzipExtra   = 0x4
	gzipName    = 0x8
	gzipComment = 0x10
)

// header reads a gzip header; io.EOF where there is none behind a member.
func (d *Decoder) header() error {
	first, err := d.take(16)
	if err != nil {
		if d.members > 0 && d.Position().In == d.fed+2 && errors.Is(err, io.ErrUnexpectedEOF) {
			d.hold, d.nbits = d.hold<<16, d.nbits+16 // nothing was there to be taken
			return io.EOF
		}
		return err
	}
	if first != 0x8b1f {
		return d.invalid("gzip magic")
	}
	v, err := d.take(16)
	if err != nil {
		return err
	}
	if v&0xff != 8 {
		return d.invalid("compression method")
	}
	flags := v >> 8
	if err := d.skip(6); err != nil { // time, flags, system
		return err
	}
	if flags&gzipExtra != 0 {
		n, err := d.take(16)
		if err == nil {
			err = d.skip(int(n))
		}
		if err != nil {
			return err
		}
	}
	for _, flag := range []uint32{gzipName, gzipComment} {
		for flags&flag != 0 {
			c, err := d.take(8)
			if err != nil {
				return err
			}
			if c == 0 {
				break
			}
		}
	}
	if flags&gzipCRC != 0 {
		if err := d.skip(2); err != nil {
			return err
		}
	}
	d.members++
	d.low, d.size, d.checksum, d.state = d.wr, 0, crc32.NewIEEE(), stateBlock
	return nil
}

func (d *Decoder) skip(n int) error {
	for range n {
		if _, err := d.take(8); err != nil {
			return err
		}
	}
	return nil
}
