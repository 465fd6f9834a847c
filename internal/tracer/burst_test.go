package tracer_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
)

// burstFiles and burstPerDir shape the tree of TestBurst.
const (
	burstFiles  = 60_000
	burstPerDir = 1_000
)

func burstPath(i int) string { return fmt.Sprintf("/burst/%02d/%05d", i/burstPerDir, i) }

// workload returns a static program that does what its arguments say.
func workload(t *testing.T) string {
	t.Helper()
	return testenv.Command(t, "./internal/tracer/testdata/workload")
}

// burstBox returns a box with the tree and this static program at /program.
func burstBox(t *testing.T) *box {
	t.Helper()
	b := newBox(t, "cp "+workload(t)+" program; mkdir burst")
	for i := range burstFiles {
		if i%burstPerDir == 0 {
			if err := os.Mkdir(filepath.Join(b.lower, filepath.Dir(burstPath(i))), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(b.lower+burstPath(i), []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// TestBurst holds that nothing is lost while a program reads files faster than any real
// start does, on a machine with and without CPU to spare, and says what that costs.
func TestBurst(t *testing.T) {
	b := burstBox(t)
	b.create(t, pivot, "/program", "burst", strconv.Itoa(burstFiles), strconv.Itoa(burstPerDir)).run(t) // warms the caches
	quiet := b.create(t, pivot, "/program", "burst", strconv.Itoa(burstFiles), strconv.Itoa(burstPerDir))
	quiet.run(t)
	t.Logf("burst of %d files: %s without tracing", burstFiles, strings.TrimSpace(quiet.out.String()))
	t.Run("alone", func(t *testing.T) { b.burst(t) })
	t.Run("busy", func(t *testing.T) {
		for range runtime.NumCPU() {
			testenv.Start(t, exec.Command("sh", "-c", "while :; do :; done"))
		}
		b.burst(t)
	})
}

// burst records a burst in the box of burstBox.
func (b *box) burst(t *testing.T) {
	t.Helper()
	c := b.create(t, pivot, "/program", "burst", strconv.Itoa(burstFiles), strconv.Itoa(burstPerDir))
	s := start(t, c, tracer.Options{})
	server := childOf(t, os.Getpid(), "optimizer-server")
	c.letGo(t)
	peak := watchRSS(server, s.Done())
	if err := c.wait(t); err != nil {
		t.Fatalf("container: %v\n%s", err, c.out.String())
	}
	ended := time.Now()
	r := result(t, s)
	lag := time.Since(ended)
	if r.Err != nil || !r.Trace.Complete() {
		t.Fatalf("error %v, losses %+v; want none", r.Err, r.Trace.Losses)
	}
	read, last, before := 0, -1, time.Duration(0)
	for _, a := range r.Trace.Accesses {
		rest, ok := strings.CutPrefix(a.Path, "/burst/")
		if !ok {
			continue
		}
		i, err := strconv.Atoi(filepath.Base(rest))
		if err != nil || i <= last || a.Size != 7 || howString(a.How) != "or-" || a.PID != int32(c.pid()) || a.Command != "program" || a.Elapsed < before {
			t.Fatalf("access %+v after number %d, which was at %v", a, last, before)
		}
		last, before = i, a.Elapsed
		read++
	}
	if _, ok := find(r, "/program"); !ok || read != burstFiles || len(r.Trace.Accesses) != burstFiles+1 {
		t.Errorf("listed %d of %d files, program %v, %d accesses in all", read, burstFiles, ok, len(r.Trace.Accesses))
	}
	t.Logf("%s with tracing; %d events; server done %v after the end, peak memory %d KiB",
		strings.TrimSpace(c.out.String()), r.Trace.Events, lag.Round(time.Millisecond), <-peak)
}

// childOf returns the id of the child of process pid that is called name.
func childOf(t *testing.T, pid int, name string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		open, closing := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
		if err != nil || open < 0 || closing < 0 {
			continue
		}
		fields := strings.Fields(string(b[closing+1:]))
		// The kernel cuts command names at 15 bytes.
		if fields[0] != "Z" && fields[1] == strconv.Itoa(pid) && strings.HasPrefix(name, string(b[open+1:closing])) {
			id, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
	}
	t.Fatalf("process %d has no child %s", pid, name)
	return 0
}

// watchRSS returns the peak resident memory of process pid in KiB once done is closed.
func watchRSS(pid int, done <-chan struct{}) <-chan int {
	peak := make(chan int, 1)
	go func() {
		most := 0
		for {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
				if _, rest, ok := strings.Cut(string(b), "VmHWM:"); ok {
					n := 0
					_, _ = fmt.Sscan(rest, &n)
					most = max(most, n)
				}
			}
			select {
			case <-done:
				peak <- most
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	return peak
}

// TestHotFile holds that a file read over and over soon costs no events.
func TestHotFile(t *testing.T) {
	b := newBox(t, "mkdir s; head -c 100000 /dev/zero > s/hot; echo x > s/after")
	r := b.record(t, pivot, "bash", "-euc", "dd if=/s/hot of=/dev/stdout bs=1 status=none | cat >/s/out; cat /s/after")
	for _, p := range []string{"/s/hot", "/s/after"} {
		if a, ok := find(r, p); !ok || howString(a.How) != "or-" {
			t.Errorf("%s: %+v, found %v", p, a, ok)
		}
	}
	if r.Trace.Events > 50_000 {
		t.Errorf("%d events for 100,000 reads of one file, want far fewer", r.Trace.Events)
	}
	t.Logf("%d events for 100,000 reads", r.Trace.Events)
}

// fifoRounds is how many FIFOs TestFIFO goes through.
const fifoRounds = 100

// TestFIFO holds that the tracer never opens a FIFO: a writer that waits for a reader
// must not be let through by the tracer, or it would write to nobody.
func TestFIFO(t *testing.T) {
	b := newBox(t, fmt.Sprintf("cp %s program; mkdir s; for i in $(seq 0 %d); do mkfifo s/fifo$i; done", workload(t), fifoRounds-1))
	c := b.create(t, pivot, "/program", "fifo", strconv.Itoa(fifoRounds))
	s := start(t, c, tracer.Options{})
	c.run(t)
	if r := result(t, s); r.Err != nil || !r.Trace.Complete() || len(r.Trace.Accesses) != 1 {
		t.Errorf("error %v, losses %+v, accesses %+v; want the program only", r.Err, r.Trace.Losses, r.Trace.Accesses)
	}
}
