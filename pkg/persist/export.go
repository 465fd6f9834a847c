package persist

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// WritePaths writes the paths of l, one per line and in order: the list that the upstream
// optimizer writes and that nydusify reads as prefetch patterns. The format has no way
// to write a path with a newline, nor lists of nothing but paths that end in a carriage return, whose
// readers take them for ends of lines; such paths are left out and counted in omitted.
func (l *List) WritePaths(w io.Writer) (omitted int, err error) {
	b := bufio.NewWriterSize(w, 1<<16)
	returns := !slices.ContainsFunc(l.Accesses, func(a trace.Access) bool {
		return !strings.HasSuffix(a.Path, "\r") && !strings.Contains(a.Path, "\n")
	})
	for i := range l.Accesses {
		p := l.Accesses[i].Path
		if returns || strings.Contains(p, "\n") {
			omitted++
			continue
		}
		b.WriteString(p)
		b.WriteByte('\n')
	}
	return omitted, b.Flush()
}

// WriteCSV writes upstream's table: the line "path,size,elapsed" and a line per access
// with the size in bytes and the time in microseconds; with readable true as a person
// reads them ("1.5 MiB", "2.500 ms"). Paths are quoted as RFC 4180 says. Its readers turn
// a carriage return and newline into a newline, so paths with both in a row are left
// out and counted in omitted.
func (l *List) WriteCSV(w io.Writer, readable bool) (omitted int, err error) {
	c := csv.NewWriter(w)
	if err := c.Write([]string{"path", "size", "elapsed"}); err != nil {
		return 0, err
	}
	for i := range l.Accesses {
		a := &l.Accesses[i]
		if strings.Contains(a.Path, "\r\n") {
			omitted++
			continue
		}
		row := []string{a.Path, strconv.FormatInt(a.Size, 10), strconv.FormatInt(a.Elapsed.Microseconds(), 10)}
		if readable {
			row[1], row[2] = readableSize(a.Size), readableMicroseconds(a.Elapsed.Microseconds())
		}
		if err := c.Write(row); err != nil {
			return omitted, err
		}
	}
	c.Flush()
	return omitted, c.Error()
}

// readableSize gives n bytes as upstream's readable table does: a number of bytes below
// 1024, else one decimal and an IEC unit.
func readableSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	for v >= 1024 && unit < len(iecUnits)-1 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", v, iecUnits[unit])
}

const iecUnits = "KMGTPE"

// readableMicroseconds gives a time as upstream's readable table does.
func readableMicroseconds(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d us", n)
	case n < 1000*1000:
		return fmt.Sprintf("%.3f ms", float64(n)/1000)
	}
	return fmt.Sprintf("%.3f s", float64(n)/(1000*1000))
}

// prefetchFile is one element of "files" in a Nydus prefetch list.
type prefetchFile struct {
	Path   string `json:"path"`
	Ranges []pair `json:"ranges,omitzero"` // nil: the whole file; empty: nothing of it
}

// pair is a range as Nydus writes it: [offset, size].
type pair [2]int64

// UnmarshalJSON accepts two whole numbers and nothing else.
func (p *pair) UnmarshalJSON(b []byte) error {
	var v []int64
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	if len(v) != 2 {
		return fmt.Errorf("range: got %s, want [offset, size]", clip(string(b)))
	}
	*p = pair{v[0], v[1]}
	return nil
}

// prefetchFiles is a slice that refuses to grow beyond MaxLines elements.
type prefetchFiles []prefetchFile

// UnmarshalJSON decodes an array of files, or null.
func (f *prefetchFiles) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return fmt.Errorf("files: got %s, want an array", clip(string(b)))
	}
	for d.More() {
		if len(*f) == MaxLines {
			return fmt.Errorf("files: more than %d", MaxLines)
		}
		var one prefetchFile
		if err := d.Decode(&one); err != nil {
			return fmt.Errorf("files[%d]: %w", len(*f), err)
		}
		*f = append(*f, one)
	}
	return nil
}

// prefetchList is the JSON that nydus-image optimize takes (rafs-format.md, 4.1).
type prefetchList struct {
	Version string        `json:"version"`
	Files   prefetchFiles `json:"files"`
}

const prefetchVersion = "v1"

// WriteJSON writes the list of files and ranges that "nydus-image optimize" takes, version
// v1, one file per line. Ranges are sorted by offset, those that touch are one; a file that
// was opened and not read has an empty list of them, which that tool takes for no chunk at
// all, as it takes no list for every chunk. A path comes once, since it refuses an image
// whose list has one twice. JSON holds Unicode text only: paths that are not UTF-8 are
// left out and counted in omitted.
func (l *List) WriteJSON(w io.Writer) (omitted int, err error) {
	b := bufio.NewWriterSize(w, 1<<16)
	b.WriteString(`{"version":"` + prefetchVersion + `","files":[`)
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	first := true
	accesses := once(l.Accesses)
	for i := range accesses {
		a := &accesses[i]
		if !utf8.ValidString(a.Path) {
			omitted++
			continue
		}
		if !first {
			b.WriteByte(',')
		}
		first = false
		b.WriteByte('\n')
		if err := enc.Encode(prefetchFile{Path: a.Path, Ranges: pairs(a.Ranges)}); err != nil {
			return omitted, err
		}
	}
	b.WriteString("]}\n")
	return omitted, b.Flush()
}

// pairs returns the union of ranges by offset; nil stays nil.
func pairs(in []trace.Range) []pair {
	if in == nil {
		return nil
	}
	out := make([]pair, 0, len(in))
	for _, r := range union(in) {
		out = append(out, pair{r.Offset, r.Length})
	}
	return out
}

// union returns ranges without times and bounds, sorted by offset; those that overlap or
// touch are one. The result is not nil.
func union(in []trace.Range) []trace.Range {
	sorted := make([]trace.Range, 0, len(in))
	for _, r := range in {
		sorted = append(sorted, trace.Range{Offset: r.Offset, Length: r.Length})
	}
	slices.SortFunc(sorted, func(a, b trace.Range) int {
		return cmp.Or(cmp.Compare(a.Offset, b.Offset), cmp.Compare(a.Length, b.Length))
	})
	out := sorted[:0]
	for _, r := range sorted {
		if n := len(out); n > 0 && r.Offset-out[n-1].Offset <= out[n-1].Length {
			last := &out[n-1]
			last.Length = max(last.Length, r.Offset-last.Offset+r.Length)
			continue
		}
		out = append(out, r)
	}
	return out
}

// once returns accesses with every path once, at its first place, with all its ranges and ways.
func once(in []trace.Access) []trace.Access {
	at := make(map[string]int, len(in))
	var out []trace.Access // nil as long as no path came twice
	for i := range in {
		a := &in[i]
		j, again := at[a.Path]
		switch {
		case !again:
			at[a.Path] = i
			if out != nil {
				at[a.Path] = len(out)
				out = append(out, *a)
			}
			continue
		case out == nil:
			out = slices.Clone(in[:i])
		}
		out[j].How |= a.How
		out[j].Size = max(out[j].Size, a.Size)
		out[j].Elapsed = min(out[j].Elapsed, a.Elapsed)
		if out[j].Ranges == nil || a.Ranges == nil {
			out[j].Ranges = nil // the whole file
			continue
		}
		out[j].Ranges = slices.Concat(out[j].Ranges, a.Ranges)
		if out[j].Ranges == nil {
			out[j].Ranges = []trace.Range{}
		}
	}
	if out == nil {
		return in
	}
	return out
}
