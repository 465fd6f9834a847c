package rebuild_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const mib = 1 << 20 // the chunk of bench.request

// touched returns a list in its native form of files of 200 MiB each, of which chunks are named: those that "a:0,3" says; "a" is a
// whole file.
func touched(t testing.TB, files ...string) (text string, l *persist.List) {
	t.Helper()
	l = &persist.List{Digest: testDigest, Platform: "linux/amd64", Engine: "fanotify+filemap", Grade: trace.GradeFaultAround}
	for _, file := range files {
		name, chunks, ranged := strings.Cut(file, ":")
		a := trace.Access{Path: "/" + name, Size: 200 * mib, How: trace.Opened | trace.Read}
		for c := range strings.SplitSeq(chunks, ",") {
			if ranged {
				n := int64(0)
				for _, digit := range c {
					n = 10*n + int64(digit-'0')
				}
				a.Ranges = append(a.Ranges, trace.Range{Offset: n*mib + 5, Length: 100})
			}
		}
		l.Accesses = append(l.Accesses, a)
	}
	var b strings.Builder
	if _, err := l.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	return b.String(), l
}

func (b *bench) overwrite(q *rebuild.Queue, files ...string) rebuild.Decision {
	b.t.Helper()
	text, _ := touched(b.t, files...)
	return b.add(q, b.request(text, func(r *rebuild.Request) { r.Overwrite = true }))
}

// overwriteFiles adds a list of grade file.
func (b *bench) overwriteFiles(q *rebuild.Queue, files ...string) rebuild.Decision {
	b.t.Helper()
	_, whole := touched(b.t, files...)
	whole.Grade = trace.GradeFile
	var text strings.Builder
	if _, err := whole.WriteTo(&text); err != nil {
		b.t.Fatal(err)
	}
	return b.add(q, b.request(text.String(), func(r *rebuild.Request) { r.Overwrite = true }))
}

// listOf returns the list that the build of d was given.
func (b *bench) listOf(d rebuild.Decision) *persist.List {
	b.t.Helper()
	data, err := os.ReadFile(filepath.Join(b.out, d.Key))
	if err != nil {
		b.t.Fatal(err)
	}
	l, err := persist.Read(strings.NewReader(strings.TrimPrefix(string(data), "whole ")))
	if err != nil {
		b.t.Fatal(err)
	}
	return l
}

// builtFor returns the paths in that list, sorted.
func (b *bench) builtFor(d rebuild.Decision) []string {
	b.t.Helper()
	var paths []string
	for _, a := range b.listOf(d).Accesses {
		paths = append(paths, a.Path)
	}
	slices.Sort(paths)
	return paths
}

// An image is built again when a run read what it was not built for, and then for all runs together: so it does not go
// back and forth between two of them.
func TestOverwriteWhatChanged(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	first := b.overwrite(q, "a", "b:0,3")
	if first.Verdict != rebuild.Queued {
		t.Fatalf("Add(first) = %+v", first)
	}
	b.run(q)
	b.waitBuilt(1)
	for name, files := range map[string][]string{
		"other order":      {"b:0,3", "a"},
		"other pages":      {"a:7", "b:3"},
		"a chunk in a 100": {"a", "b:0,1,3"},
		"nothing":          {"b:0"},
	} {
		if d := b.overwrite(q, files...); d.Verdict != rebuild.Unchanged || d.Result == nil || d.Result.Key != first.Key || d.Lacks > 0.01 {
			t.Errorf("%s: Add() = %+v, want %q", name, d, rebuild.Unchanged)
		}
	}
	second := b.overwrite(q, "b:0,4", "c:1")
	if second.Verdict != rebuild.Queued {
		t.Fatalf("Add(more) = %+v", second)
	}
	b.waitBuilt(2)
	if got, want := b.builtFor(second), []string{"/a", "/b", "/c"}; !slices.Equal(got, want) {
		t.Errorf("built for %q, want what both runs read, %q", got, want)
	}
	for _, files := range [][]string{{"c:1"}, {"a:150", "b:3"}} {
		if d := b.overwrite(q, files...); d.Verdict != rebuild.Unchanged {
			t.Errorf("Add(%q) = %+v after a build for all, want %q", files, d, rebuild.Unchanged)
		}
	}
	b.wantEmpty()
	if got := b.files("built"); len(got) != 1 || got[0] != first.Key[:24]+".list" {
		t.Errorf("built/ has %q, want the list of one image", got)
	}
}

// A waiting job is replaced by one for both lists, unless it has what the new one names.
func TestWaitingListGrows(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	b.overwrite(q, "a:1", "b:1")
	if d := b.overwrite(q, "b:1"); d.Verdict != rebuild.AlreadyQueued {
		t.Errorf("Add(less) = %+v, want %q", d, rebuild.AlreadyQueued)
	}
	d := b.overwrite(q, "c:1")
	if d.Verdict != rebuild.Replaced {
		t.Fatalf("Add(other) = %+v", d)
	}
	b.run(q)
	b.waitBuilt(1)
	if got, want := b.builtFor(d), []string{"/a", "/b", "/c"}; !slices.Equal(got, want) {
		t.Errorf("built for %q, want %q", got, want)
	}
}

// A result that is gone, and a list that cannot be read, are compared with nothing.
func TestOverwriteWithoutComparison(t *testing.T) {
	for name, spoil := range map[string]func(dir, key string) error{
		"no result": func(dir, key string) error { return os.Remove(filepath.Join(dir, "done", key+".json")) },
		"no list":   func(dir, key string) error { return os.Remove(filepath.Join(dir, "built", key[:24]+".list")) },
		"bad list": func(dir, key string) error {
			return os.WriteFile(filepath.Join(dir, "built", key[:24]+".list"), []byte("no list"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			q := b.open("ok", nil)
			d := b.overwrite(q, "a")
			b.run(q)
			b.waitBuilt(1)
			b.wantEmpty()
			if err := spoil(b.dir, d.Key); err != nil {
				t.Fatal(err)
			}
			d = b.overwrite(q, "a:1")
			if d.Verdict != rebuild.Queued {
				t.Fatalf("Add() = %+v, want %q", d, rebuild.Queued)
			}
			b.waitBuilt(2)
			if got := b.builtFor(d); !slices.Equal(got, []string{"/a"}) {
				t.Errorf("built for %q", got)
			}
		})
	}
}

// A list of ranges takes the place of one of whole files, which names more.
func TestOverwriteWholeFiles(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	b.overwriteFiles(q, "a", "b")
	b.run(q)
	b.waitBuilt(1)
	b.wantEmpty()
	d := b.overwrite(q, "a:1")
	if d.Verdict != rebuild.Queued {
		t.Fatalf("Add() = %+v, want %q", d, rebuild.Queued)
	}
	b.waitBuilt(2)
	if got := b.builtFor(d); !slices.Equal(got, []string{"/a"}) {
		t.Errorf("built for %q, want what the exact run read", got)
	}
}

// A run of whole files adds the files that are new, and no more: the image does not go back and forth between it and the exact runs, and
// what these said of a file stays.
func TestOverwriteByWholeFiles(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	b.overwrite(q, "a:1", "b:2")
	b.run(q)
	b.waitBuilt(1)
	b.wantEmpty()
	if d := b.overwriteFiles(q, "b", "a"); d.Verdict != rebuild.Unchanged {
		t.Errorf("Add(the same as whole files) = %+v, want %q", d, rebuild.Unchanged)
	}
	d := b.overwriteFiles(q, "a", "c")
	if d.Verdict != rebuild.Queued {
		t.Fatalf("Add(another whole file) = %+v, want %q", d, rebuild.Queued)
	}
	b.waitBuilt(2)
	b.wantEmpty()
	l := b.listOf(d)
	if got, want := b.builtFor(d), []string{"/a", "/b", "/c"}; !slices.Equal(got, want) || l.Grade != trace.GradeFaultAround {
		t.Errorf("built for %q, grade %q, want %q, %q", got, l.Grade, want, trace.GradeFaultAround)
	}
	for _, a := range l.Accesses {
		if whole := a.Ranges == nil; whole != (a.Path == "/c") {
			t.Errorf("%s: whole is %v", a.Path, whole)
		}
	}
	matches, err := filepath.Glob(filepath.Join(q.Dir(), "built", "*.list"))
	if err != nil || len(matches) != 1 {
		t.Fatalf("built lists %q, %v, want one", matches, err)
	}
	done, err := filepath.Glob(filepath.Join(q.Dir(), "done", "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(done, func(name string) bool {
		b, err := os.ReadFile(name)
		return err == nil && strings.Contains(string(b), `"`+matches[0]+`"`)
	}) {
		t.Errorf("none of %q names %s, the list of both runs", done, matches[0])
	}
	for _, d := range []rebuild.Decision{b.overwrite(q, "b:2"), b.overwriteFiles(q, "a", "b", "c")} {
		if d.Verdict != rebuild.Unchanged {
			t.Errorf("Add() = %+v after a build for both, want %q", d, rebuild.Unchanged)
		}
	}
}
