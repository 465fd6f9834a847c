package rafs

import (
	"bytes"
	"fmt"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/zstdenc"
)

// Level chooses between speed and size of compression.
type Level int

// The levels; what they mean depends on the compressor.
const (
	// LevelDefault is for layer blobs: fast, zstd within 3 % of the size of libzstd's level 3.
	LevelDefault Level = iota
	// LevelBest is for prefetch blobs, which are small and read by every start: about
	// 6 % smaller and four times slower with zstd (see zstdenc's BenchmarkEncode), and it
	// holds 8 MiB per encoder. Batches of 256 KiB take 3 % less again.
	LevelBest
)

// String returns "default", "best" or "level(N)".
func (l Level) String() string {
	switch l {
	case LevelDefault:
		return "default"
	case LevelBest:
		return "best"
	}
	return fmt.Sprintf("level(%d)", int(l))
}

// Match says that Length bytes of a chunk, from Pos on, equal those Back bytes before.
type Match = zstdenc.Match

// Encoder compresses chunks. The result depends on the chunk, and the matches it comes
// with, alone, not on what was encoded before. Not safe for concurrent use: one per worker. Memory with zstd at
// LevelDefault is about 1 MiB.
type Encoder struct {
	compressor Compressor
	level      Level
	zstd       zstdenc.Encoder
	library    *zstd.Encoder // made when first needed
	lz4        lz4.Compressor
	lz4HC      lz4.CompressorHC
	gzip       *gzip.Writer // made when first needed
}

// NewEncoder returns an encoder for compressor c at level. ErrUnsupported for unknown values.
func NewEncoder(c Compressor, level Level) (*Encoder, error) {
	if level != LevelDefault && level != LevelBest {
		return nil, fmt.Errorf("%w: compression %v", ErrUnsupported, level)
	}
	switch c {
	case CompressorNone, CompressorLZ4, CompressorGzip, CompressorZstd:
	default:
		return nil, fmt.Errorf("%w: writing with compressor %v", ErrUnsupported, c)
	}
	return &Encoder{compressor: c, level: level, lz4HC: lz4.CompressorHC{Level: lz4.Level9}}, nil
}

// Encode returns src as it is to be stored. When compression makes it strictly smaller,
// out is the compressed form, in dst's array if that is large enough, and compressed is
// true; otherwise out is src itself, not a copy. dst's content is overwritten.
func (e *Encoder) Encode(dst, src []byte) (out []byte, compressed bool, err error) {
	return e.EncodeMatches(dst, src, nil)
}

// EncodeMatches is [Encoder.Encode] with what is known of src: repetitions, in the order of
// Pos, none overlapping the next, such as a deflate stream has. They save the search for
// them; wrong ones do no harm. Compressors other than zstd, and levels other than [LevelDefault],
// ignore them.
func (e *Encoder) EncodeMatches(dst, src []byte, matches []Match) (out []byte, compressed bool, err error) {
	switch {
	case e.compressor == CompressorZstd && len(src) > zstdenc.MaxSize:
		out, err = e.encodeLibrary(dst, src)
	case e.compressor == CompressorZstd && e.level == LevelBest:
		out = e.zstd.EncodeDeep(dst[:0], src)
	case e.compressor == CompressorZstd:
		out = e.zstd.Encode(dst[:0], src, matches)
	case e.compressor == CompressorLZ4:
		out, err = e.encodeLZ4(dst, src)
	case e.compressor == CompressorGzip:
		out, err = e.encodeGzip(dst, src)
	}
	if err != nil {
		return nil, false, fmt.Errorf("compress %d bytes with %v: %w", len(src), e.compressor, err)
	}
	if len(out) == 0 || len(out) >= len(src) {
		return src, false, nil
	}
	return out, true, nil
}

// encodeLibrary compresses what is larger than a chunk, such as a large table, with klauspost's encoder. It makes one frame
// with content size and without checksum, as libzstd's one-shot interface does.
func (e *Encoder) encodeLibrary(dst, src []byte) ([]byte, error) {
	if e.library == nil {
		z, err := zstd.NewWriter(nil,
			zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false),
			zstd.WithSingleSegment(true),
			zstd.WithLowerEncoderMem(true),
			zstd.WithWindowSize(MaxChunkSize),
			// 0.3 % smaller at no measurable cost.
			zstd.WithAllLitEntropyCompression(true))
		if err != nil {
			return nil, err
		}
		e.library = z
	}
	return e.library.EncodeAll(src, dst[:0]), nil
}

// encodeLZ4 makes one raw block; nil when it would not be smaller than src.
func (e *Encoder) encodeLZ4(dst, src []byte) ([]byte, error) {
	if bound := lz4.CompressBlockBound(len(src)); cap(dst) < bound {
		dst = make([]byte, bound)
	}
	dst = dst[:cap(dst)]
	compress := e.lz4.CompressBlock
	if e.level == LevelBest {
		compress = e.lz4HC.CompressBlock
	}
	n, err := compress(src, dst)
	if err != nil {
		return nil, err
	}
	return dst[:n], nil
}

// encodeGzip makes one member without a name and time.
func (e *Encoder) encodeGzip(dst, src []byte) ([]byte, error) {
	out := bytes.NewBuffer(dst[:0])
	if e.gzip == nil {
		level := gzip.DefaultCompression
		if e.level == LevelBest {
			level = gzip.BestCompression
		}
		z, err := gzip.NewWriterLevel(out, level)
		if err != nil {
			return nil, err
		}
		e.gzip = z
	}
	e.gzip.Reset(out)
	if _, err := e.gzip.Write(src); err != nil {
		return nil, err
	}
	if err := e.gzip.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
