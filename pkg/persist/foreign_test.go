package persist_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestWritePaths(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	omitted, err := awkward().WritePaths(&b)
	want := "/\n/docker-entrypoint.sh\n/bytes/\xff\xfe\x80\n/ümlaut/日本\u2028\u0085\n/never/touched\n/etc/passwd\n"
	if err != nil || omitted != 2 || b.String() != want {
		t.Errorf("WritePaths = %d, %v, %q, want 2, nil, %q", omitted, err, b.String(), want)
	}
}

// Names that end in a carriage return are written where they can be read back.
func TestWritePathsReturns(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		paths   []string
		omitted int
		want    string
	}{
		{[]string{"/a\r", "/b"}, 0, "/a\r\n/b\n"},
		{[]string{"/a\r", "/b\r"}, 2, ""},
		{[]string{"/a\r", "/x\ny"}, 2, ""},
		{nil, 0, ""},
	} {
		var b bytes.Buffer
		if omitted, err := pathsOf(c.paths...).WritePaths(&b); err != nil || omitted != c.omitted || b.String() != c.want {
			t.Errorf("WritePaths of %q = %d, %v, %q, want %d, nil, %q", c.paths, omitted, err, b.String(), c.omitted, c.want)
		}
	}
}

func TestWriteCSV(t *testing.T) {
	t.Parallel()
	for readable, want := range map[bool]string{
		false: "path,size,elapsed\n/,0,0\n/docker-entrypoint.sh,1620,1\n" +
			"\"/usr/lib/with space\tand\nnewline\\n\",1099511627776,3600000000\n/bytes/\xff\xfe\x80,0,0\n/ümlaut/日本\u2028\u0085,0,0\n/never/touched,12,0\n/etc/passwd,900,0\n",
		true: "path,size,elapsed\n/,0 B,0 us\n/docker-entrypoint.sh,1.6 KiB,1 us\n" +
			"\"/usr/lib/with space\tand\nnewline\\n\",1.0 TiB,3600.000 s\n/bytes/\xff\xfe\x80,0 B,0 us\n/ümlaut/日本\u2028\u0085,0 B,0 us\n/never/touched,12 B,0 us\n/etc/passwd,900 B,0 us\n",
	} {
		var b bytes.Buffer
		omitted, err := awkward().WriteCSV(&b, readable)
		if err != nil || omitted != 1 {
			t.Errorf("WriteCSV(%v) = %d, %v, want 1, nil", readable, omitted, err)
		}
		if d := cmp.Diff(want, b.String()); d != "" {
			t.Errorf("WriteCSV(%v) (-want +got):\n%s", readable, d)
		}
		l, err := persist.ReadAny(&b)
		if err != nil || len(l.Accesses) != 7 || l.Accesses[2].Path != awkward().Accesses[2].Path || l.Accesses[2].Elapsed != time.Hour {
			t.Errorf("ReadAny of it = %+v, %v", l, err)
		}
	}
}

// The forms are those of upstream's pkg/utils/display.
func TestReadableForms(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		size     int64
		elapsed  time.Duration
		want     string
		readBack bool
	}{
		{1023, 999 * time.Microsecond, "1023 B,999 us", true},
		{1024, time.Millisecond, "1.0 KiB,1.000 ms", true},
		{1536, 1234567 * time.Nanosecond, "1.5 KiB,1.234 ms", false},
		{1<<20 - 1, 999999 * time.Microsecond, "1024.0 KiB,999.999 ms", false},
		{5 << 30, 61*time.Second + 500*time.Millisecond, "5.0 GiB,61.500 s", true},
		{1<<63 - 1, 0, "8.0 EiB,0 us", false},
	} {
		l := &persist.List{Trace: trace.Trace{Accesses: []trace.Access{{Path: "/x", Size: c.size, Elapsed: c.elapsed}}}}
		var b bytes.Buffer
		if _, err := l.WriteCSV(&b, true); err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimPrefix(b.String(), "path,size,elapsed\n/x,"); got != c.want+"\n" {
			t.Errorf("WriteCSV of %d, %v = %q, want %q", c.size, c.elapsed, got, c.want)
		}
		back, err := persist.ReadAny(&b)
		if c.readBack && (err != nil || back.Accesses[0].Size != c.size || back.Accesses[0].Elapsed != c.elapsed) {
			t.Errorf("ReadAny = %+v, %v, want %d, %v", back, err, c.size, c.elapsed)
		}
	}
}

func TestWriteJSON(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	omitted, err := awkward().WriteJSON(&b)
	if err != nil || omitted != 1 {
		t.Fatalf("WriteJSON = %d, %v, want 1, nil", omitted, err)
	}
	back, err := persist.ReadAny(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	var want []trace.Access
	for i, a := range awkward().Accesses {
		if i != 3 { // not UTF-8
			want = append(want, trace.Access{Path: a.Path, How: trace.Opened, Ranges: a.Ranges})
			if i == 4 { // sorted, without times
				want[3].Ranges = []trace.Range{{Offset: 0, Length: 4096}, {Offset: 8192, Length: 4096}, {Offset: 1 << 62, Length: 1<<62 - 1}}
			}
		}
	}
	if d := cmp.Diff(&persist.List{Grade: "range", Trace: trace.Trace{Accesses: want}}, back); d != "" {
		t.Error(d)
	}
}

// nydus-image refuses an image when its list has a path twice.
func TestWriteJSONOnce(t *testing.T) {
	t.Parallel()
	ranges := func(pairs ...int64) []trace.Range {
		out := []trace.Range{}
		for i := 0; i < len(pairs); i += 2 {
			out = append(out, trace.Range{Offset: pairs[i], Length: pairs[i+1]})
		}
		return out
	}
	l := &persist.List{Trace: trace.Trace{Accesses: []trace.Access{
		{Path: "/a", Ranges: ranges(10, 5)},
		{Path: "/b", Ranges: ranges()},
		{Path: "/a", Ranges: ranges(15, 5, 0, 1, 2, 30, 3, 1)},
		{Path: "/c", Ranges: ranges(1, 1)},
		{Path: "/b", Ranges: ranges()},
		{Path: "/c"},
		{Path: "/d"},
		{Path: "/d", Ranges: ranges(1, 1)},
	}}}
	var b bytes.Buffer
	if _, err := l.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	want := `{"version":"v1","files":[
{"path":"/a","ranges":[[0,1],[2,30]]}
,
{"path":"/b","ranges":[]}
,
{"path":"/c"}
,
{"path":"/d"}
]}
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("WriteJSON (-want +got):\n%s", d)
	}
}

// Python's reader is the judge: strict JSON, and a list without ranges means the whole file.
func TestWriteJSONForPython(t *testing.T) {
	t.Parallel()
	python := testenv.Tool(t, "python3")
	var b bytes.Buffer
	if _, err := awkward().WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(python, "-c", `import json,sys; d=json.load(sys.stdin.buffer); print(json.dumps([d["version"]]+[[f["path"],f.get("ranges")] for f in d["files"]]))`)
	cmd.Stdin = &b
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got []any
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := []any{
		"v1",
		[]any{"/", nil},
		[]any{"/docker-entrypoint.sh", nil},
		[]any{"/usr/lib/with space\tand\nnewline\\n", nil},
		[]any{"/ümlaut/日本\u2028\u0085", []any{[]any{0., 4096.}, []any{8192., 4096.}, []any{float64(1 << 62), float64(1<<62 - 1)}}},
		[]any{"/cr\r\nlf", []any{[]any{7., 1.}}},
		[]any{"/never/touched", []any{}},
		[]any{"/etc/passwd", nil},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestReadAny(t *testing.T) {
	t.Parallel()
	paths := func(grade string, p ...string) *persist.List {
		l := &persist.List{Grade: grade}
		for _, p := range p {
			l.Accesses = append(l.Accesses, trace.Access{Path: p, How: trace.Opened})
		}
		return l
	}
	ranged := paths("range", "/a")
	ranged.Accesses[0].Ranges = []trace.Range{{Offset: 5, Length: 6}}
	table := paths("file", "/a,b")
	table.Accesses[0].Size, table.Accesses[0].Elapsed = 12, 34*time.Microsecond
	for name, c := range map[string]struct {
		in   string
		want *persist.List
	}{
		"nothing":             {"", paths("file")},
		"blank":               {"\n\n", paths("file")},
		"paths":               {"/b\n\n/a\n/b", paths("file", "/b", "/a", "/b")},
		"paths to clean":      {"/usr/lib/\n//x/../../y\n/\n", paths("file", "/usr/lib", "/y", "/")},
		"spaces are kept":     {"/a \n", paths("file", "/a ")},
		"ends of lines":       {"/b\r\n\n\r\n/usr/lib/\r\n/x/..\r\n/\r\n/c\r\r\n", paths("file", "/b", "/usr/lib", "/", "/", "/c\r")},
		"ends but the last":   {"/b\r\n/a", paths("file", "/b", "/a")},
		"end and no line":     {"/b\r", paths("file", "/b")},
		"blank ends of lines": {"\r\n\r\n", paths("file")},
		"some returns":        {"/b\r\n/a\n/c\r\n", paths("file", "/b\r", "/a", "/c\r")},
		"table":               {"path,size,elapsed\r\n\"/a,b\",12,34\r\n", table},
		"table without lines": {"path,size,elapsed", paths("file")},
		"json":                {` {"files":[{"path":"/a","ranges":[[5,6]]}],"version":"v1","more":{}}`, ranged},
		"json null ranges":    {`{"version":"v1","files":[{"path":"/a","ranges":null},{"path":"/b"}]}`, paths("file", "/a", "/b")},
		"json empty ranges": {`{"version":"v1","files":[{"path":"/a","ranges":[]}]}`, &persist.List{Grade: "range", Trace: trace.Trace{Accesses: []trace.Access{
			{Path: "/a", How: trace.Opened, Ranges: []trace.Range{}},
		}}}},
		"json null files": {`{"version":"v1","files":null}`, paths("file")},
	} {
		got, err := persist.ReadAny(strings.NewReader(c.in))
		if err != nil {
			t.Errorf("%s: ReadAny: %v", name, err)
			continue
		}
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestReadAnyErrors(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ in, want string }{
		"relative path":        {"/a\nb\n", `line 2: invalid access list: path: got "b", want an absolute path`},
		"blank but a return":   {"/b\r\n\r\n/a\nc\n", `line 2: invalid access list: path: got "\r", want an absolute path`},
		"return after a name":  {"/b\n\r\n", `line 2: invalid access list: path: got "\r", want an absolute path`},
		"returns and no path":  {"\r\nb\r\n", `line 2: invalid access list: path: got "b\r", want an absolute path`},
		"binary":               {"\x7fELF\x02\x01", `line 1: invalid access list: path: got "\x7fELF\x02\x01", want an absolute path`},
		"NUL":                  {"/a\x00b\n", `line 1: invalid access list: path: got "/a\x00b", want no NUL`},
		"native, broken":       {"headstart-access-list v1\nx\n", `line 2: invalid access list: got "x"`},
		"table, fields":        {"path,size,elapsed\n/a,1\n", `invalid access list: record on line 2: wrong number of fields`},
		"table, quote":         {"path,size,elapsed\n\"/a,1,1\n", `invalid access list:`},
		"table, size":          {"path,size,elapsed\n/b,1,1\n/a,-1,1\n", `line 3: invalid access list: size: got "-1"`},
		"table, unit":          {"path,size,elapsed\n/a,1 MB,1\n", `line 2: invalid access list: size: got "1 MB", want a whole number, or a number, a space and a unit`},
		"table, time":          {"path,size,elapsed\n/a,1,9223372036854775807\n", `line 2: invalid access list: elapsed: got "9223372036854775807"`},
		"table, path":          {"path,size,elapsed\na,1,1\n", `line 2: invalid access list: path: got "a"`},
		"json, syntax":         {`{"version":"v1","files":[}`, `invalid access list: invalid character '}'`},
		"json, cut off":        {`{"version":"v1","files":[`, `invalid access list: unexpected end of JSON input`},
		"json, version":        {`{"version":"v2","files":[]}`, `unsupported access list: JSON "version": got "v2", want "v1"`},
		"json, no version":     {`{"files":[]}`, `unsupported access list: JSON "version": got "", want "v1"`},
		"json, path":           {`{"version":"v1","files":[{"path":"/a"},{"path":"b"}]}`, `files[1]: invalid access list: path: got "b"`},
		"json, no path":        {`{"version":"v1","files":[{}]}`, `files[0]: invalid access list: path: got ""`},
		"json, three numbers":  {`{"version":"v1","files":[{"path":"/a","ranges":[[1,2,3]]}]}`, `files[0]: range: got "[1,2,3]", want [offset, size]`},
		"json, empty range":    {`{"version":"v1","files":[{"path":"/a","ranges":[[1,0]]}]}`, `files[0]: invalid access list: range: got offset 1 and length 0`},
		"json, negative range": {`{"version":"v1","files":[{"path":"/a","ranges":[[-1,1]]}]}`, `files[0]: invalid access list: range: got offset -1`},
		"json, huge range":     {`{"version":"v1","files":[{"path":"/a","ranges":[[1,18446744073709551615]]}]}`, `invalid access list: files[0]:`},
		"json, files no array": {`{"version":"v1","files":{}}`, `invalid access list: files: got "{}", want an array`},
		"json, bytes":          {"{\"version\":\"v1\",\"files\":[{\"path\":\"/\xff\"}]}", `invalid access list: JSON that is not UTF-8`},
		"json, deep":           {strings.Repeat(`{"a":`, 20000), `exceeded max depth`},
	} {
		l, err := persist.ReadAny(strings.NewReader(c.in))
		if l != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: ReadAny = %v, %v\nwant an error with: %s", name, l, err, c.want)
		}
		if !errors.Is(err, persist.ErrInvalid) && !errors.Is(err, persist.ErrUnsupported) {
			t.Errorf("%s: error %v is neither ErrInvalid nor ErrUnsupported", name, err)
		}
	}
}
