package tracefs_test

import (
	"errors"
	"io"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// Many processes at once, each reading as fast as it can, keep every core busy; no event is
// lost.
func TestBurstIsComplete(t *testing.T) {
	processes, each := 500, 2000
	if testing.Short() {
		processes, each = 50, 2000
	}
	fs := open(t)
	in := create(t, fs, tracefs.Options{})
	f, inode := subject(t, true)
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	wait, say, threads := start(t)
	if err := in.Arm(threads...); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	begin := time.Now()
	go func() {
		ended <- wait()
		r.Stop()
	}()
	restore, err := tracefs.Prioritize()
	if err != nil {
		t.Logf("no priority: %v", err)
	}
	defer restore()
	say("burst", strconv.Itoa(processes), strconv.Itoa(each), f.Name())
	before := cpuTime(t)
	ours, total, calls := 0, 0, 0
	events := make([]tracefs.Event, 4096)
	for {
		n, err := r.Read(events)
		for i := range events[:n] {
			if e := &events[i]; e.Kind == tracefs.Read && e.Inode == inode {
				ours++
			}
		}
		total += n
		calls++
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	lost, err := in.Lost()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d events in %v, %d calls, %v of this process' CPU time per million", total, time.Since(begin), calls,
		time.Duration(float64(cpuTime(t)-before)/float64(total)*1e6))
	if ours != processes*each || lost.Total() != 0 {
		t.Errorf("%d reads seen, want %d; lost %+v", ours, processes*each, lost)
	}
}

// cpuTime returns what this process has used, not its children.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
