package tracefs

import (
	"context"
	"errors"
	"strconv"
	"strings"
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
	p, err := NewPool(fs, PoolOptions{Ready: 1, Max: 16, Budget: 16 << 20, Log: func(err error) { t.Error(err) }})
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

// What each CPU gets at least counts too: where there are many CPUs a small ring is a large one.
func TestPoolCountsWhatRingsTake(t *testing.T) {
	testenv.Root(t)
	fs, err := Open()
	testenv.Kernel(t, "tracefs", err)
	defer fs.Close()
	_, err = fs.Probe(0)
	testenv.Kernel(t, "page cache tracepoints", err)
	p, err := NewPool(fs, PoolOptions{Instance: Options{Ring: 1}, Ready: 3, Budget: 1, Quiet: time.Millisecond, Log: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	in, err := p.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	text, err := in.dir.read("buffer_total_size_kb")
	if err != nil {
		t.Fatal(err)
	}
	// "264", or "7 (expanded: 2816)" where nothing was enabled yet.
	fields := strings.FieldsFunc(string(text), func(r rune) bool { return r < '0' || r > '9' })
	kernel, err := strconv.ParseInt(fields[len(fields)-1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(online()) * minRing; in.size != want || kernel<<10 < want || kernel<<10 > 2*want {
		t.Errorf("%d bytes counted, the kernel says %s KiB, want %d bytes", in.size, text, want)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		p.mu.Lock()
		ready, count, spent := len(p.ready), p.count, p.spent
		p.mu.Unlock()
		if ready == 1 && count == 2 && spent == 2*in.size {
			break
		}
		if count > 2 || time.Now().After(deadline) {
			t.Fatalf("%d ready, %d in all, %d bytes spent; want 1, 2 and %d", ready, count, spent, 2*in.size)
		}
	}
	p.Put(in)
	if err := p.Close(); err != nil || p.spent != 0 && p.count == 0 {
		t.Errorf("Close() = %v with %d bytes spent", err, p.spent)
	}
}
