// Package zstdenc compresses chunks into Zstandard frames (RFC 8878).
//
// A chunk is at most 16 MiB, compressed at once and decompressed at once, and often comes out of a
// deflate stream, whose matches can be used again. That is what makes this encoder
// faster than one for streams, and it is there for speed alone (see BenchmarkEncode).
//
// The model in five terms: a frame is one chunk; a block is at most 128 KiB of it; a sequence
// is a run of literals and a match behind them; a match repeats earlier bytes of the frame from
// so many bytes back, its offset; a repeated offset is one of the last three, which cost little.
// Literals are coded with Huffman codes (package huff0), sequences with finite state entropy.
//
//	var e zstdenc.Encoder
//	frame := e.Encode(nil, chunk, nil)
//
// Limits: one frame, no dictionary, no checksum, no window smaller than the frame.
package zstdenc

import (
	"encoding/binary"

	"github.com/klauspost/compress/huff0"
)

// MaxSize is the largest chunk in bytes. It bounds offsets to 24 bits.
const MaxSize = 1 << 24

// Match says that Length bytes at Pos equal those Back bytes before.
type Match struct {
	Pos          uint32 // bytes from the start of the chunk
	Length, Back uint16 // bytes; Back may reach behind the start: such a match is of no use
}

// Numbers of the format. Source: RFC 8878.
const (
	magic        = 0xFD2FB528 // section 3.1.1
	maxBlockSize = 128 << 10  // section 3.1.1.2.3

	blockRaw        = 0 // section 3.1.1.2.2
	blockRLE        = 1
	blockCompressed = 2
)

// Encoder compresses chunks. Its zero value is ready. It holds about 1 MiB.
// Not safe for concurrent use.
type Encoder struct {
	finder   finder
	deep     *deepFinder // made when first needed
	reps     reps
	block    block
	seen     [1 << seenBits]uint32 // see repeatsFar
	codes    []codes               // of block.sequences
	literals huff0.Scratch

	prev tables          // those that the decoder has; nil: none that may be used again
	use  tables          // those of this block
	own  [kinds]fseTable // what prev points at, unless it is a predefined one
	desc []byte          // description of a table
}

const repeats = 3 // offsets that may be repeated. Source: RFC 8878 section 3.1.1.5

// reps are the repeated offsets, the last one first.
type reps [repeats]uint32

// Encode appends src to dst as one frame and returns the extended slice, which never
// shares memory with src. A frame is at most 13 bytes, and 3 per 128 KiB, longer than src.
//
// Matches are known repetitions of src in the order of Pos, none overlapping the
// next. They save the search where they promise to be as good as what it would find. Each is
// verified: wrong ones cost compression and nothing else.
//
// The frame depends on src and matches alone. A src above [MaxSize] panics.
func (e *Encoder) Encode(dst, src []byte, matches []Match) []byte {
	if !worthUsing(matches, len(src)) || e.repeatsFar(src, matches) {
		matches = nil
		e.finder.begin(len(src))
	}
	return e.encode(dst, src, e.finder.find, matches)
}

// EncodeDeep is [Encoder.Encode] with a search that takes longer and finds more. It makes the encoder
// hold 5 MiB more.
func (e *Encoder) EncodeDeep(dst, src []byte) []byte {
	if e.deep == nil {
		e.deep = new(deepFinder)
	}
	e.deep.begin(len(src))
	return e.encode(dst, src, e.deep.find, nil)
}

// find makes sequences of src from start on.
type find func(src []byte, start int, reps *reps, out *block)

func (e *Encoder) encode(dst, src []byte, find find, matches []Match) []byte {
	if len(src) > MaxSize {
		panic("zstdenc: chunk above MaxSize")
	}
	dst = appendHeader(dst, len(src))
	if len(src) == 0 {
		return appendBlockHeader(dst, blockRaw, 0, true)
	}
	e.reps = reps{1, 4, 8} // section 3.1.1.5
	e.literals.Reuse = huff0.ReusePolicyNone
	e.prev = tables{}
	for start := 0; start < len(src); {
		end := min(start+maxBlockSize, len(src))
		dst, matches = e.appendBlock(dst, src[:end], start, end == len(src), find, matches)
		start = end
	}
	return dst
}

// appendHeader writes the frame header: one segment, the content's size, no checksum.
// Source: RFC 8878 section 3.1.1.1.
func appendHeader(dst []byte, size int) []byte {
	const singleSegment = 1 << 5
	dst = binary.LittleEndian.AppendUint32(dst, magic)
	switch {
	case size < 256:
		return append(dst, singleSegment, byte(size)) //nolint:gosec // one byte of a field at a time
	case size < 65536+256:
		dst = append(dst, 1<<6|singleSegment)
		return binary.LittleEndian.AppendUint16(dst, uint16(size-256)) // below 65536
	}
	dst = append(dst, 2<<6|singleSegment)
	return binary.LittleEndian.AppendUint32(dst, uint32(size)) //nolint:gosec // at most MaxSize
}

// appendBlockHeader writes the three bytes before a block. Source: RFC 8878 section 3.1.1.2.
func appendBlockHeader(dst []byte, typ, size int, last bool) []byte {
	v := size<<3 | typ<<1
	if last {
		v |= 1
	}
	return append(dst, byte(v), byte(v>>8), byte(v>>16)) //nolint:gosec // one byte of a field at a time
}

// appendBlock writes src from start on as one block, with all before it as history. It
// returns the matches that lie behind it, at least in part.
func (e *Encoder) appendBlock(dst, src []byte, start int, last bool, find find, matches []Match) ([]byte, []Match) {
	raw := src[start:]
	saved := e.reps
	e.block.reset()
	if matches != nil {
		matches = e.block.take(src, start, &e.reps, matches)
	} else {
		find(src, start, &e.reps, &e.block)
	}
	if isRun(raw) {
		e.reps = saved
		return append(appendBlockHeader(dst, blockRLE, len(raw), last), raw[0]), matches
	}
	mark := len(dst)
	dst = appendBlockHeader(dst, blockCompressed, 0, last)
	body := len(dst)
	dst, ok := e.appendSections(dst, len(raw))
	if size := len(dst) - body; ok && size < len(raw) {
		appendBlockHeader(dst[:mark], blockCompressed, size, last)
		return dst, matches
	}
	// The decoder sees neither the sequences nor the tables of this block.
	e.reps = saved
	e.literals.Reuse = huff0.ReusePolicyNone
	e.prev = tables{}
	return append(appendBlockHeader(dst[:mark], blockRaw, len(raw), last), raw...), matches
}

// isRun reports whether b is one byte again and again, and more than a block's header.
func isRun(b []byte) bool {
	if len(b) < 4 || b[0] != b[len(b)-1] || b[0] != b[len(b)/2] {
		return false
	}
	for _, c := range b {
		if c != b[0] {
			return false
		}
	}
	return true
}

// block is what one block is made of.
type block struct {
	literals  []byte // of all sequences, and those behind the last
	sequences []sequence
}

// sequence is literals and the match behind them.
type sequence struct {
	literals uint32 // bytes
	match    uint32 // bytes, less minMatch
	offset   uint32 // 1 to repeats: a repeated offset, else the offset and repeats
}

const (
	minMatch = 3 // bytes. Source: RFC 8878 section 3.1.1.3.2.1.1

	// copySlack is how many bytes are copied at once where few are wanted.
	copySlack = 16
)

func (b *block) reset() {
	if b.literals == nil {
		b.literals = make([]byte, 0, maxBlockSize+copySlack)
	}
	b.literals, b.sequences = b.literals[:0], b.sequences[:0]
}

// add appends the literals src[anchor:i] and a match of n bytes.
func (b *block) add(src []byte, anchor, i, n int, offset uint32) {
	count, l := i-anchor, len(b.literals)
	if count <= copySlack && anchor+copySlack <= len(src) && l+copySlack <= cap(b.literals) {
		// Two words; what is written beyond the literals is overwritten later.
		to, from := b.literals[l:l+copySlack], src[anchor:anchor+copySlack]
		binary.LittleEndian.PutUint64(to, binary.LittleEndian.Uint64(from))
		binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(from[8:]))
		b.literals = b.literals[:l+count]
	} else {
		b.literals = append(b.literals, src[anchor:i]...)
	}
	b.sequences = append(b.sequences, sequence{uint32(count), uint32(n - minMatch), offset}) //nolint:gosec // at most maxBlockSize
}
