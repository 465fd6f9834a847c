package tracefs

import (
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// What is expected is made ahead, never more than there may be, and is removed again when nobody came.
func TestPoolExpects(t *testing.T) {
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	defer fs.Close()
	_, err = fs.Probe(0)
	testenv.Kernel(t, "page cache tracepoints", err)
	const most = 4
	p, err := NewPool(fs, PoolOptions{Ready: 1, Max: most, Quiet: time.Millisecond, Log: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		p.Expect() // nobody makes one any more
	}()
	until := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			p.mu.Lock()
			ready, count, likely := len(p.ready), p.count, len(p.likely)
			p.mu.Unlock()
			if ready == want && count <= most {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d ready of %d, %d expected; want %d ready of at most %d", ready, count, likely, want, most)
			}
		}
	}
	for range 3 {
		p.Expect()
	}
	until(3)
	in, err := p.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	if len(p.likely) != 2 {
		t.Errorf("%d are expected after one came, want 2", len(p.likely))
	}
	p.mu.Unlock()
	for range 2 * most {
		p.Expect()
	}
	until(most - 1) // one is in use
	p.Put(in)
	p.mu.Lock()
	for i := range p.likely {
		p.likely[i] = time.Now().Add(-time.Second)
	}
	p.mu.Unlock()
	p.signal()
	until(1)
}
