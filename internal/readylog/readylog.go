// Package readylog waits for the line with which a workload says that it is ready: in the log
// file that a container runtime writes for a container, or in output as it passes.
//
//	line, err := readylog.Wait(ctx, status.LogPath, regexp.MustCompile(`ready to accept connections`))
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
	"time"
)

// MaxLine is how many bytes of a line are looked at; the rest of a longer one is skipped.
// containerd splits lines at 16 KiB (max_container_log_line_size), and kubelets read up to
// that much at once.
const MaxLine = 64 << 10

// MaxPattern bounds a pattern in bytes: patterns come from pods' annotations.
const MaxPattern = 1 << 10

// poll is how often a file that has not grown is looked at. Log files grow on any filesystem, also
// where inotify is silent, and a rotated one needs a look anyway.
const poll = 50 * time.Millisecond

// Compile compiles a pattern of at most [MaxPattern] bytes in the syntax of package regexp, whose
// matching takes time linear in the line's length.
func Compile(pattern string) (*regexp.Regexp, error) {
	if len(pattern) > MaxPattern {
		return nil, fmt.Errorf("pattern of %d bytes, want at most %d", len(pattern), MaxPattern)
	}
	return regexp.Compile(pattern)
}

// Wait reads the CRI log file at path from its beginning until a line matches re, and returns
// that line's text without its newline. It returns ctx.Err() when ctx ends first, and an error when
// the file cannot be read, which one that is not there is not.
func Wait(ctx context.Context, path string, re *regexp.Regexp) (string, error) {
	f := follower{path: path, lines: criLines{re: re}}
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
	lines criLines
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
		f.read = 0
		f.lines.reset()
	}
	now, err := os.Stat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return err == nil && !os.SameFile(have, now), err
}

func (f *follower) drain(ctx context.Context) (string, bool, error) {
	buf := make([]byte, 32<<10)
	for ctx.Err() == nil {
		n, err := f.file.Read(buf)
		f.read += int64(n)
		if line, ok := f.lines.write(buf[:n]); ok {
			return line, true, nil
		}
		if errors.Is(err, io.EOF) {
			return "", false, nil
		}
		if err != nil {
			return "", false, err
		}
	}
	return "", false, nil
}

// splitter cuts bytes into lines of at most MaxLine bytes.
type splitter struct{ line []byte }

// write calls each with every line that b completes, without its newline, until it returns true.
func (s *splitter) write(b []byte, each func(line []byte) bool) bool {
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		part := b
		if i >= 0 {
			part = b[:i]
		}
		s.line = append(s.line, part[:min(len(part), MaxLine-len(s.line))]...)
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
