package persist

import (
	"bufio"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// ReadAny parses a list in whichever format its first bytes show: the native one, a profile,
// which gives the union of its runs, Nydus' JSON (an opening brace), upstream's table (the line "path,size,elapsed"), else paths,
// one per line. Paths of the foreign formats are cleaned; a path that is not absolute is
// an error. Blank lines of a path list are skipped,
// as are the carriage returns where all its lines end in one, and no bytes at all are an empty
// list. What a format does not say stays zero; a list that is not native claims grade "file",
// or "range" where it has ranges. Bounds and errors are those of [Read].
func ReadAny(r io.Reader) (*List, error) {
	b := bufio.NewReaderSize(r, 1<<16)
	head, err := b.Peek(len(csvHeader) + 2)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read access list: %w", err)
	}
	text := string(head)
	var l *List
	switch {
	case strings.HasPrefix(text, magicName[:len(csvHeader)]):
		return Read(b)
	case strings.HasPrefix(text, profileName):
		p, err := ReadProfile(b)
		if err != nil {
			return nil, err
		}
		return p.List(Union), nil
	case strings.HasPrefix(strings.TrimLeft(text, " \t\r\n"), "{"):
		l, err = readJSON(b)
	case strings.HasPrefix(text, csvHeader+"\n"), strings.HasPrefix(text, csvHeader+"\r\n"), text == csvHeader:
		l, err = readCSV(b)
	default:
		l, err = readPaths(b)
	}
	if err != nil {
		return nil, fmt.Errorf("read access list: %w", err)
	}
	return l, nil
}

const csvHeader = "path,size,elapsed"

// imported makes an access of a path that a foreign format names.
func imported(p string) (trace.Access, error) {
	switch {
	case !strings.HasPrefix(p, "/"):
		return trace.Access{}, invalidf("path: got %s, want an absolute path", clip(p))
	case strings.IndexByte(p, 0) >= 0:
		return trace.Access{}, invalidf("path: got %s, want no NUL", clip(p))
	}
	return trace.Access{Path: path.Clean(p), How: trace.Opened}, nil
}

// readPaths reads a path per line. Where every line that a newline ends, blank ones aside, ends in a carriage
// return before it, these end the lines and are no part of a name.
func readPaths(r io.Reader) (*List, error) {
	lines := newLineReader(r)
	l := &List{Grade: GradeFile}
	returns := true // so far
	var blank error // a line that is blank only with returns
	for {
		line, ended, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if len(line) == 0 {
			continue
		}
		if returns = returns && (line[len(line)-1] == '\r' || !ended && len(l.Accesses) > 0); !returns && blank != nil {
			return nil, blank
		}
		a, err := imported(string(line))
		switch {
		case err != nil && returns && string(line) == "\r":
			blank = cmp.Or(blank, lines.fail(err))
			continue
		case err != nil:
			return nil, lines.fail(err)
		}
		l.Accesses = append(l.Accesses, a)
	}
	for i := range l.Accesses {
		if a := &l.Accesses[i]; returns {
			a.Path = path.Clean(strings.TrimSuffix(a.Path, "\r"))
		}
	}
	return l, nil
}

func readCSV(r io.Reader) (*List, error) {
	limited := &io.LimitedReader{R: r, N: MaxListSize + 1}
	c := csv.NewReader(limited)
	c.FieldsPerRecord, c.ReuseRecord = 3, true
	l := &List{Grade: GradeFile}
	for header := true; ; header = false {
		row, err := c.Read()
		if errors.Is(err, io.EOF) && limited.N > 0 {
			return l, nil
		}
		if limited.N <= 0 || len(l.Accesses) > MaxLines {
			return nil, invalidf("more than %d bytes or %d lines", MaxListSize, MaxLines)
		}
		if err != nil {
			if _, ok := errors.AsType[*csv.ParseError](err); ok {
				return nil, invalidf("%v", err)
			}
			return nil, err
		}
		if header {
			continue
		}
		line, _ := c.FieldPos(0)
		a, err := csvAccess(row)
		if err != nil {
			return nil, &lineError{line, err}
		}
		l.Accesses = append(l.Accesses, a)
	}
}

func csvAccess(row []string) (trace.Access, error) {
	a, err := imported(strings.Clone(row[0]))
	if err != nil {
		return a, err
	}
	if a.Size, err = parseMeasure("size", row[1], sizeUnits, 1); err != nil {
		return a, err
	}
	elapsed, err := parseMeasure("elapsed", row[2], timeUnits, int64(time.Microsecond))
	a.Elapsed = time.Duration(elapsed)
	return a, err
}

// unit is a suffix of upstream's readable table and how many bytes or nanoseconds it means.
type unit struct {
	suffix string
	factor int64
}

var (
	sizeUnits = []unit{{" KiB", 1 << 10}, {" MiB", 1 << 20}, {" GiB", 1 << 30}, {" TiB", 1 << 40}, {" PiB", 1 << 50}, {" EiB", 1 << 60}, {" B", 1}}
	timeUnits = []unit{{" us", int64(time.Microsecond)}, {" ms", int64(time.Millisecond)}, {" s", int64(time.Second)}}
)

// parseMeasure parses a whole number of plain units, or a number with one of the suffixes.
func parseMeasure(what, s string, units []unit, plain int64) (int64, error) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && n >= 0 && n <= math.MaxInt64/plain {
		return n * plain, nil
	}
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(digits, 64)
		if v := f * float64(u.factor); err == nil && v >= 0 && v < math.MaxInt64 {
			return int64(v), nil
		}
	}
	return 0, invalidf("%s: got %s, want a whole number, or a number, a space and a unit", what, clip(s))
}

func readJSON(r io.Reader) (*List, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxListSize+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > MaxListSize:
		return nil, invalidf("more than %d bytes", MaxListSize)
	case !utf8.Valid(data):
		return nil, invalidf("JSON that is not UTF-8")
	}
	var in prefetchList
	if err := json.Unmarshal(data, &in); err != nil {
		return nil, invalidf("%v", err)
	}
	if in.Version != prefetchVersion {
		return nil, fmt.Errorf("%w: JSON \"version\": got %s, want %q", ErrUnsupported, clip(in.Version), prefetchVersion)
	}
	l := &List{Grade: GradeFile}
	for i, f := range in.Files {
		a, err := imported(f.Path)
		if err != nil {
			return nil, fmt.Errorf("files[%d]: %w", i, err)
		}
		if f.Ranges != nil {
			l.Grade = GradeRange
			a.Ranges = make([]trace.Range, 0, len(f.Ranges))
		}
		for _, r := range f.Ranges {
			a.Ranges = append(a.Ranges, trace.Range{Offset: r[0], Length: r[1]})
		}
		if err := checkAccess(&a); err != nil {
			return nil, fmt.Errorf("files[%d]: %w", i, err)
		}
		l.Accesses = append(l.Accesses, a)
	}
	return l, nil
}
