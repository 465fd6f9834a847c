package persist

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"path"
	"strings"

	"github.com/headstart-oci/headstart/pkg/trace"
)

const allHow = trace.Opened | trace.Read | trace.Executed | trace.Runtime

// Validate returns nil when every value of l is one that the native format can hold:
// absolute cleaned paths without NUL, sizes, times and pids of at least 0, ranges with
// at least one byte that end below 2^63, at most [MaxFileRanges] of them in a file, losses
// with a reason, processes with a pid. Else it returns [ErrInvalid] with the first fault.
func (l *List) Validate() error {
	if l.Duration < 0 {
		return invalidf("duration: got %d ns, want at least 0", int64(l.Duration))
	}
	if y := l.Started.UTC().Year(); !l.Started.IsZero() && (y < 0 || y > 9999) {
		return invalidf("started: got year %d, want 0 to 9999", y)
	}
	if l.Events < 0 || l.Skipped < 0 {
		return invalidf("events and skipped: got %d and %d, want at least 0", l.Events, l.Skipped)
	}
	for i, x := range l.Losses {
		if x.Reason == "" || x.Count < -1 {
			return invalidf("loss %d: got reason %s and count %d, want a reason and at least -1", i, clip(x.Reason), x.Count)
		}
	}
	for i, p := range l.Processes {
		if p.PID <= 0 || p.Parent < 0 {
			return invalidf("process %d: got pid %d and parent %d, want at least 1 and 0", i, p.PID, p.Parent)
		}
	}
	for i := range l.Accesses {
		if err := checkAccess(&l.Accesses[i]); err != nil {
			return invalidf("access %d: %v", i, err)
		}
	}
	return nil
}

func checkAccess(a *trace.Access) error {
	switch {
	case !strings.HasPrefix(a.Path, "/"):
		return invalidf("path: got %s, want an absolute path", clip(a.Path))
	case path.Clean(a.Path) != a.Path:
		return invalidf("path: got %s, want it cleaned (%s)", clip(a.Path), clip(path.Clean(a.Path)))
	case strings.IndexByte(a.Path, 0) >= 0:
		return invalidf("path: got %s, want no NUL", clip(a.Path))
	case a.How&^allHow != 0:
		return invalidf("how: got bits %#x, want at most %#x", uint8(a.How), uint8(allHow))
	case a.Size < 0 || a.Elapsed < 0 || a.PID < 0:
		return invalidf("size, elapsed, pid: got %d, %d, %d, want at least 0", a.Size, int64(a.Elapsed), a.PID)
	}
	if len(a.Ranges) > MaxFileRanges {
		return invalidf("ranges: got %d, want at most %d", len(a.Ranges), MaxFileRanges)
	}
	for _, r := range a.Ranges {
		if r.Elapsed < 0 {
			return invalidf("range: got elapsed %d, want at least 0", int64(r.Elapsed))
		}
		if r.Offset < 0 || r.Length <= 0 || r.Length > math.MaxInt64-r.Offset {
			return invalidf("range: got offset %d and length %d, want at least 0 and 1 and an end below 2^63", r.Offset, r.Length)
		}
	}
	return nil
}

// ContentHash returns "sha256:" and 64 hex digits that depend on what the list asks a
// builder to do and on nothing else: the paths, their ranges and their order. Times,
// pids, names, losses and whether a range is certain do not count.
func (l *List) ContentHash() string {
	h := sha256.New()
	var b []byte
	for _, a := range l.Accesses {
		b = binary.AppendUvarint(b[:0], uint64(len(a.Path)))
		b = append(b, a.Path...)
		b = binary.AppendUvarint(b, uint64(len(a.Ranges)))
		if a.Ranges != nil && len(a.Ranges) == 0 {
			b = append(b, 0) // no byte, in place of all: no path has the length 0
		}
		for _, r := range a.Ranges {
			b = binary.AppendVarint(binary.AppendVarint(b, r.Offset), r.Length)
		}
		h.Write(b)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}
