package watch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// Run goes on with what an earlier process left pending, then reads and answers events until ctx
// ends, and returns nil then. What is pending at that moment stays pending in the table.
// Another error is one of the group itself: nothing is answered any more.
func (w *Watcher) Run(ctx context.Context) error {
	defer w.answers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		w.signal()
	})
	defer func() {
		if !stop() {
			<-woken // it may write to a descriptor that Close closes
		}
	}()
	if err := w.takeOver(ctx); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	for ctx.Err() == nil {
		room := w.room()
		if room > 0 {
			removes := w.ended()
			err := w.read(ctx, room)
			if err == nil {
				continue
			}
			if passes(err) {
				w.pause(ctx, err)
				continue
			}
			if !errors.Is(err, fanotify.ErrEmpty) {
				return fmt.Errorf("watch: %w", err)
			}
			w.drained(removes)
		}
		if err := w.wait(room > 0); err != nil {
			return fmt.Errorf("watch: %w", err)
		}
	}
	return nil
}

// passes reports whether err is of one event, not of the group: there was no descriptor or no memory for it, or its file could not be opened. The
// kernel has denied that read (fs/notify/fanotify/fanotify_user.c, fanotify_read).
func passes(err error) bool {
	errno, ok := errors.AsType[unix.Errno](err)
	return ok && errno != unix.EBADF && errno != unix.EFAULT && errno != unix.EINVAL && !errors.Is(err, fanotify.ErrEmpty)
}

const (
	readPause = 10 * time.Millisecond // after an error that passes
	sayPause  = 10 * time.Second      // between two words about such errors
)

// pause lets an error of a read pass: the next process would meet it again, and readers would wait until then.
func (w *Watcher) pause(ctx context.Context, err error) {
	w.denied.Add(1)
	if now := time.Now(); now.Sub(w.said) >= sayPause {
		w.said = now
		w.log.Error("an event could not be read, whose read the kernel denies; others are", zap.Error(err))
	}
	timer := time.NewTimer(readPause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// room returns how many events may be read, and asks to be woken when there are none.
func (w *Watcher) room() int {
	w.slotMu.Lock()
	defer w.slotMu.Unlock()
	room := min(inboxEvents, w.limit-(w.table.slots-len(w.freeSlots)))
	w.full.Store(room <= 0)
	return max(0, room)
}

// signal ends a wait.
func (w *Watcher) signal() {
	one := binary.NativeEndian.AppendUint64(nil, 1)
	_, _ = unix.Write(w.wake, one) // ones do not fill it up
}

// wait sleeps until there may be something to do.
func (w *Watcher) wait(events bool) error {
	fds := []unix.PollFd{{Fd: int32(w.wake), Events: unix.POLLIN}, {Fd: int32(w.group.FD()), Events: unix.POLLIN}} //nolint:gosec // descriptors
	if !events {
		fds = fds[:1]
	}
	if _, err := unix.Poll(fds, -1); err != nil {
		if errors.Is(err, unix.EINTR) {
			return nil
		}
		return err
	}
	if fds[0].Revents != 0 {
		var b [8]byte
		_, _ = unix.Read(w.wake, b[:]) // whatever it was, it was a signal
	}
	return nil
}

// read takes at most room events from the kernel. They are written into memory that
// survives this process, then get a slot each, then the inbox is emptied; only then one is
// answered, because its number may come again with the next read.
func (w *Watcher) read(ctx context.Context, room int) error {
	inbox := w.table.inbox()[:room*recordSize]
	n, err := w.group.ReadRaw(inbox)
	if err != nil {
		return err
	}
	events, err := decodeInbox(inbox[:n])
	if err != nil {
		return err
	}
	w.events.Add(int64(len(events)))
	slots := w.take(len(events))
	for i := range events {
		events[i].file = fileOf(events[i].fd)
		w.table.put(slots[i], events[i])
	}
	w.table.clearInbox(n)
	for i := range events {
		w.dispatch(ctx, slots[i], events[i])
	}
	return nil
}

// fileOf returns the file of an event's descriptor, zero when it cannot be told.
func fileOf(fd int32) file {
	var st unix.Stat_t
	for {
		err := unix.Fstat(int(fd), &st)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return file{}
		}
		return file{st.Dev, st.Ino}
	}
}

// take returns n free slots; room made sure that there are as many.
func (w *Watcher) take(n int) []int {
	w.slotMu.Lock()
	defer w.slotMu.Unlock()
	at := len(w.freeSlots) - n
	slots := append([]int(nil), w.freeSlots[at:]...)
	w.freeSlots = w.freeSlots[:at]
	return slots
}

// dispatch answers an event at once when it can.
func (w *Watcher) dispatch(ctx context.Context, slot int, e event) {
	l := w.look(e.file)
	if l.has(e) {
		if b := l.blob(); b != nil && w.touched != nil {
			w.touched(b, e.offset, e.count)
		}
		l.done()
		w.ready.Add(1)
		w.answer(slot, e, nil)
		return
	}
	w.waited.Add(1)
	w.answers.Go(func() {
		err := w.bounded(func() error {
			defer l.done()
			return w.fill(ctx, l.blob(), e)
		})
		if err != nil && ctx.Err() != nil {
			return // it stays pending, for the next process
		}
		w.answer(slot, e, err)
	})
}

// errLate is the error of a read that waited for the limit.
var errLate = errors.New("gave nothing in time, and does not end")

// bounded is f, which goes on by itself when it takes longer than a read may wait.
func (w *Watcher) bounded(f func() error) error {
	if w.most <= 0 {
		return f()
	}
	result := make(chan error, 1)
	w.answers.Go(func() { result <- f() })
	timer := time.NewTimer(w.most)
	defer timer.Stop()
	select {
	case err := <-result:
		return err
	case <-timer.C:
		return fmt.Errorf("what fetches for a read %w: after %v", errLate, w.most)
	}
}

// fill makes the range of e ready in b; nil: nobody knows the file, or it is not what it was.
func (w *Watcher) fill(ctx context.Context, b *store.Blob, e event) error {
	switch {
	case b == nil && e.file == (file{}):
		return fmt.Errorf("event of a file that nobody knows, of %d bytes at %d: some files that it may be of were lost", e.count, e.offset)
	case b == nil:
		return fmt.Errorf("event of a file that is not watched: device %#x, inode %d", e.file.dev, e.file.ino)
	}
	if err := w.ensure(ctx, b, e.offset, min(e.count, max(0, b.Size()-e.offset))); err != nil {
		return fmt.Errorf("blob %s: read %d bytes at %d: %w", b.Name(), e.count, e.offset, err)
	}
	if !b.ReadyRange(e.offset, e.count) {
		return fmt.Errorf("blob %s: read %d bytes at %d: not ready after all", b.Name(), e.count, e.offset)
	}
	return nil
}

// answer ends an event: it passes when err is nil, else its reader gets EIO. The number
// is in use until the answer is given; only then it may be given to another event.
func (w *Watcher) answer(slot int, e event, err error) {
	w.reply(e.fd, err)
	w.table.free(slot)
	_ = w.closeNumber(slot, e) // read-only: there is nothing to lose
	w.giveBack(slot)
}

// closeNumber gives the number of an event free, when it is the Watcher's.
func (w *Watcher) closeNumber(slot int, e event) error {
	w.slotMu.Lock()
	i, ok := w.inherited[slot]
	delete(w.inherited, slot)
	w.slotMu.Unlock()
	if ok && !i.held {
		return nil
	}
	return unix.Close(int(e.fd))
}

// reply tells the kernel.
func (w *Watcher) reply(fd int32, err error) {
	errno := unix.Errno(0)
	if err != nil {
		errno = unix.EIO
		w.denied.Add(1)
		w.log.Error("a read of a lazy mount failed", zap.Error(err))
	}
	if err := w.group.Answer(fd, errno); err != nil && !errors.Is(err, unix.ENOENT) {
		w.log.Error("an event cannot be answered", zap.Int32("fd", fd), zap.Error(err))
	}
}

func (w *Watcher) giveBack(slot int) {
	w.slotMu.Lock()
	w.freeSlots = append(w.freeSlots, slot)
	w.slotMu.Unlock()
	if w.full.CompareAndSwap(true, false) {
		w.signal()
	}
}
