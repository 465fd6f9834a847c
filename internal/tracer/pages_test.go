package tracer_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// pool returns a pool of instances that goes with the test.
func pool(t testing.TB) *tracefs.Pool {
	t.Helper()
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Log: func(err error) { t.Errorf("pool: %v", err) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close pool: %v", err)
		}
		if err := fs.Close(); err != nil {
			t.Errorf("close tracefs: %v", err)
		}
	})
	return p
}

// pools are those of the tests that run: one each, however many containers it starts.
var pools sync.Map

// poolOf returns the pool of a test's sessions that have none of their own.
func poolOf(t testing.TB) *tracefs.Pool {
	t.Helper()
	if p, ok := pools.Load(t); ok {
		return p.(*tracefs.Pool)
	}
	t.Cleanup(func() { pools.Delete(t) })
	p := pool(t)
	pools.Store(t, p)
	return p
}

// TestInstanceGoesBack holds that an instance is gone when a session is over whose pool was closed meanwhile, and that
// the list has what it recorded.
func TestInstanceGoesBack(t *testing.T) {
	b := newDiskBox(t, identitySetup)
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	t.Cleanup(func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
		testenv.Kernel(t, "tracefs", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	own := func() []string {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(dir, "instances", fmt.Sprintf("%s%d-*", tracefs.Prefix, os.Getpid())))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	before := own()
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1, Max: 1, Log: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	c := b.create(t, pivot, "/program", "files", "read:/s/plain")
	s := start(t, c, tracer.Options{Pages: p})
	during := own()
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Fatal(err)
	}
	c.run(t)
	r := result(t, s)
	if after := own(); len(during) != len(before)+1 || len(after) != len(before) {
		t.Errorf("instances %q before, %q while it records, %q after", before, during, after)
	}
	a, ok := find(r, "/s/plain")
	if !ok || len(a.Ranges) == 0 || r.Err != nil || !r.Trace.Complete() {
		t.Errorf("/s/plain is %+v, found %t; error %v, losses %+v", a, ok, r.Err, r.Trace.Losses)
	}
}
