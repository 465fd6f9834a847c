package remote

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// turns lets the goroutines of this process change one index of referrers one after the other.
var turns = struct {
	sync.Mutex
	of map[string]*turn
}{of: map[string]*turn{}}

// turn is the right to change one index; who has put into busy has it.
type turn struct {
	busy    chan struct{}
	waiters int // who has it or waits for it
}

// takeTurn waits until nobody else in this process, and for a layout in any process, changes
// the index of referrers that ref names. The caller calls done when the index is written.
func takeTurn(ctx context.Context, ref Reference) (done func() error, err error) {
	if ref.Kind == KindLayout {
		return lockReferrers(ctx, ref)
	}
	name := ref.String()
	turns.Lock()
	t := turns.of[name]
	if t == nil {
		t = &turn{busy: make(chan struct{}, 1)}
		turns.of[name] = t
	}
	t.waiters++
	turns.Unlock()
	leave := func() {
		turns.Lock()
		defer turns.Unlock()
		if t.waiters--; t.waiters == 0 {
			delete(turns.of, name)
		}
	}
	select {
	case t.busy <- struct{}{}:
		return func() error { <-t.busy; leave(); return nil }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// lockReferrers locks a layout's directory of blobs: its root is locked for each file that is
// made while the index is written.
func lockReferrers(ctx context.Context, ref Reference) (done func() error, err error) {
	d, err := os.Open(filepath.Join(ref.Path, ocispec.ImageBlobsDir))
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return d.Close, nil // closing releases the lock
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", d.Name(), err), d.Close())
		}
		if err := sleep(ctx, lockPoll); err != nil {
			return nil, errors.Join(fmt.Errorf("%s is locked by another writer: %w", d.Name(), err), d.Close())
		}
	}
}
