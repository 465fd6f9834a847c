package rebuild_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/testenv"
)

const testDigest = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// bench is one queue's directory with what its builds make.
type bench struct {
	t        testing.TB
	dir, out string

	mu     sync.Mutex
	built  []rebuild.Result
	failed []rebuild.Failure
}

func newBench(t testing.TB) *bench {
	dir := t.TempDir()
	b := &bench{t: t, dir: filepath.Join(dir, "queue"), out: filepath.Join(dir, "out")}
	if err := os.Mkdir(b.out, 0o700); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) open(mode string, change func(*rebuild.QueueOptions)) *rebuild.Queue {
	b.t.Helper()
	o := rebuild.QueueOptions{
		Command: child(mode, b.out), Backoff: func(int) time.Duration { return 10 * time.Millisecond },
		Poll: 10 * time.Millisecond, Grace: 2 * time.Second, MaxAttempts: 3,
		Built: func(_ rebuild.Job, r rebuild.Result) {
			b.mu.Lock()
			b.built = append(b.built, r)
			b.mu.Unlock()
		},
		Failed: func(_ rebuild.Job, f rebuild.Failure) {
			b.mu.Lock()
			b.failed = append(b.failed, f)
			b.mu.Unlock()
		},
	}
	if change != nil {
		change(&o)
	}
	q, err := rebuild.Open(b.dir, o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if err := q.Close(); err != nil {
			b.t.Error(err)
		}
	})
	return q
}

// run works on q until the returned function is called.
func (b *bench) run(q *rebuild.Queue) (stop func(cause error)) {
	ctx, cancel := context.WithCancelCause(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		q.Run(ctx)
	}()
	stop = func(cause error) {
		cancel(cause)
		<-done
	}
	b.t.Cleanup(func() { stop(nil) })
	return stop
}

func (b *bench) results() (built, failed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.built), len(b.failed)
}

func (b *bench) request(list string, change func(*rebuild.Request)) rebuild.Request {
	b.t.Helper()
	path := filepath.Join(b.t.TempDir(), "run.list")
	if err := os.WriteFile(path, []byte(list), 0o600); err != nil {
		b.t.Fatal(err)
	}
	r := rebuild.Request{
		Image: rebuild.Image{Reference: "docker.io/library/nginx:latest", Digest: testDigest, Platform: "linux/amd64"},
		List:  path, ListHash: "hash of " + list,
		Options: rebuild.Options{
			Target: rebuild.TargetRegistry, Reference: rebuild.DefaultReference, Compressor: "zstd", Digester: "blake3", ChunkSize: 1 << 20,
		},
		Recording: rebuild.Recording{Container: "c1", Files: 3, List: path},
	}
	if change != nil {
		change(&r)
	}
	return r
}

func (b *bench) add(q *rebuild.Queue, r rebuild.Request) rebuild.Decision {
	b.t.Helper()
	d, err := q.Add(context.Background(), r)
	if err != nil {
		b.t.Fatal(err)
	}
	return d
}

func (b *bench) waitBuilt(n int) {
	b.t.Helper()
	eventually(b.t, fmt.Sprintf("%d results", n), func() bool {
		built, failed := b.results()
		if failed > 0 {
			b.t.Fatalf("failed: %+v", b.failed)
		}
		return built >= n
	})
}

// files lists what is in a directory of the queue.
func (b *bench) files(dir string) []string {
	b.t.Helper()
	entries, err := os.ReadDir(filepath.Join(b.dir, dir))
	if err != nil {
		b.t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// wantEmpty checks that nothing is left of jobs that ended.
func (b *bench) wantEmpty() {
	b.t.Helper()
	for _, d := range []string{"jobs", "lists", "work", "tmp"} {
		eventually(b.t, d+" to be empty", func() bool { return len(b.files(d)) == 0 })
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited for %s in vain", what)
}

func TestBuild(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	d := b.add(q, b.request("list 1", nil))
	if d.Verdict != rebuild.Queued || d.Target != "docker.io/library/nginx:latest-optimized" {
		t.Fatalf("Add() = %+v", d)
	}
	// Waiting already, and for the same list.
	if d := b.add(q, b.request("list 1", nil)); d.Verdict != rebuild.AlreadyQueued {
		t.Errorf("Add(again) = %+v", d)
	}
	if d := b.add(q, b.request("list 2", nil)); d.Verdict != rebuild.AlreadyQueued {
		t.Errorf("Add(other list) = %+v", d)
	}
	b.run(q)
	b.waitBuilt(1)
	b.wantEmpty()
	if data, err := os.ReadFile(filepath.Join(b.out, d.Key)); err != nil || string(data) != "whole list 1" {
		t.Errorf("built %q, %v", data, err)
	}
	var res rebuild.Result
	data, err := os.ReadFile(filepath.Join(b.dir, "done", d.Key+".json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &res); err != nil || res.Target != d.Target || res.Key != d.Key || res.PrefetchBytes != 7 || res.Image.Digest != testDigest {
		t.Errorf("result %+v, %v", res, err)
	}
	// Built: the same list, another list, another list that may overwrite, other options.
	if d := b.add(q, b.request("list 1", nil)); d.Verdict != rebuild.AlreadyBuilt || d.Result == nil {
		t.Errorf("Add(built) = %+v", d)
	}
	if d := b.add(q, b.request("list 2", nil)); d.Verdict != rebuild.BuiltForAnother {
		t.Errorf("Add(built for another) = %+v", d)
	}
	if d := b.add(q, b.request("list 2", func(r *rebuild.Request) { r.Overwrite = true })); d.Verdict != rebuild.Queued {
		t.Errorf("Add(overwrite) = %+v", d)
	}
	b.waitBuilt(2)
	if d := b.add(q, b.request("list 1", func(r *rebuild.Request) { r.Options.ChunkSize = 4096 })); d.Verdict != rebuild.Queued {
		t.Errorf("Add(other options) = %+v", d)
	}
	b.waitBuilt(3)
	b.wantEmpty()
}

func TestNewerListReplacesAWaitingOne(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	over := func(r *rebuild.Request) { r.Overwrite = true }
	b.add(q, b.request("list 1", over))
	d := b.add(q, b.request("list 2", over))
	if d.Verdict != rebuild.Replaced {
		t.Fatalf("Add() = %+v", d)
	}
	b.run(q)
	b.waitBuilt(1)
	if data, err := os.ReadFile(filepath.Join(b.out, d.Key)); err != nil || string(data) != "whole list 2" {
		t.Errorf("built %q, %v", data, err)
	}
	b.wantEmpty()
}

// TestReplacedWhileBuilt replaces a job whose build is going on: both lists are built.
func TestReplacedWhileBuilt(t *testing.T) {
	b := newBench(t)
	q := b.open("slow:300ms", nil)
	over := func(r *rebuild.Request) { r.Overwrite = true }
	d1 := b.add(q, b.request("list 1", over))
	b.run(q)
	eventually(t, "a build", func() bool { return len(pids(t, b.out)) == 1 })
	d2 := b.add(q, b.request("list 2", over))
	eventually(t, "both", func() bool { return len(b.files("done")) == 2 && len(b.files("jobs")) == 0 })
	for _, d := range []rebuild.Decision{d1, d2} {
		if _, err := os.Stat(filepath.Join(b.out, d.Key)); err != nil {
			t.Error(err)
		}
	}
	b.wantEmpty()
}

func TestFailures(t *testing.T) {
	for mode, tc := range map[string]struct {
		attempts  int
		permanent bool
		text      string
	}{
		"fail":      {3, false, "the registry said no"},
		"permanent": {1, true, "the image is no image"},
		"crash":     {3, false, "the build process ended: exit status 3: out of luck"},
	} {
		t.Run(mode, func(t *testing.T) {
			b := newBench(t)
			q := b.open(mode, nil)
			d := b.add(q, b.request("list 1", nil))
			b.run(q)
			eventually(t, "the failure", func() bool { _, failed := b.results(); return failed == 1 })
			f := b.failed[0]
			if f.Attempts != tc.attempts || f.Permanent != tc.permanent || !strings.Contains(f.Error, tc.text) || len(pids(t, b.out)) != tc.attempts {
				t.Errorf("failure %+v after %d builds", f, len(pids(t, b.out)))
			}
			data, err := os.ReadFile(filepath.Join(b.dir, "failed", d.Key+".json"))
			if err != nil || !strings.Contains(string(data), tc.text) {
				t.Errorf("failed/ has %s, %v", data, err)
			}
			b.wantEmpty()
			if d := b.add(q, b.request("list 1", nil)); d.Verdict != rebuild.FailedBefore || !strings.Contains(d.Failure.Error, tc.text) {
				t.Errorf("Add(failed) = %+v", d)
			}
			if n := len(b.files("done")); n != 0 {
				t.Errorf("%d results", n)
			}
			if tc.permanent { // so another list does not help either
				if d := b.add(q, b.request("list 2", nil)); d.Verdict != rebuild.FailedBefore {
					t.Errorf("Add(another list) = %+v", d)
				}
			}
			// Later it is accepted again.
			later := b.open("ok", func(o *rebuild.QueueOptions) { o.RetryFailed = time.Nanosecond })
			if d := b.add(later, b.request("list 1", nil)); d.Verdict != rebuild.Queued {
				t.Errorf("Add(failed long ago) = %+v", d)
			}
		})
	}
}

func TestTriedAgainAfterAFailure(t *testing.T) {
	b := newBench(t)
	q := b.open("fail-first:3", nil)
	b.add(q, b.request("list 1", nil))
	b.run(q)
	b.waitBuilt(1)
	if n := len(pids(t, b.out)); n != 3 {
		t.Errorf("%d builds, want 3", n)
	}
	b.wantEmpty()
}

func TestBuildTimeout(t *testing.T) {
	b := newBench(t)
	q := b.open("slow:1h", func(o *rebuild.QueueOptions) { o.MaxAttempts = 1 })
	b.add(q, b.request("list 1", func(r *rebuild.Request) { r.Options.Timeout = 50 * time.Millisecond }))
	b.run(q)
	eventually(t, "the failure", func() bool { _, failed := b.results(); return failed == 1 })
	if f := b.failed[0]; !strings.Contains(f.Error, "the build did not end within 50ms") {
		t.Errorf("failure %+v", f)
	}
}

func TestAddRefuses(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	for name, tc := range map[string]struct {
		change func(*rebuild.Request)
		want   string
	}{
		"no digest":    {func(r *rebuild.Request) { r.Image.Digest = "" }, "digest is not known"},
		"image ID":     {func(r *rebuild.Request) { r.Image.Reference = testDigest }, "known by its ID only"},
		"no reference": {func(r *rebuild.Request) { r.Image.Reference = "" }, "bad reference"},
		"list gone":    {func(r *rebuild.Request) { r.List += "x" }, "no such file"},
		"bad template": {func(r *rebuild.Request) { r.Options.Reference = "{x}" }, "unknown field {x}"},
		"no target":    {func(r *rebuild.Request) { r.Options.Target = "" }, "target \"\""},
	} {
		if d, err := q.Add(context.Background(), b.request("l", tc.change)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: Add() = %+v, %v, want %q", name, d, err, tc.want)
		}
	}
	for _, d := range []string{"jobs", "lists", "tmp"} {
		if got := b.files(d); len(got) != 0 {
			t.Errorf("%s has %v", d, got)
		}
	}
}

// TestBadFilesAreSetAside has job files that are no jobs beside one that is.
func TestBadFilesAreSetAside(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	b.add(q, b.request("list 1", nil))
	for name, text := range map[string]string{
		"half.json":   `{"version": 1, "key": "abc`,
		"other.json":  `{"version": 99}`,
		"key.json":    `{"version": 1, "key": "../../etc/passwd", "image": {"digest": "x"}, "target": "t", "list": "/l"}`,
		"large.json":  strings.Repeat(" ", 2<<20),
		"ignored.txt": "",
	} {
		if err := os.WriteFile(filepath.Join(b.dir, "jobs", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.run(q)
	b.waitBuilt(1)
	if got := strings.Join(b.files("failed"), " "); got != "half.json.bad key.json.bad large.json.bad other.json.bad" {
		t.Errorf("failed/ has %s", got)
	}
}

// TestLayoutThatIsGone builds again what a result names and nobody has any more.
func TestLayoutThatIsGone(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	layout := filepath.Join(b.out, "layout")
	blob := filepath.Join(layout, "blobs", "sha256", strings.Repeat("ab", 32))
	if err := os.MkdirAll(filepath.Dir(blob), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blob, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := b.request("list 1", func(r *rebuild.Request) { r.Options.Target, r.Options.LayoutDir = rebuild.TargetLayout, layout })
	b.add(q, r)
	b.run(q)
	b.waitBuilt(1)
	if d := b.add(q, r); d.Verdict != rebuild.AlreadyBuilt {
		t.Errorf("Add() = %+v", d)
	}
	if err := os.RemoveAll(layout); err != nil {
		t.Fatal(err)
	}
	if d := b.add(q, r); d.Verdict != rebuild.Queued {
		t.Errorf("Add(layout gone) = %+v", d)
	}
	b.waitBuilt(2)
	b.wantEmpty()
}

func TestPriority(t *testing.T) {
	b := newBench(t)
	q := b.open("priority", nil)
	b.add(q, b.request("list 1", nil))
	b.run(q)
	b.waitBuilt(1)
	data, err := os.ReadFile(filepath.Join(b.out, "priorities"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(data), "\n")
	for _, l := range lines[:len(lines)-1] {
		if l != "nice 19 policy 5 io 3" {
			t.Errorf("a thread has %s, want nice 19, SCHED_IDLE (5), idle I/O (3)", l)
		}
	}
	if last := lines[len(lines)-1]; len(lines) < 3 || last != "oom 800" {
		t.Errorf("got %q", data)
	}
}

// TestQueueIsFull fills the queue with jobs of many images.
func TestQueueIsFull(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	job, err := json.Marshal(map[string]any{"version": 1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		if err := os.WriteFile(filepath.Join(b.dir, "jobs", fmt.Sprintf("%024x.json", i)), job, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := q.Add(context.Background(), b.request("list 1", nil)); !errors.Is(err, rebuild.ErrFull) {
		t.Errorf("Add() = %v, want ErrFull", err)
	}
}

func TestAddWhileTheQueueIsLocked(t *testing.T) {
	b := newBench(t)
	q := b.open("ok", nil)
	f, err := os.OpenFile(filepath.Join(b.dir, "state.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := q.Add(ctx, b.request("list 1", nil)); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "another process holds") {
		t.Errorf("Add() = %v", err)
	}
}

// TestDiskFull has a file system without space for a job, then for a build, then with.
func TestDiskFull(t *testing.T) {
	testenv.Root(t)
	b := newBench(t)
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", b.dir, "tmpfs", 0, "size=1m"); err != nil {
		testenv.Kernel(t, "tmpfs", err)
	}
	t.Cleanup(func() {
		if err := testenv.Unmount(b.dir); err != nil {
			t.Error(err)
		}
	})
	q, err := rebuild.Open(b.dir, rebuild.QueueOptions{
		Command: child("fill", b.out), MaxAttempts: 2, Backoff: func(int) time.Duration { return 10 * time.Millisecond },
		Failed:      func(_ rebuild.Job, f rebuild.Failure) { b.mu.Lock(); b.failed = append(b.failed, f); b.mu.Unlock() },
		Built:       func(_ rebuild.Job, r rebuild.Result) { b.mu.Lock(); b.built = append(b.built, r); b.mu.Unlock() },
		RetryFailed: time.Nanosecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	ballast := filepath.Join(b.dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 2<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	if _, err := q.Add(context.Background(), b.request("list 1", nil)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Add() = %v, want ENOSPC", err)
	}
	if n := len(b.files("jobs")) + len(b.files("lists")) + len(b.files("tmp")); n != 0 {
		t.Errorf("%d files are left", n)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	b.add(q, b.request("list 1", nil))
	stop := b.run(q)
	eventually(t, "the failure", func() bool { _, failed := b.results(); return failed == 1 })
	if !strings.Contains(b.failed[0].Error, "no space left on device") {
		t.Errorf("failure %+v", b.failed[0])
	}
	if err := syscall.Mount("tmpfs", b.dir, "tmpfs", syscall.MS_REMOUNT, "size=32m"); err != nil {
		t.Fatal(err)
	}
	b.add(q, b.request("list 1", nil))
	eventually(t, "the result", func() bool { built, _ := b.results(); return built == 1 })
	stop(nil)
}
