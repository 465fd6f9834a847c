package tracer_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// leastRing is the size of the ring buffers that an instance gets where many containers start: see tracefs.PoolOptions.
const leastRing = 512 << 10

// TestMillionEvents holds that a container of 500 processes that touch a million pages is recorded whole by way of the server,
// and what that costs. The smallest ring buffers fill within milliseconds in which the server does not run, as on a machine with
// ten times the work that it has CPUs for: then the list counts what it lacks, to the last event.
func TestMillionEvents(t *testing.T) {
	m := million{processes: 500, each: 2000}
	if testing.Short() {
		m.processes = 50
	}
	page := os.Getpagesize()
	b := newDiskBox(t, fmt.Sprintf("mkdir s/own; for i in $(seq 0 %d); do echo $i > s/own/$i; done; head -c %d /dev/urandom > s/shared",
		m.processes-1, millionPages*page))
	t.Run("a ring of its own", func(t *testing.T) {
		for range 3 { // a machine that stops for seconds loses some of these too
			c, r := m.record(t, b, tracefs.DefaultRing)
			if r.Trace.Complete() {
				m.judge(t, c, r)
				return
			}
			m.count(t, r)
			t.Logf("losses %q", lossOf(r))
		}
		t.Error("three recordings lost something")
	})
	t.Run("the smallest ring", func(t *testing.T) {
		c, r := m.record(t, b, leastRing)
		if r.Trace.Complete() {
			m.judge(t, c, r)
			return
		}
		m.count(t, r)
	})
}

// count holds that a list that is not whole counts what it lacks.
func (m million) count(t *testing.T, r tracer.Result) {
	t.Helper()
	seen := r.Trace.Events
	for _, l := range r.Trace.Losses {
		if l.Reason != "overrun" || l.Count < 1 {
			t.Errorf("loss %+v", l)
		}
		seen += l.Count
	}
	if seen < int64(m.processes*m.each) {
		t.Errorf("%d events were seen or are known to be lost, want one for each of %d reads at least", seen, m.processes*m.each)
	}
}

// millionPages is how many pages /s/shared has, as the test's program knows.
const millionPages = 3000

// million is how many processes read how many pages each.
type million struct{ processes, each int }

// record records them with ring buffers of a size.
func (m million) record(t *testing.T, b *box, ring int64) (*container, tracer.Result) {
	t.Helper()
	c := b.create(t, pivot, "/program", "processes", strconv.Itoa(m.processes), strconv.Itoa(m.each))
	s, _ := pooled(t, c, tracefs.PoolOptions{Ready: 1, Instance: tracefs.Options{Ring: ring}})
	peak := watchRSS(childOf(t, os.Getpid(), "optimizer-server"), s.Done())
	c.run(t)
	r := result(t, s)
	kib := <-peak
	t.Logf("%d events, %d processes: peak memory %d KiB, losses %q", r.Trace.Events, len(r.Trace.Processes), kib, lossOf(r))
	if r.Err != nil || r.Grade == trace.GradeFile || r.End != tracer.EndExit {
		t.Errorf("end %q, error %v, grade %s", r.End, r.Err, r.Grade)
	}
	if kib > 20<<10 {
		t.Errorf("peak memory %d KiB, want 20 MiB at most", kib)
	}
	return c, r
}

// judge holds a whole recording of them to what they did.
func (m million) judge(t *testing.T, c *container, r tracer.Result) {
	t.Helper()
	if r.Trace.Events < int64(m.processes*m.each) {
		t.Errorf("%d events, want one for each of %d reads at least", r.Trace.Events, m.processes*m.each)
	}
	truth := make(pageSet)
	for p := range int64(millionPages) {
		if p%3 != 1 {
			truth[p] = true
		}
	}
	lower, upper := bounds(t, r, "/s/shared", int64(millionPages*os.Getpagesize()))
	judge(t, "/s/shared", lower, truth, upper)
	if len(lower) != len(truth) || len(upper) != len(truth) {
		t.Errorf("%d pages certain, %d listed, %d read", len(lower), len(upper), len(truth))
	}
	byPID := make(map[int32]trace.Process)
	for _, p := range r.Trace.Processes {
		byPID[p.PID] = p
	}
	readers := make(map[int32]bool)
	for i := range m.processes {
		a, ok := find(r, fmt.Sprintf("/s/own/%d", i))
		p, known := byPID[a.PID]
		// A process that is gone when its event is read has no name.
		if !ok || len(a.Ranges) != 1 || !known || p.Parent != int32(c.pid()) || p.Command != "program" && p.Command != "" {
			t.Fatalf("file of process %d: %+v, listed %t, of process %+v", i, a, ok, p)
		}
		readers[a.PID] = true
	}
	if len(readers) != m.processes || len(byPID) != m.processes+1 || len(r.Trace.Processes) != m.processes+1 {
		t.Errorf("files of %d processes, %d of them in the list, want %d and their parent", len(readers), len(r.Trace.Processes), m.processes)
	}
}

// TestBurstOfPagesWhileBusy holds that a burst of files is recorded whole, ranges and all, where other programs want every CPU.
func TestBurstOfPagesWhileBusy(t *testing.T) {
	files := burstFiles
	if testing.Short() {
		files = 5 * burstPerDir
	}
	b := newDiskBox(t, fmt.Sprintf("mkdir burst; cd burst; for d in $(seq -w 0 %d); do mkdir $d; done; "+
		"seq 0 %d | awk '{f=sprintf(\"%%02d/%%05d\", $1/%d, $1); print \"content\" > f; close(f)}'", max(files/burstPerDir-1, 10), files-1, burstPerDir))
	c := b.create(t, pivot, "/program", "burst", strconv.Itoa(files), strconv.Itoa(burstPerDir))
	s := start(t, c, tracer.Options{})
	peak := watchRSS(childOf(t, os.Getpid(), "optimizer-server"), s.Done())
	for range runtime.NumCPU() {
		testenv.Start(t, exec.Command("sh", "-c", "while :; do :; done"))
	}
	c.run(t)
	r := result(t, s)
	t.Logf("%d files, %d events: peak memory %d KiB", len(r.Trace.Accesses), r.Trace.Events, <-peak)
	if r.Err != nil || !r.Trace.Complete() || r.Grade == trace.GradeFile || len(r.Trace.Accesses) != files+1 {
		t.Errorf("error %v, losses %q, grade %s, %d files", r.Err, lossOf(r), r.Grade, len(r.Trace.Accesses))
	}
	last, seen := -1, 0
	for _, a := range r.Trace.Accesses {
		if !strings.HasPrefix(a.Path, "/burst/") {
			continue
		}
		i, err := strconv.Atoi(filepath.Base(a.Path))
		if err != nil || i <= last || howString(a.How) != "or-" || len(a.Ranges) != 1 || a.Ranges[0].Offset != 0 || a.Ranges[0].Length != 8 || !a.Ranges[0].Certain {
			t.Fatalf("access %+v after number %d, %v", a, last, err)
		}
		last = i
		seen++
	}
	if seen != files {
		t.Errorf("%d of %d files are listed", seen, files)
	}
}
