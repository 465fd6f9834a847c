package tracefs

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// After a rush for which too few were ready more are, and when it is calm again no more than
// before.
func TestPoolLearnsFromARush(t *testing.T) {
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	defer fs.Close()
	_, err = fs.Probe(0)
	testenv.Kernel(t, "page cache tracepoints", err)
	p, err := NewPool(fs, PoolOptions{Ready: 1, Max: 16, Budget: 1, Log: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			p.mu.Lock()
			done := ok()
			want, ready, count := p.want, len(p.ready), p.count
			p.mu.Unlock()
			if done {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("not %s: %d wanted, %d ready, %d in all", what, want, ready, count)
			}
		}
	}
	var out []*Instance
	for range 4 {
		in, err := p.Get(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, in)
	}
	until("more ready after a rush", func() bool { return p.want > 1 && p.want <= 4 && len(p.ready) == p.want })
	for _, in := range out {
		p.Put(in)
	}
	until("as many as before", func() bool {
		p.rushed = time.Now().Add(-2 * calm)
		p.signal()
		return p.want == 1 && len(p.ready) == 1 && p.count == 1
	})
	// Of those that wait in vain nothing is left either.
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	for range 8 {
		switch in, err := p.Get(ctx); {
		case err == nil:
			p.Put(in)
		case !errors.Is(err, context.DeadlineExceeded):
			t.Error(err)
		}
	}
}
