package tracefs_test

import (
	"context"
	"errors"
	"testing"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

func TestPoolLimit(t *testing.T) {
	fs := open(t)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Ready: 1, Max: 2, Log: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx := context.Background()
	first, err := p.Get(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Put(first)
	second, err := p.Get(ctx)
	for errors.Is(err, tracefs.ErrLimit) { // the worker is making one
		second, err = p.Get(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer p.Put(second)
	if _, err := p.Get(ctx); !errors.Is(err, tracefs.ErrLimit) {
		t.Errorf("Get() of the third = %v, want ErrLimit", err)
	}
}
