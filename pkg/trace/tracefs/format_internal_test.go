package tracefs

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseFormat(t *testing.T) {
	const good = "name: x\nID: 7\nformat:\n" +
		"\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n" +
		"\n\tfield:char comm[16];\toffset:8;\tsize:16;\tsigned:0;\n" +
		"\tfield:__data_loc char[] filename;\toffset:24;\tsize:4;\tsigned:1;\n" +
		"\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n\nprint fmt: \"field:%d\", 1\n"
	f, err := parseFormat([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	// The brackets of a __data_loc stand before its name, which nobody needs here.
	want := map[string]field{"common_type": {0, 2, false}, "comm": {8, 16, false}, "char": {24, 4, true}, "commit": {8, 8, true}}
	if diff := cmp.Diff(want, f.fields, cmp.AllowUnexported(field{})); diff != "" || f.id != 7 {
		t.Errorf("id %d, fields (-want +got):\n%s", f.id, diff)
	}
	for name, bad := range map[string]string{
		"empty":           "",
		"no field":        "ID: 1\n",
		"large id":        "ID: 65536\n\tfield:int x;\toffset:0;\tsize:4;\tsigned:0;\n",
		"no size":         "\tfield:int x;\toffset:0;\tsigned:0;\n",
		"no name":         "\tfield:;\toffset:0;\tsize:4;\tsigned:0;\n",
		"negative offset": "\tfield:int x;\toffset:-1;\tsize:4;\tsigned:0;\n",
		"large offset":    "\tfield:int x;\toffset:99999999;\tsize:4;\tsigned:0;\n",
		"no number":       "\tfield:int x;\toffset:a;\tsize:4;\tsigned:0;\n",
	} {
		if f, err := parseFormat([]byte(bad)); !errors.Is(err, ErrInvalid) || f != nil {
			t.Errorf("%s: parseFormat() = %v, %v, want ErrInvalid", name, f, err)
		}
	}
}

// Every field this package reads must be there and hold an integer.
func TestLayoutNeedsFields(t *testing.T) {
	for k := range Kind(kinds) {
		text := string(readFile(t, tracepoints[k].dir[strings.IndexByte(tracepoints[k].dir, '/')+1:]+".format"))
		for i, name := range append([]string{"common_type", "common_pid"}, tracepoints[k].fields[:]...) {
			if name == "" {
				continue
			}
			without := strings.Replace(text, " "+name+";", " other;", 1)
			if without == text {
				t.Fatalf("%s: no field %s in the captured format", k, name)
			}
			l, err := newLayout(readFile(t, "header_page"))
			if err != nil {
				t.Fatal(err)
			}
			err = l.add(k, []byte(without))
			if optional := i-2 >= tracepoints[k].optional; optional != (err == nil) || err != nil && !errors.Is(err, ErrInvalid) {
				t.Errorf("%s without %s: %v", k, name, err)
			}
		}
	}
}

func TestNewLayoutRefuses(t *testing.T) {
	good := string(readFile(t, "header_page"))
	for _, change := range [][2]string{
		{"timestamp", "time"},
		{"commit", "length"},
		{" data", " bytes"},
		{"offset:16", "offset:8"},
		{"size:4080", "size:8"},
		{"timestamp;\toffset:0;\tsize:8", "timestamp;\toffset:0;\tsize:4"},
	} {
		bad := strings.Replace(good, change[0], change[1], 1)
		if bad == good {
			t.Fatalf("%q is not in the captured text", change[0])
		}
		if l, err := newLayout([]byte(bad)); !errors.Is(err, ErrInvalid) || l != nil {
			t.Errorf("%s for %s: newLayout() = %v, %v, want ErrInvalid", change[1], change[0], l, err)
		}
	}
}

func TestFieldGet(t *testing.T) {
	minus := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for size, want := range map[int]uint64{1: 0xff, 2: 0xffff, 4: 0xffffffff, 8: 1<<64 - 1} {
		if got := (field{0, size, false}).get(minus); got != want {
			t.Errorf("unsigned of %d bytes = %#x, want %#x", size, got, want)
		}
		if got := (field{0, size, true}).get(minus); got != 1<<64-1 {
			t.Errorf("signed of %d bytes = %#x, want -1", size, got)
		}
	}
}

func TestParseStats(t *testing.T) {
	const good = "entries: 12\noverrun: 3\ncommit overrun: 4\nbytes: 0\noldest event ts:     0.000000\nnow ts: 12264.645226\ndropped events: 5\nread events: 0\n"
	got, err := parseStats([]byte(good))
	if want := (Lost{Overrun: 3, Commit: 4, Dropped: 5}); err != nil || got != want || got.Total() != 12 {
		t.Errorf("parseStats() = %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "overrun: 1\n", strings.Replace(good, "overrun: 3", "overrun: x", 1), strings.Replace(good, "dropped", "lost", 1)} {
		if got, err := parseStats([]byte(bad)); !errors.Is(err, ErrInvalid) || got != (Lost{}) {
			t.Errorf("parseStats(%q) = %+v, %v, want ErrInvalid", bad, got, err)
		}
	}
}

func TestChoose(t *testing.T) {
	for _, tt := range []struct {
		has, want, get Set
		bad            bool
	}{
		{all, 0, all, false},
		{Pages | Inserts, 0, Pages | Inserts, false},
		{Inserts | Waits | Processes, 0, Inserts | Processes, false},
		{Pages, Pages | Waits, Pages, false},
		{Pages, 0, Pages, false},
		{Pages | Inserts, Inserts, Inserts, false},
		{Inserts | 1<<Fault | Processes, 0, Inserts | Processes, false}, // before Linux 6.11
		{Inserts | 1<<Fault, Pages, 0, true},
		{Processes, 0, 0, true},
		{0, 0, 0, true},
		{Pages, Pages | Processes, Pages, false},
	} {
		got, err := choose(tt.has, tt.want)
		if got != tt.get || errors.Is(err, ErrUnsupported) != tt.bad {
			t.Errorf("choose(%s; %s) = %s, %v, want %s", tt.has, tt.want, got, err, tt.get)
		}
	}
}

func TestSpecText(t *testing.T) {
	for _, s := range []Spec{{}, {Events: Pages | Processes}, {Events: Inserts, ReadsOneMore: true}} {
		text, err := s.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var got Spec
		if err := got.UnmarshalText(text); err != nil || got != s {
			t.Errorf("UnmarshalText(%s) = %+v, %v, want %+v", text, got, err, s)
		}
	}
	for _, bad := range []string{"", "7", "7,", "7,yes", "ff,true", "x,true", "7,true,"} {
		var got Spec
		if err := got.UnmarshalText([]byte(bad)); !errors.Is(err, ErrInvalid) || got != (Spec{}) {
			t.Errorf("UnmarshalText(%q) = %+v, %v, want ErrInvalid", bad, got, err)
		}
	}
}
