package tracefs

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// primed opens a pool; the function returned waits for what it says, or fails.
func primed(t *testing.T, log func(error)) (*Pool, func(what string, ok func() bool)) {
	t.Helper()
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	_, err = fs.Probe(0)
	testenv.Kernel(t, "page cache tracepoints", err)
	p, err := NewPool(fs, PoolOptions{Ready: 1, Max: 4, Quiet: time.Millisecond, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(p.Close(), fs.Close()); err != nil {
			t.Error(err)
		}
	})
	return p, func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			p.mu.Lock()
			done := ok()
			p.mu.Unlock()
			if done {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("not %s: %+v", what, p.primer)
			}
		}
	}
}

// While a call of Get is expected another instance keeps the kernel's events and filters in use, and records nothing; then it does not any more, and goes with the pool.
func TestPoolPrimes(t *testing.T) {
	p, until := primed(t, func(err error) { t.Error(err) })
	until("idle", func() bool { return len(p.ready) == 1 })
	if p.primer.in != nil {
		t.Fatal("the kernel is prepared although nothing is expected")
	}
	expect := func() {
		p.Expect()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.primer.until = time.Now().Add(time.Hour) // however slow the kernel is
	}
	expect()
	until("prepared", func() bool { return p.primer.on })
	in := p.primer.in
	threads, err := in.Filter()
	if err != nil || !slices.Equal(threads, []int{os.Getpid()}) {
		t.Errorf("filter: %v, %v; want this process's first thread, %d", threads, err, os.Getpid())
	}
	enabled := func(want string) {
		t.Helper()
		for k := range Kind(kinds) {
			if !in.spec.Events.Has(k) {
				continue
			}
			text, err := in.dir.read("events/" + tracepoints[k].dir + "/enable")
			if err != nil || strings.TrimSpace(string(text)) != want {
				t.Errorf("%s: enable is %q, %v; want %s", k, text, err, want)
			}
		}
	}
	enabled("1")
	if text, err := in.dir.read("tracing_on"); err != nil || strings.TrimSpace(string(text)) != "0" {
		t.Errorf("tracing_on: %q, %v; want 0", text, err)
	}
	got, err := p.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got == in {
		t.Fatal("Get returned what records nothing")
	}
	if err := got.Arm(os.Getpid()); err != nil {
		t.Error(err)
	}
	p.Put(got)
	p.mu.Lock()
	p.primer.until = time.Now()
	p.mu.Unlock()
	p.signal()
	until("left alone", func() bool { return !p.primer.on })
	enabled("0")
	if threads, err := in.Filter(); err != nil || len(threads) != 0 {
		t.Errorf("filter afterwards: %v, %v; want none", threads, err)
	}
	expect()
	until("prepared again", func() bool { return p.primer.on })
	if p.primer.in != in {
		t.Error("another instance was made")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := p.fs.root.names("instances")
	if err != nil || slices.Contains(names, in.name) {
		t.Errorf("instances after Close: %q, %v; want no %s", names, err, in.name)
	}
}

// Where the kernel cannot be prepared recordings begin all the same, it is said once, and tried again with the next one.
func TestPoolPrimesInVain(t *testing.T) {
	said := make(chan error, 100)
	p, until := primed(t, func(err error) { said <- err })
	until("idle", func() bool { return len(p.ready) == 1 })
	p.mu.Lock()
	p.primer.in = &Instance{name: "gone", dir: dir{os.NewFile(^uintptr(0), "gone")}, spec: Spec{Events: Pages}} // nothing works with it
	p.mu.Unlock()
	for range 2 {
		p.Expect()
		until("given up", func() bool { return p.primer.failed })
		select {
		case err := <-said:
			t.Log(err)
		case <-time.After(time.Minute):
			t.Error("nothing was said")
		}
		in, err := p.Get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		p.Put(in)
		until("idle again", func() bool { return len(p.ready) > 0 })
	}
	if len(said) != 0 {
		t.Errorf("said as well: %v", <-said)
	}
	p.mu.Lock()
	if p.primer.on {
		t.Error("what does not work is said to be on")
	}
	p.primer.in = nil
	p.mu.Unlock()
}
