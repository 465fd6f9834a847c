package persist_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// runAt is a list of one workload that started n seconds after another.
func runAt(n int, accesses ...trace.Access) *persist.List {
	return &persist.List{
		Reference: "docker.io/library/nginx:1.27", Digest: "sha256:4c1d", Platform: "linux/amd64", Command: []string{"nginx"},
		Container: fmt.Sprintf("c%d", n), Engine: "fanotify+filemap", Grade: persist.GradeFaultAround,
		Started: time.Unix(1700000000+int64(n), 0).UTC(), Duration: time.Second,
		Trace: trace.Trace{Accesses: accesses},
	}
}

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
	p, err := persist.Merge(persist.MergeOptions{}, ps...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func profileBytes(t testing.TB, p *persist.Profile) string {
	t.Helper()
	var b bytes.Buffer
	if n, err := p.WriteTo(&b); err != nil || n != int64(b.Len()) {
		t.Fatalf("WriteTo = %d, %v, want %d, nil", n, err, b.Len())
	}
	return b.String()
}

func rng(offset, length int64, at time.Duration, certain bool) trace.Range {
	return trace.Range{Offset: offset, Length: length, Elapsed: at, Certain: certain}
}

func TestProfileFiles(t *testing.T) {
	t.Parallel()
	lossy := runAt(9,
		trace.Access{Path: "/lossy", Elapsed: 1, Size: 5, Ranges: []trace.Range{rng(0, 5, 1, true)}},
		trace.Access{Path: "/all", Elapsed: 2, Size: 9000, Ranges: []trace.Range{rng(8192, 808, 3, true)}})
	lossy.Losses = []trace.Loss{{Reason: "overflow", Count: -1}}
	p := profileOf(t, lossy,
		runAt(1,
			trace.Access{Path: "/all", How: trace.Opened, Elapsed: 10, Size: 8000, Ranges: []trace.Range{rng(0, 4096, 11, true), rng(4096, 4096, 11, false)}},
			trace.Access{Path: "/opened", How: trace.Opened, Elapsed: 20, Size: 1, Ranges: []trace.Range{}},
			trace.Access{Path: "/two", Elapsed: 30, Size: 7}),
		runAt(2,
			trace.Access{Path: "/two", Elapsed: 5, Size: 7, Ranges: []trace.Range{rng(0, 3, 6, true)}},
			trace.Access{Path: "/all", How: trace.Read, Elapsed: 50, Size: 8000, Ranges: []trace.Range{rng(0, 8192, 51, true)}}),
		runAt(3,
			trace.Access{Path: "/all", How: trace.Executed, Elapsed: 40, Size: 8000, Ranges: []trace.Range{rng(2048, 2048, 41, false)}}))
	if p.Complete() != 3 || len(p.Runs) != 4 || p.Runs[3].List.Container != "c9" || p.Runs[0].List.Container != "c3" {
		t.Fatalf("runs = %+v", p.Runs)
	}
	all := persist.File{Access: trace.Access{Path: "/all", How: trace.Opened | trace.Read | trace.Executed, Size: 9000}, Runs: 3, Lossy: 1, Weight: 1}
	with := func(f persist.File, at time.Duration, ranges ...trace.Range) persist.File {
		f.Elapsed, f.Ranges = at, ranges
		return f
	}
	two := persist.File{Access: trace.Access{Path: "/two", Size: 7, Elapsed: 5}, Runs: 2, Weight: 2. / 3}
	for name, c := range map[string]struct {
		policy persist.Policy
		want   []persist.File
	}{
		"union": {persist.Union, []persist.File{
			{Access: trace.Access{Path: "/lossy", Size: 5, Elapsed: 1, Ranges: []trace.Range{rng(0, 5, 1, true)}}, Lossy: 1},
			two,
			with(all, 10, rng(8192, 808, 3, true), rng(0, 2048, 11, true), rng(4096, 4096, 11, true), rng(2048, 2048, 41, true)),
			{Access: trace.Access{Path: "/opened", How: trace.Opened, Elapsed: 20, Size: 1, Ranges: []trace.Range{}}, Runs: 1, Weight: 1. / 3},
		}},
		"two of three": {0.6, []persist.File{
			{Access: trace.Access{Path: "/two", Size: 7, Elapsed: 5, Ranges: []trace.Range{rng(0, 3, 6, false)}}, Runs: 2, Weight: 2. / 3},
			with(all, 10, rng(0, 2048, 11, true), rng(4096, 4096, 11, false), rng(2048, 2048, 41, true)),
		}},
		"intersection": {persist.Intersection, []persist.File{with(all, 10, rng(2048, 2048, 41, false))}},
	} {
		if d := cmp.Diff(c.want, p.Files(c.policy)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	l := p.List(persist.Union)
	if !l.Complete() || l.Grade != persist.GradeFaultAround || l.Digest != "sha256:4c1d" || l.Container != "" || !l.Started.Equal(time.Unix(1700000001, 0)) || l.Duration != time.Second {
		t.Errorf("List = %+v", l)
	}
	if err := l.Validate(); err != nil {
		t.Error(err)
	}
}

// Where no run is complete, all count, and the list says what is missing.
func TestProfileOfLossyRuns(t *testing.T) {
	t.Parallel()
	a, b := runAt(1, trace.Access{Path: "/a"}, trace.Access{Path: "/b"}), runAt(2, trace.Access{Path: "/a"})
	a.Losses = []trace.Loss{{Reason: "late", Count: 2, Detail: "x"}}
	b.Losses = []trace.Loss{{Reason: "overflow", Count: -1}}
	b.Grade = persist.GradeFile
	p := profileOf(t, a, b)
	if got := len(p.Files(persist.Intersection)); got != 1 {
		t.Errorf("%d files in the intersection, want 1", got)
	}
	for _, f := range p.Files(persist.Union) {
		if want := map[string]float64{"/a": 1, "/b": .5}[f.Path]; f.Weight != want || f.Runs != 0 {
			t.Errorf("%s has the weight %v of %d complete runs, want %v of none", f.Path, f.Weight, f.Runs, want)
		}
	}
	l := p.List(persist.Union)
	if len(l.Losses) != 2 || l.Complete() || l.Losses[0].Reason != "overflow" || !strings.HasSuffix(l.Losses[1].Detail, ": x") || l.Grade != persist.GradeFile {
		t.Errorf("List = %+v", l)
	}
}

func TestProfileRoundTrip(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]*persist.Profile{
		"none":    {},
		"one":     profileOf(t, awkward()),
		"several": profileOf(t, runAt(1, trace.Access{Path: "/a"}), runAt(2, trace.Access{Path: "/a"}), runAt(3)),
	} {
		text := profileBytes(t, p)
		got, err := persist.ReadProfile(strings.NewReader(text))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if d := cmp.Diff(text, profileBytes(t, got)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
		l, err := persist.ReadAny(strings.NewReader(text))
		if err != nil {
			t.Fatalf("%s: ReadAny: %v", name, err)
		}
		if d := cmp.Diff(p.List(persist.Union), l); d != "" {
			t.Errorf("%s: ReadAny (-want +got):\n%s", name, d)
		}
		for i := range len(text) {
			if got, err := persist.ReadProfile(strings.NewReader(text[:i])); !errors.Is(err, persist.ErrInvalid) || got != nil {
				t.Fatalf("%s: ReadProfile of the first %d bytes = %v, %v, want nil, ErrInvalid", name, i, got, err)
			}
		}
	}
}

func TestReadProfileErrors(t *testing.T) {
	t.Parallel()
	text := profileBytes(t, profileOf(t, runAt(1, trace.Access{Path: "/a"}), runAt(2)))
	runs := strings.SplitAfter(text, "losses\n")
	for name, c := range map[string]struct{ in, want string }{
		"a list":     {golden, `line 1: invalid access list: got "headstart-access-list v2", want "headstart-profile v1"`},
		"version":    {"headstart-profile v2\n", `line 1: unsupported access list: got profile version "v2", want v1`},
		"other byte": {strings.Replace(text, "\t/a\n", "\t/b\n", 1), `run: got id "sha256:`},
		"no run":     {"headstart-profile v1\nx\n", `line 2: invalid access list: got "x", want "run " and an id, or the end line`},
		"count":      {"headstart-profile v1\nend 1 runs\n", `line 2: invalid access list: got "end 1 runs", want "end 0 runs"`},
		"after":      {text + "x\n", `after the end line`},
		"order":      {"headstart-profile v1\n" + runs[1] + strings.TrimPrefix(runs[0], "headstart-profile v1\n") + runs[2], `want them in order`},
		"twice":      {runs[0] + strings.TrimPrefix(runs[0], "headstart-profile v1\n") + runs[2], `want them in order`},
		"bad list":   {"headstart-profile v1\nrun x\nheadstart-access-list v9\n", `line 3: unsupported access list`},
	} {
		p, err := persist.ReadProfile(strings.NewReader(c.in))
		if p != nil || err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, persist.ErrInvalid) && !errors.Is(err, persist.ErrUnsupported) {
			t.Errorf("%s: ReadProfile = %v, %v\nwant %s", name, p, err, c.want)
		}
	}
	many := &persist.Profile{}
	for i := range persist.MaxRuns + 1 {
		many.Runs = append(many.Runs, profileOf(t, runAt(100-i)).Runs...)
	}
	if _, err := many.WriteTo(&bytes.Buffer{}); !errors.Is(err, persist.ErrInvalid) {
		t.Errorf("WriteTo of %d runs: %v, want ErrInvalid", len(many.Runs), err)
	}
	slices.Reverse(many.Runs)
	many.Runs = many.Runs[:2]
	if _, err := many.WriteTo(&bytes.Buffer{}); !errors.Is(err, persist.ErrInvalid) {
		t.Errorf("WriteTo of runs out of order: %v, want ErrInvalid", err)
	}
}

// randomLists makes n runs over few paths and offsets, so that they meet; some are equal.
func randomLists(r *rand.Rand, n int) []*persist.List {
	var lists []*persist.List
	for range n {
		var accesses []trace.Access
		for range r.IntN(6) {
			a := trace.Access{Path: fmt.Sprintf("/f%d", r.IntN(4)), Size: r.Int64N(100), Elapsed: time.Duration(r.IntN(50)), How: trace.How(r.IntN(16))}
			if r.IntN(3) > 0 {
				a.Ranges = []trace.Range{}
				for range r.IntN(5) {
					a.Ranges = append(a.Ranges, rng(r.Int64N(30), 1+r.Int64N(20), time.Duration(r.IntN(20)), r.IntN(2) == 0))
				}
			}
			accesses = append(accesses, a)
		}
		l := runAt(r.IntN(20), accesses...)
		if r.IntN(4) == 0 {
			l.Losses = []trace.Loss{{Reason: "late", Count: -1}}
		}
		lists = append(lists, l)
	}
	return lists
}

// Merging is commutative, associative and idempotent, also beyond MaxRuns.
func TestMergeProperties(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := 1 + r.IntN(8)
		if seed%10 == 0 {
			n = persist.MaxRuns
		}
		a, b, c := profileOf(t, randomLists(r, n)...), profileOf(t, randomLists(r, n)...), profileOf(t, randomLists(r, 1+r.IntN(8))...)
		checkMerging(t, a, b, c)
	}
}

func checkMerging(t *testing.T, a, b, c *persist.Profile) {
	t.Helper()
	merge := func(ps ...*persist.Profile) *persist.Profile {
		p, err := persist.Merge(persist.MergeOptions{Mixed: true}, ps...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	same := func(what string, x, y *persist.Profile) {
		t.Helper()
		if d := cmp.Diff(profileBytes(t, x), profileBytes(t, y)); d != "" {
			t.Fatalf("%s:\n%s", what, d)
		}
	}
	same("commutative", merge(a, b), merge(b, a))
	same("associative", merge(a, merge(b, c)), merge(merge(a, b), c))
	same("all at once", merge(a, b, c), merge(merge(a, b), c))
	same("idempotent", merge(a, a), a)
	same("absorbs", merge(merge(a, b), a), merge(a, b))
	same("neutral", merge(a, &persist.Profile{}), a)
}

// A profile that its file has no room for is refused, and one of fewer runs is not.
func TestProfileTooLarge(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("writes 256 MiB")
	}
	long := strings.Repeat("/0123456789abcdef", 200)
	var lists []*persist.List
	for n := range 3 {
		l := runAt(n)
		for i := range 30000 {
			l.Accesses = append(l.Accesses, trace.Access{Path: fmt.Sprintf("%s/%d", long, i)})
		}
		lists = append(lists, l)
	}
	p := profileOf(t, lists...)
	if _, err := p.WriteTo(io.Discard); !errors.Is(err, persist.ErrInvalid) || !strings.Contains(err.Error(), "write profile of 3 runs: ") {
		t.Errorf("WriteTo = %v, want ErrInvalid", err)
	}
	if _, err := p.Keep(2).WriteTo(io.Discard); err != nil {
		t.Error(err)
	}
	if got := p.Keep(9); len(got.Runs) != 3 || len(p.Keep(-1).Runs) != 0 {
		t.Errorf("Keep = %v", got)
	}
}

// What a policy asks for, byte by byte, against counting.
func TestFilesAgainstCounting(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 2))
		p := profileOf(t, randomLists(r, 1+r.IntN(6))...)
		for _, policy := range []persist.Policy{persist.Union, 0.3, 0.5, persist.Intersection} {
			checkFiles(t, p, policy)
		}
	}
}

func checkFiles(t *testing.T, p *persist.Profile, policy persist.Policy) {
	t.Helper()
	files := p.Files(policy)
	byPath := map[string]persist.File{}
	for i, f := range files {
		byPath[f.Path] = f
		if i > 0 && files[i-1].Elapsed > f.Elapsed {
			t.Fatalf("file %d is before %d", i, i-1)
		}
	}
	l := p.List(policy)
	if err := l.Validate(); err != nil {
		t.Fatal(err)
	}
	const end = 60 // beyond every range of randomLists
	for f := range 4 {
		path := fmt.Sprintf("/f%d", f)
		got, listed := byPath[path]
		for at := range int64(end) {
			for _, sure := range []bool{false, true} {
				want := wanted(p, policy, path, at, sure)
				have := listed && got.Ranges == nil && !sure
				for _, x := range got.Ranges {
					have = have || at >= x.Offset && at-x.Offset < x.Length && (x.Certain || !sure)
				}
				// A whole file stands for more than the bytes that are known to be certain.
				if have != want && (got.Ranges != nil || !sure) {
					t.Fatalf("policy %v, %s, byte %d, certain %v: got %v, want %v\n%+v\n%s", policy, path, at, sure, have, want, got, profileBytes(t, p))
				}
			}
		}
	}
}

// wanted counts the runs that touched a byte.
func wanted(p *persist.Profile, policy persist.Policy, path string, at int64, sure bool) bool {
	touched, of, anyone := 0, 0, false
	for _, r := range p.Runs {
		counts := r.List.Complete() || p.Complete() == 0
		if counts {
			of++
		}
		hit, whole := false, false
		for _, a := range r.List.Accesses {
			if a.Path != path {
				continue
			}
			whole = whole || a.Ranges == nil
			hit = hit || a.Ranges == nil && !sure
			for _, x := range a.Ranges {
				hit = hit || at >= x.Offset && at-x.Offset < x.Length && (x.Certain || !sure)
			}
		}
		if whole && sure {
			hit = false
		}
		anyone = anyone || hit
		if hit && counts {
			touched++
		}
	}
	if policy == persist.Union {
		return anyone
	}
	return touched > 0 && float64(touched)+1e-9 >= float64(policy)*float64(of)
}

func FuzzReadProfile(f *testing.F) {
	f.Add([]byte(profileBytes(f, &persist.Profile{})))
	f.Add([]byte(profileBytes(f, profileOf(f, awkward()))))
	f.Add([]byte(profileBytes(f, profileOf(f, randomLists(rand.New(rand.NewPCG(1, 3)), 3)...))))
	f.Add([]byte("headstart-profile v1\nrun x\n" + golden + "end 1 runs\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		p, err := persist.ReadProfile(bytes.NewReader(in))
		if err != nil {
			if p != nil || !errors.Is(err, persist.ErrInvalid) && !errors.Is(err, persist.ErrUnsupported) {
				t.Fatalf("ReadProfile = %v, %v, want nil and ErrInvalid or ErrUnsupported", p, err)
			}
			return
		}
		if got := profileBytes(t, p); got != string(in) {
			t.Fatalf("written back %q, want %q", got, in)
		}
	})
}

// Lists from arbitrary bytes merge as random ones do.
func FuzzMerge(f *testing.F) {
	f.Add([]byte(golden), []byte(goldenV1), []byte("/a\n/b\n"))
	f.Add([]byte("/b\n/a\n"), []byte("/a\n/b\n"), []byte(`{"version":"v1","files":[{"path":"/a","ranges":[[0,5],[3,9]]}]}`))
	f.Fuzz(func(t *testing.T, x, y, z []byte) {
		var ps []*persist.Profile
		for _, in := range [][]byte{x, y, z} {
			l, err := persist.ReadAny(bytes.NewReader(in))
			if err != nil {
				return
			}
			p, err := persist.NewProfile(l)
			if err != nil {
				t.Fatal(err)
			}
			ps = append(ps, p)
		}
		checkMerging(t, ps[0], ps[1], ps[2])
		all, err := persist.Merge(persist.MergeOptions{Mixed: true}, ps...)
		if err != nil {
			t.Fatal(err)
		}
		for _, policy := range []persist.Policy{persist.Union, 0.5, persist.Intersection} {
			if err := all.List(policy).Validate(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// large is a run of 60,000 files with 1,000,000 ranges.
func large(n int) *persist.List {
	l := runAt(n)
	for f := range 60000 {
		a := trace.Access{Path: fmt.Sprintf("/usr/lib/python3/dist-packages/package%d/module%d.py", f%500, f), How: trace.Opened, Size: 1 << 20, Elapsed: time.Duration(f) * 20000}
		for i := range 17 - f%2 {
			a.Ranges = append(a.Ranges, rng(int64(i)*65536, 4096*int64(1+i%9), a.Elapsed+time.Duration(i*n*100), i%3 > 0))
		}
		l.Accesses = append(l.Accesses, a)
	}
	return l
}

func BenchmarkWriteLargeList(b *testing.B) {
	l := large(1)
	b.ReportAllocs()
	for b.Loop() {
		n, err := l.WriteTo(io.Discard)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(n)
	}
}

func BenchmarkReadLargeList(b *testing.B) {
	var text bytes.Buffer
	if _, err := large(1).WriteTo(&text); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(text.Len()))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := persist.Read(bytes.NewReader(text.Bytes())); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFilesOfLargeProfile(b *testing.B) {
	p := profileOf(b, large(1), large(2), large(3), large(4))
	b.ReportAllocs()
	for b.Loop() {
		if got := len(p.Files(0.5)); got != 60000 {
			b.Fatal(got)
		}
	}
}
