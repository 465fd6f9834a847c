package tracer_test

import (
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
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
