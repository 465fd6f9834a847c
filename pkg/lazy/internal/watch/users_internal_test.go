package watch

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// TestRemovedUnderAnEvent closes a blob as soon as Remove allows it, with a reader for whom it is being filled.
func TestRemovedUnderAnEvent(t *testing.T) {
	for name, inherited := range map[string]bool{"own event": false, "inherited event": true, "inherited event of an unknown file": true} {
		t.Run(name, func(t *testing.T) {
			u := newSetup(t, 16, 0)
			entered, gate := make(chan struct{}), make(chan struct{})
			if inherited {
				first := u.watcher(t, func(ctx context.Context, _ *store.Blob, _, _ int64) error {
					<-ctx.Done()
					return ctx.Err()
				})
				stop := run(t, first)
				defer func(read <-chan error) { must(t, <-read) }(u.read(t, 3))
				await(t, "a pending event", func() bool { return first.Stats().Pending == 1 })
				stop()
				must(t, first.Close())
				if name == "inherited event of an unknown file" {
					u.forgetFiles()
				}
			}
			w := u.watcher(t, func(ctx context.Context, b *store.Blob, offset, length int64) error {
				if b == u.blob {
					entered <- struct{}{}
					select {
					case <-gate:
					case <-ctx.Done():
					}
				}
				return u.ensure(ctx, b, offset, length)
			})
			defer w.Close()
			stop := run(t, w)
			if !inherited {
				defer func(read <-chan error) { must(t, <-read) }(u.read(t, 3))
			}
			defer stop()
			<-entered
			removed := make(chan error, 1)
			go func() { removed <- errors.Join(w.Remove(u.blob), u.blob.Close()) }()
			select {
			case err := <-removed:
				t.Errorf("Remove = %v while the blob is being filled", err)
			case <-time.After(50 * time.Millisecond):
			}
			must(t, <-u.readOf(t, u.second, 5)) // others do not wait for it
			close(gate)
			must(t, <-removed)
		})
	}
}

// TestQueuedBeforeRemove is events that nobody had looked at when the blob was removed: a mount of it may go on that has all it
// needs. The test's reads stand for its.
func TestQueuedBeforeRemove(t *testing.T) {
	for name, filled := range map[string]int64{"complete": 16, "as much as one of two images needs": 8} {
		t.Run(name, func(t *testing.T) {
			u := newSetup(t, 16, 0)
			w := u.watcher(t, u.ensure)
			defer w.Close()
			here, there := u.read(t, 3), u.read(t, 12)
			await(t, "two events", func() bool { return queued(t, w) })
			must(t, u.ensure(t.Context(), u.blob, 0, filled*store.BlockSize))
			if filled == 16 {
				if ok, err := w.Settle(u.blob); !ok || err != nil {
					t.Fatalf("Settle = %t, %v", ok, err)
				}
			}
			must(t, errors.Join(w.Remove(u.blob), u.blob.Close()))
			if known := u.ensured.Swap(0); known != 1 {
				t.Fatalf("%d calls of Ensure before Run, want that of the test", known)
			}
			stop := run(t, w)
			defer stop()
			if err := <-here; err != nil {
				t.Errorf("read of what was ready = %v", err)
			}
			if err := <-there; (filled == 16) != (err == nil) || err != nil && !errors.Is(err, unix.EIO) {
				t.Errorf("read of another block = %v with %d of 16 blocks ready, want EIO where it is not ready", err, filled)
			}
			if n := u.ensured.Load(); n != 0 {
				t.Errorf("%d calls of Ensure for a blob that was closed", n)
			}
			// What takes memory goes with the events it was kept for.
			await(t, "an empty queue", func() bool {
				w.mu.RLock()
				defer w.mu.RUnlock()
				return !w.partial && len(w.gone) == int(filled/16)
			})
		})
	}
}

// queued reports whether the group has the events of two readers: they are in their reads, for long enough.
func queued(t *testing.T, w *Watcher) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(w.group.FD()), Events: unix.POLLIN}}
	_, err := unix.Poll(fds, 1000)
	must(t, err)
	time.Sleep(50 * time.Millisecond)
	return fds[0].Revents != 0
}

// TestAddedAfterRemove is a complete blob of which another image uses more: what was known of it at the end counts no longer.
func TestAddedAfterRemove(t *testing.T) {
	u := newSetup(t, 16, 0)
	w := u.watcher(t, u.ensure)
	defer w.Close()
	info, chunks := blocks("three", 16)
	b, err := u.store.OpenBlob(info, chunks[:8])
	must(t, err)
	must(t, w.Add(b))
	must(t, u.ensure(t.Context(), b, 0, b.Size()))
	if ok, err := w.Settle(b); !ok || err != nil {
		t.Fatalf("Settle = %t, %v", ok, err)
	}
	must(t, errors.Join(w.Remove(b), b.Close()))
	b, err = u.store.OpenBlob(info, chunks)
	must(t, err)
	must(t, w.Add(b))
	stop := run(t, w)
	defer stop()
	before := u.ensured.Load()
	must(t, <-u.readOf(t, b, 12))
	if got := u.ensured.Load() - before; got != 1 {
		t.Errorf("%d calls of Ensure for a block that was missing, want 1", got)
	}
	must(t, errors.Join(w.Remove(b), b.Close()))
}

// TestPendingOfAWholeFile is a process that died with an event of a blob that was complete: the next one has no use for the blob
// any more, and the reader passes.
func TestPendingOfAWholeFile(t *testing.T) {
	u := newSetup(t, 16, 0)
	first := u.watcher(t, func(ctx context.Context, _ *store.Blob, _, _ int64) error {
		<-ctx.Done()
		return ctx.Err()
	})
	stop := run(t, first)
	read, other := u.read(t, 3), u.readOf(t, u.second, 3)
	await(t, "two pending events", func() bool { return first.Stats().Pending == 2 })
	stop()
	must(t, errors.Join(first.Close(), u.ensure(t.Context(), u.blob, 0, u.blob.Size())))
	w, err := New(Config{Group: u.group, Table: u.table, Ensure: u.ensure})
	must(t, err)
	defer w.Close()
	w.AddWhole(u.blob.Inode())
	stop = run(t, w)
	defer stop()
	must(t, <-read)
	if err := <-other; !errors.Is(err, unix.EIO) {
		t.Errorf("read of a file that nobody knows = %v, want EIO", err)
	}
	must(t, <-u.read(t, 5)) // its mark is there still
	must(t, u.ensure(t.Context(), u.second, 8*store.BlockSize, store.BlockSize))
	dev, ino := u.second.Inode()
	w.AddReady(dev, ino, u.second.ReadyRange)
	must(t, <-u.readOf(t, u.second, 8))
	if err := <-u.readOf(t, u.second, 9); !errors.Is(err, unix.EIO) {
		t.Errorf("read of what is not ready of a file that is not watched = %v, want EIO", err)
	}
	must(t, w.Add(u.second))
	w.AddWhole(u.second.Inode())
	before := u.ensured.Load()
	must(t, <-u.readOf(t, u.second, 4))
	if u.ensured.Load() != before+1 {
		t.Error("AddWhole of a watched file counts")
	}
}

// forgetFiles makes pending events those of a process that died before it knew of which file they are.
func (u *setup) forgetFiles() {
	for n := range u.table.slots {
		if e, ok := u.table.get(n); ok {
			e.file = file{}
			u.table.put(n, e)
		}
	}
}

// TestUnknownFile is an inherited event of which nobody knows the file: it passes when the range is ready in all files, and fails when
// there may be a file that was not added.
func TestUnknownFile(t *testing.T) {
	for name, unsure := range map[string]bool{"all files are known": false, "one was lost": true} {
		t.Run(name, func(t *testing.T) {
			u := newSetup(t, 16, 0)
			first := u.watcher(t, func(ctx context.Context, _ *store.Blob, _, _ int64) error {
				<-ctx.Done()
				return ctx.Err()
			})
			stop := run(t, first)
			read := u.read(t, 3)
			await(t, "a pending event", func() bool { return first.Stats().Pending == 1 })
			stop()
			must(t, first.Close())
			u.forgetFiles()
			w, err := New(Config{Group: u.group, Table: u.table, Ensure: u.ensure})
			must(t, err)
			defer w.Close()
			must(t, w.Add(u.second))
			if unsure {
				w.Unsure() // as the caller knows, having no way to add the first one
			} else {
				must(t, w.Add(u.blob))
			}
			stop = run(t, w)
			defer stop()
			if err := <-read; unsure != errors.Is(err, unix.EIO) || !unsure && err != nil {
				t.Errorf("read = %v, want EIO where a file was lost: %t", err, unsure)
			}
			must(t, <-u.readOf(t, u.second, 7))
			if got := w.Stats(); got.TakenOver != 1 || (got.Denied == 1) != unsure {
				t.Errorf("stats = %+v", got)
			}
		})
	}
}
