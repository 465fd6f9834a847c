package readylog

import (
	"io"
	"regexp"
	"sync"
)

// Tee passes output on and calls a function at the first line that matches.
type Tee struct {
	to    io.Writer
	re    *regexp.Regexp
	found func(line string)

	mu    sync.Mutex // guards what follows
	lines splitter
	done  bool
}

// NewTee returns a writer that writes to to and calls found once, with the first whole line that
// matches re, after it was written. Found must not write to the Tee. A last line without a
// newline is not looked at.
func NewTee(to io.Writer, re *regexp.Regexp, found func(line string)) *Tee {
	return &Tee{to: to, re: re, found: found, lines: splitter{max: MaxLine}}
}

// Write implements io.Writer; the result is that of the writer behind. Safe for concurrent use if
// that one is.
func (t *Tee) Write(p []byte) (int, error) {
	n, err := t.to.Write(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return n, err
	}
	t.done = t.lines.write(p, func(line []byte) bool {
		if !t.re.Match(line) {
			return false
		}
		t.found(string(line))
		return true
	})
	return n, err
}
