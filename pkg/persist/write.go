package persist

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Bounds of a native list; [Read] refuses more and [List.WriteTo] writes no more.
const (
	MaxLine       = 1 << 24 // bytes of a line with its newline
	MaxLines      = 1 << 21 // lines of a list
	MaxListSize   = 1 << 27 // bytes of a list of any format
	MaxFileRanges = 1 << 18 // ranges of one access: of at most 60 bytes each, they fit in a line
)

const (
	magicName    = "headstart-access-list "
	magicVersion = "v2"
	magicLine    = magicName + magicVersion
	magicOldLine = magicName + "v1" // still read
	columnsLine  = "accesses\thow\telapsed_ns\tsize\tpid\tcommand\tranges\tpath"
)

// howLetters are the letters of the bits of trace.How, the lowest first; version 1 has
// the first oldHowLetters of them.
const (
	howLetters    = "orxc"
	oldHowLetters = 3
)

// noRanges and wholeFile stand in place of ranges.
const (
	wholeFile = "-"    // nil: the whole file counts
	noRanges  = "none" // empty: no byte was touched
)

// WriteTo writes l in the native format (docs/format-access-list.md) and returns the
// bytes written. The bytes depend on l alone. It returns [ErrInvalid], having written
// nothing, when [List.Validate] does; a list beyond [MaxLine], [MaxLines] or
// [MaxListSize] is ErrInvalid too, but part of it may have been written.
func (l *List) WriteTo(w io.Writer) (int64, error) {
	if err := l.Validate(); err != nil {
		return 0, err
	}
	lw := &lineWriter{w: bufio.NewWriterSize(w, 1<<16), maxLines: MaxLines, maxSize: MaxListSize}
	l.write(lw)
	if lw.err == nil {
		lw.err = lw.w.Flush()
	}
	return lw.n - int64(lw.w.Buffered()), lw.err
}

// write writes a list that was validated.
func (l *List) write(lw *lineWriter) {
	l.writeHeader(lw)
	var ranges int64
	var b []byte
	for i := range l.Accesses {
		b = appendAccess(b[:0], &l.Accesses[i])
		lw.line(b)
		ranges += int64(len(l.Accesses[i].Ranges))
	}
	lw.line(fmt.Appendf(nil, "end %d accesses %d ranges %d losses", len(l.Accesses), ranges, len(l.Losses)))
}

func (l *List) writeHeader(lw *lineWriter) {
	lw.line([]byte(magicLine))
	text := func(key, value string) {
		if value != "" {
			lw.line(appendEscaped([]byte(key+" "), value, false))
		}
	}
	number := func(key string, value int64) {
		if value != 0 {
			lw.line(strconv.AppendInt([]byte(key+" "), value, 10))
		}
	}
	text("reference", l.Reference)
	text("digest", l.Digest)
	text("platform", l.Platform)
	text("container", l.Container)
	text("name", l.Name)
	text("pod", l.Pod)
	text("namespace", l.Namespace)
	for _, a := range l.Command {
		lw.line(appendEscaped([]byte("arg "), a, false))
	}
	text("engine", l.Engine)
	text("grade", l.Grade)
	if !l.Started.IsZero() {
		text("started", l.Started.UTC().Format(time.RFC3339Nano))
	}
	number("duration", int64(l.Duration))
	text("ended", l.End)
	text("verdict", l.Verdict())
	number("events", l.Events)
	number("skipped", l.Skipped)
	for _, x := range l.Losses {
		b := appendEscaped([]byte("loss "), x.Reason, true)
		b = strconv.AppendInt(append(b, ' '), x.Count, 10)
		if x.Detail != "" {
			b = appendEscaped(append(b, ' '), x.Detail, false)
		}
		lw.line(b)
	}
	for _, x := range l.Processes {
		b := fmt.Appendf(nil, "process %d %d", x.PID, x.Parent)
		if x.Command != "" {
			b = appendEscaped(append(b, ' '), x.Command, false)
		}
		lw.line(b)
	}
	lw.line([]byte(columnsLine))
}

func appendAccess(b []byte, a *trace.Access) []byte {
	for i, letter := range []byte(howLetters) {
		if a.How&(1<<i) == 0 {
			letter = '-'
		}
		b = append(b, letter)
	}
	for _, v := range []int64{int64(a.Elapsed), a.Size, int64(a.PID)} {
		b = strconv.AppendInt(append(b, '\t'), v, 10)
	}
	b = appendEscaped(append(b, '\t'), a.Command, false)
	b = appendRanges(append(b, '\t'), a.Ranges)
	return appendEscaped(append(b, '\t'), a.Path, false)
}

func appendRanges(b []byte, ranges []trace.Range) []byte {
	switch {
	case ranges == nil:
		return append(b, wholeFile...)
	case len(ranges) == 0:
		return append(b, noRanges...)
	}
	for i, r := range ranges {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, r.Offset, 10)
		b = strconv.AppendInt(append(b, '+'), r.Length, 10)
		if r.Elapsed != 0 {
			b = strconv.AppendInt(append(b, '@'), int64(r.Elapsed), 10)
		}
		if r.Certain {
			b = append(b, '!')
		}
	}
	return b
}

// lineWriter writes lines until the first error and keeps the bounds that [Read] has.
type lineWriter struct {
	w     *bufio.Writer
	n     int64
	lines int
	err   error

	maxLines int
	maxSize  int64
}

func (w *lineWriter) line(b []byte) {
	if w.err != nil {
		return
	}
	w.lines++
	if len(b)+1 > MaxLine || w.lines > w.maxLines || w.n+int64(len(b))+1 > w.maxSize {
		w.err = &lineError{w.lines, invalidf("line of %d bytes after %d bytes, want lines of at most %d bytes, at most %d of them and %d bytes in all", len(b)+1, w.n, MaxLine, w.maxLines, w.maxSize)}
		return
	}
	n, err := w.w.Write(b)
	if err == nil {
		err = w.w.WriteByte('\n')
		n++
	}
	w.n, w.err = w.n+int64(n), err
}
