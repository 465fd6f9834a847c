package tracer_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// openInstances returns the directory of the instances of tracefs, until the test ends.
func openInstances(t *testing.T) int {
	t.Helper()
	fd, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	testenv.Kernel(t, "tracefs", err)
	defer func() { _ = unix.Close(fd) }()
	if err := unix.FsconfigCreate(fd); err != nil {
		t.Fatal(err)
	}
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(mnt) }()
	dir, err := unix.Openat(mnt, "instances", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(dir) })
	return dir
}

// instances returns the names of this project's instances of tracefs.
func instances(t *testing.T) map[string]bool {
	t.Helper()
	dir, err := unix.Openat(openInstances(t), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(dir), "instances")
	defer func() { _ = f.Close() }()
	names, err := f.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]bool)
	for _, name := range names {
		if strings.HasPrefix(name, tracefs.Prefix) {
			found[name] = true
		}
	}
	return found
}

// pooled starts a session that takes its instance from a pool of the given options.
func pooled(t *testing.T, c *container, o tracefs.PoolOptions) (*tracer.Session, *tracefs.Pool) {
	t.Helper()
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	p, err := tracefs.NewPool(fs, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(p.Close(), fs.Close()); err != nil {
			t.Error(err)
		}
	})
	return start(t, c, tracer.Options{Pages: p}), p
}

// TestRingFull holds that a ring that is full loses events by count, that the list says so, and that the
// workload does not notice.
func TestRingFull(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	args := []string{"/program", "files"}
	for range 15_000 {
		args = append(args, "read:/s/plain")
	}
	c := b.create(t, pivot, args...)
	s, _ := pooled(t, c, tracefs.PoolOptions{Instance: tracefs.Options{Ring: 1}})
	server := childOf(t, os.Getpid(), "optimizer-server")
	signal(t, server, unix.SIGSTOP) // nobody empties it
	c.run(t)
	signal(t, server, unix.SIGCONT)
	r := result(t, s)
	if r.Err != nil || len(r.Trace.Losses) != 1 || r.Trace.Losses[0].Reason != "overrun" || r.Trace.Losses[0].Count < 1 {
		t.Errorf("error %v, losses %+v; want a count of overrun events", r.Err, r.Trace.Losses)
	}
	if _, ok := find(r, "/s/plain"); !ok {
		t.Error("/s/plain is not listed")
	}
}

// TestNoInstance holds that a session without an instance to be had records whole files.
func TestNoInstance(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	c := b.create(t, pivot, "/program", "files", "read:/s/plain")
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Max: 1})
	if err != nil {
		t.Fatal(err)
	}
	taken, err := p.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, c, tracer.Options{Pages: p})
	c.run(t)
	r := result(t, s)
	p.Put(taken)
	if err := errors.Join(p.Close(), fs.Close()); err != nil {
		t.Error(err)
	}
	a, ok := find(r, "/s/plain")
	if !ok || a.Ranges != nil || r.Grade != trace.GradeFile || r.Engine != "fanotify" || r.Err != nil || !r.Trace.Complete() {
		t.Errorf("access %+v, listed %v, grade %q by %q, error %v, losses %q; want a whole file", a, ok, r.Grade, r.Engine, r.Err, lossOf(r))
	}
}

// TestKilledWithPages holds that nothing is left of a tracer that was killed, and that its instance serves
// the next one.
func TestKilledWithPages(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	c := b.create(t, pivot, "/program", "files", "read:/s/plain", "pause:60s")
	s, p := pooled(t, c, tracefs.PoolOptions{Ready: 1, Max: 1})
	server := childOf(t, os.Getpid(), "optimizer-server")
	c.letGo(t)
	time.Sleep(100 * time.Millisecond)
	signal(t, server, unix.SIGKILL)
	if r := result(t, s); !errors.Is(r.Err, tracer.ErrKilled) || lossOf(r) != "killed -1" {
		t.Errorf("error %v, losses %q", r.Err, lossOf(r))
	}
	next := b.create(t, pivot, "/program", "files", "read:/s/plain")
	var in *tracefs.Instance
	for end := time.Now().Add(limit); in == nil; time.Sleep(10 * time.Millisecond) {
		got, err := p.Get(t.Context())
		if err == nil {
			in = got
		} else if time.Now().After(end) {
			t.Fatalf("no instance: %v", err)
		}
	}
	p.Put(in)
	time.Sleep(200 * time.Millisecond) // it is reset
	s = start(t, next, tracer.Options{Pages: p})
	next.run(t)
	r := result(t, s)
	if a, ok := find(r, "/s/plain"); !ok || r.Err != nil || !r.Trace.Complete() {
		t.Errorf("the next one: %+v, listed %v, error %v, losses %q", a, ok, r.Err, lossOf(r))
	}
}

// shortContainers runs containers one after the other, every tenth of which is killed at once, and
// holds that nothing is left of them.
func shortContainers(t *testing.T, n int) {
	b := newDiskBox(t, identitySetup)
	p := pool(t)
	before := instances(t)
	server := testenv.Binary(t, "optimizer-server")
	for i := range n {
		c := b.create(t, pivot, "/program", "files", "read:/s/plain")
		s, err := tracer.Start(context.Background(), tracer.Options{Server: server, PID: c.pid(), Pages: p})
		if err != nil {
			t.Fatal(err)
		}
		killed := i%10 == 9
		if killed {
			_ = c.cmd.Process.Kill()
		} else {
			select {
			case <-s.Ready():
			case <-s.Done():
			}
			c.letGo(t)
		}
		err = c.wait(t)
		r := result(t, s)
		switch _, ok := find(r, "/s/plain"); {
		case killed && (r.Err == nil || errors.Is(r.Err, tracer.ErrLate)):
		case killed:
			t.Fatalf("container %d, killed at once: %v", i, r.Err)
		case err != nil || r.Err != nil || !r.Trace.Complete() || !ok:
			t.Fatalf("container %d: %v, tracer %v, losses %q, listed %v", i, err, r.Err, lossOf(r), ok)
		}
	}
	extra := 0
	for name := range instances(t) {
		// Others on this machine have theirs.
		if !before[name] && strings.HasPrefix(name, fmt.Sprintf("%s%d-", tracefs.Prefix, os.Getpid())) {
			extra++
		}
	}
	// The pool may have made what it keeps ready, and more after a rush.
	if extra > tracefs.DefaultMax/4 {
		t.Errorf("%d instances more than before %d containers", extra, n)
	}
}

func TestShortContainers(t *testing.T) { shortContainers(t, 30) }

// TestSoakShortContainers is the same with 500.
func TestSoakShortContainers(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("SOAK is not set: make soak")
	}
	shortContainers(t, 500)
}

// TestManyFilesMemory holds the memory that a node pays for a container whose start touches 60,000 files with
// page events, on the kind of root that containers have.
func TestManyFilesMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 60,000 files")
	}
	setup := fmt.Sprintf("mkdir burst; cd burst; for d in $(seq -w 0 %d); do mkdir $d; done; seq 0 %d | awk '{f=sprintf(\"%%02d/%%05d\", $1/%d, $1); print \"content\" > f; close(f)}'",
		burstFiles/burstPerDir-1, burstFiles-1, burstPerDir)
	b := newDiskBox(t, setup)
	c := b.create(t, pivot, "/program", "burst", strconv.Itoa(burstFiles), strconv.Itoa(burstPerDir))
	s := start(t, c, tracer.Options{})
	peak := watchRSS(childOf(t, os.Getpid(), "optimizer-server"), s.Done())
	c.run(t)
	r := result(t, s)
	whole := 0
	for _, a := range r.Trace.Accesses {
		if a.Ranges == nil {
			whole++
		}
	}
	if r.Err != nil || !r.Trace.Complete() || len(r.Trace.Accesses) != burstFiles+1 || whole > 0 {
		t.Errorf("error %v, losses %q, %d files, %d of them whole", r.Err, lossOf(r), len(r.Trace.Accesses), whole)
	}
	kib := <-peak
	t.Logf("%d files, %d events: peak memory %d KiB", len(r.Trace.Accesses), r.Trace.Events, kib)
	if kib > 32<<10 {
		t.Errorf("peak memory %d KiB; 20 MiB is what is wanted, and 32 what no machine should exceed", kib)
	}
}
