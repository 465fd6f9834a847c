// Package stream is what optimizer-server writes and its parent reads: a header, then
// frames. A frame is its length (uint32, little-endian, bytes after the length), a kind
// (one byte) and the kind's fields; paths are last and run to the frame's end, so any
// byte may be in them. A stream that ends without an [End] frame was cut off.
package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Magic opens a stream; its last byte is the version of the format.
const Magic = "HSTRACE\x05"

// MaxFrame bounds the bytes of one frame after its length. A path that the kernel
// names is at most 4096 bytes; one found by walking the tree can be longer.
const MaxFrame = 64 << 10

// Armed is what the parent of a server writes to its standard input, a pipe or a socket, when the trace instance is armed that it handed to it. What it
// writes in its place says why that failed, in 1 to MaxArmed bytes, which come in one piece (pipe(7), PIPE_BUF; unix(7), packets).
//
// StandsBy is what a server that was started with --standby writes there, a socket then, when it waits for orders.
const (
	Armed    = "armed"
	StandsBy = "standing by"
	MaxArmed = 512 // bytes
)

// Errors of [Reader.Next].
var (
	// ErrMagic is returned when what is read is no stream of this version.
	ErrMagic = errors.New("not a trace stream")
	// ErrInvalid is returned for a frame that cannot be decoded.
	ErrInvalid = errors.New("invalid trace frame")
)

// Kinds of frames, as written.
const (
	kindReady   = 'R'
	kindTouch   = 'T'
	kindPending = 'P'
	kindMerge   = 'M'
	kindFound   = 'O'
	kindRename  = 'N'
	kindRanges  = 'G'
	kindProcess = 'Q'
	kindDrained = 'D'
	kindFailure = 'F'
	kindEnd     = 'E'
)

// Frame is one of [Ready], [Touch], [Pending], [Merge], [Found], [Rename], [Ranges],
// [Process], [Drained], [Failure] and [End].
type Frame interface{ append(b []byte) []byte }

// Ready says that the marks are in place.
type Ready struct {
	Armed  time.Time // wall clock, to the nanosecond
	Mark   string    // what was marked: "filesystem" or "mount"
	Engine string    // what records besides fanotify; empty: nothing
	Note   string    // why not a better engine; may be empty
	Early  bool      // the container's command had not begun
}

// Touch is the first touch of a file of the image. Ranges of the access are not sent.
type Touch struct {
	ID     uint32 // ids follow the order of first touches
	Access trace.Access
}

// Pending says that a file was touched for the first time whose path is not known yet; at the end, when it
// may come again and again, that paths are still being looked for.
type Pending struct{}

// Merge adds ways of touching to an earlier Touch.
type Merge struct {
	ID  uint32
	How trace.How
}

// Found is the first touch of a file that came to light at the end, by its pages. Ranges of
// the access are not sent.
type Found struct {
	ID     uint32
	Access trace.Access
}

// Rename says that the file of an earlier Touch has another path in the image.
type Rename struct {
	ID   uint32
	Path string
}

// Ranges adds touched ranges to an earlier Touch or Found, at most [MaxRanges] at a time; none at
// all says that no byte was touched.
type Ranges struct {
	ID     uint32
	Ranges []trace.Range
}

// MaxRanges is how many ranges one frame holds: 3 int64 and a byte each.
const MaxRanges = MaxFrame / 2 / sizeRange

const sizeRange = 3*8 + 1

// maxText bounds the text that ends a frame, but for paths, in bytes.
const maxText = MaxFrame / 2

// Process is one process of the run.
type Process struct{ trace.Process }

// Drained says that the server is done with the trace instance that it was handed: nothing reads it any
// more, and what it counted as lost is known. Files may still have to be named.
type Drained struct {
	Why string // why it made no use of it; empty: it did
}

// Failure says why the server cannot trace. No End follows.
type Failure struct {
	Code string // "late", "privilege", "kernel", "internal"
	Text string
}

// End closes the stream: everything that happened before has been sent.
type End struct {
	Reason  string        // "exit" or "stop"
	Engine  string        // what recorded
	Grade   string        // one of the trace package's grades
	Elapsed time.Duration // since arming
	Events  int64
	Skipped int64
	Losses  []trace.Loss
}

// Append returns b with f appended as it is written.
func Append(b []byte, f Frame) []byte {
	return finish(f.append(append(b, 0, 0, 0, 0)), len(b))
}

// AppendTouch is [Append] of a [Touch], without the allocation that an interface takes.
func AppendTouch(b []byte, id uint32, a *trace.Access) []byte {
	return finish(putAccess(append(b, 0, 0, 0, 0, kindTouch), id, a), len(b))
}

// AppendRanges is [Append] of [Ranges] likewise; ranges stay the caller's.
func AppendRanges(b []byte, id uint32, ranges []trace.Range) []byte {
	return finish(putRanges(append(b, 0, 0, 0, 0, kindRanges), id, ranges), len(b))
}

// finish fills in the length of the frame that starts at start and ends with b.
func finish(b []byte, start int) []byte {
	binary.LittleEndian.PutUint32(b[start:], frameLen(b, start))
	return b
}

// frameLen is the length of the frame that starts at start; frames are far below 4 GiB.
func frameLen(b []byte, start int) uint32 {
	n := len(b) - start - 4
	if n > MaxFrame {
		panic(fmt.Sprintf("stream: frame of %d bytes, want at most %d", n, MaxFrame))
	}
	return uint32(n) //nolint:gosec // bounded above
}

func (f Ready) append(b []byte) []byte {
	b = putBool(put64(append(b, kindReady), f.Armed.UnixNano()), f.Early)
	return append(putString(putString(b, f.Mark), f.Engine), clip(f.Note, maxText)...)
}

func (f Touch) append(b []byte) []byte { return putAccess(append(b, kindTouch), f.ID, &f.Access) }
func (f Found) append(b []byte) []byte { return putAccess(append(b, kindFound), f.ID, &f.Access) }

func putAccess(b []byte, id uint32, a *trace.Access) []byte {
	b = binary.LittleEndian.AppendUint32(b, id)
	b = put64(put64(append(b, byte(a.How)), a.Size), int64(a.Elapsed))
	b = binary.LittleEndian.AppendUint32(b, uint32(a.PID)) //nolint:gosec // the bits are kept
	return append(putString(b, a.Command), a.Path...)
}

func (Pending) append(b []byte) []byte { return append(b, kindPending) }
func (f Drained) append(b []byte) []byte {
	return append(append(b, kindDrained), clip(f.Why, maxText)...)
}

func (f Merge) append(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(append(b, kindMerge), f.ID), byte(f.How))
}

func (f Rename) append(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(append(b, kindRename), f.ID), f.Path...)
}

func (f Ranges) append(b []byte) []byte { return putRanges(append(b, kindRanges), f.ID, f.Ranges) }

func putRanges(b []byte, id uint32, ranges []trace.Range) []byte {
	b = binary.LittleEndian.AppendUint32(b, id)
	for _, r := range ranges {
		b = putBool(put64(put64(put64(b, r.Offset), r.Length), int64(r.Elapsed)), r.Certain)
	}
	return b
}

func (f Process) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(append(b, kindProcess), uint32(f.PID)) //nolint:gosec // the bits are kept
	b = binary.LittleEndian.AppendUint32(b, uint32(f.Parent))                   //nolint:gosec // the bits are kept
	return append(b, clip(f.Command, maxText)...)
}

func (f Failure) append(b []byte) []byte {
	return append(putString(append(b, kindFailure), f.Code), clip(f.Text, maxText)...)
}

func (f End) append(b []byte) []byte {
	b = putString(putString(putString(append(b, kindEnd), f.Reason), f.Engine), f.Grade)
	b = put64(put64(put64(b, int64(f.Elapsed)), f.Events), f.Skipped)
	for _, l := range f.Losses {
		b = putString(put64(putString(b, l.Reason), l.Count), l.Detail)
	}
	return b
}

func put64(b []byte, v int64) []byte {
	return binary.LittleEndian.AppendUint64(b, uint64(v)) //nolint:gosec // the bits are kept
}

func putBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// putString writes a length byte and at most 255 bytes of s.
func putString(b []byte, s string) []byte {
	s = clip(s, math.MaxUint8)
	return append(append(b, byte(len(s))), s...) //nolint:gosec // clipped above
}

func clip(s string, n int) string { return s[:min(len(s), n)] }

// Reader reads a stream. It is not safe for concurrent use.
type Reader struct {
	r      io.Reader
	begun  bool
	header [4]byte
	buf    []byte
	last   string // command of the last access: mostly also that of the next
}

// NewReader returns a Reader; r should be buffered.
func NewReader(r io.Reader) *Reader { return &Reader{r: r} }

// Next returns the next frame. It returns io.EOF at the stream's end between two
// frames, io.ErrUnexpectedEOF inside one, [ErrMagic] at the start of something else and
// [ErrInvalid] for a frame that cannot be decoded. It allocates at most [MaxFrame] bytes.
func (r *Reader) Next() (Frame, error) {
	if !r.begun {
		b := make([]byte, len(Magic))
		n, err := io.ReadFull(r.r, b)
		if n == 0 && err != nil {
			return nil, err
		}
		if string(b) != Magic {
			return nil, fmt.Errorf("%w: starts with %q, want %q", ErrMagic, b[:n], Magic)
		}
		r.begun = true
	}
	if _, err := io.ReadFull(r.r, r.header[:]); err != nil {
		return nil, err
	}
	size := binary.LittleEndian.Uint32(r.header[:])
	if size == 0 || size > MaxFrame {
		return nil, fmt.Errorf("%w: %d bytes, want 1 to %d", ErrInvalid, size, MaxFrame)
	}
	if uint32(cap(r.buf)) < size { //nolint:gosec // bounded by MaxFrame
		r.buf = make([]byte, size)
	}
	b := r.buf[:size]
	if _, err := io.ReadFull(r.r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return decode(b, &r.last)
}

// decode returns the frame in b, which is not empty. last is as in Reader.
func decode(b []byte, last *string) (Frame, error) {
	c := cursor{b: b[1:], last: last}
	var f Frame
	switch b[0] {
	case kindReady:
		f = Ready{Armed: time.Unix(0, c.int64()), Early: c.bool(), Mark: c.string(), Engine: c.string(), Note: c.text()}
	case kindTouch:
		f = Touch{ID: c.uint32(), Access: c.access()}
	case kindFound:
		f = Found{ID: c.uint32(), Access: c.access()}
	case kindRename:
		f = Rename{ID: c.uint32(), Path: c.rest()}
	case kindRanges:
		f = Ranges{ID: c.uint32(), Ranges: c.ranges()}
	case kindProcess:
		f = Process{trace.Process{PID: c.int32(), Parent: c.int32(), Command: c.text()}}
	case kindPending:
		f = Pending{}
	case kindDrained:
		f = Drained{Why: c.text()}
	case kindMerge:
		f = Merge{ID: c.uint32(), How: trace.How(c.byte())}
	case kindFailure:
		f = Failure{Code: c.string(), Text: c.text()}
	case kindEnd:
		f = c.end()
	default:
		return nil, fmt.Errorf("%w: kind %#x", ErrInvalid, b[0])
	}
	if c.short || len(c.b) > 0 {
		return nil, fmt.Errorf("%w: kind %q of %d bytes does not hold its fields", ErrInvalid, b[0], len(b))
	}
	return f, nil
}

// cursor takes fields off a frame; short is set when there were not enough bytes.
type cursor struct {
	b     []byte
	short bool
	last  *string // see Reader
}

func (c *cursor) take(n int) []byte {
	if n > len(c.b) {
		c.short, c.b = true, nil
		return make([]byte, n)
	}
	b := c.b[:n]
	c.b = c.b[n:]
	return b
}

func (c *cursor) byte() byte     { return c.take(1)[0] }
func (c *cursor) uint32() uint32 { return binary.LittleEndian.Uint32(c.take(4)) }
func (c *cursor) string() string { return string(c.take(int(c.byte()))) }
func (c *cursor) rest() string   { return string(c.take(len(c.b))) }

// text takes the rest, which is as long as it can be written.
func (c *cursor) text() string {
	c.short = c.short || len(c.b) > maxText
	return c.rest()
}

func (c *cursor) int64() int64 {
	return int64(binary.LittleEndian.Uint64(c.take(8))) //nolint:gosec // the bits are kept
}

func (c *cursor) int32() int32 { return int32(c.uint32()) } //nolint:gosec // the bits are kept

func (c *cursor) access() trace.Access {
	return trace.Access{
		How: trace.How(c.byte()), Size: c.int64(), Elapsed: time.Duration(c.int64()),
		PID: c.int32(), Command: c.command(), Path: c.rest(),
	}
}

func (c *cursor) command() string {
	b := c.take(int(c.byte()))
	if string(b) != *c.last {
		*c.last = string(b)
	}
	return *c.last
}

// bool takes a byte; one that is neither 0 nor 1 spoils the frame.
func (c *cursor) bool() bool {
	v := c.byte()
	c.short = c.short || v > 1
	return v == 1
}

// ranges takes ranges to the frame's end.
func (c *cursor) ranges() []trace.Range {
	if len(c.b)%sizeRange != 0 || len(c.b)/sizeRange > MaxRanges {
		c.short = true
		return nil
	}
	var out []trace.Range
	for len(c.b) > 0 {
		r := trace.Range{Offset: c.int64(), Length: c.int64(), Elapsed: time.Duration(c.int64()), Certain: c.bool()}
		if c.short || r.Offset < 0 || r.Length <= 0 || r.Offset > math.MaxInt64-r.Length {
			c.short = true
			return nil
		}
		out = append(out, r)
	}
	return out
}

func (c *cursor) end() End {
	e := End{Reason: c.string(), Engine: c.string(), Grade: c.string(), Elapsed: time.Duration(c.int64()), Events: c.int64(), Skipped: c.int64()}
	for len(c.b) > 0 {
		e.Losses = append(e.Losses, trace.Loss{Reason: c.string(), Count: c.int64(), Detail: c.string()})
	}
	return e
}
