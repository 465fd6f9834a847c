package tracefs_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// pool returns a pool for the test, which fails for every error in the background.
func pool(t testing.TB, fs *tracefs.FS, o tracefs.PoolOptions) *tracefs.Pool {
	t.Helper()
	o.Log = func(err error) { t.Error(err) }
	p, err := tracefs.NewPool(fs, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		if err := p.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		if _, err := p.Get(context.Background()); !errors.Is(err, tracefs.ErrClosed) {
			t.Errorf("Get() of a closed pool = %v, want ErrClosed", err)
		}
	})
	return p
}

// get returns an instance of p.
func get(t testing.TB, p *tracefs.Pool) *tracefs.Instance {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	in, err := p.Get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func TestPoolLimit(t *testing.T) {
	p := pool(t, open(t), tracefs.PoolOptions{Ready: 1, Max: 2})
	first, second := get(t, p), get(t, p)
	if _, err := p.Get(context.Background()); !errors.Is(err, tracefs.ErrLimit) {
		t.Errorf("Get() of the third = %v, want ErrLimit", err)
	}
	p.Put(first)
	third := get(t, p)
	if third == second {
		t.Error("an instance in use was handed out")
	}
	p.Put(second)
	p.Put(third)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.Get(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Get() with a cancelled context = %v", err)
	}
}

// Instances given back armed, read or not, are as new when they come again.
func TestPoolRecycles(t *testing.T) {
	p := pool(t, open(t), tracefs.PoolOptions{Ready: 1, Max: 1})
	for range 3 {
		in := get(t, p)
		f, inode := subject(t, true)
		events := armed(t, in, func() error { _, err := f.ReadAt(make([]byte, 1), 0); return err })
		if got := of(events, tracefs.Read, inode, filePages); len(got) != 1 {
			t.Errorf("read pages %v, want the first", got)
		}
		for _, e := range events {
			if e.Kind != tracefs.Fork && e.Kind != tracefs.Exec && e.Last < e.First {
				t.Errorf("event %+v: last page before the first", e)
			}
		}
		p.Put(in)
	}
}

// Fifty at once are served within the pool's bounds.
func TestPoolManyAtOnce(t *testing.T) {
	const many = 50
	n := many
	if testing.Short() {
		n = 8
	}
	p := pool(t, open(t), tracefs.PoolOptions{Budget: 16 << 20})
	f, inode := subject(t, true)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			in := get(t, p)
			defer p.Put(in)
			events := armed(t, in, func() error { _, err := f.ReadAt(make([]byte, 1), 0); return err })
			if got := of(events, tracefs.Read, inode, filePages); !got[0] || len(got) != 1 {
				t.Errorf("read pages %v, want the first", got)
			}
		})
	}
	wg.Wait()
}

// An instance that is armed when it comes back to a closed pool is removed, and its filter says whom it records till then.
func TestPutAfterClose(t *testing.T) {
	fs := open(t)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1, Max: 1, Log: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	in := get(t, p)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if threads, err := in.Filter(); err != nil || len(threads) != 0 {
		t.Errorf("Filter() = %v, %v, want none yet", threads, err)
	}
	if err := in.Arm(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	if threads, err := in.Filter(); err != nil || !slices.Contains(threads, os.Getpid()) {
		t.Errorf("Filter() = %v, %v, want %d", threads, err, os.Getpid())
	}
	// Whoever else has the directory sees that it is gone.
	dir, err := unix.Dup(int(in.File().Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	p.Put(in)
	if err := unix.Faccessat(dir, "tracing_on", unix.F_OK, 0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a removed instance's files: %v, want ENOENT", err)
	}
}
