package persist

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// Read parses a list in the native format, version 2 or 1, up to its end of file. What it
// accepts of version 2, [List.WriteTo] writes back byte for byte, except for header lines with
// keys that this version does not know: those are skipped. A list of version 1 is written
// back as version 2. Memory is bounded by a small multiple of the
// bytes read, and those by [MaxListSize].
// It returns [ErrInvalid] with the line's number, what was found and what was wanted
// (also for a list that was cut off), [ErrUnsupported] for another version, and r's errors.
func Read(r io.Reader) (*List, error) {
	p := &nativeParser{lines: newLineReader(r), list: &List{}}
	if err := p.parse(); err != nil {
		return nil, fmt.Errorf("read access list: %w", err)
	}
	if err := p.lines.end(); err != nil {
		return nil, fmt.Errorf("read access list: %w", err)
	}
	return p.list, nil
}

// lineReader yields lines without their newline and enforces the bounds.
type lineReader struct {
	r    *bufio.Reader
	n    int   // number of the last line, from 1
	size int64 // bytes read
	buf  []byte

	maxLines int
	maxSize  int64
}

func newLineReader(r io.Reader) *lineReader {
	return &lineReader{r: bufio.NewReaderSize(r, 1<<16), maxLines: MaxLines, maxSize: MaxListSize}
}

// next returns the next line, valid until the next call, and whether a newline ended it.
// The error is io.EOF when no byte is left.
func (l *lineReader) next() (line []byte, ended bool, err error) {
	l.buf = l.buf[:0]
	l.n++
	for {
		part, err := l.r.ReadSlice('\n')
		l.size += int64(len(part))
		if len(l.buf)+len(part) > MaxLine || l.n > l.maxLines || l.size > l.maxSize {
			return nil, false, l.fail(invalidf("more than %d bytes in a line, %d lines or %d bytes in all", MaxLine, l.maxLines, l.maxSize))
		}
		l.buf = append(l.buf, part...)
		switch {
		case err == nil:
			return l.buf[:len(l.buf)-1], true, nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(l.buf) > 0:
			return l.buf, false, nil
		case errors.Is(err, io.EOF):
			return nil, false, io.EOF
		default:
			return nil, false, l.fail(err)
		}
	}
}

// whole returns the next line, which a newline has to end; want says what it should be.
func (l *lineReader) whole(want string) (string, error) {
	line, ended, err := l.next()
	switch {
	case errors.Is(err, io.EOF):
		return "", l.fail(invalidf("got the end of the file, want %s", want))
	case err != nil:
		return "", err
	case !ended:
		return "", l.fail(invalidf("got %s and the end of the file, want a newline", clip(string(line))))
	}
	return string(line), nil
}

// end returns nil when no byte is left.
func (l *lineReader) end() error {
	rest, _, err := l.next()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	}
	return l.fail(invalidf("got %s after the end line, want the end of the file", clip(string(rest))))
}

func (l *lineReader) fail(err error) error { return &lineError{l.n, err} }

type nativeParser struct {
	lines *lineReader
	list  *List
	rank  int  // of the last known header key
	old   bool // version 1
	// verdict is what the header says; empty when it says nothing.
	verdict string
}

// parse reads a list up to its end line.
func (p *nativeParser) parse() error {
	line, err := p.lines.whole("the line " + magicLine)
	if err != nil {
		return err
	}
	if p.old = line == magicOldLine; line != magicLine && !p.old {
		if v, ok := strings.CutPrefix(line, magicName); ok {
			return p.lines.fail(fmt.Errorf("%w: got version %s, want %s or v1", ErrUnsupported, clip(v), magicVersion))
		}
		return p.lines.fail(invalidf("got %s, want %q", clip(line), magicLine))
	}
	for {
		if line, err = p.lines.whole("a header line or the line that starts the accesses"); err != nil {
			return err
		}
		if strings.HasPrefix(line, "accesses\t") || line == "accesses" {
			break
		}
		if err := p.header(line); err != nil {
			return p.lines.fail(err)
		}
	}
	if line != columnsLine {
		return p.lines.fail(invalidf("got columns %s, want %q", clip(line), columnsLine))
	}
	if want := p.list.Verdict(); p.verdict != want && !p.old {
		return p.lines.fail(invalidf("verdict: got %s, want %q: there are %d losses", clip(p.verdict), want, len(p.list.Losses)))
	}
	return p.accesses()
}

func (p *nativeParser) accesses() error {
	var ranges int64
	for {
		line, err := p.lines.whole("an access or the end line")
		if err != nil {
			return err
		}
		if strings.HasPrefix(line, "end ") {
			want := fmt.Sprintf("end %d accesses %d ranges %d losses", len(p.list.Accesses), ranges, len(p.list.Losses))
			if line != want {
				return p.lines.fail(invalidf("got %s, want %q for what came before it", clip(line), want))
			}
			return nil
		}
		a, err := p.access(line)
		if err != nil {
			return p.lines.fail(err)
		}
		ranges += int64(len(a.Ranges))
		p.list.Accesses = append(p.list.Accesses, a)
	}
}

// headerKeys is the order of the known header lines.
var headerKeys = []string{
	"reference", "digest", "platform", "container", "name", "pod", "namespace", "arg", "engine", "grade",
	"started", "duration", "ended", "verdict", "events", "skipped", "loss", "process",
}

// inVersion1 tells the keys that version 1 knows from those that it skips.
func inVersion1(key string) bool { return key != "verdict" && key != "process" }

func (p *nativeParser) header(line string) error {
	key, raw, ok := strings.Cut(line, " ")
	if !ok || key == "" || strings.ContainsFunc(key, func(r rune) bool { return r != '-' && (r < 'a' || r > 'z') }) {
		return invalidf("got %s, want a key of lower-case letters, a space and a value", clip(line))
	}
	rank := slices.Index(headerKeys, key) + 1
	if rank == 0 || p.old && !inVersion1(key) {
		_, err := unescape(raw, false)
		return err
	}
	repeats := key == "arg" || key == "loss" || key == "process"
	if rank < p.rank || rank == p.rank && !repeats {
		return invalidf("key %q after %q, want each once and in the order %v", key, headerKeys[p.rank-1], headerKeys)
	}
	p.rank = rank
	switch key {
	case "loss":
		return p.loss(raw)
	case "process":
		return p.process(raw)
	}
	value, err := unescape(raw, false)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if value == "" && key != "arg" {
		return invalidf("%s: got no value, want one or no such line", key)
	}
	return p.set(key, value)
}

func (p *nativeParser) set(key, value string) error {
	l := p.list
	if s, ok := map[string]*string{
		"reference": &l.Reference, "digest": &l.Digest, "platform": &l.Platform, "container": &l.Container,
		"name": &l.Name, "pod": &l.Pod, "namespace": &l.Namespace, "engine": &l.Engine, "grade": &l.Grade, "ended": &l.End,
		"verdict": &p.verdict,
	}[key]; ok {
		*s = value
		return nil
	}
	if n, ok := map[string]*int64{"duration": (*int64)(&l.Duration), "events": &l.Events, "skipped": &l.Skipped}[key]; ok {
		v, err := parseNumber(key, value, 1, 64)
		*n = v
		return err
	}
	if key == "arg" {
		l.Command = append(l.Command, value)
		return nil
	}
	t, err := time.Parse(time.RFC3339Nano, value)
	if err != nil || t.UTC().Format(time.RFC3339Nano) != value || t.IsZero() {
		return invalidf("started: got %s, want a time like 2006-01-02T15:04:05.999999999Z", clip(value))
	}
	l.Started = t.UTC()
	return nil
}

func (p *nativeParser) loss(raw string) error {
	reason, rest, ok := strings.Cut(raw, " ")
	count, detail, detailed := strings.Cut(rest, " ")
	if !ok || reason == "" || detailed && detail == "" {
		return invalidf("loss: got %s, want a reason, a count and a detail if there is one", clip(raw))
	}
	var x trace.Loss
	var err error
	if x.Reason, err = unescape(reason, true); err != nil {
		return fmt.Errorf("loss: reason: %w", err)
	}
	if x.Count, err = parseNumber("loss: count", count, -1, 64); err != nil {
		return err
	}
	if x.Detail, err = unescape(detail, false); err != nil {
		return fmt.Errorf("loss: detail: %w", err)
	}
	p.list.Losses = append(p.list.Losses, x)
	return nil
}

func (p *nativeParser) process(raw string) error {
	pid, rest, ok := strings.Cut(raw, " ")
	parent, command, named := strings.Cut(rest, " ")
	if !ok || named && command == "" {
		return invalidf("process: got %s, want a pid, its parent's pid and a command if there is one", clip(raw))
	}
	var x trace.Process
	n, err := parseNumber("process: pid", pid, 1, 32)
	if err != nil {
		return err
	}
	x.PID = int32(n) //nolint:gosec // parsed with 32 bits
	if n, err = parseNumber("process: parent", parent, 0, 32); err != nil {
		return err
	}
	x.Parent = int32(n) //nolint:gosec // parsed with 32 bits
	if x.Command, err = unescape(command, false); err != nil {
		return fmt.Errorf("process: command: %w", err)
	}
	x.Command = strings.Clone(x.Command)
	p.list.Processes = append(p.list.Processes, x)
	return nil
}

// parseNumber parses the one spelling that strconv.AppendInt gives a number.
func parseNumber(what, s string, least int64, bits int) (int64, error) {
	v, err := strconv.ParseInt(s, 10, bits)
	digits := strings.TrimPrefix(s, "-")
	if err != nil || v < least || s[0] == '+' || digits[0] == '0' && s != "0" {
		return 0, invalidf("%s: got %s, want a decimal number of at least %d and less than 2^%d", what, clip(s), least, bits-1)
	}
	return v, nil
}

func (p *nativeParser) access(line string) (trace.Access, error) {
	var a trace.Access
	f := strings.SplitN(line, "\t", 8)
	if len(f) != 7 {
		return a, invalidf("got %s, want 7 fields with tabs between them: how, elapsed, size, pid, command, ranges, path", clip(line))
	}
	var err error
	if a.How, err = parseHow(f[0], p.old); err != nil {
		return a, err
	}
	elapsed, err := parseNumber("elapsed", f[1], 0, 64)
	if err != nil {
		return a, err
	}
	a.Elapsed = time.Duration(elapsed)
	if a.Size, err = parseNumber("size", f[2], 0, 64); err != nil {
		return a, err
	}
	pid, err := parseNumber("pid", f[3], 0, 32)
	if err != nil {
		return a, err
	}
	a.PID = int32(pid) //nolint:gosec // parsed with 32 bits
	if a.Command, err = unescape(f[4], false); err != nil {
		return a, fmt.Errorf("command: %w", err)
	}
	if a.Ranges, err = parseRanges(f[5], p.old); err != nil {
		return a, err
	}
	if a.Path, err = unescape(f[6], false); err != nil {
		return a, fmt.Errorf("path: %w", err)
	}
	// A long line of ranges must not stay in memory for its path.
	a.Command, a.Path = strings.Clone(a.Command), strings.Clone(a.Path)
	return a, checkAccess(&a)
}

func parseHow(s string, old bool) (trace.How, error) {
	letters := howLetters
	if old {
		letters = letters[:oldHowLetters]
	}
	var how trace.How
	ok := len(s) == len(letters)
	for i := 0; ok && i < len(letters); i++ {
		switch s[i] {
		case letters[i]:
			how |= 1 << i
		case '-':
		default:
			ok = false
		}
	}
	if !ok {
		return 0, invalidf("how: got %s, want the letters %q, each of which may be \"-\"", clip(s), letters)
	}
	return how, nil
}

// parseRanges parses the column of ranges; that of version 1 has neither times, nor
// certainty, nor files without a range.
func parseRanges(s string, old bool) ([]trace.Range, error) {
	switch {
	case s == wholeFile:
		return nil, nil
	case s == noRanges && !old:
		return []trace.Range{}, nil
	}
	n := strings.Count(s, ",") + 1
	if n > MaxFileRanges {
		return nil, invalidf("ranges: got %d, want at most %d", n, MaxFileRanges)
	}
	out := make([]trace.Range, 0, n)
	for part := range strings.SplitSeq(s, ",") {
		r, err := parseRange(part, old)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// parseRange parses OFFSET+LENGTH[@ELAPSED][!].
func parseRange(s string, old bool) (r trace.Range, err error) {
	rest, timed, elapsed := s, false, ""
	if !old {
		rest, r.Certain = strings.CutSuffix(rest, "!")
		rest, elapsed, timed = strings.Cut(rest, "@")
	}
	off, length, ok := strings.Cut(rest, "+")
	if !ok {
		return trace.Range{}, invalidf("range: got %s, want OFFSET+LENGTH", clip(s))
	}
	if r.Offset, err = parseNumber("range offset", off, 0, 64); err != nil {
		return trace.Range{}, err
	}
	if r.Length, err = parseNumber("range length", length, 1, 64); err != nil {
		return trace.Range{}, err
	}
	if timed {
		n, err := parseNumber("range elapsed", elapsed, 1, 64)
		if err != nil {
			return trace.Range{}, err
		}
		r.Elapsed = time.Duration(n)
	}
	return r, nil
}
