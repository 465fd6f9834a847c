package persist

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// wanted yields the accesses with something to prefetch, each path once. What was opened and
// never read, and the root, are left out: these formats name files to read whole.
func (l *List) wanted(yield func(a *trace.Access) bool) {
	accesses := once(l.Accesses)
	for i := range accesses {
		a := &accesses[i]
		if a.Path == "/" || a.Ranges != nil && len(a.Ranges) == 0 {
			continue
		}
		if !yield(a) {
			return
		}
	}
}

// stargzEntry is a line of a record of stargz-snapshotter.
// Source: containerd/stargz-snapshotter recorder/recorder.go.
type stargzEntry struct {
	Path           string `json:"path"` // of the tar entry, without a leading slash
	ManifestDigest string `json:"manifestDigest,omitempty"`
	LayerIndex     *int   `json:"layerIndex,omitempty"` // 0 is the lowest
}

// Place is where an image has a path: its own name, symbolic links resolved, and the layer
// with the tar entry of it, 0 being the lowest.
type Place struct {
	Path  string
	Layer int
}

// WriteStargz writes the record that "ctr-remote convert --estargz-record-in" and
// --zstdchunked-record-in read: a JSON object per file, in order. place, where it is not
// nil, gives the layers that a record of "ctr-remote optimize --record-out" has too; paths
// that it does not know are left out and counted in omitted, as are those that are not UTF-8.
func (l *List) WriteStargz(w io.Writer, place func(path string) (Place, bool)) (omitted int, err error) {
	b := bufio.NewWriterSize(w, 1<<16)
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	for a := range l.wanted {
		e := stargzEntry{Path: a.Path}
		if place != nil {
			p, ok := place(a.Path)
			if !ok {
				omitted++
				continue
			}
			e = stargzEntry{p.Path, l.Digest, &p.Layer}
		}
		if e.Path = strings.TrimPrefix(e.Path, "/"); !utf8.ValidString(e.Path) {
			omitted++
			continue
		}
		if err := enc.Encode(e); err != nil {
			return omitted, err
		}
	}
	return omitted, b.Flush()
}

// WriteSOCI writes the array of paths that "soci create --prefetch-files-json" reads. It cuts
// white space off both ends of a path: such paths, and those that are not UTF-8, are left out
// and counted in omitted.
// Source: awslabs/soci-snapshotter cmd/soci/commands/internal/prefetch.go.
func (l *List) WriteSOCI(w io.Writer) (omitted int, err error) {
	b := bufio.NewWriterSize(w, 1<<16)
	var one bytes.Buffer
	enc := json.NewEncoder(&one)
	enc.SetEscapeHTML(false)
	b.WriteByte('[')
	sep := "\n"
	for a := range l.wanted {
		if !utf8.ValidString(a.Path) || strings.TrimSpace(a.Path) != a.Path {
			omitted++
			continue
		}
		one.Reset()
		if err := enc.Encode(a.Path); err != nil {
			return omitted, err
		}
		b.WriteString(sep)
		b.Write(bytes.TrimSuffix(one.Bytes(), []byte("\n")))
		sep = ",\n"
	}
	b.WriteString("\n]\n")
	return omitted, b.Flush()
}

// What overlaybd takes from a list of files. Source: containerd/overlaybd src/prefetch.cpp
// DynamicPrefetcher: it ignores lines that its expression does not match, and the whole file when it is longer.
const overlaybdListSize = 65536

var overlaybdPath = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^/([a-zA-Z0-9_.-]+/)*[a-zA-Z0-9_.-]+$`) })

// WriteOverlayBDFiles writes the list of files to prefetch that overlaybd reads ("ctr record-trace
// --priority_list", recordTracePath), a path per line. It takes paths of ASCII letters,
// digits, "_", "-" and "." only, and 65,536 bytes in all: other paths and the last ones
// are left out and counted in omitted. It takes an empty file for an order to record: a list
// without a path that it would read is [ErrInvalid], and nothing is written.
func (l *List) WriteOverlayBDFiles(w io.Writer) (omitted int, err error) {
	var out []byte
	for a := range l.wanted {
		if !overlaybdPath().MatchString(a.Path) || len(out)+len(a.Path)+1 > overlaybdListSize {
			omitted++
			continue
		}
		out = append(append(out, a.Path...), '\n')
	}
	if len(out) == 0 {
		return omitted, invalidf("no file that overlaybd could prefetch, of %d", len(l.Accesses))
	}
	_, err = w.Write(out)
	return omitted, err
}

// WritePatterns writes the list of paths that nydusify and nydus-image take as prefetch patterns, one per
// line. nydus-image refuses a list that is not UTF-8, cuts white space off the ends of a line, and takes a
// directory for all below it: paths that are not UTF-8, end with white space or have a newline, and the
// root, are left out and counted in omitted. nydusify takes an empty list for the root: a list of which no
// path is left is [ErrInvalid], and nothing is written.
// Source: dragonflyoss/nydus builder/src/core/prefetch.rs, contrib/nydusify cmd/nydusify.go.
func (l *List) WritePatterns(w io.Writer) (omitted int, err error) {
	var out []byte
	for i := range l.Accesses {
		p := l.Accesses[i].Path
		if p == "/" || !utf8.ValidString(p) || strings.TrimSpace(p) != p || strings.Contains(p, "\n") {
			omitted++
			continue
		}
		out = append(append(out, p...), '\n')
	}
	if len(out) == 0 {
		return omitted, invalidf("no file that nydusify would take, of %d: it prefetches the whole image for an empty list", len(l.Accesses))
	}
	_, err = w.Write(out)
	return omitted, err
}

// TraceFrame is a read of a layer.
type TraceFrame struct {
	Layer  uint32 // 0 is the lowest
	Offset int64  // bytes, at least 0
	Length int64  // bytes, greater than 0
}

// The trace file of overlaybd: a header of 24 bytes (magic, 4 unused, size of the frames,
// their checksum, 4 unused), then frames of 24 bytes (operation, 3 unused, layer, count,
// offset), little-endian: what a 64-bit C++ compiler makes of the structs TraceHeader and TraceFormat.
// Source: containerd/overlaybd src/prefetch.cpp.
const (
	overlaybdMagic    = 3270449184
	overlaybdHeader   = 24
	overlaybdFrame    = 24
	overlaybdRead     = 'R'
	overlaybdMaxCount = 1 << 20 // MAX_IO_SIZE: the size of the buffer that a frame is read into
)

// castagnoli is the polynomial of overlaybd's checksum, which starts at 0 and is not inverted.
// Source: alibaba/PhotonLibOS common/checksum/crc32c.cpp.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// WriteOverlayBDTrace writes frames as a trace that overlaybd replays, in their order; a long
// one becomes several of at most 1 MiB. It takes an empty file for an order to record: no
// frames, and frames beyond their bounds, are [ErrInvalid], and nothing is written.
func WriteOverlayBDTrace(w io.Writer, frames []TraceFrame) error {
	out := make([]byte, overlaybdHeader, overlaybdHeader+overlaybdFrame*len(frames))
	for i, f := range frames {
		if f.Offset < 0 || f.Length <= 0 || f.Offset+f.Length < 0 {
			return invalidf("trace frame %d: got offset %d and length %d, want at least 0 and 1 and an end below 2^63", i, f.Offset, f.Length)
		}
		for f.Length > 0 {
			n := min(f.Length, overlaybdMaxCount)
			out = append(out, overlaybdRead, 0, 0, 0)
			out = binary.LittleEndian.AppendUint32(out, f.Layer)
			out = binary.LittleEndian.AppendUint64(out, uint64(n))
			out = binary.LittleEndian.AppendUint64(out, uint64(f.Offset))
			f.Offset, f.Length = f.Offset+n, f.Length-n
		}
	}
	if len(frames) == 0 {
		return invalidf("no bytes that overlaybd could prefetch")
	}
	body := out[overlaybdHeader:]
	binary.LittleEndian.PutUint32(out[0:], overlaybdMagic)
	binary.LittleEndian.PutUint64(out[8:], uint64(len(body)))
	binary.LittleEndian.PutUint32(out[16:], ^crc32.Update(^uint32(0), castagnoli, body))
	_, err := w.Write(out)
	return err
}

// Touch is a first touch of bytes of a file.
type Touch struct {
	Access *trace.Access
	// Range is what was touched, with its time; of a file without ranges it is the whole
	// file, as far as its size is known, at the time of the file's first touch.
	Range trace.Range
	// Whole tells that the file has no ranges.
	Whole bool
}

// Touches returns all first touches of l in the order of their times; a range without one was
// touched with its file.
func (l *List) Touches() []Touch {
	var out []Touch
	accesses := once(l.Accesses)
	for i := range accesses {
		a := &accesses[i]
		if a.Ranges == nil {
			out = append(out, Touch{a, trace.Range{Length: a.Size, Elapsed: a.Elapsed}, true})
		}
		for _, r := range a.Ranges {
			r.Elapsed = cmp.Or(r.Elapsed, a.Elapsed)
			out = append(out, Touch{a, r, false})
		}
	}
	slices.SortStableFunc(out, func(a, b Touch) int { return cmp.Compare(a.Range.Elapsed, b.Range.Elapsed) })
	return out
}
