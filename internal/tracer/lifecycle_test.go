package tracer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// lossOf returns the reasons of a result's losses.
func lossOf(r tracer.Result) string {
	var reasons []string
	for _, l := range r.Trace.Losses {
		reasons = append(reasons, fmt.Sprintf("%s %d", l.Reason, l.Count))
	}
	return strings.Join(reasons, ", ")
}

// sleeper is a container that reads a file and then sleeps.
func sleeper(t *testing.T) (*box, *container) {
	t.Helper()
	b := newBox(t, "mkdir s; echo x > s/f; echo x > s/g")
	return b, b.create(t, pivotProc, "bash", "-euc", "cat /s/f; sleep 0.3; cat /s/g > /s/seen; exec sleep 600")
}

// await waits until a file exists.
func await(t *testing.T, name string) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		if st, err := os.Stat(name); err == nil && st.Size() > 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("no %s after %v", name, limit)
		}
	}
}

func TestEnds(t *testing.T) {
	tests := map[string]struct {
		o   tracer.Options
		do  func(s *tracer.Session, c *container)
		end string
	}{
		"stop":      {do: func(s *tracer.Session, _ *container) { s.Stop("asked"); s.Stop("second") }, end: "asked"},
		"timeout":   {o: tracer.Options{Timeout: 5 * time.Second}, end: tracer.EndTimeout},
		"idle":      {o: tracer.Options{Idle: 3 * time.Second}, end: tracer.EndIdle},
		"exit":      {do: func(_ *tracer.Session, c *container) { _ = c.cmd.Process.Kill() }, end: tracer.EndExit},
		"terminate": {do: func(_ *tracer.Session, _ *container) {}, end: tracer.EndStop},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b, c := sleeper(t)
			s := start(t, c, tt.o)
			server := childOf(t, os.Getpid(), "optimizer-server")
			c.letGo(t)
			await(t, b.merged+"/s/seen")
			if tt.do != nil {
				tt.do(s, c)
			}
			if name == "terminate" {
				signal(t, server, unix.SIGTERM)
			}
			r := result(t, s)
			if r.End != tt.end || r.Err != nil || !r.Trace.Complete() {
				t.Errorf("end %q, error %v, losses %q; want %q without either", r.End, r.Err, lossOf(r), tt.end)
			}
			for _, p := range []string{"/s/f", "/s/g"} {
				if _, ok := find(r, p); !ok {
					t.Errorf("%s is not listed", p)
				}
			}
			if r.Armed.IsZero() || r.Duration < 300*time.Millisecond {
				t.Errorf("armed %v, duration %v", r.Armed, r.Duration)
			}
			if ns := holders(t, c.pid()); name != "exit" && len(ns) > 0 {
				t.Errorf("processes %v still hold the container's mount namespace", ns)
			}
		})
	}
}

// holders returns the processes of ours, besides the container's, in the mount namespace
// of process pid.
func holders(t *testing.T, pid int) []string {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return nil
	}
	tasks, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, task := range tasks {
		if got, err := os.Readlink(task); err != nil || got != ns {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(task)), "comm"))
		if err == nil && strings.HasPrefix(string(comm), "optimizer-") {
			names = append(names, task)
		}
	}
	return names
}

func signal(t *testing.T, pid int, sig unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, sig); err != nil {
		t.Fatalf("signal %v to %d: %v", sig, pid, err)
	}
}

// TestCancel holds that cancelling the context ends the recording like a stop.
func TestCancel(t *testing.T) {
	b, c := sleeper(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s, err := tracer.Start(ctx, tracer.Options{Server: testenv.Binary(t, "optimizer-server"), PID: c.pid()})
	if err != nil {
		t.Fatal(err)
	}
	<-s.Ready()
	c.letGo(t)
	await(t, b.merged+"/s/seen")
	cancel()
	if r := result(t, s); r.End != tracer.EndStop || r.Err != nil {
		t.Errorf("end %q, error %v; want %q", r.End, r.Err, tracer.EndStop)
	}
}

// TestKilled holds that a tracer that dies while it traces leaves what it had sent, a loss,
// and the container alone.
func TestKilled(t *testing.T) {
	b, c := sleeper(t)
	s := start(t, c, tracer.Options{})
	server := childOf(t, os.Getpid(), "optimizer-server")
	c.letGo(t)
	await(t, b.merged+"/s/seen")
	time.Sleep(time.Second) // on a busy machine it takes its time
	signal(t, server, unix.SIGKILL)
	r := result(t, s)
	if r.End != tracer.EndKilled || !errors.Is(r.Err, tracer.ErrKilled) || lossOf(r) != "killed -1" {
		t.Errorf("end %q, error %v, losses %q", r.End, r.Err, lossOf(r))
	}
	if _, ok := find(r, "/s/g"); !ok {
		t.Error("/s/g, touched before, is not listed")
	}
	if err := unix.Kill(c.pid(), 0); err != nil {
		t.Errorf("container: %v", err)
	}
}

// TestFrozen holds that a tracer that was stopped by SIGSTOP harms nobody and is killed
// when it does not end.
func TestFrozen(t *testing.T) {
	b, c := sleeper(t)
	s := start(t, c, tracer.Options{Grace: 200 * time.Millisecond})
	server := childOf(t, os.Getpid(), "optimizer-server")
	signal(t, server, unix.SIGSTOP)
	c.letGo(t)
	await(t, b.merged+"/s/seen")
	s.Stop("stop")
	r := result(t, s)
	if r.End != tracer.EndKilled || !errors.Is(r.Err, tracer.ErrKilled) || lossOf(r) != "killed -1" {
		t.Errorf("end %q, error %v, losses %q", r.End, r.Err, lossOf(r))
	}
}

// TestParentDies holds that a server whose parent is gone ends, and leaves the container.
func TestParentDies(t *testing.T) {
	_, c := sleeper(t)
	cmd := exec.Command(testenv.Binary(t, "optimizer-server"), "--pid", fmt.Sprint(c.pid()))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	// What a parent that was killed does: both ends close at once.
	_, _ = in.Close(), out.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // it could not write; nobody reads
	}()
	select {
	case <-ended:
	case <-time.After(limit):
		_ = cmd.Process.Kill()
		t.Fatal("server still runs")
	}
}

// TestParentHangs holds that a parent that does not read makes the server neither wait
// nor lose anything.
func TestParentHangs(t *testing.T) {
	const files = 5_000 // far more than a pipe holds
	b := newBox(t, fmt.Sprintf("mkdir s; cd s; for i in $(seq %d); do : > a-rather-long-name-for-a-file-$i; done", files))
	c := b.create(t, pivot, "bash", "-euc", "cat /s/*; echo x > /done; exec sleep 600")
	cmd := exec.Command(testenv.Binary(t, "optimizer-server"), "--pid", fmt.Sprint(c.pid()))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 30)
	if _, err := io.ReadFull(out, head); err != nil {
		t.Fatal(err)
	}
	c.letGo(t)
	await(t, b.merged+"/done")
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	// The namespace is given up before the last frames are read.
	for end := time.Now().Add(limit); len(holders(t, c.pid())) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("server still holds the namespace: %v", holders(t, c.pid()))
		}
	}
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(rest), "/s/a-rather-long-name"); n != files {
		t.Errorf("%d files in the stream, want %d", n, files)
	}
}

// TestNoTracer holds what a session says when nothing can be traced.
func TestNoTracer(t *testing.T) {
	server := func(t *testing.T, script string) string {
		name := filepath.Join(t.TempDir(), "server")
		if err := os.WriteFile(name, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return name
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		script string // empty: the real server
		pid    int
		err    error
		text   string
	}{
		"process gone":   {pid: gone.Process.Pid, err: tracer.ErrLate, text: "no such process"},
		"exits":          {script: "echo oops >&2; exit 3", pid: 1, err: tracer.ErrKilled, text: `exit status 3), it said "oops"`},
		"other program":  {script: `echo '{"path":"/x"}'; exec sleep 600`, pid: 1, err: tracer.ErrKilled, text: "not a trace stream"},
		"upstream style": {script: `echo '{"path":"/bin/sh","size":1,"elapsed":2}'`, pid: 1, err: tracer.ErrKilled, text: "not a trace stream"},
		"bad frame":      {script: `sleep 2 & printf 'HSTRACE\005\001\000\000\000X'; wait`, pid: 1, err: tracer.ErrKilled, text: "invalid trace frame"},
		"huge frame":     {script: `printf 'HSTRACE\005\377\377\377\377X'; exec sleep 600`, pid: 1, err: tracer.ErrKilled, text: "invalid trace frame"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			o := tracer.Options{}
			if tt.script != "" {
				o.Server = server(t, tt.script)
			} else {
				testenv.Root(t)
			}
			s := startUnarmed(t, tt.pid, o)
			r := result(t, s)
			if !errors.Is(r.Err, tt.err) || !strings.Contains(fmt.Sprint(r.Err), tt.text) {
				t.Errorf("error %v; want %v with %q", r.Err, tt.err, tt.text)
			}
			if r.End != tracer.EndKilled || lossOf(r) != "late -1" {
				t.Errorf("end %q, losses %q; want %q, %q", r.End, lossOf(r), tracer.EndKilled, "late -1")
			}
			select {
			case <-s.Ready():
				t.Error("session says that it was ready")
			default:
			}
		})
	}
	t.Run("no binary", func(t *testing.T) {
		s, err := tracer.Start(context.Background(), tracer.Options{Server: "/nonexistent/server", PID: 1})
		if s != nil || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("Start = %v, %v", s, err)
		}
	})
	t.Run("options", func(t *testing.T) {
		for _, o := range []tracer.Options{{Server: "/bin/true"}, {Server: "/bin/true", PID: -1}, {Server: "/bin/true", PID: 1, Timeout: -1}} {
			if s, err := tracer.Start(context.Background(), o); s != nil || err == nil {
				t.Errorf("Start(%+v) = %v, nil; want an error", o, s)
			}
		}
	})
}

// TestPrivileges holds that a server without CAP_SYS_ADMIN says so.
func TestPrivileges(t *testing.T) {
	b, c := sleeper(t)
	_ = b
	name := filepath.Join(t.TempDir(), "server")
	script := fmt.Sprintf("#!/bin/sh\nexec setpriv --bounding-set -sys_admin --inh-caps -sys_admin %s \"$@\"\n", testenv.Binary(t, "optimizer-server"))
	if err := os.WriteFile(name, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	r := result(t, startUnarmed(t, c.pid(), tracer.Options{Server: name}))
	if !errors.Is(r.Err, tracer.ErrPrivilege) || lossOf(r) != "late -1" {
		t.Errorf("error %v, losses %q; want %v", r.Err, lossOf(r), tracer.ErrPrivilege)
	}
}

// TestEarly holds that a session knows whether it was armed before the container's command began.
func TestEarly(t *testing.T) {
	b := newBox(t, "mkdir s; echo x > s/f; cp "+workload(t)+" program")
	for _, mode := range []string{pivot, chroot} {
		c := b.create(t, mode, "/program", "read", "/s/f")
		early := start(t, c, tracer.Options{})
		c.run(t)
		if r := result(t, early); !r.Early || !r.Trace.Complete() {
			t.Errorf("%s: early %t, losses %q; want all of the run", mode, r.Early, lossOf(r))
		}
		c = b.create(t, mode, "/program", "files", "read:/s/f", "pause:60s")
		c.letGo(t)
		for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.pid())); err == nil && filepath.Base(exe) == "program" {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the command does not begin")
			}
		}
		late := start(t, c, tracer.Options{})
		_ = c.cmd.Process.Kill()
		if r := result(t, late); r.Early {
			t.Errorf("%s: says that it was there before a command that ran", mode)
		}
	}
}

// TestTwoAtOnce holds that two sessions of one container see the same.
func TestTwoAtOnce(t *testing.T) {
	b := newBox(t, "mkdir s; echo x > s/f")
	c := b.create(t, pivot, "cat", "/s/f")
	s1, s2 := start(t, c, tracer.Options{}), start(t, c, tracer.Options{})
	c.run(t)
	paths := func(r tracer.Result) (p []string) {
		for _, a := range r.Trace.Accesses {
			p = append(p, a.Path)
		}
		return p
	}
	p1, p2 := paths(result(t, s1)), paths(result(t, s2))
	if !slices.Equal(p1, p2) || !slices.Contains(p1, "/s/f") {
		t.Errorf("one says %q, the other %q", p1, p2)
	}
}

// TestShortLived holds that a container that lives for a moment is traced whole.
func TestShortLived(t *testing.T) {
	b := newBox(t, "mkdir s; cp "+workload(t)+" s/program")
	for range 20 {
		r := b.record(t, pivot, "/s/program", "nothing")
		// The first process, which is this test's program, may fault its own libraries in while it waits: "/" is a layer here.
		own := slices.DeleteFunc(r.Trace.Accesses, func(a trace.Access) bool { return !strings.HasPrefix(a.Path, "/s/") })
		if len(own) != 1 || own[0].Path != "/s/program" {
			t.Errorf("accesses %+v; want the program", r.Trace.Accesses)
		}
	}
}

// TestArming measures the time from the start of a recording to its marks being in place, by a server that is started
// then and by one that stands by. It asserts no number.
func TestArming(t *testing.T) {
	b := newBox(t, "")
	c := b.create(t, pivotProc, "sleep", "600")
	server := testenv.Binary(t, "optimizer-server")
	pages := pool(t)
	reserve := tracer.NewReserve(server, nil)
	defer reserve.Close()
	for _, o := range []tracer.Options{{}, {Reserve: reserve}} {
		o.Server, o.PID, o.Pages = server, c.pid(), pages
		var times []time.Duration
		for range 10 {
			if o.Reserve != nil { // as at the creation of a container
				o.Reserve.Expect()
				stand(t, o.Reserve, 1)
			}
			began := time.Now()
			s, err := tracer.Start(context.Background(), o)
			if err != nil {
				t.Fatal(err)
			}
			<-s.Ready()
			times = append(times, time.Since(began))
			s.Stop("")
			<-s.Done()
			time.Sleep(tracefs.DefaultQuiet + 100*time.Millisecond) // the pool resets the instance
		}
		slices.Sort(times)
		t.Logf("stands by %t: armed after %v (median), %v (worst of %d), page events included", o.Reserve != nil, times[len(times)/2], times[len(times)-1], len(times))
	}
}
