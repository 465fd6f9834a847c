package report_test

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"github.com/headstart-oci/headstart/internal/report"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func profileOf(t testing.TB, lists ...*persist.List) *persist.Profile {
	t.Helper()
	var ps []*persist.Profile
	for _, l := range lists {
		p, err := persist.NewProfile(l)
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	p, err := persist.Merge(persist.MergeOptions{Mixed: true}, ps...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func write(t testing.TB, p *persist.Profile, o report.Options) string {
	t.Helper()
	var b bytes.Buffer
	if err := report.Write(&b, p, o); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// element is what a browser's parser makes of a start tag.
type element struct {
	name  string
	attrs map[string]string
	text  string // of it and below
}

func parse(t testing.TB, page string) (out []element) {
	t.Helper()
	root, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	var text func(n *html.Node) string
	text = func(n *html.Node) string {
		if n.Type == html.TextNode {
			return n.Data
		}
		var b strings.Builder
		for c := range n.ChildNodes() {
			b.WriteString(text(c))
		}
		return b.String()
	}
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		e := element{name: n.Data, attrs: map[string]string{}, text: text(n)}
		for _, a := range n.Attr {
			e.attrs[a.Key] = a.Val
		}
		out = append(out, e)
	}
	return out
}

// selfContained fails for whatever could run, load or lead away.
func selfContained(t *testing.T, elements []element) {
	t.Helper()
	known := map[string]bool{}
	for name := range strings.FieldsSeq("html head meta title style body h1 h2 p dl dt dd ul li b i span div svg path rect code table thead tbody tr th td footer") {
		known[name] = true
	}
	policy := false
	for _, e := range elements {
		if !known[e.name] {
			t.Errorf("element %s: %.100q", e.name, e.text)
		}
		for k, v := range e.attrs {
			if strings.HasPrefix(k, "on") || k == "src" || k == "href" || strings.Contains(v, "url(") || strings.Contains(v, "://") {
				t.Errorf("element %s has %s=%q", e.name, k, v)
			}
		}
		policy = policy || e.attrs["http-equiv"] == "Content-Security-Policy" && strings.HasPrefix(e.attrs["content"], "default-src 'none'")
	}
	if !policy {
		t.Error("no content security policy")
	}
}

const evil = "/evil/<script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{.}}</style>\x1b[31m\xff\u202e"

func sample() *persist.List {
	return &persist.List{
		Reference: "registry.example/app:1<b>", Digest: "sha256:4c1d", Platform: "linux/amd64", Command: []string{"app", "</dd><script>"},
		Engine: "fanotify+filemap", Grade: persist.GradeFaultAround, Started: time.Unix(1700000000, 0).UTC(), Duration: time.Second, End: "idle",
		Trace: trace.Trace{Skipped: 7, Accesses: []trace.Access{
			{Path: "/usr/bin/app", Elapsed: time.Millisecond, Size: 1 << 20, Ranges: []trace.Range{
				{Offset: 0, Length: 64 << 10, Elapsed: 2 * time.Millisecond, Certain: true},
				{Offset: 64 << 10, Length: 192 << 10, Elapsed: 40 * time.Millisecond},
			}},
			{Path: evil, Elapsed: 50 * time.Millisecond, Size: 2048},
			{Path: "/etc/passwd", How: trace.Runtime, Elapsed: 60 * time.Millisecond, Size: 100},
			{Path: "/never", Elapsed: 80 * time.Millisecond, Size: 100, Ranges: []trace.Range{}},
		}},
	}
}

func sampleImage() *report.Image {
	return &report.Image{
		Name: "oci:x<y>", Bytes: 2 << 20,
		Layers: []report.Layer{{Digest: "sha256:aaaaaaaaaaaaaaaaaaaa", Stored: 1 << 19}, {Digest: "sha256:bbbb", Stored: 10}},
		Layer:  func(path string) (int, bool) { return len(path) % 2, path != "/never" },
	}
}

func TestPage(t *testing.T) {
	t.Parallel()
	lossy := sample()
	lossy.Started = lossy.Started.Add(time.Hour)
	lossy.Losses = []trace.Loss{{Reason: "overflow", Count: -1, Detail: "<i>ring</i>"}, {Reason: "late", Count: 3}}
	page := write(t, profileOf(t, sample(), lossy), report.Options{PolicyName: "any run", Image: sampleImage()})
	elements := parse(t, page)
	selfContained(t, elements)
	body := ""
	rects := 0
	for _, e := range elements {
		switch e.name {
		case "body":
			body = e.text
		case "rect":
			rects++
		}
	}
	for _, want := range []string{
		"Start of registry.example/app:1<b>", "oci:x<y>", "app </dd><script>", "fault-around", "any run",
		`"/evil/<script>alert(1)</script><img src=x onerror=alert(2)>\"'` + "`" + `{{.}}</style>\x1b[31m\xff\u202e"`,
		"/etc/passwd (container runtime)", "1 of 2runs are complete", "complete: 1 of 2 runs are; what the others lost is below",
		"64.0 KiB to 258.1 KiB of 2.0 MiB: 3.1 % to 12.6 % of the bytes of the image's files",
		"2 of 4 files have no ranges", "overflow (an unknown number): <i>ring</i>", "late (3)", "60.0 ms", // nothing of /never was touched

		"layer 0, sha256:aaaaaaaaaaaa, 512.0 KiB stored", "layer 1", "not in the image",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if rects < 5 {
		t.Errorf("%d marks on the timelines", rects)
	}
}

func TestPageOfLittle(t *testing.T) {
	t.Parallel()
	paths, err := persist.ReadAny(strings.NewReader("/a\n/b\n/c\n"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		p    *persist.Profile
		want string
	}{
		"no run":  {&persist.Profile{}, "No file."},
		"no file": {profileOf(t, &persist.List{}), "No file."},
		"paths":   {profileOf(t, paths), "No times were recorded"},
		"huge":    {profileOf(t, &persist.List{Trace: trace.Trace{Accesses: []trace.Access{{Path: "/x", Size: 1<<63 - 1}, {Path: "/y", Size: 1<<63 - 1}}}}), "8.0 EiB"},
		"one": {profileOf(t, &persist.List{Trace: trace.Trace{Accesses: []trace.Access{{
			Path: "/x", Elapsed: 1<<63 - 1, Size: 1<<63 - 1,
			Ranges: []trace.Range{{Offset: 0, Length: 1<<63 - 1, Elapsed: 1<<63 - 1}},
		}}}}), "/x"},
	} {
		page := write(t, c.p, report.Options{Image: &report.Image{}})
		selfContained(t, parse(t, page))
		if !strings.Contains(page, c.want) {
			t.Errorf("%s: the page does not say %q", name, c.want)
		}
		for _, bad := range []string{"NaN", "Inf", "%!", "-9223372036854775808"} {
			if strings.Contains(page, bad) {
				t.Errorf("%s: the page has %s", name, bad)
			}
		}
	}
}

// No time of a list is too long for the axis or a mark.
func TestPageOfLongRun(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		end   time.Duration
		wants []string
	}{
		{40e15, []string{"10000000.00 s", "20000000.00 s", "30000000.00 s", "40000000.00 s"}},
		{1<<63 - 1, []string{"2305843009.21 s", "4611686018.43 s", "6917529027.64 s", "9223372036.85 s"}},
	} {
		var accesses []trace.Access
		for i := range 8 {
			accesses = append(accesses, trace.Access{Path: fmt.Sprintf("/f%d", i), Size: 10, Elapsed: c.end / 8 * time.Duration(i+1)})
		}
		accesses = append(accesses, trace.Access{Path: "/last", Size: 10, Elapsed: c.end})
		page := write(t, profileOf(t, &persist.List{Trace: trace.Trace{Accesses: accesses}}), report.Options{})
		for _, want := range c.wants {
			if !strings.Contains(page, want) {
				t.Errorf("a run of %d ns: the page does not say %q", c.end, want)
			}
		}
		if bad := regexp.MustCompile(`-[0-9][0-9.]* [mµ]?s`).FindString(page); bad != "" {
			t.Errorf("a run of %d ns: the page says %q", c.end, bad)
		}
	}
}

func bigList(n int) *persist.List {
	l := sample()
	for i := range n {
		at := time.Duration(i) * 20 * time.Microsecond
		l.Accesses = append(l.Accesses, trace.Access{
			Path: fmt.Sprintf("/srv/node_modules/m%d/f%d.js", i%900, i), Elapsed: at, Size: int64(i),
			Ranges: []trace.Range{{Length: int64(i) + 1, Elapsed: at + time.Microsecond, Certain: i%2 == 0}},
		})
	}
	for i := range 500 {
		l.Losses = append(l.Losses, trace.Loss{Reason: "overflow", Count: int64(i)})
	}
	return l
}

// 60,000 files give a page that a phone can open, which says what it leaves out.
func TestPageIsBounded(t *testing.T) {
	t.Parallel()
	page := write(t, profileOf(t, bigList(60000)), report.Options{Image: sampleImage()})
	if len(page) > 1<<20 {
		t.Errorf("%d bytes, want at most 1 MiB", len(page))
	}
	elements := parse(t, page)
	selfContained(t, elements)
	rows := 0
	for _, e := range elements {
		if e.name == "tr" {
			rows++
		}
	}
	if rows > 2*report.MaxRows+60 {
		t.Errorf("%d rows of tables", rows)
	}
	for _, want := range []string{"The 50 largest of 60004 files are shown", "59954 other files", "and 59954 more files with", "and 400 more losses"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
}

func FuzzWrite(f *testing.F) {
	f.Add("/a<b>", "ref", "reason", int64(5), int64(7), int64(9))
	f.Add(evil, evil, evil, int64(1<<62), int64(1<<62), int64(0))
	f.Fuzz(func(t *testing.T, path, ref, reason string, offset, length, elapsed int64) {
		l := sample()
		l.Reference, l.Container = ref, ref
		l.Losses = []trace.Loss{{Reason: reason, Count: 1, Detail: path}}
		l.Accesses = append(l.Accesses, trace.Access{
			Path: path, Elapsed: time.Duration(elapsed), Size: length,
			Ranges: []trace.Range{{Offset: offset, Length: length, Elapsed: time.Duration(elapsed)}},
		})
		if l.Validate() != nil {
			return
		}
		selfContained(t, parse(t, write(t, profileOf(t, l), report.Options{Image: sampleImage(), PolicyName: ref})))
	})
}
