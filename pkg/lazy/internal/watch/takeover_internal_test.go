package watch

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// setup is a marked blob of n blocks, and another one, with all that a Watcher needs.
type setup struct {
	group        *fanotify.Group
	table        *Table
	store        *store.Store
	blob, second *store.Blob
	ensured      atomic.Int64
}

// blocks returns a blob of n chunks of one block each.
func blocks(id string, n int) (rafs.Blob, []rafs.Chunk) {
	chunks := make([]rafs.Chunk, n)
	for i := range chunks {
		chunks[i] = rafs.Chunk{Index: uint32(i), UncompressedOffset: uint64(i) * store.BlockSize, UncompressedSize: store.BlockSize}
	}
	return rafs.Blob{ID: id, UncompressedSize: uint64(n) * store.BlockSize}, chunks
}

func newSetup(t testing.TB, n, slots int) *setup {
	t.Helper()
	testenv.Root(t)
	state := t.TempDir()
	testenv.Kernel(t, "pre-content events", store.Probe(state))
	u := &setup{}
	var err error
	u.group, err = fanotify.New(fanotify.Options{PreContent: true})
	must(t, err)
	t.Cleanup(func() { must(t, u.group.Close()) })
	u.table, err = NewTable(slots)
	must(t, err)
	t.Cleanup(func() { must(t, u.table.Close()) })
	s, err := store.Open(state, store.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	u.store = s
	u.blob, err = s.OpenBlob(blocks("one", n))
	must(t, err)
	u.second, err = s.OpenBlob(blocks("two", n))
	must(t, err)
	return u
}

// ensure fills ranges with sevens.
func (u *setup) ensure(_ context.Context, b *store.Blob, offset, length int64) error {
	u.ensured.Add(1)
	missing, err := b.Missing(offset, length)
	if err != nil {
		return err
	}
	for _, c := range missing {
		if err := b.Put(c, sevens()); err != nil {
			return err
		}
	}
	return nil
}

func sevens() []byte {
	p := make([]byte, store.BlockSize)
	for i := range p {
		p[i] = 7
	}
	return p
}

func (u *setup) watcher(t testing.TB, ensure func(context.Context, *store.Blob, int64, int64) error) *Watcher {
	t.Helper()
	w, err := New(Config{Group: u.group, Table: u.table, Ensure: ensure})
	must(t, err)
	must(t, errors.Join(w.Add(u.blob), w.Add(u.second)))
	return w
}

// run runs w; the returned function ends it.
func run(t testing.TB, w *Watcher) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		must(t, <-done)
	}
}

// read reads one block of the data file in the background.
func (u *setup) read(t testing.TB, block int64) <-chan error {
	t.Helper()
	return u.readOf(t, u.blob, block)
}

// readOf is read of one of the blobs.
func (u *setup) readOf(t testing.TB, b *store.Blob, block int64) <-chan error {
	t.Helper()
	f, err := os.Open(b.Path())
	must(t, err)
	result := make(chan error, 1)
	go func() {
		p := make([]byte, store.BlockSize)
		_, err := f.ReadAt(p, block*store.BlockSize)
		if err == nil && p[5] != 7 {
			err = errors.New("wrong bytes")
		}
		result <- errors.Join(err, f.Close())
	}()
	return result
}

// await polls until cond holds.
func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for range 2000 {
		if cond() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s: not after 10 s", what)
}

// TestDiedWithAFullInbox is a process that died after the kernel had given it an event and before it had
// looked at it. Its descriptor is gone, or its number belongs to somebody else by now.
func TestDiedWithAFullInbox(t *testing.T) {
	for name, occupied := range map[string]bool{"number free": false, "number taken": true} {
		t.Run(name, func(t *testing.T) {
			u := newSetup(t, 16, 0)
			must(t, u.watcher(t, u.ensure).Close()) // its marks stay
			read := u.read(t, 3)
			var n int
			await(t, "an event", func() bool {
				var err error
				n, err = u.group.ReadRaw(u.table.inbox())
				return err == nil
			})
			events, err := decodeInbox(u.table.inbox()[:n])
			if err != nil || len(events) != 1 || events[0].offset != 3*store.BlockSize {
				t.Fatalf("inbox holds %+v, %v, want an event of block 3", events, err)
			}
			if occupied {
				defer unix.Close(int(events[0].fd))
			} else {
				must(t, unix.Close(int(events[0].fd)))
			}
			w := u.watcher(t, u.ensure)
			defer w.Close()
			if w.inherited[w.table.slots-1].held == occupied {
				t.Errorf("inherited %+v, number taken: %t", w.inherited, occupied)
			}
			stop := run(t, w)
			must(t, <-read)
			must(t, <-u.read(t, 9))
			stop()
			if s := w.Stats(); s.TakenOver != 1 || s.Lost != 0 || s.Denied != 0 || s.Pending != 0 || s.Events != 1 {
				t.Errorf("stats = %+v, want one event taken over, one read", s)
			}
			if u.table.words[wordInbox].Load() != 0 || u.table.Pending() != 0 || len(w.inherited) != 0 {
				t.Error("the table is not empty")
			}
		})
	}
}

// TestLostEvent is an event that an earlier process read past the table.
func TestLostEvent(t *testing.T) {
	u := newSetup(t, 16, 0)
	w := u.watcher(t, u.ensure)
	defer w.Close()
	read := u.read(t, 3)
	elsewhere := make([]byte, recordSize)
	await(t, "an event", func() bool {
		_, err := u.group.ReadRaw(elsewhere)
		return err == nil
	})
	events, err := decodeInbox(elsewhere)
	must(t, err)
	defer unix.Close(int(events[0].fd))
	stop := run(t, w)
	if err := <-read; !errors.Is(err, unix.EIO) {
		t.Errorf("read = %v, want EIO", err)
	}
	must(t, <-u.read(t, 3))
	stop()
	if s := w.Stats(); s.Lost != 1 {
		t.Errorf("stats = %+v, want one lost", s)
	}
}

// TestSwept is a process that had an event with a high number: the next one looks for lost ones up to there.
func TestSwept(t *testing.T) {
	table, err := NewTable(0)
	must(t, err)
	defer table.Close()
	for _, fd := range []int32{3, 100_000, 7} {
		table.put(0, event{fd: fd})
		table.free(0)
	}
	again, err := OpenTable(table.File())
	must(t, err)
	defer func() { must(t, again.memory.Unmap()) }()
	if got := again.swept(); got <= 100_000 || got > 200_000 {
		t.Errorf("numbers below %d are tried, want those around 100000 too", got)
	}
}

// TestMoreEventsThanSlots holds that the others wait in the kernel's queue.
func TestMoreEventsThanSlots(t *testing.T) {
	u := newSetup(t, 64, 2)
	gate := make(chan struct{})
	w := u.watcher(t, func(ctx context.Context, b *store.Blob, offset, length int64) error {
		<-gate
		return u.ensure(ctx, b, offset, length)
	})
	defer w.Close()
	stop := run(t, w)
	var reads []<-chan error
	for n := range int64(20) {
		reads = append(reads, u.read(t, n))
	}
	await(t, "two pending events", func() bool { return w.Stats().Pending == 2 })
	if s := w.Stats(); s.Events != 2 {
		t.Errorf("stats = %+v, want two events read", s)
	}
	close(gate)
	for _, r := range reads {
		must(t, <-r)
	}
	stop()
	if s := w.Stats(); s.Events != 20 || s.Pending != 0 || s.Waited != 20 {
		t.Errorf("stats = %+v, want 20 events", s)
	}
}

// TestStoppedAndContinued is a process that ends in order while a reader waits: the next one goes on.
func TestStoppedAndContinued(t *testing.T) {
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
	w := u.watcher(t, u.ensure)
	defer w.Close()
	stop = run(t, w)
	must(t, <-read)
	stop()
	if s := w.Stats(); s.TakenOver != 1 || s.Denied != 0 {
		t.Errorf("stats = %+v, want one event taken over", s)
	}
}

// TestTwoUsers holds that the mark stays until the last user goes, and what Add does when a complete blob
// needs more.
func TestTwoUsers(t *testing.T) {
	u := newSetup(t, 16, 0)
	w := u.watcher(t, u.ensure)
	defer w.Close()
	must(t, w.Add(u.blob))
	must(t, w.Remove(u.blob))
	stop := run(t, w)
	must(t, <-u.read(t, 1))
	if s := w.Stats(); s.Events != 1 {
		t.Errorf("stats = %+v: the mark is gone with the first of two users", s)
	}
	must(t, u.ensure(t.Context(), u.blob, 0, u.blob.Size()))
	if ok, err := w.Settle(u.blob); !ok || err != nil {
		t.Errorf("Settle = %t, %v", ok, err)
	}
	if ok, err := w.Settle(u.second); ok || err != nil {
		t.Errorf("Settle of an incomplete blob = %t, %v", ok, err)
	}
	must(t, <-u.read(t, 2))
	must(t, w.Remove(u.blob))
	must(t, w.Remove(u.blob)) // one too many is no harm
	must(t, <-u.read(t, 2))
	stop()
	if s := w.Stats(); s.Events != 1 {
		t.Errorf("stats = %+v: events without a mark", s)
	}
}

// TestCompleteMayBecomeIncomplete is a blob that is complete when it is mounted: it has a mark until it is settled, and may get
// it again, because it may turn out wrong or not durable.
func TestCompleteMayBecomeIncomplete(t *testing.T) {
	u := newSetup(t, 16, 0)
	must(t, u.ensure(t.Context(), u.blob, 0, u.blob.Size()))
	w := u.watcher(t, u.ensure)
	defer w.Close()
	must(t, w.Add(u.blob))
	stop := run(t, w)
	defer stop()
	must(t, <-u.read(t, 1))
	if s := w.Stats(); s.Events != 1 || s.Ready != 1 {
		t.Errorf("stats = %+v, want one event of what is ready", s)
	}
	must(t, u.blob.Sync())
	must(t, <-u.read(t, 2))
	must(t, w.Add(u.blob)) // all is durable
	must(t, <-u.read(t, 3))
	if ok, err := w.Settle(u.blob); !ok || err != nil {
		t.Errorf("Settle = %t, %v", ok, err)
	}
	must(t, <-u.read(t, 4))
	if s := w.Stats(); s.Events != 3 {
		t.Errorf("stats = %+v, want three events, and none without a mark", s)
	}
	must(t, w.Again(u.blob))
	must(t, <-u.read(t, 5))
	if s := w.Stats(); s.Events != 4 {
		t.Errorf("stats = %+v, want an event of the mark that came again", s)
	}
	for range 3 {
		must(t, w.Remove(u.blob))
	}
	must(t, w.Again(u.blob)) // of nobody: there is no mark
	must(t, <-u.read(t, 6))
	if s := w.Stats(); s.Events != 4 {
		t.Errorf("stats = %+v: an event of a blob that nobody watches", s)
	}
}

func TestOpenTableRefuses(t *testing.T) {
	table, err := NewTable(10)
	must(t, err)
	defer table.Close()
	dup := func() *os.File {
		fd, err := unix.FcntlInt(table.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
		must(t, err)
		return os.NewFile(uintptr(fd), "table")
	}
	f := dup()
	again, err := OpenTable(f)
	must(t, err)
	must(t, again.Close())
	table.words[wordSlots].Add(1)
	f = dup()
	defer f.Close()
	if got, err := OpenTable(f); got != nil || !errors.Is(err, ErrTable) {
		t.Errorf("OpenTable of another size = %v, %v, want ErrTable", got, err)
	}
	table.words[wordSlots].Add(^uint64(0))
	table.words[wordMagic].Store(tableMagic + 1)
	if got, err := OpenTable(f); got != nil || !errors.Is(err, ErrTable) {
		t.Errorf("OpenTable of another version = %v, %v, want ErrTable", got, err)
	}
	if _, err := NewTable(-1); err == nil {
		t.Error("NewTable(-1) gives a table")
	}
}

// BenchmarkReadyEvent is one reader whose every read is an event of what is ready.
func BenchmarkReadyEvent(b *testing.B) {
	u := newSetup(b, 256, 0)
	w := u.watcher(b, u.ensure)
	defer w.Close()
	must(b, u.ensure(b.Context(), u.blob, 0, u.blob.Size()))
	f, err := os.Open(u.blob.Path())
	must(b, err)
	defer f.Close()
	stop := run(b, w)
	defer stop()
	p := make([]byte, store.BlockSize)
	b.SetBytes(store.BlockSize)
	b.ReportAllocs()
	before := cpuTime(b)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, len(p))
		for pb.Next() {
			if _, err := f.ReadAt(p, 4096); err != nil {
				b.Error(err)
			}
		}
	})
	b.StopTimer()
	events := float64(w.Stats().Events)
	b.ReportMetric(events/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric((cpuTime(b)-before).Seconds()*1e6/events, "cpu-µs/event")
}

// cpuTime returns what this process has used of both kinds: its watcher and its reader.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var r unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkTakeOver is what a daemon's start costs when nothing is pending.
func BenchmarkTakeOver(b *testing.B) {
	u := newSetup(b, 16, 0)
	for b.Loop() {
		w := u.watcher(b, u.ensure)
		must(b, w.takeOver(b.Context()))
		must(b, w.Close())
	}
}
