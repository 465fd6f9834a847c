package watch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// Config says what a [Watcher] works with. Group, Table and Ensure are required.
type Config struct {
	// Group is a group with PreContent, perhaps one that another process made. The
	// caller closes it, after the last mount is gone.
	Group *fanotify.Group
	// Table holds what is pending, perhaps from another process. The caller closes it,
	// after [Watcher.Close].
	Table *Table
	// Ensure returns once [offset, offset+length) of b is ready, or with an error, which
	// fails that read. It is called by many goroutines, at most one per slot of the
	// table. When ctx ends it returns soon.
	Ensure func(ctx context.Context, b *store.Blob, offset, length int64) error
	// Touched, if not nil, is told of reads whose data was ready. It returns at once: others wait meanwhile.
	Touched func(b *store.Blob, offset, length int64)
	// Limit is how long a read waits at most, whatever Ensure does: one that is stuck goes on by itself, and its read fails. It keeps
	// [Watcher.Remove] and the end of [Watcher.Run] waiting. 0: no bound.
	Limit time.Duration
	// Log is told of reads that failed; nil: nobody.
	Log *zap.Logger
}

// Stats counts since New.
type Stats struct {
	Events    int64 // events read
	Ready     int64 // of these, the range was ready
	Waited    int64 // events whose reader had to wait for Ensure
	Denied    int64 // events that were answered with EIO
	TakenOver int64 // events that were pending when Run began
	Lost      int64 // events that waited for an answer and were in no table; they got EIO
	Pending   int64 // events pending now
}

// Watcher answers the events of data files. Its methods are safe for concurrent use; Run
// is called once.
type Watcher struct {
	group   *fanotify.Group
	table   *Table
	ensure  func(ctx context.Context, b *store.Blob, offset, length int64) error
	touched func(b *store.Blob, offset, length int64) // nil: nobody is told
	log     *zap.Logger
	most    time.Duration
	wake    int // an eventfd: there is room again, or Run is to end; -1 when closed

	mu      sync.RWMutex // guards what follows, and is held while marks change
	blobs   map[file]*watched
	gone    map[file]gone // none of them is in blobs
	removes int64         // so far
	partial bool          // gone has files that are not complete
	unsure  bool          // see Unsure

	slotMu sync.Mutex // guards freeSlots and inherited
	// freeSlots are the slots that are not pending.
	freeSlots []int
	inherited map[int]inherited // by slot, what is pending of an earlier process

	full  atomic.Bool // the reader waits for room
	limit int         // events that may be pending
	said  time.Time   // when an error that passes was logged last; of Run

	answers sync.WaitGroup

	events, ready, waited, denied, takenOver, lost atomic.Int64
}

// share is the part of the process' descriptors that events may have: one in share. A blob takes three.
const share = 4

// New returns a Watcher that has not read anything yet. What the table says is pending
// keeps the descriptor numbers that it needs: nothing may be read from the group before
// New. The caller closes the Watcher.
func New(c Config) (*Watcher, error) {
	w := &Watcher{group: c.Group, table: c.Table, ensure: c.Ensure, touched: c.Touched, most: c.Limit, log: c.Log, wake: -1, blobs: map[file]*watched{}, gone: map[file]gone{}, inherited: map[int]inherited{}}
	if w.log == nil {
		w.log = zap.NewNop()
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("watch: %w", err)
	}
	w.limit = max(1, min(w.table.slots-inboxEvents, int(min(limit.Cur, 1<<20))/share))
	// Before anything else takes one of the numbers.
	err := w.inherit()
	if err == nil {
		w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		for slot, i := range w.inherited {
			err = errors.Join(err, w.closeNumber(slot, i.event))
		}
		return nil, fmt.Errorf("watch: %w", err)
	}
	return w, nil
}

// Close closes what the Watcher opened, after Run has returned. Events that are pending
// stay so, for the next process: see [Watcher.DenyAll].
func (w *Watcher) Close() error {
	var errs []error
	for n := range w.table.slots {
		if e, ok := w.table.get(n); ok && w.wake >= 0 {
			errs = append(errs, w.closeNumber(n, e))
		}
	}
	if w.wake >= 0 {
		errs = append(errs, unix.Close(w.wake))
		w.wake = -1
	}
	return errors.Join(errs...)
}

func identify(b *store.Blob) file {
	dev, ino := b.Inode()
	return file{dev, ino}
}

// Add watches b, before EROFS opens its data file: a file that was opened without a mark
// never raises an event. For every Add there is one Remove. A blob that is complete gets a mark too, which
// [Watcher.Settle] takes away when the mount is there: it may turn out to be wrong on disk, and no later mark would reach mounts
// that were made without one.
func (w *Watcher) Add(b *store.Blob) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := identify(b)
	known := w.blobs[id]
	if known == nil {
		if err := w.unmarked(b); err != nil {
			return err
		}
		known = &watched{blob: b}
		w.blobs[id] = known
	}
	if known.blob != b {
		return fmt.Errorf("watch blob %s: its data file is watched as that of %s", b.Name(), known.blob.Name())
	}
	if err := w.group.Mark(mark(b.File())); err != nil {
		if known.refs == 0 {
			delete(w.blobs, id)
		}
		return fmt.Errorf("watch blob %s: %w", b.Name(), err)
	}
	known.refs++
	delete(w.gone, id)
	return nil
}

// Again marks the data file of b once more when it is watched: it was settled, or found complete, and is not any more. Mounts see events
// of it because there was a mark when they were made ([Watcher.Add]). Of one that is not watched nothing passes any more that was ready.
func (w *Watcher) Again(b *store.Blob) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := identify(b)
	if known := w.blobs[id]; known == nil || known.blob != b {
		delete(w.gone, id)
		return nil
	}
	if err := w.group.Mark(mark(b.File())); err != nil {
		return fmt.Errorf("watch blob %s: %w", b.Name(), err)
	}
	return nil
}

// ErrMarked is returned by [Watcher.Add] for a data file that was opened while an earlier process' mark was on it:
// writing it would be an event that this process has to answer first.
var ErrMarked = errors.New("the data file was opened with a mark on it")

// unmarked makes sure that writing to a blob raises no events. The mark that it finds is gone
// afterwards, so that the blob may be closed and opened again.
func (w *Watcher) unmarked(b *store.Blob) error {
	if !b.FirstUse() {
		return nil
	}
	err := w.group.Unmark(mark(b.File()))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		err = ErrMarked
	}
	return fmt.Errorf("watch blob %s: %w", b.Name(), err)
}

// UnmarkOld is Unmark, and reports whether there was a mark.
func (w *Watcher) UnmarkOld(f *os.File) (bool, error) {
	err := w.group.Unmark(mark(f))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

func mark(f *os.File) fanotify.Mark {
	return fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(f.Fd())}
}

// Unmark removes the mark of a data file that no mount has, where there is one: of a kept one that nobody adopts
// ([store.Store.Unadopted]), before its descriptors are given up.
func (w *Watcher) Unmark(f *os.File) error {
	if err := w.group.Unmark(mark(f)); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// Settle makes the data of b durable and takes its mark away when it is complete, and reports
// whether it is. Reads of it raise no events from then on.
func (w *Watcher) Settle(b *store.Blob) (bool, error) {
	if !b.Complete() {
		return false, nil
	}
	// Before the mark goes: when the disk lost data, the blob is incomplete again.
	if err := b.Sync(); err != nil {
		return false, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if known := w.blobs[identify(b)]; known == nil || known.blob != b || !b.Durable() {
		return false, nil
	}
	if err := w.Unmark(b.File()); err != nil {
		return false, fmt.Errorf("settle blob %s: %w", b.Name(), err)
	}
	return true, nil
}

// Remove is [Watcher.End], and returns when the channel is closed: Ensure must return by then.
func (w *Watcher) Remove(b *store.Blob) error {
	idle, err := w.End(b)
	<-idle
	return err
}

// End ends one Add, after the last mount that needs more of it is gone, or has all that it needs. The last one takes the mark away, unless there
// are strangers ([store.Blob.Strangers]): then the blob is left with it ([store.Blob.Leave]), for [Watcher.Release]. The
// channel is closed when no event of it is looked at any more: then the blob may be closed, whatever the error. Events of it that are
// found later pass when what they ask for was ready at the end.
func (w *Watcher) End(b *store.Blob) (idle <-chan struct{}, err error) {
	done := make(chan struct{})
	id := identify(b)
	w.mu.Lock()
	defer w.mu.Unlock()
	known := w.blobs[id]
	if known != nil && known.blob == b {
		if known.refs--; known.refs == 0 {
			strangers := b.Strangers()
			if strangers {
				b.Leave()
			} else if err = w.Unmark(b.File()); err != nil {
				err = fmt.Errorf("remove blob %s: %w", b.Name(), err)
			}
			w.forget(id, b, strangers)
			go func() {
				defer close(done)
				known.events.Wait()
			}()
			return done, err
		}
	}
	close(done)
	return done, nil
}

// Stats returns the counters.
func (w *Watcher) Stats() Stats {
	w.slotMu.Lock()
	pending := w.table.slots - len(w.freeSlots)
	w.slotMu.Unlock()
	return Stats{
		Events: w.events.Load(), Ready: w.ready.Load(), Waited: w.waited.Load(), Denied: w.denied.Load(),
		TakenOver: w.takenOver.Load(), Lost: w.lost.Load(), Pending: int64(pending),
	}
}
