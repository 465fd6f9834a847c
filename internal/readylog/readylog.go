// Package readylog waits for the line with which a workload says that it is ready: in the log
// file that a container runtime writes for a container, or in output as it passes.
//
//	line, err := readylog.Wait(ctx, status.LogPath, created, regexp.MustCompile(`ready to accept connections`))
//
// A log file has the form of the CRI: lines of "time stream tag text", where tag is F for a whole
// line and P for a part of one that goes on. Of a line, the first [MaxLine] bytes count. A file that
// is not there yet is waited for, and one that was renamed away (rotated) or truncated is followed.
package readylog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"regexp/syntax"
	"time"
)

// MaxLine is how many bytes of a line are looked at; the rest of a longer one is skipped.
// Together with [MaxProgram] it bounds the time that one line takes.
const MaxLine = 4 << 10

// maxRaw is how many bytes of a log file's line are kept, with the CRI's fields. It is more than
// containerd writes in one: it splits lines at 16 KiB (max_container_log_line_size).
const maxRaw = 64 << 10

// Bounds of a pattern: patterns come from pods' annotations.
const (
	// MaxPattern bounds its text in bytes.
	MaxPattern = 1 << 10
	// MaxProgram bounds the steps of its program, which may be many more than its bytes:
	// "(a?){1000}" has 4,000. Any text of MaxPattern bytes without counted repetitions fits.
	MaxProgram = 4 << 10
)

// poll is how often a file that has not grown is looked at. Log files grow on any filesystem, also
// where inotify is silent, and a rotated one needs a look anyway.
const poll = 50 * time.Millisecond

// Compile compiles a pattern within [MaxPattern] and [MaxProgram] in the syntax of package regexp,
// whose matching takes time linear in the line's length times the program's. Compile itself
// may take a few tenths of a second: package regexp goes through each character of a range whose
// case is folded, as in (?i)[B-\x{1E940}].
func Compile(pattern string) (*regexp.Regexp, error) {
	if len(pattern) > MaxPattern {
		return nil, fmt.Errorf("pattern of %d bytes, want at most %d", len(pattern), MaxPattern)
	}
	parsed, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return nil, err
	}
	if n := steps(parsed); n > MaxProgram {
		return nil, fmt.Errorf("pattern of about %d steps once its repetitions are written out, want at most %d", n, MaxProgram)
	}
	return regexp.Compile(pattern)
}

// steps estimates how many instructions the program of re has; it cannot overflow, as
// package syntax bounds the product of nested counts to 1000, and their depth.
func steps(re *syntax.Regexp) int {
	n := 1
	switch re.Op {
	case syntax.OpLiteral:
		n = len(re.Rune)
	case syntax.OpCapture, syntax.OpStar:
		n = 2 // its begin and its end; a star of what may be empty is (x+)?
	}
	for _, sub := range re.Sub {
		n += steps(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Max, re.Min+1) // Max is -1 where there is none
	}
	return n
}

// Wait reads the CRI log file at path from its beginning until a line matches re, and returns
// that line's text without its newline. Of what the file has to begin with, lines that are dated before since do not count: runtimes append,
// and they may be those of an earlier container. It returns ctx.Err() when ctx ends first, and an error when
// the file cannot be read, which one that is not there is not. Matching takes about a tenth of a CPU at most, whatever the pattern and the log.
func Wait(ctx context.Context, path string, since time.Time, re *regexp.Regexp) (string, error) {
	f := follower{path: path, lines: criLines{re: re, since: since, raw: splitter{max: maxRaw}}}
	if info, err := os.Stat(path); err == nil {
		f.old = info.Size()
	}
	defer f.close()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		line, ok, err := f.advance(ctx)
		if err != nil {
			return "", fmt.Errorf("read log %s: %w", path, err)
		}
		if ok {
			return line, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// follower reads a file that grows, also over rotation.
type follower struct {
	path  string
	file  *os.File // nil: not there yet
	read  int64    // bytes of file
	old   int64    // how many bytes the first file had to begin with
	lines criLines
	spent time.Duration // at matching, since the last rest
}

func (f *follower) close() {
	if f.file != nil {
		_ = f.file.Close() // only read from
		f.file = nil
	}
}

// advance reads what is there and reports whether a line of it matched.
func (f *follower) advance(ctx context.Context) (string, bool, error) {
	for ctx.Err() == nil {
		if f.file == nil {
			file, err := os.Open(f.path)
			if errors.Is(err, fs.ErrNotExist) {
				return "", false, nil
			}
			if err != nil {
				return "", false, err
			}
			f.file, f.read = file, 0
		}
		// Whether it was renamed away is asked first: what was written until then is read below.
		gone, err := f.replaced()
		if err != nil {
			return "", false, err
		}
		line, ok, err := f.drain(ctx)
		if ok || err != nil {
			return line, ok, err
		}
		if !gone {
			return "", false, nil
		}
		f.close()
		f.lines.reset()
		f.old = 0
	}
	return "", false, nil
}

// replaced reports whether the path names another file than the open one. A truncated file is
// read again from its beginning.
func (f *follower) replaced() (bool, error) {
	have, err := f.file.Stat()
	if err != nil {
		return false, err
	}
	if have.Size() < f.read {
		if _, err := f.file.Seek(0, io.SeekStart); err != nil {
			return false, err
		}
		f.read, f.old = 0, 0
		f.lines.reset()
	}
	now, err := os.Stat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // who rotates it has it open until another is there
	}
	return err == nil && !os.SameFile(have, now), err
}

func (f *follower) drain(ctx context.Context) (string, bool, error) {
	buf := make([]byte, MaxLine) // ctx is looked at between them
	for ctx.Err() == nil {
		part := buf
		if f.old > f.read {
			part = buf[:min(int64(len(buf)), f.old-f.read)]
		} else {
			f.old, f.lines.since = 0, time.Time{} // what follows is new, whatever the clock says
		}
		n, err := f.file.Read(part)
		f.read += int64(n)
		began := time.Now()
		if line, ok := f.lines.write(buf[:n]); ok {
			return line, true, nil
		}
		f.rest(ctx, time.Since(began))
		if errors.Is(err, io.EOF) {
			return "", false, nil
		}
		if err != nil {
			return "", false, err
		}
	}
	return "", false, nil
}

// restFrom is how long matching may take until there is a rest, restFactor how much longer than that the rest is, restMost how long it is at most,
// since a busy machine makes matching long, too. Patterns and logs are a pod's, and the processors are not.
const (
	restFrom   = 10 * time.Millisecond
	restFactor = 9
	restMost   = 5 * time.Second
)

// rest waits now and then, so that matching, which took so long again, takes no more than its part of the time.
func (f *follower) rest(ctx context.Context, took time.Duration) {
	if f.spent += took; f.spent < restFrom {
		return
	}
	timer := time.NewTimer(min(restFactor*f.spent, restMost))
	defer timer.Stop()
	f.spent = 0
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// splitter cuts bytes into lines of at most max bytes.
type splitter struct {
	max  int
	line []byte
}

// write calls each with every line that b completes, without its newline, until it returns true.
func (s *splitter) write(b []byte, each func(line []byte) bool) bool {
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		part := b
		if i >= 0 {
			part = b[:i]
		}
		s.line = append(s.line, part[:min(len(part), s.max-len(s.line))]...)
		if i < 0 {
			return false
		}
		b = b[i+1:]
		line := s.line
		s.line = s.line[:0]
		if each(line) {
			return true
		}
	}
	return false
}

// criLines matches the text of CRI log lines. Parts of a line are put together for each stream.
type criLines struct {
	re     *regexp.Regexp
	since  time.Time
	raw    splitter
	stdout []byte // parts of a line so far
	stderr []byte
}

func (c *criLines) reset() { c.raw.line, c.stdout, c.stderr = nil, nil, nil }

func (c *criLines) write(b []byte) (match string, ok bool) {
	ok = c.raw.write(b, func(line []byte) bool {
		text, whole := c.text(line)
		if whole && c.re.Match(text) {
			match = string(text)
			return true
		}
		return false
	})
	return match, ok
}

// text returns the text that the log line completes. A line of another form completes nothing.
func (c *criLines) text(line []byte) (text []byte, whole bool) {
	f := bytes.SplitN(line, []byte(" "), 4)
	if len(f) < 3 {
		return nil, false
	}
	if at, err := time.Parse(time.RFC3339Nano, string(f[0])); err == nil && at.Before(c.since) {
		return nil, false
	}
	var parts *[]byte
	switch string(f[1]) {
	case "stdout":
		parts = &c.stdout
	case "stderr":
		parts = &c.stderr
	default:
		return nil, false
	}
	if len(f) == 4 {
		*parts = append(*parts, f[3][:min(len(f[3]), MaxLine-len(*parts))]...)
	}
	// A tag may have more words after a colon; the first is F or P. Source: CRI's kubelet
	// logs format, LogTag in k8s.io/kubernetes pkg/kubelet/kuberuntime/logs.
	tag, _, _ := bytes.Cut(f[2], []byte(":"))
	if string(tag) == "P" {
		return nil, false
	}
	text = *parts
	*parts = (*parts)[:0]
	return text, true
}
