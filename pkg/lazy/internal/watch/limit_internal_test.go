package watch

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// What fetches for one reader hangs and obeys nobody: the reader gets an error, others go on, and so does the next one of
// the same range.
func TestLimit(t *testing.T) {
	t.Parallel()
	u := newSetup(t, 8, 0)
	hang := make(chan struct{})
	w, err := New(Config{Group: u.group, Table: u.table, Limit: 3 * time.Second, Ensure: func(ctx context.Context, b *store.Blob, offset, n int64) error {
		select {
		case <-hang:
		default:
			if offset == 0 {
				<-hang
				return errors.New("hung up")
			}
		}
		return u.ensure(ctx, b, offset, n)
	}})
	must(t, err)
	defer func() { must(t, w.Close()) }()
	must(t, errors.Join(w.Add(u.blob), w.Add(u.second)))
	stop := run(t, w)
	first := u.read(t, 0)
	if err := <-u.read(t, 5); err != nil {
		t.Errorf("read of another block = %v", err)
	}
	if err := <-first; !errors.Is(err, unix.EIO) {
		t.Errorf("read that hangs = %v, want EIO", err)
	}
	close(hang)
	if err := <-u.read(t, 0); err != nil {
		t.Errorf("next read = %v", err)
	}
	stop()
	if s := w.Stats(); s.Denied != 1 || s.Pending != 0 {
		t.Errorf("Stats = %+v, want one denied and nothing pending", s)
	}
}
