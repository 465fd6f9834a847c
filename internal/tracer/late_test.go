package tracer_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

// awaitFilter waits until an instance of this project records process pid.
func awaitFilter(t *testing.T, pid int) {
	t.Helper()
	dir := openInstances(t)
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for name := range instances(t) {
			fd, err := unix.Openat(dir, name+"/set_event_pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				continue // gone
			}
			b := make([]byte, 4096)
			n, err := unix.Read(fd, b)
			_ = unix.Close(fd)
			if err == nil && slices.Contains(strings.Fields(string(b[:n])), strconv.Itoa(pid)) {
				return
			}
		}
	}
	t.Fatalf("no instance records process %d", pid)
}

// awaitHandled opens a file until server asks the kernel for no more events of it.
func awaitHandled(t *testing.T, server int, file string) {
	t.Helper()
	ignored := func() (n int) {
		infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", server))
		if err != nil {
			t.Fatal(err)
		}
		for _, info := range infos {
			b, _ := os.ReadFile(info) // it may be closed by now
			n += strings.Count(string(b), "fanotify ino:")
		}
		return n
	}
	before := ignored()
	for end := time.Now().Add(limit); ignored() <= before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s was opened for %v, and the tracer goes on asking for it", file, limit)
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLateInstance holds that a container which started when no instance was ready gets one later: what it had touched by then
// counts as whole files, what it touches from then on has ranges.
func TestLateInstance(t *testing.T) {
	t.Run("a server that is started then", func(t *testing.T) { testLateInstance(t, nil) })
	t.Run("one that stands by", func(t *testing.T) {
		r := tracer.NewReserve(testenv.Binary(t, "optimizer-server"), nil)
		t.Cleanup(r.Close)
		testLateInstance(t, r)
	})
}

// testLateInstance tries until an instance came after the container had touched something: it takes tens of milliseconds to make, and the container a few.
func testLateInstance(t *testing.T, reserve *tracer.Reserve) {
	const tries = 5
	for range tries {
		if reserve != nil {
			reserve.Expect()
			stand(t, reserve, 1)
		}
		if lateInstance(t, reserve) {
			return
		}
		t.Log("the instance came before the container had touched its first files")
	}
	t.Errorf("so it was %d times", tries)
}

// lateInstance reports whether the instance came late, and holds that the list is right then.
func lateInstance(t *testing.T, reserve *tracer.Reserve) bool {
	b := newDiskBox(t, identitySetup)
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1, Max: 3, Quiet: time.Hour}) // none is made that nobody waits for
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(p.Close(), fs.Close()); err != nil {
			t.Error(err)
		}
	})
	taken, err := p.Get(t.Context()) // it has to make another one
	if err != nil {
		t.Fatal(err)
	}
	defer p.Put(taken)
	args := []string{"/program", "files", "read:/s/twice", "map:/s/mapped", "child:0:/s/go", "read:/s/twice", "map:/s/private", "open:/s/opened"}
	c := b.create(t, pivot, args...)
	s := start(t, c, tracer.Options{Pages: p, PagesWait: time.Nanosecond, Reserve: reserve})
	c.letGo(t)
	await(t, b.merged+"/s/waits")
	awaitFilter(t, c.pid())
	// What is in its queue still would be whole.
	server := childOf(t, os.Getpid(), "optimizer-server")
	for _, name := range []string{"empty", "owned"} {
		awaitHandled(t, server, fmt.Sprintf("/proc/%d/root/s/%s", c.pid(), name)) // through the container's own mount
	}
	if err := os.WriteFile(b.merged+"/s/go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(t); err != nil {
		t.Fatalf("container: %v\n%s", err, c.out.String())
	}
	r := result(t, s)
	if r.Err != nil || !r.Trace.Complete() || r.Engine != "fanotify+filemap" || r.Grade != trace.GradeFaultAround {
		t.Errorf("error %v, losses %q, %s by %s; want a complete list of ranges", r.Err, lossOf(r), r.Grade, r.Engine)
	}
	whole := 0
	first := []string{"/program", "/s/twice", "/s/mapped"}
	for _, name := range first {
		if a, ok := find(r, name); !ok {
			t.Errorf("%s is not listed", name)
		} else if a.Ranges == nil {
			whole++
		}
	}
	for name, want := range map[string]bool{"/s/plain": true, "/s/private": true, "/s/opened": false} {
		if a, ok := find(r, name); !ok || a.Ranges == nil || (len(a.Ranges) > 0) != want {
			t.Errorf("%s: listed %v, ranges %+v; want some: %v", name, ok, a.Ranges, want)
		}
	}
	return whole == len(first)
}

// TestLateForNobody holds that an instance that comes when the container has ended, or that nobody made, leaves whole files.
func TestLateForNobody(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1, Max: 3})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		taken, err := p.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c := b.create(t, pivot, "/program", "files", "read:/s/plain")
		s := start(t, c, tracer.Options{Pages: p, PagesWait: time.Nanosecond})
		c.run(t)
		r := result(t, s)
		if _, ok := find(r, "/s/plain"); !ok || r.Err != nil || !r.Trace.Complete() {
			t.Errorf("listed %v, error %v, losses %q", ok, r.Err, lossOf(r))
		}
		p.Put(taken)
	}
	if err := errors.Join(p.Close(), fs.Close()); err != nil {
		t.Error(err)
	}
}

// TestNoMemory holds that a container is recorded, with whole files, where the kernel has no memory for an instance, and that
// no instance is left.
func TestNoMemory(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	const petabyte = 1 << 50 // the kernel looks at what is free before it allocates: kernel/trace/ring_buffer.c __rb_allocate_pages
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Instance: tracefs.Options{Ring: petabyte}, Budget: 1 << 60, Ready: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Get(t.Context()); !errors.Is(err, tracefs.ErrLimit) || !errors.Is(err, unix.ENOMEM) {
		t.Errorf("Get() = %v, want ErrLimit for ENOMEM", err)
	}
	for _, wait := range []time.Duration{0, time.Nanosecond} {
		c := b.create(t, pivot, "/program", "files", "read:/s/plain")
		s := start(t, c, tracer.Options{Pages: p, PagesWait: wait})
		c.run(t)
		r := result(t, s)
		if a, ok := find(r, "/s/plain"); !ok || a.Ranges != nil || r.Grade != trace.GradeFile || r.Err != nil || !r.Trace.Complete() {
			t.Errorf("wait %v: access %+v, listed %v, grade %q, error %v, losses %q; want a whole file", wait, a, ok, r.Grade, r.Err, lossOf(r))
		}
	}
	if err := errors.Join(p.Close(), fs.Close()); err != nil {
		t.Error(err)
	}
	for name := range instances(t) {
		if strings.HasPrefix(name, fmt.Sprintf("%s%d-", tracefs.Prefix, os.Getpid())) {
			t.Errorf("instance %s is left", name)
		}
	}
}
