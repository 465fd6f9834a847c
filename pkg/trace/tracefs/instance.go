package tracefs

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Prefix begins the name of every instance that this package makes.
const Prefix = "headstart-"

// DefaultRing is the size of an instance's ring buffers together, in bytes, where
// [Options.Ring] does not say. One event takes 44 bytes, a [Wait] 68: see docs/design.md for how fast
// rings fill and are emptied.
const DefaultRing = 4 << 20

// minRing is the least that each CPU gets, in bytes.
const minRing = 128 << 10

// Options says what an instance is like. The zero value records the best events there are.
type Options struct {
	// Events are what to record; 0: what [FS.Probe] chooses.
	Events Set
	// Ring is the size of all ring buffers together, in bytes, at least 0; 0: DefaultRing. Each CPU gets
	// 128 KiB at least, so that there is more of it where there are many.
	// It is divided by the CPUs; each gets at least 128 KiB.
	Ring int64
}

// Spec is what a process that is handed an instance must know of it. It is plain data;
// MarshalText and UnmarshalText carry it on a command line.
type Spec struct {
	// Events are what [Instance.Arm] turns on.
	Events Set
	// ReadsOneMore: the kernel reports the page behind a read as its last one.
	ReadsOneMore bool
}

// MarshalText returns the spec in one word. It never fails.
func (s Spec) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%x,%t", uint8(s.Events), s.ReadsOneMore), nil
}

// UnmarshalText accepts what MarshalText returns; anything else is [ErrInvalid].
func (s *Spec) UnmarshalText(text []byte) error {
	events, more, _ := strings.Cut(string(text), ",")
	set, err := strconv.ParseUint(events, 16, 8)
	if err != nil || Set(set)&^all != 0 || more != "true" && more != "false" {
		return fmt.Errorf("%w: instance spec %q", ErrInvalid, text)
	}
	*s = Spec{Events: Set(set), ReadsOneMore: more == "true"}
	return nil
}

// Lost counts the events that did not reach a ring buffer or were overwritten in it.
type Lost struct {
	Overrun int64 // overwritten before they were read
	Commit  int64 // lost because a nested writer filled the buffer
	Dropped int64 // not written because the buffer was full: the usual way here
}

// Total returns the sum.
func (l Lost) Total() int64 { return l.Overrun + l.Commit + l.Dropped }

// Instance is one private set of ring buffers with its filter and its events. Its methods
// may not be called concurrently, except with those of its [Reader].
type Instance struct {
	name string
	dir  dir
	fs   *FS // nil: somebody else removes it
	spec Spec
	size int64 // of all rings together, in bytes; 0: somebody else knows
}

// counter tells the instances of this process apart.
var counter atomic.Uint64

// Create makes an instance: rings sized, clock set, nothing recorded yet. It takes tens of
// milliseconds. The caller closes it before the FS. It returns what [FS.Probe] does, and
// [ErrLimit] when the kernel has no memory for it.
func (f *FS) Create(o Options) (*Instance, error) {
	if o.Ring < 0 {
		return nil, fmt.Errorf("create trace instance: ring of %d bytes", o.Ring)
	}
	events, err := f.Probe(o.Events)
	if err != nil {
		return nil, err
	}
	i, err := f.make()
	if err != nil {
		return nil, fmt.Errorf("create trace instance: %w", err)
	}
	i.spec.Events = events
	if err := i.prepare(o.Ring); err != nil {
		return nil, errors.Join(fmt.Errorf("create trace instance: %w", explain(err)), i.Close())
	}
	if events.Has(Read) {
		if i.spec.ReadsOneMore, err = f.readsOneMore(i); err != nil {
			return nil, errors.Join(fmt.Errorf("create trace instance: %w", err), i.Close())
		}
	}
	return i, nil
}

// attempts is how often an instance is made again that somebody who cleans up took away
// between its making and its locking.
const attempts = 10

// make makes and locks an instance of the kernel's defaults.
func (f *FS) make() (*Instance, error) {
	start, err := startTime(os.Getpid())
	if err != nil {
		return nil, explain(err)
	}
	for n := 1; ; n++ {
		name := fmt.Sprintf("%s%d-%d-%d", Prefix, os.Getpid(), start, counter.Add(1))
		if err := f.instances.mkdir(name); err != nil {
			return nil, explain(err)
		}
		d, err := f.take(name)
		if err == nil {
			return &Instance{name: name, dir: d, fs: f}, nil
		}
		if rerr := f.instances.rmdir(name); rerr != nil && !gone(rerr) {
			return nil, explain(errors.Join(err, rerr))
		}
		if n == attempts || !gone(err) && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, explain(err)
		}
	}
}

// take opens and locks an instance that was just made. It returns ENOENT or EWOULDBLOCK
// where somebody who cleans up was faster.
func (f *FS) take(name string) (dir, error) {
	d, err := f.instances.sub(name)
	if err != nil {
		return dir{}, err
	}
	if err = d.lock(); err == nil {
		var ok bool
		if ok, err = d.has("tracing_on"); err == nil && !ok {
			err = unix.ENOENT
		}
	}
	if err != nil {
		return dir{}, errors.Join(err, d.close())
	}
	return d, nil
}

// setup is written to every instance. What is not there in a kernel may be missing if
// optional says so.
var setup = []struct {
	file, value string
	optional    bool
}{
	{"trace_clock", "mono", false},         // CLOCK_MONOTONIC, what everybody else uses
	{"options/event-fork", "1", false},     // the filter follows fork(2)
	{"options/overwrite", "0", false},      // keep what came first: first touches are what counts
	{"options/record-cmd", "0", true},      // names of processes are not asked for; saves work at each switch
	{"options/markers", "0", true},         // nobody writes into the trace
	{"buffer_percent", "25", true},         // wake the reader when a quarter is full, not at each event
	{"options/disable_on_free", "0", true}, // nobody uses free_buffer
}

// prepare sets the instance up.
func (i *Instance) prepare(ring int64) error {
	if ring == 0 {
		ring = DefaultRing
	}
	for _, s := range setup {
		err := i.dir.write(s.file, s.value)
		if err != nil && (!s.optional || !errors.Is(err, unix.ENOENT)) {
			return fmt.Errorf("set %s: %w", s.file, err)
		}
	}
	if i.spec.Events.Has(Wait) {
		if err := i.dir.write("events/"+tracepoints[Wait].dir+"/filter", waitFilter); err != nil {
			return fmt.Errorf("set filter: %w", err)
		}
	}
	cpus, err := i.cpus()
	if err != nil {
		return err
	}
	n := int64(min(online(), len(cpus)))
	each := max(ring/n, minRing)
	if err := i.dir.write("buffer_size_kb", strconv.FormatInt(each>>10, 10)); err != nil {
		return fmt.Errorf("ring of %d bytes for each of %d CPUs: %w", each, len(cpus), err)
	}
	i.size = n * each
	return nil
}

// cpus returns the directories of the CPUs that there may be; those that are not online have
// no ring.
func (i *Instance) cpus() ([]string, error) {
	names, err := i.dir.names("per_cpu")
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: per_cpu is empty", ErrInvalid)
	}
	return names, nil
}

// FromFile returns the instance whose directory is f, as [Instance.File] of another process
// was inherited, with that one's [Instance.Spec]. It takes over f. Closing it leaves the
// instance to its maker. It returns [ErrUnsupported] where f is no instance.
func FromFile(f *os.File, spec Spec) (*Instance, error) {
	i := &Instance{name: f.Name(), dir: dir{f}, spec: spec}
	if ok, err := i.dir.has("set_event_pid"); err != nil || !ok {
		return nil, errors.Join(fmt.Errorf("%w: %s is no trace instance", ErrUnsupported, f.Name()), err, f.Close())
	}
	return i, nil
}

// Name returns the name of the instance's directory below instances/.
func (i *Instance) Name() string { return i.name }

// Spec returns what a process that is handed the instance must know.
func (i *Instance) Spec() Spec { return i.spec }

// File returns the instance's directory, to be inherited by another process, which hands
// it to [FromFile]: all files are opened below it, so that it works in every mount
// namespace. It stays the instance's.
func (i *Instance) File() *os.File { return i.dir.file }

// Arm makes the instance record what the threads do, and everything that they fork from
// then on. They are numbers of the initial PID namespace, see [Threads]; a process whose
// threads are not all named is recorded in part. It takes less than a millisecond of a
// reset instance. On an error nothing is recorded.
func (i *Instance) Arm(threads ...int) error {
	if len(threads) == 0 {
		return errors.New("arm trace instance: no thread")
	}
	var list strings.Builder
	for _, t := range threads {
		if t <= 0 {
			return fmt.Errorf("arm trace instance: thread %d", t)
		}
		fmt.Fprintf(&list, "%d ", t)
	}
	// The filter comes first: without it the events are everybody's.
	err := i.dir.write("set_event_pid", list.String())
	for k := range Kind(kinds) {
		if err == nil && i.spec.Events.Has(k) {
			err = i.dir.write("events/"+tracepoints[k].dir+"/enable", "1")
		}
	}
	if err != nil {
		return fmt.Errorf("arm trace instance: %w", errors.Join(explain(err), i.Disarm()))
	}
	return nil
}

// Add names further threads to an armed instance.
func (i *Instance) Add(threads ...int) error {
	var list strings.Builder
	for _, t := range threads {
		fmt.Fprintf(&list, "%d ", t)
	}
	if list.Len() == 0 {
		return nil
	}
	if err := i.dir.append("set_event_pid", list.String()); err != nil {
		return fmt.Errorf("add threads to trace instance: %w", explain(err))
	}
	return nil
}

// Filter returns the threads that the instance records; those that ended are none of them. Without any it records
// nobody, or everybody where [Instance.Arm] was never called.
func (i *Instance) Filter() ([]int, error) {
	text, err := i.dir.read("set_event_pid")
	if err != nil {
		return nil, fmt.Errorf("threads of trace instance: %w", explain(err))
	}
	var threads []int
	for field := range strings.FieldsSeq(string(text)) {
		n, err := strconv.Atoi(field)
		if err != nil { // "no pid"
			continue
		}
		threads = append(threads, n)
	}
	return threads, nil
}

// Pause ends recording at once and cheaply; what was recorded can still be read. The
// tracepoints cost the machine a little until Disarm.
func (i *Instance) Pause() error {
	if err := i.dir.write("tracing_on", "0"); err != nil {
		return fmt.Errorf("pause trace instance: %w", explain(err))
	}
	return nil
}

// Disarm ends recording and forgets the threads; what was recorded can still be read.
func (i *Instance) Disarm() error {
	var errs []error
	for k := range Kind(kinds) {
		if i.spec.Events.Has(k) {
			errs = append(errs, i.dir.write("events/"+tracepoints[k].dir+"/enable", "0"))
		}
	}
	errs = append(errs, i.dir.write("set_event_pid", ""))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("disarm trace instance: %w", explain(err))
	}
	return nil
}

// Reset disarms the instance and throws away what it holds and has counted, so that it is
// as new.
func (i *Instance) Reset() error {
	if err := i.Disarm(); err != nil {
		return err
	}
	return i.empty()
}

// empty makes a disarmed instance as new.
func (i *Instance) empty() error {
	// Opening the file for writing empties all rings and resets their counts
	// (kernel/trace/trace.c tracing_open).
	if err := errors.Join(i.dir.write("trace", ""), i.dir.write("tracing_on", "1")); err != nil {
		return fmt.Errorf("reset trace instance: %w", explain(err))
	}
	return nil
}

// Lost returns the events lost since the instance was created or reset.
// Source: kernel/trace/trace.c tracing_stats_read.
func (i *Instance) Lost() (Lost, error) {
	cpus, err := i.cpus()
	if err != nil {
		return Lost{}, fmt.Errorf("count lost events: %w", err)
	}
	var sum Lost
	for _, cpu := range cpus {
		text, err := i.dir.read("per_cpu/" + cpu + "/stats")
		if err != nil {
			return Lost{}, fmt.Errorf("count lost events: %w", err)
		}
		l, err := parseStats(text)
		if err != nil {
			return Lost{}, fmt.Errorf("count lost events of %s: %w", cpu, err)
		}
		sum.Overrun += l.Overrun
		sum.Commit += l.Commit
		sum.Dropped += l.Dropped
	}
	return sum, nil
}

// parseStats parses a file per_cpu/cpuN/stats, which must name all three counts.
func parseStats(text []byte) (Lost, error) {
	var l Lost
	want := map[string]*int64{"overrun": &l.Overrun, "commit overrun": &l.Commit, "dropped events": &l.Dropped}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		count := want[key]
		if count == nil {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		if err != nil || n < 0 {
			return Lost{}, fmt.Errorf("%w: stats: %q", ErrInvalid, strings.TrimSpace(line))
		}
		*count = n
		delete(want, key)
	}
	if len(want) != 0 {
		return Lost{}, fmt.Errorf("%w: stats lack %d counts: %q", ErrInvalid, len(want), text)
	}
	return l, nil
}

// Close ends the instance. Its maker's Close removes it, which takes tens of milliseconds,
// and fails with EBUSY while somebody has a [Reader] of it open; it may then be called again.
// After a success later calls return nil.
func (i *Instance) Close() error {
	if i.fs != nil {
		if err := i.fs.instances.rmdir(i.name); err != nil && !gone(err) {
			return fmt.Errorf("remove trace instance: %w", err)
		}
	}
	err := i.dir.close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// layout reads how the instance's pages and events look.
func (i *Instance) layout() (*layout, error) {
	text, err := i.dir.read("events/header_page")
	if err != nil {
		return nil, explain(err)
	}
	l, err := newLayout(text)
	if err != nil {
		return nil, err
	}
	for k := range Kind(kinds) {
		if !i.spec.Events.Has(k) {
			continue
		}
		if text, err = i.dir.read("events/" + tracepoints[k].dir + "/format"); err != nil {
			return nil, explain(err)
		}
		if err := l.add(k, text); err != nil {
			return nil, err
		}
	}
	l.readsOneMore = i.spec.ReadsOneMore
	return l, nil
}

// calibration is what is known of the kernel's way to report reads.
type calibration struct{ known, oneMore bool }

// readsOneMore finds out whether the kernel reports a read of one page as one of two, as
// Linux does before "filemap: fix the last_index of mm_filemap_get_pages" (2025): it reads a
// byte of this program under its own eyes, in an instance that is idle and empty and is so afterwards.
func (f *FS) readsOneMore(i *Instance) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for range 3 { // what others read at that moment may fill the ring
		if lost, err := f.calibrateBy(i); err != nil || !lost || f.calibrate.known {
			return f.calibrate.oneMore, err
		}
	}
	return false, errors.New("calibrate: others read so much that this program's own read is not among what was recorded")
}

// calibrateBy does so once, unless it is known, and reports whether events were lost meanwhile. Called with mu held.
func (f *FS) calibrateBy(i *Instance) (overrun bool, err error) {
	if f.calibrate.known {
		return false, nil
	}
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		return false, err
	}
	defer exe.Close() //nolint:errcheck // read only
	r, err := i.Reader()
	if err != nil {
		return false, err
	}
	defer r.Close() //nolint:errcheck // its descriptors only
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := int32(unix.Gettid()) //nolint:gosec // a pid has 32 bits
	// For this moment everybody's reads are recorded: to forget a filter takes the kernel tens of milliseconds.
	enable := "events/" + tracepoints[Read].dir + "/enable"
	if err = i.dir.write(enable, "1"); err == nil {
		_, err = exe.ReadAt(make([]byte, 1), 0)
	}
	err = errors.Join(err, i.dir.write(enable, "0"))
	r.Stop()
	events := make([]Event, 64)
	for err == nil { // to the end, so that nothing is left in the rings
		var n int
		n, err = r.Read(events)
		for _, e := range events[:n] {
			// None on a filesystem that does not read through the page cache: nothing to correct.
			if !f.calibrate.known && e.Kind == Read && e.PID == tid && e.First == 0 && e.Last <= 1 {
				f.calibrate = calibration{known: true, oneMore: e.Last == 1}
			}
		}
	}
	if errors.Is(err, errEOF) {
		err = nil
	}
	lost, lerr := i.Lost()
	overrun = lost.Total() > 0
	if err = errors.Join(err, lerr); err != nil || overrun {
		err = errors.Join(err, i.Reset())
	} else {
		err = i.dir.write("tracing_on", "1")
	}
	if err != nil {
		return false, fmt.Errorf("calibrate: %w", explain(err))
	}
	return overrun, nil
}
