package rebuild_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/rebuild"
)

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

// TestKilledBuildIsTriedAgain kills every build: a bounded number of times, then never again.
func TestKilledBuildIsTriedAgain(t *testing.T) {
	b := newBench(t)
	q := b.open("slow:1h", nil)
	b.add(q, b.request("list 1", nil))
	b.run(q)
	for n := 1; n <= 3; n++ {
		eventually(t, "a build", func() bool { return len(pids(t, b.out)) == n })
		if err := syscall.Kill(pids(t, b.out)[n-1], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the failure", func() bool { _, failed := b.results(); return failed == 1 })
	if f := b.failed[0]; !strings.Contains(f.Error, "signal: killed") || f.Attempts != 3 {
		t.Errorf("failure %+v", f)
	}
	b.wantEmpty()
}

// TestCalledOff ends the queue's Run during a build: the build is gone and not counted.
func TestCalledOff(t *testing.T) {
	for _, mode := range []string{"once-slow", "deaf"} {
		t.Run(mode, func(t *testing.T) {
			b := newBench(t)
			q := b.open(mode, func(o *rebuild.QueueOptions) { o.Grace = 100 * time.Millisecond })
			b.add(q, b.request("list 1", nil))
			stop := b.run(q)
			eventually(t, "a build", func() bool { return len(pids(t, b.out)) == 1 })
			stop(nil)
			if alive(pids(t, b.out)[0]) {
				t.Error("the build goes on")
			}
			jobs, err := q.Jobs()
			if err != nil || len(jobs) != 1 || jobs[0].Attempts != 0 || !jobs[0].NotBefore.IsZero() {
				t.Fatalf("jobs %+v, %v", jobs, err)
			}
			if _, failed := b.results(); failed != 0 {
				t.Errorf("%d failures", failed)
			}
			q = b.open("ok", nil)
			b.run(q)
			b.waitBuilt(1)
			b.wantEmpty()
		})
	}
}

// TestParentKilled kills the plugin during a build: the build goes on, holds the queue,
// and the next plugin finds its result.
func TestParentKilled(t *testing.T) {
	b := newBench(t)
	d := b.add(b.open("ok", nil), b.request("list 1", nil))
	parent := startParent(t, b, "slow:500ms")
	eventually(t, "a build", func() bool { return len(pids(t, b.out)) == 1 })
	parent()
	if !alive(pids(t, b.out)[0]) {
		t.Fatal("the build died with its parent")
	}
	q := b.open("crash", nil) // a second build would fail
	b.run(q)
	b.waitBuilt(1)
	if n := len(pids(t, b.out)); n != 1 {
		t.Errorf("%d builds, want 1", n)
	}
	if _, err := os.Stat(filepath.Join(b.out, d.Key)); err != nil {
		t.Error(err)
	}
	b.wantEmpty()
}

// TestAllKilled kills plugin and build: the next plugin cleans up and builds again.
func TestAllKilled(t *testing.T) {
	b := newBench(t)
	b.add(b.open("ok", nil), b.request("list 1", nil))
	parent := startParent(t, b, "slow:1h")
	eventually(t, "a build that has files", func() bool {
		return len(pids(t, b.out)) == 1 && len(b.files("work")) == 1
	})
	parent()
	if err := syscall.Kill(pids(t, b.out)[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	q := b.open("ok", nil)
	b.run(q)
	b.waitBuilt(1)
	if n := len(pids(t, b.out)); n != 2 {
		t.Errorf("%d builds, want 2", n)
	}
	b.wantEmpty()
}

// TestDetach leaves the build alone.
func TestDetach(t *testing.T) {
	b := newBench(t)
	q := b.open("slow:300ms", nil)
	b.add(q, b.request("list 1", nil))
	stop := b.run(q)
	eventually(t, "a build", func() bool { return len(pids(t, b.out)) == 1 })
	stop(rebuild.ErrDetach)
	if !alive(pids(t, b.out)[0]) {
		t.Error("the build is gone")
	}
	q2 := b.open("crash", nil)
	b.run(q2)
	b.waitBuilt(1)
	b.wantEmpty()
}

// TestTwoPlugins works on one queue from several at once: every job is built once, one at a time.
func TestTwoPlugins(t *testing.T) {
	b := newBench(t)
	var queues []*rebuild.Queue
	for range 3 {
		q := b.open("slow:20ms", nil)
		queues = append(queues, q)
		b.run(q)
	}
	const jobs = 9
	for i := range jobs {
		b.add(queues[i%3], b.request("list", func(r *rebuild.Request) { r.Image.Reference = fmt.Sprintf("example.com/a:%d", i) }))
	}
	b.waitBuilt(jobs)
	b.wantEmpty()
	if n := len(pids(t, b.out)); n != jobs {
		t.Errorf("%d builds, want %d", n, jobs)
	}
}

// TestKillDrill kills builds and plugins at random moments. What is visible is whole at
// every moment, and in the end everything is built.
func TestKillDrill(t *testing.T) {
	b := newBench(t)
	watch := make(chan struct{})
	seen := make(chan error, 1)
	go func() { seen <- b.watch(watch) }()
	const rounds = 12
	rng := rand.New(rand.NewPCG(1, 2))
	add := b.open("ok", nil)
	for i := range rounds {
		b.add(add, b.request("list", func(r *rebuild.Request) { r.Image.Reference = fmt.Sprintf("example.com/a:%d", i) }))
		before := len(pids(t, b.out))
		parent := startParent(t, b, "slow:30ms")
		if i%4 != 0 { // else the plugin dies while it starts
			eventually(t, "a build", func() bool { return len(pids(t, b.out)) > before || len(b.files("jobs")) == 0 })
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		if started := pids(t, b.out); len(started) > 0 && i%2 == 0 {
			_ = syscall.Kill(started[len(started)-1], syscall.SIGKILL) // may have ended
		}
		parent()
	}
	q := b.open("ok", func(o *rebuild.QueueOptions) { o.MaxAttempts = 100 })
	b.run(q)
	eventually(t, "all results", func() bool { return len(b.files("done")) == rounds && len(b.files("jobs")) == 0 })
	b.wantEmpty()
	close(watch)
	if err := <-seen; err != nil {
		t.Error(err)
	}
	for _, name := range b.files("done") {
		if data, err := os.ReadFile(filepath.Join(b.out, strings.TrimSuffix(name, ".json"))); err != nil || string(data) != "whole list" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	t.Logf("%d jobs took %d builds", rounds, len(pids(t, b.out)))
}

// watch reads whatever is visible, until stop is closed, and returns the first file that is not whole.
func (b *bench) watch(stop <-chan struct{}) error {
	for {
		for _, dir := range []string{"jobs", "done", "failed"} {
			names, err := filepath.Glob(filepath.Join(b.dir, dir, "*.json"))
			if err != nil {
				return err
			}
			for _, n := range names {
				data, err := os.ReadFile(n)
				if os.IsNotExist(err) {
					continue
				}
				if err != nil || !json.Valid(data) {
					return fmt.Errorf("%s is not whole: %q, %w", n, data, err)
				}
			}
		}
		select {
		case <-stop:
			return nil
		case <-time.After(time.Millisecond):
		}
	}
}

// startParent starts a plugin that works on the queue; kill kills it.
func startParent(t testing.TB, b *bench, mode string) (kill func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envParent+"="+b.dir, envChild+"="+mode, envOut+"="+b.out)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	killed := false
	kill = func() {
		if killed {
			return
		}
		killed = true
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	}
	t.Cleanup(kill)
	return kill
}

func TestRunEndsAtOnceWhenIdle(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { q.Run(ctx); close(done) }()
	time.Sleep(20 * time.Millisecond)
	cancel()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("Run goes on")
	}
}
