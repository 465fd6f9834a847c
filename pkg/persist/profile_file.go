package persist

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

const (
	profileName  = "headstart-profile "
	profileMagic = profileName + "v1"
	runPrefix    = "run "
)

// WriteTo writes p in its format (docs/format-profile.md) and returns the bytes written. The
// bytes depend on p's runs alone. A profile beyond [MaxRuns], [MaxProfileLines] or
// [MaxProfileSize], or with a list that is none, is [ErrInvalid]; part of it may have
// been written then.
func (p *Profile) WriteTo(w io.Writer) (int64, error) {
	if len(p.Runs) > MaxRuns {
		return 0, invalidf("profile: got %d runs, want at most %d", len(p.Runs), MaxRuns)
	}
	if !slices.IsSortedFunc(p.Runs, compareRuns) {
		return 0, invalidf("profile: its runs are not in order")
	}
	lw := &lineWriter{w: bufio.NewWriterSize(w, 1<<16), maxLines: MaxProfileLines, maxSize: MaxProfileSize}
	lw.line([]byte(profileMagic))
	for _, r := range p.Runs {
		if err := r.List.Validate(); err != nil {
			return 0, fmt.Errorf("run %s: %w", r.ID, err)
		}
		lw.line([]byte(runPrefix + r.ID))
		r.List.write(lw)
	}
	lw.line(fmt.Appendf(nil, "end %d runs", len(p.Runs)))
	if errors.Is(lw.err, ErrInvalid) {
		return lw.n - int64(lw.w.Buffered()), fmt.Errorf("write profile of %d runs: %w", len(p.Runs), lw.err)
	}
	if lw.err == nil {
		lw.err = lw.w.Flush()
	}
	return lw.n - int64(lw.w.Buffered()), lw.err
}

// ReadProfile parses a profile, up to the end of file. What it accepts, [Profile.WriteTo]
// writes back byte for byte. The lists in it are verified against their IDs. Memory is
// bounded by a small multiple of the bytes read, and those by [MaxProfileSize].
// Errors are those of [Read].
func ReadProfile(r io.Reader) (*Profile, error) {
	lines := newLineReader(r)
	lines.maxLines, lines.maxSize = MaxProfileLines, MaxProfileSize
	p, err := readProfile(lines)
	if err == nil {
		err = lines.end()
	}
	if err != nil {
		return nil, fmt.Errorf("read profile: %w", err)
	}
	return p, nil
}

func readProfile(lines *lineReader) (*Profile, error) {
	line, err := lines.whole("the line " + profileMagic)
	if err != nil {
		return nil, err
	}
	if line != profileMagic {
		if v, ok := strings.CutPrefix(line, profileName); ok {
			return nil, lines.fail(fmt.Errorf("%w: got profile version %s, want v1", ErrUnsupported, clip(v)))
		}
		return nil, lines.fail(invalidf("got %s, want %q", clip(line), profileMagic))
	}
	p := &Profile{}
	names := interner{}
	for {
		if line, err = lines.whole("a run or the end line"); err != nil {
			return nil, err
		}
		if strings.HasPrefix(line, "end ") {
			if want := "end " + strconv.Itoa(len(p.Runs)) + " runs"; line != want {
				return nil, lines.fail(invalidf("got %s, want %q for what came before it", clip(line), want))
			}
			return p, nil
		}
		id, ok := strings.CutPrefix(line, runPrefix)
		if !ok {
			return nil, lines.fail(invalidf("got %s, want \"run \" and an id, or the end line", clip(line)))
		}
		if len(p.Runs) == MaxRuns {
			return nil, lines.fail(invalidf("more than %d runs", MaxRuns))
		}
		at := lines.n
		run, err := readRun(lines, id)
		if err != nil {
			return nil, err
		}
		names.intern(run.List)
		p.Runs = append(p.Runs, run)
		if n := len(p.Runs); n > 1 && compareRuns(p.Runs[n-2], run) >= 0 {
			return nil, &lineError{at, invalidf("run %s comes after run %s, want them in order", clip(id), clip(p.Runs[n-2].ID))}
		}
	}
}

func readRun(lines *lineReader, id string) (Run, error) {
	at := lines.n
	parser := &nativeParser{lines: lines, list: &List{}}
	if err := parser.parse(); err != nil {
		return Run{}, err
	}
	got, err := runID(parser.list)
	if err != nil {
		return Run{}, &lineError{at, err}
	}
	if got != id {
		return Run{}, &lineError{at, invalidf("run: got id %s of a list whose bytes give %s", clip(id), got)}
	}
	return Run{ID: id, List: parser.list}, nil
}

// interner makes equal strings of several runs one: their paths and commands mostly are.
type interner map[string]string

func (n interner) intern(l *List) {
	one := func(s *string) {
		if have, ok := n[*s]; ok {
			*s = have
			return
		}
		n[*s] = *s
	}
	for i := range l.Accesses {
		one(&l.Accesses[i].Path)
		one(&l.Accesses[i].Command)
	}
}

// ReadAnyProfile parses a profile, or a list in one of the formats of [ReadAny], which is
// the profile of one run. Bounds and errors are theirs.
func ReadAnyProfile(r io.Reader) (*Profile, error) {
	b := bufio.NewReaderSize(r, 1<<16)
	if head, err := b.Peek(len(profileName)); err == nil && string(head) == profileName {
		return ReadProfile(b)
	}
	l, err := ReadAny(b)
	if err != nil {
		return nil, err
	}
	return NewProfile(l)
}
