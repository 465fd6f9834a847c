package rafs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// decoder decompresses chunks and tables of which the exact size is known. Safe for
// concurrent use; the zero value is ready.
type decoder struct {
	once sync.Once
	zstd *zstd.Decoder
	err  error
}

// decode returns the size bytes that src decompresses to. It allocates no more than
// size plus the decompressor's state, whatever src claims.
func (d *decoder) decode(c Compressor, src []byte, size int) ([]byte, error) {
	return d.decodeTo(make([]byte, size, size+decodeSlack), c, src)
}

// decodeSlack is how many bytes behind its end a zstd block may be written in steps of that many, which is
// much faster. Source: compressedBlockOverAlloc in klauspost/compress zstd/blockdec.go.
const decodeSlack = 16

// decodeTo is decode into dst, which has the size. Up to [decodeSlack] bytes of dst's capacity behind
// that are overwritten.
func (d *decoder) decodeTo(dst []byte, c Compressor, src []byte) ([]byte, error) {
	size := len(dst)
	var n int
	var err error
	switch c {
	case CompressorNone:
		n = copy(dst, src)
		if len(src) > size {
			n = len(src)
		}
	case CompressorLZ4:
		n, err = lz4.UncompressBlock(src, dst)
	case CompressorZstd:
		n, err = d.decodeZstd(dst, src)
	case CompressorGzip:
		n, err = decodeGzip(dst, src)
	default:
		return nil, fmt.Errorf("%w: compressor %v", ErrUnsupported, c)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %v data of %d bytes: %w", ErrInvalid, c, len(src), err)
	}
	if n != size {
		return nil, fmt.Errorf("%w: %v data of %d bytes holds %d bytes, want %d", ErrInvalid, c, len(src), n, size)
	}
	return dst, nil
}

func (d *decoder) decodeZstd(dst, src []byte) (int, error) {
	d.once.Do(func() {
		d.zstd, d.err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true))
	})
	if d.err != nil {
		return 0, d.err
	}
	// The limit is the capacity, so a frame cannot outgrow dst by more than the slack, and then it has another size.
	out, err := d.zstd.DecodeAll(src, dst[:0:min(cap(dst), len(dst)+decodeSlack)])
	return len(out), err
}

func decodeGzip(dst, src []byte) (int, error) {
	z, err := gzip.NewReader(bytes.NewReader(src))
	if err != nil {
		return 0, err
	}
	n, err := io.ReadFull(z, dst)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return n, err
	}
	// One more byte tells a stream that is too long, and has the checksum verified.
	var one [1]byte
	extra, err := io.ReadFull(z, one[:])
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	return n + extra, nil
}
