package watch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// inherited is an event that an earlier process read and did not answer. Its number must
// not be given to another event before it is answered, so this process occupies it.
type inherited struct {
	event
	// held: this package occupies the number; else another part of the process does.
	held bool
}

// inherit finds what is pending in the table, moves the inbox into slots, and occupies the
// numbers.
func (w *Watcher) inherit() error {
	numbers := map[int32]bool{}
	for n := range w.table.slots {
		e, ok := w.table.get(n)
		switch {
		case !ok:
			w.freeSlots = append(w.freeSlots, n)
		case numbers[e.fd]:
			return fmt.Errorf("%w: event %d is pending twice", ErrTable, e.fd)
		default:
			numbers[e.fd] = true
			w.inherited[n] = inherited{event: e}
		}
	}
	inbox := w.table.inbox()
	unread, err := decodeInbox(inbox)
	if err != nil {
		return fmt.Errorf("events that were just read: %w", err)
	}
	fresh := map[int32]bool{}
	for _, e := range unread {
		if fresh[e.fd] {
			return fmt.Errorf("%w: event %d was just read twice", ErrTable, e.fd)
		}
		fresh[e.fd] = true
		if numbers[e.fd] {
			continue // it has its slot
		}
		if len(w.freeSlots) == 0 {
			return fmt.Errorf("%w: no slot for an event that was just read", ErrTable)
		}
		slot := w.take(1)[0]
		w.table.put(slot, e)
		w.inherited[slot] = inherited{event: e}
	}
	w.table.clearInbox(len(inbox))
	w.takenOver.Store(int64(len(w.inherited)))
	for slot, i := range w.inherited {
		if i.held, err = occupy(w.table.File().Fd(), i.fd); err != nil {
			return err
		}
		w.inherited[slot] = i
	}
	return nil
}

// occupy takes the number fd, where it is free, with a copy of another descriptor.
func occupy(other uintptr, fd int32) (bool, error) {
	got, err := unix.FcntlInt(other, unix.F_DUPFD_CLOEXEC, int(fd))
	if errors.Is(err, unix.EINVAL) {
		return false, nil // above this process' limit
	}
	if err != nil {
		return false, fmt.Errorf("occupy descriptor %d: %w", fd, err)
	}
	if got == int(fd) {
		return true, nil
	}
	return false, unix.Close(got)
}

// takeOver starts the work on what was inherited. Where another part of the process has an
// event's number, which it may close at any time, nothing is read before that event is
// answered.
func (w *Watcher) takeOver(ctx context.Context) error {
	if err := w.sweep(); err != nil {
		return err
	}
	var unheld sync.WaitGroup
	for slot, i := range maps.Clone(w.inherited) {
		done := func() {}
		if !i.held {
			unheld.Add(1)
			done = unheld.Done
		}
		w.waited.Add(1)
		looks := w.lookInherited(i.event) // before the queue is empty, and before one of them is removed
		w.answers.Go(func() {
			defer done()
			err := w.bounded(func() error {
				defer func() {
					for _, l := range looks {
						l.done()
					}
				}()
				return w.fillInherited(ctx, looks, i.event)
			})
			if err != nil && ctx.Err() != nil {
				return // it stays pending, for the next process
			}
			w.answer(slot, i.event, err)
		})
	}
	unheld.Wait()
	return nil
}

// lookInherited is look for an event of which perhaps nobody knows the file.
func (w *Watcher) lookInherited(e event) []look {
	if e.file == (file{}) {
		return w.lookAll()
	}
	return []look{w.look(e.file)}
}

// fillInherited makes the range of e ready in all files that it may be of.
func (w *Watcher) fillInherited(ctx context.Context, looks []look, e event) error {
	if e.fd < 0 || e.offset < 0 || e.count < 0 {
		return fmt.Errorf("%w: event %d of %d bytes at %d", ErrTable, e.fd, e.count, e.offset)
	}
	var errs []error
	for _, l := range looks {
		if !l.has(e) {
			errs = append(errs, w.fill(ctx, l.blob(), e))
		}
	}
	return errors.Join(errs...)
}

// sweep fails every event that waits for an answer and is in no table. There is none, unless an
// earlier process worked in another way; its readers would wait for ever.
func (w *Watcher) sweep() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	numbers := map[int32]bool{}
	for _, i := range w.inherited {
		numbers[i.fd] = true
	}
	for fd := range int32(min(limit.Max, w.table.swept())) { //nolint:gosec // at most twice the descriptors of a process
		if numbers[fd] {
			continue
		}
		switch err := w.group.Answer(fd, unix.EIO); {
		case err == nil:
			w.lost.Add(1)
		case !errors.Is(err, unix.ENOENT):
			return err
		}
	}
	return nil
}

// minSwept and moreSwept bound the descriptor numbers that sweep tries, each of which takes a system call while readers wait: as many
// as a process has that mounts thousands of blobs, and beyond the highest that any event had.
const (
	minSwept  = 1 << 16
	moreSwept = 2 * DefaultSlots
	maxSwept  = 1 << 30 // sysctl fs.nr_open is less
)

// swept returns below which number events may have been.
func (t *Table) swept() uint64 {
	return max(minSwept, min(t.words[wordMost].Load(), maxSwept)+moreSwept)
}

// DenyAll answers everything that is pending or queued with EIO, after Run has returned, for a
// process that nobody will take over from. It returns how many there were.
func (w *Watcher) DenyAll() (int, error) {
	denied := 0
	gone := errors.New("nobody serves this mount any more")
	for n := range w.table.slots {
		e, ok := w.table.get(n)
		if !ok {
			continue
		}
		w.reply(e.fd, gone)
		w.table.free(n)
		_ = w.closeNumber(n, e) // read-only
		denied++
	}
	for {
		inbox := w.table.inbox()
		n, err := w.group.ReadRaw(inbox)
		if errors.Is(err, fanotify.ErrEmpty) {
			return denied, nil
		}
		if err != nil {
			return denied, err
		}
		events, err := decodeInbox(inbox[:n])
		for _, e := range events {
			w.reply(e.fd, gone)
			_ = unix.Close(int(e.fd)) // read-only
			denied++
		}
		w.table.clearInbox(n)
		if err != nil {
			return denied, err
		}
	}
}
