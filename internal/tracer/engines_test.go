package tracer_test

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// recordBy is [box.record] with instances of the given options.
func (b *box) recordBy(t *testing.T, o tracefs.Options, argv ...string) tracer.Result {
	t.Helper()
	c := b.create(t, pivot, argv...)
	s, _ := pooled(t, c, tracefs.PoolOptions{Instance: o})
	c.run(t)
	r := result(t, s)
	if r.Err != nil || !r.Trace.Complete() || r.End != tracer.EndExit {
		t.Fatalf("result: end %q, error %v, losses %+v; want a complete trace that ends with %q", r.End, r.Err, r.Trace.Losses, tracer.EndExit)
	}
	return r
}

// TestInsertEngine has the engine of kernels that tell only what enters the page cache: the list names it and
// counts files as a whole; what had to be read from storage comes first, and what was cached has no order.
func TestInsertEngine(t *testing.T) {
	const size = 1<<20 + 123
	page := int64(os.Getpagesize())
	setup := "cp " + workload(t) + " program; mkdir s; for f in read mapped opened; do head -c " + strconv.Itoa(size) + " /dev/urandom > s/$f; done"
	c := newColdBox(t, setup)
	args := []string{"/program", "ranges", "pread:/s/read:300000:40000", "mmap:/s/mapped:700000:9000", "pread:/s/opened:0:0"}
	by := tracefs.Options{Events: tracefs.Inserts | tracefs.Processes}
	for _, state := range []string{"cold", "warm"} {
		if state == "warm" {
			c.warm(t)
		}
		watch := c.watchInsertions(t)
		r := c.recordBy(t, by, args...)
		sizes := c.files(t)
		inserted := c.touched(t, watch.stop(t), sizes)
		if r.Engine != "fanotify+page-cache" || r.Grade != trace.GradeFile {
			t.Errorf("%s: grade %q by %q, want whole files by page-cache insertions", state, r.Grade, r.Engine)
		}
		for path, size := range sizes {
			a, ok := find(r, path)
			if !ok {
				t.Errorf("%s: %s is not listed", state, path)
				continue
			}
			if a.Ranges == nil {
				if state == "cold" && path != "/s/opened" {
					t.Errorf("cold: nothing is known of %s", path)
				}
				continue
			}
			truth, seen := inserted[path], make(pageSet)
			if state == "warm" && len(truth) == 0 {
				t.Errorf("warm: ranges %+v of %s, which was cached", a.Ranges, path)
				continue
			}
			for _, g := range a.Ranges {
				for p := g.Offset / page; p < pagesOf(g.Offset+g.Length); p++ {
					if len(seen) < len(truth) && !truth[p] || seen[p] || g.Certain {
						t.Errorf("%s: page %d in %+v: twice, or certain, or before one that was read", path, p, g)
					}
					seen[p] = true
				}
			}
			if int64(len(seen)) != pagesOf(size) {
				t.Errorf("%s: %d pages listed of %d", path, len(seen), pagesOf(size))
			}
		}
	}
}

// TestUnmounted holds that a tracefs that is unmounted while a container runs changes nothing: neither for
// the run, nor for the next one of the same pool.
func TestUnmounted(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	dir := t.TempDir()
	if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
		testenv.Kernel(t, "tracefs", err)
	}
	fs, err := tracefs.OpenAt(dir)
	if err != nil {
		t.Fatal(errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)))
	}
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1})
	if err != nil {
		t.Fatal(errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)))
	}
	t.Cleanup(func() {
		if err := errors.Join(p.Close(), fs.Close()); err != nil {
			t.Error(err)
		}
	})
	for i := range 2 {
		c := b.create(t, pivot, "/program", "files", "read:/s/plain")
		s := start(t, c, tracer.Options{Pages: p})
		if i == 0 {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
		c.run(t)
		r := result(t, s)
		if a, ok := find(r, "/s/plain"); !ok || len(a.Ranges) == 0 || !r.Trace.Complete() || r.Err != nil {
			t.Errorf("run %d: %+v, listed %v, losses %q, error %v; want ranges", i, a, ok, lossOf(r), r.Err)
		}
	}
}

// TestSoakClock steps the machine's clock by a second and back while a container runs: times and order are those of
// clocks that nobody sets.
func TestSoakClock(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("SOAK is not set: make soak (it sets the machine's clock)")
	}
	b := newDiskBox(t, identitySetup)
	for name, step := range map[string]int64{"forth and back": 1, "back and forth": -1} {
		t.Run(name, func(t *testing.T) {
			c := b.create(t, pivot, "/program", "files", "read:/s/plain", "pause:200ms", "read:/s/linked", "pause:200ms", "map:/s/mapped", "pause:200ms", "read:/s/hard1")
			began := monotonic(t)
			s := start(t, c, tracer.Options{})
			c.letGo(t)
			time.Sleep(100 * time.Millisecond)
			stepClock(t, step)
			time.Sleep(300 * time.Millisecond)
			stepClock(t, -step)
			if err := c.wait(t); err != nil {
				t.Fatal(err)
			}
			r := result(t, s)
			took := monotonic(t) - began
			if r.Err != nil || !r.Trace.Complete() || r.Duration <= 0 || r.Duration > took {
				t.Errorf("duration %v of %v, error %v, losses %q", r.Duration, took, r.Err, lossOf(r))
			}
			last := time.Duration(-1)
			for _, p := range []string{"/program", "/s/plain", "/s/linked", "/s/mapped", "/s/hard1"} {
				a, ok := find(r, p)
				if !ok || a.Elapsed <= last || a.Elapsed > took || len(a.Ranges) == 0 {
					t.Errorf("%s: %+v, listed %v; the file before it was touched at %v, all took %v", p, a, ok, last, took)
				}
				last = a.Elapsed
				for _, g := range a.Ranges {
					if g.Elapsed < a.Elapsed-trace.MergeWindow || g.Elapsed > took {
						t.Errorf("%s: range %+v of a file first touched at %v, all took %v", p, g, a.Elapsed, took)
					}
				}
			}
		})
	}
}

// monotonic is a clock that nobody sets.
func monotonic(t *testing.T) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}

// stepClock moves the machine's wall clock by seconds, exactly.
func stepClock(t *testing.T, seconds int64) {
	t.Helper()
	if _, err := unix.ClockAdjtime(unix.CLOCK_REALTIME, &unix.Timex{Modes: unix.ADJ_SETOFFSET, Time: unix.Timeval{Sec: seconds}}); err != nil {
		t.Error(fmt.Errorf("step the clock: %w", err))
	}
}
