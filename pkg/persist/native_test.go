package persist_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// golden is awkward() in version 2.
const golden = "headstart-access-list v2\n" +
	"reference docker.io/library/nginx:1.27\n" +
	"digest sha256:4c1d000000000000000000000000000000000000000000000000000000000000\n" +
	"platform linux/arm64/v8\n" +
	"container 0123abc\nname web\npod web-7c5d\nnamespace default\n" +
	"arg /docker-entrypoint.sh\narg \narg -g\narg daemon off;\narg two\\nlines\\x00\\x7f\\\\\n" +
	"engine fanotify+filemap\ngrade fault-around\nstarted 2026-11-21T00:41:00.123456789Z\nduration 2500000000\nended exit\nverdict incomplete\n" +
	"events 1201\nskipped 3\n" +
	"loss overflow -1 the queue overflowed, twice\nloss odd\\x20reason\\n 0\n" +
	"process 4242 0 docker-entrypoi\nprocess 2147483647 4242 a b\\tc\nprocess 5 4242\n" +
	"accesses\thow\telapsed_ns\tsize\tpid\tcommand\tranges\tpath\n" +
	"o---\t0\t0\t0\t\t-\t/\n" +
	"orx-\t1500\t1620\t4242\tdocker-entrypoi\t-\t/docker-entrypoint.sh\n" +
	"-r--\t3600000000000\t1099511627776\t2147483647\ta b\\tc\t-\t/usr/lib/with space\\tand\\nnewline\\\\n\n" +
	"----\t0\t0\t0\t-\t-\t/bytes/\xff\xfe\x80\n" +
	"--x-\t0\t0\t0\t\t8192+4096@77!,0+4096@78,4611686018427387904+4611686018427387903!\t/ümlaut/日本\u2028\u0085\n" +
	"o---\t0\t0\t0\t\t7+1\t/cr\\r\\nlf\n" +
	"o---\t0\t12\t0\t\tnone\t/never/touched\n" +
	"---c\t0\t900\t0\t\t-\t/etc/passwd\n" +
	"end 8 accesses 4 ranges 2 losses\n"

// goldenV1 is what version 1 can say of awkward().
const goldenV1 = "headstart-access-list v1\n" +
	"reference docker.io/library/nginx:1.27\n" +
	"digest sha256:4c1d000000000000000000000000000000000000000000000000000000000000\n" +
	"platform linux/arm64/v8\n" +
	"container 0123abc\nname web\npod web-7c5d\nnamespace default\n" +
	"arg /docker-entrypoint.sh\narg \narg -g\narg daemon off;\narg two\\nlines\\x00\\x7f\\\\\n" +
	"engine fanotify\ngrade file\nstarted 2026-11-21T00:41:00.123456789Z\nduration 2500000000\nended exit\n" +
	"events 1201\nskipped 3\n" +
	"loss overflow -1 the queue overflowed, twice\nloss odd\\x20reason\\n 0\n" +
	"accesses\thow\telapsed_ns\tsize\tpid\tcommand\tranges\tpath\n" +
	"o--\t0\t0\t0\t\t-\t/\n" +
	"orx\t1500\t1620\t4242\tdocker-entrypoi\t-\t/docker-entrypoint.sh\n" +
	"-r-\t3600000000000\t1099511627776\t2147483647\ta b\\tc\t-\t/usr/lib/with space\\tand\\nnewline\\\\n\n" +
	"---\t0\t0\t0\t-\t-\t/bytes/\xff\xfe\x80\n" +
	"--x\t0\t0\t0\t\t0+4096,4611686018427387904+4611686018427387903\t/ümlaut/日本\u2028\u0085\n" +
	"o--\t0\t0\t0\t\t7+1\t/cr\\r\\nlf\n" +
	"end 6 accesses 3 ranges 2 losses\n"

func TestNativeGolden(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	n, err := awkward().WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("WriteTo = %d, %v, want %d, nil", n, err, b.Len())
	}
	if d := cmp.Diff(golden, b.String()); d != "" {
		t.Fatalf("bytes (-want +got):\n%s", d)
	}
	for name, read := range map[string]func(io.Reader) (*persist.List, error){"Read": persist.Read, "ReadAny": persist.ReadAny} {
		got, err := read(iotest.OneByteReader(strings.NewReader(golden)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(awkward(), got); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

// A list of version 1 is read as it was meant, also one with keys of version 2, which
// version 1 skips, and written as version 2.
func TestNativeVersion1(t *testing.T) {
	t.Parallel()
	want := awkward()
	want.Engine, want.Grade, want.Processes = "fanotify", "file", nil
	want.Accesses = want.Accesses[:6]
	want.Accesses[4].Ranges = []trace.Range{{Offset: 0, Length: 4096}, {Offset: 1 << 62, Length: 1<<62 - 1}}
	for _, in := range []string{goldenV1, strings.Replace(goldenV1, "loss o", "verdict complete\nprocess nonsense\nloss o", 1)} {
		got, err := persist.Read(strings.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("Read (-want +got):\n%s", d)
		}
		var b bytes.Buffer
		if _, err := got.WriteTo(&b); err != nil || !strings.HasPrefix(b.String(), "headstart-access-list v2\n") {
			t.Errorf("WriteTo = %v, %.40q, want version 2", err, b.String())
		}
	}
}

// What version 2 brought is refused in version 1.
func TestReadVersion1Errors(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"o---\t0\t0\t0\t\t-\t/x":      `how: got "o---", want the letters "orx"`,
		"o--\t0\t0\t0\t\tnone\t/x":    `range: got "none", want OFFSET+LENGTH`,
		"o--\t0\t0\t0\t\t0+1!\t/x":    `range length: got "1!"`,
		"o--\t0\t0\t0\t\t0+1@5\t/x":   `range length: got "1@5"`,
		"o--\t0\t0\t0\t\t0+1,0+\t/x":  `range length: got ""`,
		"o--\t0\t0\t0\t\t0+1,,\t/x":   `range: got ""`,
		"o--\t0\t0\t0\t\t-,0+1\t/x":   `range: got "-"`,
		"o--\t0\t0\t0\t\t0x0+1\t/x":   `range offset: got "0x0"`,
		"o--\t0\t0\t0\t\t-1+1\t/x":    `range offset: got "-1"`,
		"o--\t0\t0\t0\t\t0+1+1\t/x":   `range length: got "1+1"`,
		"o--\t0\t0\t0\t\t 0+1\t/x":    `range offset: got " 0"`,
		"o--\t0\t0\t0\t\t0+1, 0+1\tx": `range offset: got " 0"`,
	} {
		in := "headstart-access-list v1\naccesses\thow\telapsed_ns\tsize\tpid\tcommand\tranges\tpath\n" + line + "\n"
		if l, err := persist.Read(strings.NewReader(in)); l != nil || !errors.Is(err, persist.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("Read of %q = %v, %v, want ErrInvalid with %s", line, l, err, want)
		}
	}
}

func TestNativeEmpty(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if _, err := new(persist.List).WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	got, err := persist.Read(&b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&persist.List{}, got); d != "" {
		t.Error(d)
	}
}

// Every byte value in a path survives, and none but control bytes and the backslash is changed.
func TestEveryByteInAPath(t *testing.T) {
	t.Parallel()
	for c := 1; c < 256; c++ {
		if c == '/' || c == '.' {
			continue
		}
		p := "/x" + string([]byte{byte(c)}) + "y"
		l := &persist.List{Trace: trace.Trace{Accesses: []trace.Access{{Path: p, Command: p[1:]}}}}
		var b bytes.Buffer
		if _, err := l.WriteTo(&b); err != nil {
			t.Fatalf("byte %#x: %v", c, err)
		}
		if plain := c >= 0x20 && c != 0x7f && c != '\\'; bytes.Contains(b.Bytes(), []byte("\t"+p+"\n")) != plain {
			t.Errorf("byte %#x: stands for itself = %v, want %v", c, !plain, plain)
		}
		got, err := persist.Read(&b)
		if err != nil || got.Accesses[0].Path != p || got.Accesses[0].Command != p[1:] {
			t.Errorf("byte %#x: got %+v, %v", c, got, err)
		}
	}
}

// A list cut off at any byte is refused, and so is one with any line missing or doubled.
func TestNativeTruncated(t *testing.T) {
	t.Parallel()
	for i := range len(golden) {
		if l, err := persist.Read(strings.NewReader(golden[:i])); !errors.Is(err, persist.ErrInvalid) || l != nil {
			t.Fatalf("Read of the first %d bytes = %v, %v, want nil, ErrInvalid", i, l, err)
		}
	}
	lines := strings.SplitAfter(strings.TrimSuffix(golden, "\n"), "\n")
	// Header lines are optional, but for the verdict; a loss is counted in the end line.
	for i := range lines {
		without := strings.Join(lines[:i], "") + strings.Join(lines[i+1:], "")
		header := i > 0 && i < 26 && !strings.HasPrefix(lines[i], "verdict ") && !strings.HasPrefix(lines[i], "loss ")
		if _, err := persist.Read(strings.NewReader(without + "\n")); (err == nil) != header {
			t.Errorf("Read without line %d = %v, want error: %v", i+1, err, !header)
		}
	}
}

func TestReadErrors(t *testing.T) {
	t.Parallel()
	const head = "headstart-access-list v2\nverdict complete\n"
	const columns = "accesses\thow\telapsed_ns\tsize\tpid\tcommand\tranges\tpath\n"
	const magic = "headstart-access-list v2\n"
	body := func(line string) string { return head + columns + line + "\nend 1 accesses 0 ranges 0 losses\n" }
	for name, c := range map[string]struct{ in, want string }{
		"empty":                   {"", `line 1: invalid access list: got the end of the file, want the line headstart-access-list v2`},
		"other text":              {"hello\n", `line 1: invalid access list: got "hello", want "headstart-access-list v2"`},
		"version 3":               {"headstart-access-list v3\n", `line 1: unsupported access list: got version "v3", want v2 or v1`},
		"no accesses":             {magic + "name x\n", `line 3: invalid access list: got the end of the file, want a header line or the line that starts the accesses`},
		"header without value":    {magic + "name\n", `line 2: invalid access list: got "name", want a key of lower-case letters, a space and a value`},
		"header with empty value": {magic + "name \n", `line 2: invalid access list: name: got no value, want one or no such line`},
		"key twice":               {magic + "name a\nname b\n", `line 3: invalid access list: key "name" after "name", want each once and in the order`},
		"keys out of order":       {magic + "pod a\nname b\n", `line 3: invalid access list: key "name" after "pod"`},
		"number":                  {magic + "events 07\n", `line 2: invalid access list: events: got "07", want a decimal number of at least 1 and less than 2^63`},
		"zero is no line":         {magic + "events 0\n", `line 2: invalid access list: events: got "0"`},
		"time":                    {magic + "started yesterday\n", `line 2: invalid access list: started: got "yesterday", want a time like`},
		"time zone":               {magic + "started 2026-01-01T00:00:00+01:00\n", `line 2: invalid access list: started:`},
		"loss":                    {magic + "loss overflow\n", `line 2: invalid access list: loss: got "overflow", want a reason, a count and a detail if there is one`},
		"loss count":              {magic + "loss overflow -2\n", `line 2: invalid access list: loss: count: got "-2"`},
		"columns":                 {magic + "accesses\tpath\n", `line 2: invalid access list: got columns "accesses\tpath"`},
		"fields":                  {body("o---\t0\t/x"), `line 4: invalid access list: got "o---\t0\t/x", want 7 fields with tabs between them`},
		"tab in the path":         {body("o---\t0\t0\t0\t\t-\t/x\ty"), `line 4: invalid access list: got "o---\t0\t0\t0\t\t-\t/x\ty", want 7 fields`},
		"how":                     {body("oxr-\t0\t0\t0\t\t-\t/x"), `line 4: invalid access list: how: got "oxr-", want the letters "orxc"`},
		"elapsed":                 {body("o---\t-1\t0\t0\t\t-\t/x"), `line 4: invalid access list: elapsed: got "-1"`},
		"size":                    {body("o---\t0\t9223372036854775808\t0\t\t-\t/x"), `line 4: invalid access list: size: got "9223372036854775808"`},
		"pid":                     {body("o---\t0\t0\t2147483648\t\t-\t/x"), `line 4: invalid access list: pid: got "2147483648", want a decimal number of at least 0 and less than 2^31`},
		"range":                   {body("o---\t0\t0\t0\t\t5\t/x"), `line 4: invalid access list: range: got "5", want OFFSET+LENGTH`},
		"range of nothing":        {body("o---\t0\t0\t0\t\t5+0\t/x"), `line 4: invalid access list: range length: got "0"`},
		"range overflow":          {body("o---\t0\t0\t0\t\t9223372036854775807+1\t/x"), `line 4: invalid access list: range: got offset 9223372036854775807 and length 1`},
		"relative path":           {body("o---\t0\t0\t0\t\t-\tetc/passwd"), `line 4: invalid access list: path: got "etc/passwd", want an absolute path`},
		"path that escapes":       {body("o---\t0\t0\t0\t\t-\t/../etc/passwd"), `line 4: invalid access list: path: got "/../etc/passwd", want it cleaned ("/etc/passwd")`},
		"NUL in the path":         {body("o---\t0\t0\t0\t\t-\t/x\\x00"), `line 4: invalid access list: path: got "/x\x00", want no NUL`},
		"escape of a letter":      {body("o---\t0\t0\t0\t\t-\t/\\x41"), `line 4: path: invalid access list: escape: got "\\x41"`},
		"escape in upper case":    {body("o---\t0\t0\t0\t\t-\t/\\x0A"), `line 4: path: invalid access list: escape: got "\\x0A"`},
		"escape cut off":          {body("o---\t0\t0\t0\t\t-\t/\\"), `line 4: path: invalid access list: escape: got "\\"`},
		"raw control byte":        {body("o---\t0\t0\t0\t\t-\t/\x01"), `line 4: path: invalid access list: byte 0x01 stands for itself, want it escaped`},
		"no verdict":              {magic + columns, `line 2: invalid access list: verdict: got "", want "complete": there are 0 losses`},
		"false verdict":           {head + "loss late 1\n" + columns, `line 4: invalid access list: verdict: got "complete", want "incomplete": there are 1 losses`},
		"other verdict":           {magic + "verdict perhaps\n" + columns, `line 3: invalid access list: verdict: got "perhaps"`},
		"process without parent":  {head + "process 1\n", `line 3: invalid access list: process: got "1", want a pid, its parent's pid and a command`},
		"process without name":    {head + "process 1 0 \n", `line 3: invalid access list: process: got "1 0 "`},
		"process 0":               {head + "process 0 0\n", `line 3: invalid access list: process: pid: got "0"`},
		"parent below 0":          {head + "process 1 -1\n", `line 3: invalid access list: process: parent: got "-1"`},
		"process escape":          {head + "process 1 0 a\tb\n", `line 3: process: command: invalid access list: byte 0x09 stands for itself`},
		"three letters":           {body("o--\t0\t0\t0\t\t-\t/x"), `line 4: invalid access list: how: got "o--", want the letters "orxc"`},
		"range at 0":              {body("o---\t0\t0\t0\t\t0+1@0\t/x"), `line 4: invalid access list: range elapsed: got "0", want a decimal number of at least 1`},
		"range mark first":        {body("o---\t0\t0\t0\t\t0+1!@5\t/x"), `line 4: invalid access list: range length: got "1!"`},
		"range marked twice":      {body("o---\t0\t0\t0\t\t0+1@5!!\t/x"), `line 4: invalid access list: range elapsed: got "5!"`},
		"too many ranges":         {body("o---\t0\t0\t0\t\t" + strings.Repeat("0+1,", persist.MaxFileRanges) + "0+1\t/x"), `line 4: invalid access list: ranges: got 262145, want at most 262144`},
		"wrong counts":            {head + columns + "end 2 accesses 0 ranges 0 losses\n", `line 4: invalid access list: got "end 2 accesses 0 ranges 0 losses", want "end 0 accesses 0 ranges 0 losses" for what came before it`},
		"more after the end":      {golden + "\n", `line 37: invalid access list: got "" after the end line, want the end of the file`},
		"no newline":              {strings.TrimSuffix(golden, "\n"), `and the end of the file, want a newline`},
		"line too long":           {magic + "name " + strings.Repeat("x", persist.MaxLine), `line 2: invalid access list: more than 16777216 bytes in a line`},
	} {
		l, err := persist.Read(strings.NewReader(c.in))
		if l != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: Read = %v, %v\nwant an error with: %s", name, l, err, c.want)
		}
		if !errors.Is(err, persist.ErrInvalid) && !errors.Is(err, persist.ErrUnsupported) {
			t.Errorf("%s: error %v is neither ErrInvalid nor ErrUnsupported", name, err)
		}
	}
}

func TestReadUnknownKeys(t *testing.T) {
	t.Parallel()
	in := strings.Replace(golden, "name web\n", "name web\nnode-name n1\n", 1)
	got, err := persist.Read(strings.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(awkward(), got); d != "" {
		t.Error(d)
	}
}

func TestReadKeepsReadErrors(t *testing.T) {
	t.Parallel()
	broken := errors.New("disk on fire")
	for _, at := range []int{0, 10, 400, len(golden)} {
		r := io.MultiReader(strings.NewReader(golden[:at]), iotest.ErrReader(broken))
		if l, err := persist.Read(r); !errors.Is(err, broken) || l != nil {
			t.Errorf("Read with an error after %d bytes = %v, %v, want nil, %v", at, l, err, broken)
		}
	}
}

// endless yields the same line for ever.
type endless string

func (e endless) Read(b []byte) (int, error) {
	n := 0
	for n+len(e) <= len(b) {
		n += copy(b[n:], e)
	}
	return n, nil
}

func TestReadersEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 128 MiB of input several times")
	}
	t.Parallel()
	head := "headstart-access-list v2\n"
	for name, r := range map[string]io.Reader{
		"no newline":   io.MultiReader(strings.NewReader(head), endless("xxxxxxxx")),
		"unknown keys": io.MultiReader(strings.NewReader(head), endless("x "+strings.Repeat("y", 1000)+"\n")),
		"paths":        endless("/a/b/c\n"),
		"blank lines":  endless("\n"),
		"csv":          io.MultiReader(strings.NewReader("path,size,elapsed\n"), endless("/a,1,1\n")),
		"csv quote":    io.MultiReader(strings.NewReader("path,size,elapsed\n\""), endless("aaaaaaaa")),
		"json":         io.MultiReader(strings.NewReader(`{"version":"v1","files":[`), endless(`{"path":"/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"},`)),
	} {
		start := time.Now()
		if l, err := persist.ReadAny(r); l != nil || !errors.Is(err, persist.ErrInvalid) {
			t.Errorf("%s: ReadAny = %v, %v, want nil, ErrInvalid", name, l != nil, err)
		}
		t.Logf("%s: refused after %v", name, time.Since(start).Round(time.Millisecond))
	}
}

func TestWriteToRefuses(t *testing.T) {
	t.Parallel()
	access := func(a trace.Access) *persist.List {
		return &persist.List{Trace: trace.Trace{Accesses: []trace.Access{a}}}
	}
	for want, l := range map[string]*persist.List{
		`access 0: invalid access list: path: got "", want an absolute path`: access(trace.Access{}),
		`path: got "x", want an absolute path`:                               access(trace.Access{Path: "x"}),
		`path: got "/x/", want it cleaned ("/x")`:                            access(trace.Access{Path: "/x/"}),
		`want no NUL`:                       access(trace.Access{Path: "/\x00"}),
		`how: got bits 0x10`:                access(trace.Access{Path: "/", How: 16}),
		`size, elapsed, pid: got -1, 0, 0`:  access(trace.Access{Path: "/", Size: -1}),
		`range: got offset -1 and length 1`: access(trace.Access{Path: "/", Ranges: []trace.Range{{Offset: -1, Length: 1}}}),
		`range: got elapsed -1`:             access(trace.Access{Path: "/", Ranges: []trace.Range{{Length: 1, Elapsed: -1}}}),
		`ranges: got 262145`:                access(trace.Access{Path: "/", Ranges: slices.Repeat([]trace.Range{{Length: 1}}, persist.MaxFileRanges+1)}),
		`process 0: got pid 0`:              {Trace: trace.Trace{Processes: []trace.Process{{}}}},
		`loss 0: got reason ""`:             {Trace: trace.Trace{Losses: []trace.Loss{{}}}},
		`duration: got -1 ns`:               {Duration: -1},
		`started: got year 10000`:           {Started: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)},
		`events and skipped: got -1 and 0`:  {Trace: trace.Trace{Events: -1}},
		`line of 16777233 bytes`:            {Reference: strings.Repeat("x", persist.MaxLine+6)},
	} {
		n, err := l.WriteTo(io.Discard)
		if !errors.Is(err, persist.ErrInvalid) || !strings.Contains(err.Error(), want) || n != 0 {
			t.Errorf("WriteTo = %d, %v, want 0 and ErrInvalid with %s", n, err, want)
		}
	}
}

func TestWriteToKeepsErrors(t *testing.T) {
	t.Parallel()
	broken := errors.New("no room")
	r, w := io.Pipe()
	r.CloseWithError(broken)
	if n, err := awkward().WriteTo(w); n != 0 || !errors.Is(err, broken) {
		t.Errorf("WriteTo = %d, %v, want 0, %v", n, err, broken)
	}
}

func TestContentHash(t *testing.T) {
	t.Parallel()
	base := awkward()
	same := &persist.List{Trace: trace.Trace{Accesses: base.Accesses}, Reference: "other"}
	for i := range same.Accesses {
		a := same.Accesses[i]
		same.Accesses[i] = trace.Access{Path: a.Path, Ranges: a.Ranges}
	}
	same.Accesses[4].Ranges = slices.Clone(same.Accesses[4].Ranges)
	same.Accesses[4].Ranges[0].Certain, same.Accesses[4].Ranges[0].Elapsed = false, 0
	if base.ContentHash() != same.ContentHash() || len(base.ContentHash()) != 71 {
		t.Errorf("ContentHash = %s and %s, want them equal", base.ContentHash(), same.ContentHash())
	}
	seen := map[string]string{}
	for name, l := range map[string][]trace.Access{
		"none":     nil,
		"a b":      {{Path: "/a"}, {Path: "/b"}},
		"b a":      {{Path: "/b"}, {Path: "/a"}},
		"a":        {{Path: "/a"}},
		"range":    {{Path: "/a", Ranges: []trace.Range{{Length: 1}}}},
		"range2":   {{Path: "/a", Ranges: []trace.Range{{Length: 1}, {Length: 1}}}},
		"no range": {{Path: "/a", Ranges: []trace.Range{}}},
		"longer":   {{Path: "/a", Ranges: []trace.Range{{Length: 2}}}},
	} {
		h := (&persist.List{Trace: trace.Trace{Accesses: l}}).ContentHash()
		if other, ok := seen[h]; ok {
			t.Errorf("%s and %s have the same hash", name, other)
		}
		seen[h] = name
	}
}
