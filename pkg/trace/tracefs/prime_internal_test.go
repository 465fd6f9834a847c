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
func primed(t *testing.T, log func(error), announced bool) (*Pool, func(what string, ok func() bool)) {
	t.Helper()
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	_, err = fs.Probe(0)
	testenv.Kernel(t, "page cache tracepoints", err)
	p, err := NewPool(fs, PoolOptions{Ready: 1, Max: 4, Quiet: time.Millisecond, Announced: announced, Log: log})
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
	p, until := primed(t, func(err error) { t.Error(err) }, false)
	until("idle", func() bool { return len(p.ready) == 1 })
	if len(p.primer.in) > 0 {
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
	in := slices.Clone(p.primer.in)
	if len(in) != primers {
		t.Fatalf("%d instances keep the kernel prepared, want %d", len(in), primers)
	}
	for _, i := range in {
		i.prepared(t, "1", os.Getpid())
		if text, err := i.dir.read("tracing_on"); err != nil || strings.TrimSpace(string(text)) != "0" {
			t.Errorf("tracing_on: %q, %v; want 0", text, err)
		}
	}
	got, err := p.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(in, got) {
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
	for _, i := range in {
		i.prepared(t, "0")
	}
	expect()
	until("prepared again", func() bool { return p.primer.on })
	if !slices.Equal(p.primer.in, in) {
		t.Error("other instances were made")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	names, err := p.fs.root.names("instances")
	for _, i := range in {
		if err != nil || slices.Contains(names, i.name) {
			t.Errorf("instances after Close: %q, %v; want no %s", names, err, i.name)
		}
	}
}

// prepared holds that an instance has its events on, "1", or off, "0", and which threads it names.
func (i *Instance) prepared(t *testing.T, on string, threads ...int) {
	t.Helper()
	if got, err := i.Filter(); err != nil || !slices.Equal(got, threads) {
		t.Errorf("filter: %v, %v; want %v", got, err, threads)
	}
	for k := range Kind(kinds) {
		if !i.spec.Events.Has(k) {
			continue
		}
		text, err := i.dir.read("events/" + tracepoints[k].dir + "/enable")
		if err != nil || strings.TrimSpace(string(text)) != on {
			t.Errorf("%s: enable is %q, %v; want %s", k, text, err, on)
		}
	}
}

// Where calls are announced, what prepares the kernel is there before the first announcement, and does nothing yet.
func TestPoolIsEquipped(t *testing.T) {
	p, until := primed(t, func(err error) { t.Error(err) }, true)
	until("equipped", func() bool { return len(p.primer.in) == primers && len(p.ready) == 1 })
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.primer.on {
		t.Error("the kernel is prepared although nothing is expected")
	}
	for _, i := range p.primer.in {
		i.prepared(t, "0")
	}
}

// Where the kernel cannot be prepared recordings begin all the same, it is said once, and tried again with the next one.
func TestPoolPrimesInVain(t *testing.T) {
	said := make(chan error, 100)
	p, until := primed(t, func(err error) { said <- err }, false)
	until("idle", func() bool { return len(p.ready) == 1 })
	p.mu.Lock()
	gone := &Instance{name: "gone", dir: dir{os.NewFile(^uintptr(0), "gone")}, spec: Spec{Events: Pages}} // nothing works with it
	p.primer.in = []*Instance{gone, gone}
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
