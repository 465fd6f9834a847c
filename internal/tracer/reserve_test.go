package tracer_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// standing returns the servers of this process that stand by.
func standing(t *testing.T) (pids []int) {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err != nil || !strings.HasSuffix(string(line), "optimizer-server\x00--standby\x00") {
			continue // gone, or something else
		}
		var pid, parent int
		var state string
		stat, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "stat"))
		if _, err := fmt.Sscanf(string(stat), "%d (optimizer-serve) %s %d", &pid, &state, &parent); err == nil && parent == os.Getpid() && state != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

// stand waits until n servers stand by and returns them.
func stand(t *testing.T, r *tracer.Reserve, n int) []int {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		pids := standing(t)
		if r.Ready() == n && len(pids) >= n {
			return pids
		}
		if time.Now().After(end) {
			t.Fatalf("%d servers stand by, of %d processes; want %d", r.Ready(), len(pids), n)
		}
	}
}

// gone waits until a process has no thread that runs.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		stat, serr := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || serr != nil || len(tasks) == 1 && strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("process %d is still there", pid)
		}
	}
}

// recorded judges a recording of "cat /s/f".
func recorded(t *testing.T, r tracer.Result, grade string) {
	t.Helper()
	if r.Err != nil || !r.Trace.Complete() || r.Grade != grade || r.End != tracer.EndExit {
		t.Errorf("end %s, grade %s, losses %q, error %v; want %s, %s, none", r.End, r.Grade, lossOf(r), r.Err, tracer.EndExit, grade)
	}
	if !slices.ContainsFunc(r.Trace.Accesses, func(a trace.Access) bool { return a.Path == "/s/f" }) {
		t.Errorf("accesses %+v, want /s/f among them", r.Trace.Accesses)
	}
}

// TestReserve records with servers that stood by, with page events and without. One that was killed meanwhile is replaced, and what
// nobody took is gone afterwards. See TestLateInstance for one that gets page events later.
func TestReserve(t *testing.T) {
	server := testenv.Binary(t, "optimizer-server")
	var none *tracer.Reserve
	none.Expect()
	none.Close()
	reserve := tracer.NewReserve(server, nil)
	defer reserve.Close()
	b := newBox(t, "mkdir s; echo x > s/f")
	pages := pool(t)
	for name, tt := range map[string]struct {
		pages bool
		kill  bool
		grade string
	}{
		"with page events":    {pages: true, grade: trace.GradeFaultAround},
		"without page events": {grade: trace.GradeFile},
		"killed meanwhile":    {pages: true, kill: true, grade: trace.GradeFaultAround},
	} {
		t.Run(name, func(t *testing.T) {
			reserve.Expect()
			pid := stand(t, reserve, 1)[0]
			c := b.create(t, pivot, "cat", "/s/f")
			o := tracer.Options{Server: server, Reserve: reserve, PID: c.pid()}
			if tt.pages {
				o.Pages = pages
			}
			if tt.kill {
				signal(t, pid, unix.SIGKILL)
				gone(t, pid)
			}
			s := startWith(t, o)
			if got := childOf(t, os.Getpid(), "optimizer-server"); (got == pid) == tt.kill {
				t.Errorf("process %d records, and %d stood by", got, pid)
			}
			c.run(t)
			recorded(t, result(t, s), tt.grade)
		})
	}
	for range 30 {
		reserve.Expect()
	}
	stand(t, reserve, 8)
	reserve.Close()
	reserve.Expect()
	if left := standing(t); len(left) != 0 || reserve.Ready() != 0 {
		t.Errorf("servers %d stand by after Close", left)
	}
}

// startWith starts a session with these options alone and waits until it is armed.
func startWith(t *testing.T, o tracer.Options) *tracer.Session {
	t.Helper()
	s, err := tracer.Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-s.Ready():
	case <-s.Done():
		t.Fatal(s.Result().Err)
	}
	return s
}

// TestReserveEnds holds that a server that nobody takes ends: after a time, and when its parent was killed.
func TestReserveEnds(t *testing.T) {
	reserve := tracer.NewReserve(testenv.Binary(t, "optimizer-server"), nil)
	defer reserve.Close()
	reserve.Keep(3 * time.Second) // long enough to be seen
	reserve.Expect()
	for end := time.Now().Add(limit); len(standing(t)) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no server was started")
		}
	}
	for end := time.Now().Add(limit); len(standing(t)) != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("servers %d stand by", standing(t))
		}
	}
	parent := exec.Command("/proc/self/exe")
	parent.Env = append(os.Environ(), envReserve+"="+testenv.Binary(t, "optimizer-server"))
	out, err := parent.StdoutPipe()
	if err == nil {
		err = parent.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	_, err = fmt.Fscan(out, &pid)
	kerr := parent.Process.Kill()
	_ = parent.Wait() // it was killed
	if err != nil || kerr != nil {
		t.Fatalf("the parent's server: %v, %v", err, kerr)
	}
	gone(t, pid)
}

// holdReserve has one server stand by, prints its number, and waits to be killed.
func holdReserve(server string) {
	r := tracer.NewReserve(server, nil)
	r.Expect()
	for r.Ready() == 0 {
		time.Sleep(time.Millisecond)
	}
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", os.Getpid()))
	for _, name := range children {
		text, _ := os.ReadFile(name)
		fmt.Print(string(text))
	}
	fmt.Println(err)
	select {}
}

// TestReserveOfNothing starts a server, where there is one, when what was to stand by is none, or says something else.
func TestReserveOfNothing(t *testing.T) {
	dir := t.TempDir()
	for name, script := range map[string]string{"missing": "", "ends": "exit 3", "says nothing it should": "echo hello >&0; exec sleep 600"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, name)
			if script != "" {
				if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			reserve := tracer.NewReserve(path, nil)
			reserve.Expect()
			b := newBox(t, "mkdir s; echo x > s/f")
			c := b.create(t, pivot, "cat", "/s/f")
			s := startWith(t, tracer.Options{Server: testenv.Binary(t, "optimizer-server"), Reserve: reserve, PID: c.pid()})
			c.run(t)
			recorded(t, result(t, s), trace.GradeFile)
			reserve.Close()
			if n := reserve.Ready(); n != 0 {
				t.Errorf("%d servers stand by", n)
			}
		})
	}
}
