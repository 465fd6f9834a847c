package builder

import (
	"github.com/headstart-oci/headstart/pkg/builder/internal/gunzip"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// matchLog keeps what a gzip stream tells about the tar in it: which bytes repeat which. The
// search for repetitions is the greater part of compressing a chunk, and the layer's
// author has paid for it already. It holds what lies behind one place, which moves on as
// the tar is read. Not safe for concurrent use.
type matchLog struct {
	hold    int64         // place in the tar where what is wanted begins
	matches []loggedMatch // from first on those that end behind hold
	first   int
	dropped int64 // place of the last match that the log had no room for
}

// loggedMatch says that length bytes at pos equal those back bytes before.
type loggedMatch struct {
	pos          int64 // in the tar
	length, back uint16
}

// maxLogged bounds a log to 4 MiB. A chunk of 1 MiB has seldom more than 80,000 matches.
const maxLogged = 1 << 18

// add takes the matches of the bytes at pos, which come in order.
func (l *matchLog) add(pos int64, matches []gunzip.Match) {
	if l.first > len(l.matches)/2 {
		l.matches = l.matches[:copy(l.matches, l.matches[l.first:])]
		l.first = 0
	}
	for _, m := range matches {
		at := pos + int64(m.Pos)
		if len(l.matches) == maxLogged {
			l.dropped = at
			continue
		}
		l.matches = append(l.matches, loggedMatch{at, m.Length, m.Back})
	}
}

// keep drops what ends at or before pos.
func (l *matchLog) keep(pos int64) {
	for l.first < len(l.matches) && l.matches[l.first].pos+int64(l.matches[l.first].length) <= pos {
		l.first++
	}
	l.hold = pos
}

// appendTo appends the matches of the n bytes from hold on, as far as dst has room for all; else
// it appends none. A match that begins before hold is cut.
func (l *matchLog) appendTo(dst []rafs.Match, n int) []rafs.Match {
	mark := len(dst)
	if l.dropped > l.hold {
		return dst
	}
	for _, m := range l.matches[l.first:] {
		at := m.pos - l.hold
		length := int64(m.length)
		if at < 0 {
			length, at = length+at, 0
		}
		if at >= int64(n) {
			break
		}
		if length = min(length, int64(n)-at); length <= 0 {
			continue
		}
		if len(dst) == cap(dst) {
			return dst[:mark]
		}
		dst = append(dst, rafs.Match{Pos: uint32(at), Length: uint16(length), Back: m.back}) //nolint:gosec // inside a chunk; at most 258
	}
	return dst
}
