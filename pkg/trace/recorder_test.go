package trace_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

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

// TestRecorderEngines holds how what two engines tell becomes one trace.
func TestRecorderEngines(t *testing.T) {
	const ms = time.Millisecond
	var r trace.Recorder
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(p string, elapsed time.Duration) trace.Access { return trace.Access{Path: p, Elapsed: elapsed} }
	// Heard of late, together: the pages know better, and what came before is not later.
	must(r.Touch(0, at("/opened", 30*ms)))
	must(r.Touch(1, at("/read", 30*ms)))
	must(r.Touch(2, at("/early", 30*ms)))
	must(r.Touch(3, at("/newname", 30*ms)))
	must(r.Touch(4, at("/alias", 31*ms)))
	must(r.Touch(5, at("/whole", 40*ms)))
	must(r.Found(6, at("/found", 15*ms)))
	must(r.Found(7, at("/whole", 20*ms))) // the other engine found a file that is listed
	r.Ranges(0, nil)
	r.Ranges(1, []trace.Range{{Offset: 4096, Length: 1, Elapsed: 10 * ms, Certain: true}})
	r.Ranges(1, []trace.Range{{Offset: 0, Length: 1, Elapsed: 20 * ms}})
	r.Ranges(6, []trace.Range{{Length: 9, Elapsed: 15 * ms}})
	r.Ranges(99, []trace.Range{{Length: 1}}) // never recorded
	must(r.Rename(3, "/oldname"))
	must(r.Rename(4, "/early"))
	must(r.Rename(99, "/x"))
	if err := r.Rename(0, "relative"); err == nil {
		t.Error("Rename to a relative path = nil")
	}
	r.Ranges(4, []trace.Range{{Length: 5, Elapsed: 32 * ms}})
	r.Process(trace.Process{PID: 2, Parent: 1, Command: "c"})
	r.Process(trace.Process{PID: 1})

	want := trace.Trace{
		Accesses: []trace.Access{
			{Path: "/opened", Elapsed: 10 * ms, Ranges: []trace.Range{}},
			{Path: "/read", Elapsed: 10 * ms, Ranges: []trace.Range{{Offset: 4096, Length: 1, Elapsed: 10 * ms, Certain: true}, {Length: 1, Elapsed: 20 * ms}}},
			{Path: "/found", Elapsed: 15 * ms, Ranges: []trace.Range{{Length: 9, Elapsed: 15 * ms}}},
			{Path: "/early", Elapsed: 30 * ms, Ranges: []trace.Range{{Length: 5, Elapsed: 32 * ms}}},
			{Path: "/oldname", Elapsed: 30 * ms},
			{Path: "/whole", Elapsed: 40 * ms},
		},
		Processes: []trace.Process{{PID: 2, Parent: 1, Command: "c"}, {PID: 1}},
	}
	if diff := cmp.Diff(want, r.Trace()); diff != "" {
		t.Errorf("Trace (-want +got):\n%s", diff)
	}
}

// cpuTime returns what the calling thread has run for: other work on the machine does not count.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestRecorderManyNames holds that names of one file, of which a container can make very many, become one
// access in time that grows with their number only, in whatever order they turn out to be one.
func TestRecorderManyNames(t *testing.T) {
	const n = 100_000
	for name, to := range map[string]func(i int) int{
		"star":  func(int) int { return n },
		"chain": func(i int) int { return i + 1 },
	} {
		t.Run(name, func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			path := func(i int) string { return fmt.Sprintf("/%06d", i) }
			var r trace.Recorder
			began := cpuTime(t)
			for i := range n + 1 {
				if err := r.Touch(uint32(i), access(path(i), trace.Opened)); err != nil {
					t.Fatal(err)
				}
			}
			touched := cpuTime(t) - began
			began += touched
			for i := range n {
				if err := r.Rename(uint32(i), path(to(i))); err != nil {
					t.Fatal(err)
				}
			}
			for i := range n {
				r.Merge(uint32(i), trace.How(1<<(i%3)))
			}
			if renamed := cpuTime(t) - began; renamed > 20*max(touched, time.Millisecond) {
				t.Errorf("%d names took %v, and %v to become one: far more", n, touched, renamed)
			}
			want := []trace.Access{access(path(n), trace.Opened|trace.Read|trace.Executed)}
			if diff := cmp.Diff(want, r.Trace().Accesses); diff != "" {
				t.Errorf("accesses (-want +got):\n%s", diff)
			}
		})
	}
}
