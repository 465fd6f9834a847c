package trace_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/trace"
)

func access(path string, how trace.How) trace.Access {
	return trace.Access{Path: path, How: how, Size: 1, Elapsed: time.Second}
}

func TestRecorder(t *testing.T) {
	var r trace.Recorder
	touch := func(id uint32, a trace.Access) {
		t.Helper()
		if err := r.Touch(id, a); err != nil {
			t.Fatal(err)
		}
	}
	touch(1, access("/b", trace.Opened))
	touch(5, access("/late", trace.Opened))
	r.Merge(1, trace.Read)
	r.Merge(99, trace.Read) // never recorded
	touch(0, access("/a", trace.Opened|trace.Executed))
	touch(7, access("/b", trace.Executed)) // the same path again, later
	r.Merge(7, trace.Opened)
	earlier := access("/late", trace.Read)
	earlier.Command = "first"
	touch(3, earlier) // the same path again, earlier
	touch(4, access("/non\xff\nutf", 0))
	r.Lose(trace.Loss{Reason: "unresolved", Count: 2})
	r.Lose(trace.Loss{Reason: "overflow", Count: -1, Detail: "queue"})
	r.Lose(trace.Loss{Reason: "unresolved", Count: 3, Detail: "no path"})
	r.Lose(trace.Loss{Reason: "overflow", Count: 5})
	r.Skip(4)
	r.Saw(100)

	want := trace.Trace{
		Accesses: []trace.Access{
			access("/a", trace.Opened|trace.Executed),
			access("/b", trace.Opened|trace.Read|trace.Executed),
			{Path: "/late", How: trace.Opened | trace.Read, Size: 1, Elapsed: time.Second, Command: "first"},
			access("/non\xff\nutf", 0),
		},
		Losses:  []trace.Loss{{Reason: "unresolved", Count: 5, Detail: "no path"}, {Reason: "overflow", Count: -1, Detail: "queue"}},
		Skipped: 4,
		Events:  100,
	}
	got := r.Trace()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Trace (-want +got):\n%s", diff)
	}
	if got.Complete() || r.Len() != 4 {
		t.Errorf("Complete() = %v, Len() = %d", got.Complete(), r.Len())
	}
	got.Accesses[0].Path = "/changed"
	got.Losses[0].Count = 0
	if diff := cmp.Diff(want, r.Trace()); diff != "" {
		t.Errorf("Trace after its result was changed (-want +got):\n%s", diff)
	}
}

func TestRecorderEmpty(t *testing.T) {
	var r trace.Recorder
	r.Merge(0, trace.Read)
	if got := r.Trace(); !got.Complete() || got.Accesses != nil {
		t.Errorf("Trace() = %+v, want the zero Trace", got)
	}
}

func TestRecorderRefuses(t *testing.T) {
	for _, path := range []string{"", "/", "a", "./a", "/a/", "/a//b", "/a/./b", "/a/../b", "/..", "//a"} {
		var r trace.Recorder
		if err := r.Touch(0, access(path, trace.Opened)); err == nil || r.Len() != 0 {
			t.Errorf("Touch(%q) = %v, recorded %d; want an error", path, err, r.Len())
		}
	}
}
