package fuse

import (
	"errors"
	"math"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStatCPU(t *testing.T) {
	line := func(name string, cpu string) string {
		return "7 (" + name + ") R" + strings.Repeat(" 1", 35) + " " + cpu + " 0 0\n"
	}
	for _, c := range []struct {
		line string
		cpu  int
		ok   bool
	}{
		{line("cat", "3"), 3, true},
		{line("a) b (c", "12"), 12, true},
		{line("cat", "-1"), -1, false},
		{line("cat", "x"), 0, false},
		{"7 (cat) R 1 2 3", 0, false},
		{"7 cat R 1", 0, false},
		{"", 0, false},
	} {
		if cpu, ok := statCPU([]byte(c.line)); ok != c.ok || ok && cpu != c.cpu {
			t.Errorf("%q: CPU %d, %t; want %d, %t", c.line, cpu, ok, c.cpu, c.ok)
		}
	}
}

// A thread that is on another CPU is followed, and afterwards the caller may run where it could before.
func TestFollow(t *testing.T) {
	runtime.LockOSThread() // until the end of the test: what is left of it goes with the thread
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		t.Fatal(err)
	}
	if allowed.Count() < 2 {
		t.Skip("one CPU")
	}
	var cpus []int
	for n := 0; len(cpus) < 2; n++ {
		if allowed.IsSet(n) {
			cpus = append(cpus, n)
		}
	}
	for _, want := range cpus {
		there, done := make(chan int), make(chan struct{})
		go func() {
			runtime.LockOSThread()
			var one unix.CPUSet
			one.Set(want)
			if err := unix.SchedSetaffinity(0, &one); err != nil {
				t.Error(err)
			}
			there <- unix.Gettid()
			<-done
		}() // a thread that is locked ends with its goroutine
		tid := <-there
		var other unix.CPUSet
		other.Set(cpus[0] + cpus[1] - want)
		if err := unix.SchedSetaffinity(0, &other); err != nil {
			t.Fatal(err)
		}
		if follow(tid) {
			t.Errorf("moved to CPU %d, which is not allowed", want)
		}
		here, moved := -1, false
		for deadline := time.Now().Add(time.Minute); (!moved || here != want) && time.Now().Before(deadline); { // the scheduler may move it at any moment
			if err := errors.Join(unix.SchedSetaffinity(0, &other), unix.SchedSetaffinity(0, &allowed)); err != nil {
				t.Fatal(err)
			}
			moved = follow(tid)
			var err error
			if here, err = ownCPU(); err != nil {
				t.Fatal(err)
			}
		}
		if !moved || here != want {
			t.Errorf("on CPU %d after thread %d on %d was followed: moved %t", here, tid, want, moved)
		}
		close(done)
		var now unix.CPUSet
		if err := unix.SchedGetaffinity(0, &now); err != nil {
			t.Fatal(err)
		}
		if now != allowed {
			t.Errorf("CPUs allowed afterwards: %v, want %v", now, allowed)
		}
	}
	if follow(math.MaxInt32) {
		t.Error("a thread that does not exist was followed")
	}
}

// Who takes its time between reads is looked for ever more rarely; who does not is as soon as it is late.
func TestFollowerTakesItsTime(t *testing.T) {
	pid := uint32(os.Getpid())
	var f follower
	reads := func(n int, small bool, gap time.Duration) {
		for range n {
			f.saw(pid, small, gap)
		}
	}
	state := func(what string, next, slow int) {
		t.Helper()
		if f.next != next || f.slow != slow {
			t.Errorf("%s: looked for after %d late reads, %d were; want %d, %d", what, f.next, f.slow, next, slow)
		}
	}
	reads(1+smallRun, true, time.Millisecond)
	state("the first reads", 1, 0)
	reads(1, true, time.Millisecond)
	state("a late one", 2, 0)
	reads(3, true, time.Millisecond)
	state("three more", 4, 1)
	reads(nearRun-1, true, time.Microsecond)
	reads(1, false, time.Millisecond) // a file read from its beginning
	reads(smallRun, true, time.Millisecond)
	reads(100, true, 0) // what came in another way
	state("a few in time", 4, 1)
	reads(1, true, time.Microsecond)
	state("enough of them", 1, 0)
	reads(1, true, time.Millisecond)
	state("late once more", 1, 0)
	reads(1<<20, true, time.Millisecond)
	if f.next != followMost {
		t.Errorf("looked for after %d late reads, want %d at most", f.next, followMost)
	}
	f.saw(pid+1, true, time.Millisecond)
	state("somebody else", 1, 0)
	if f.pid != pid+1 {
		t.Errorf("follows %d, want %d", f.pid, pid+1)
	}
}
