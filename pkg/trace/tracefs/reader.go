package tracefs

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Interval is how long a [Reader] sleeps at most while nothing fills the rings: the kernel
// wakes it when a quarter of a ring is full, so that few events cost no wake-up each.
const Interval = 500 * time.Millisecond

var errEOF = io.EOF

// Reader yields the events of one instance, of all CPUs, in order of time. Read and Close
// may not be called concurrently with themselves or each other; Stop may at any time.
type Reader struct {
	in      *Instance
	layout  *layout
	streams []*stream
	polls   []unix.PollFd
	page    []byte
	read    func(fd int, p []byte) (int, error) // read(2), but in tests
	paused  bool
	sleep   time.Duration // how long the next wait takes at most; 0: Interval

	missed, rejoined atomic.Int64

	// mu guards wake, which Stop writes to and Close closes.
	mu       sync.Mutex
	wake     int // eventfd; -1: closed
	stopping atomic.Bool
}

// stream is the ring of one CPU.
type stream struct {
	file   *os.File
	fd     int
	buf    []Event // of the last page
	events []Event // the part of buf that is not yet handed out
	until  int64   // every event of this CPU up to this time has been decoded; nanoseconds
}

// Reader returns a reader of the instance. The caller closes it before the instance. It
// may be made before or after Arm; an instance has one at a time.
func (i *Instance) Reader() (*Reader, error) {
	l, err := i.layout()
	if err != nil {
		return nil, fmt.Errorf("read trace instance: %w", err)
	}
	cpus, err := i.cpus()
	if err != nil {
		return nil, fmt.Errorf("read trace instance: %w", explain(err))
	}
	r := &Reader{in: i, layout: l, page: make([]byte, l.size), read: unix.Read, wake: -1}
	for _, cpu := range cpus {
		f, err := i.dir.open("per_cpu/"+cpu+"/trace_pipe_raw", unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("read trace instance: %w", explain(err)), r.Close())
		}
		s := &stream{file: f, fd: int(f.Fd())}
		// Fd makes the file blocking.
		if err := unix.SetNonblock(s.fd, true); err != nil {
			return nil, errors.Join(fmt.Errorf("read trace instance: %w", err), f.Close(), r.Close())
		}
		r.streams = append(r.streams, s)
		r.polls = append(r.polls, unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN}) //nolint:gosec // a descriptor
	}
	if r.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		r.wake = -1
		return nil, errors.Join(fmt.Errorf("read trace instance: %w", err), r.Close())
	}
	r.polls = append(r.polls, unix.PollFd{Fd: int32(r.wake), Events: unix.POLLIN}) //nolint:gosec // a descriptor
	return r, nil
}

// Read fills events with what comes next and returns how many there were, at least one
// unless there is an error. It blocks until there is something. After [Reader.Stop] it
// returns what happened before and then io.EOF. Events are in order of time; one that
// another CPU was just writing may come some microseconds late. [ErrInvalid] means that a
// page did not make sense; its events are missing, and Read may be called again.
func (r *Reader) Read(events []Event) (int, error) {
	if len(events) == 0 {
		return 0, errors.New("read trace instance: no room for events")
	}
	for {
		// Asked before reading: what comes after Stop is nobody's.
		stopping := r.stopping.Load()
		if stopping && !r.paused {
			if err := r.in.Pause(); err != nil {
				return 0, err
			}
			r.paused = true
		}
		n, err := r.fill(events)
		if n > 0 || err != nil {
			return n, err
		}
		if stopping {
			return 0, io.EOF
		}
		if err := r.wait(); err != nil {
			return 0, err
		}
	}
}

// soon is how long the first wait after Wake takes: a program that was opened to be executed
// has taken over its process by then, mostly. Each further wait takes twice as long.
const soon = 4 * time.Millisecond

// wait returns when a ring fills, somebody wakes the reader, or it is time.
func (r *Reader) wait() error {
	timeout := Interval
	if r.sleep > 0 {
		timeout = r.sleep
		if r.sleep *= 2; r.sleep >= Interval {
			r.sleep = 0
		}
	}
	_, err := unix.Poll(r.polls, int(timeout/time.Millisecond))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for trace events: %w", err)
	}
	for i := range r.streams {
		if r.polls[i].Revents&^unix.POLLIN != 0 {
			// A CPU that is not online has no ring, and poll would return at once for ever.
			r.polls[i].Fd = -1
		}
	}
	if r.polls[len(r.polls)-1].Revents&unix.POLLIN != 0 {
		var b [8]byte
		_, _ = unix.Read(r.wake, b[:]) // only a wake-up
		r.sleep = soon
	}
	return nil
}

// fill hands out what is there, at most len(events).
func (r *Reader) fill(events []Event) (int, error) {
	n := 0
	for n < len(events) {
		first, horizon := r.first()
		if first == nil || first.events[0].Time > horizon {
			at := int64(math.MaxInt64)
			if first != nil {
				at = first.events[0].Time
			}
			more, err := r.refill(at)
			if err != nil {
				return n, err
			}
			if first == nil && !more {
				return n, nil
			}
			continue
		}
		// All events of this CPU that nobody else's can come before.
		run := 1
		limit := r.limit(first, horizon)
		for run < len(first.events) && n+run < len(events) && first.events[run].Time <= limit {
			run++
		}
		copy(events[n:], first.events[:run])
		first.events = first.events[run:]
		n += run
	}
	return n, nil
}

// first returns the stream with the earliest event, nil when no stream has one, and the
// time up to which the streams without events are known to have none.
func (r *Reader) first() (*stream, int64) {
	var first *stream
	horizon := int64(math.MaxInt64)
	for _, s := range r.streams {
		switch {
		case len(s.events) == 0:
			horizon = min(horizon, s.until)
		case first == nil || s.events[0].Time < first.events[0].Time:
			first = s
		}
	}
	return first, horizon
}

// limit returns the time up to which the events of first come before those of all others.
func (r *Reader) limit(first *stream, horizon int64) int64 {
	for _, s := range r.streams {
		if s != first && len(s.events) > 0 {
			horizon = min(horizon, s.events[0].Time)
		}
	}
	return horizon
}

// refill reads a page of each ring whose events up to the time at are not known, and
// reports whether there was any. Rings that are empty are then known up to at, or to the
// present where at is the end of time.
func (r *Reader) refill(at int64) (bool, error) {
	more := false
	for i, s := range r.streams {
		if len(s.events) > 0 || s.until >= at {
			continue
		}
		// Before the read: an event that the read does not find is later.
		now, err := monotonic()
		if err != nil {
			return more, err
		}
		if err := r.next(s); err != nil {
			return more, err
		}
		if len(s.events) > 0 {
			more = true
			r.polls[i].Fd = int32(s.fd) //nolint:gosec // a descriptor; it has a ring, if it had none before
			continue
		}
		// The ring's clock may be ahead of ours by what adjusting it takes, hence at.
		s.until = now
		if at != math.MaxInt64 {
			s.until = max(now, at)
		}
	}
	return more, nil
}

// next decodes the next page of s that has events; there is none when s.events is empty
// then.
func (r *Reader) next(s *stream) error {
	for len(s.events) == 0 {
		n, err := r.read(s.fd, r.page)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENODEV), err == nil && n == 0: // ENODEV: the CPU is not online
			return nil
		case err != nil:
			return fmt.Errorf("read trace events: %w", err)
		}
		var info pageInfo
		s.buf, info, err = r.layout.decodePage(s.buf[:0], r.page[:n])
		s.events = s.buf
		if err != nil {
			return fmt.Errorf("read trace events: %w", err)
		}
		if info.missed == unknown {
			info.missed = 1
		}
		r.missed.Add(int64(info.missed))
		r.follow(s.events)
		if len(s.events) > 0 {
			s.until = s.events[len(s.events)-1].Time
		}
	}
	return nil
}

// follow puts processes back into the filter that left it because a thread other than their
// first called execve: the kernel takes a process' number out when its first thread exits,
// which then is the number of the thread that goes on (fs/exec.c de_thread).
func (r *Reader) follow(events []Event) {
	for i := range events {
		e := &events[i]
		if e.Kind != Exec || e.Other == e.PID || r.paused {
			continue
		}
		r.rejoined.Add(1)
		threads, _ := Family(int(e.PID)) // none: it is gone
		if err := r.in.Add(threads...); err != nil {
			r.missed.Add(1) // and the count of rejoined says why
		}
	}
}

// Rejoined returns how many processes left the filter by execve in a thread that was not
// their first, and were put back: pages that they touched in between may be missing. Safe
// at any time.
func (r *Reader) Rejoined() int64 { return r.rejoined.Load() }

// Wake makes Read look at the rings at once, and a few times more in the next [Interval],
// instead of when they fill or that is over. Call it when a program is started: it shortens
// what [Reader.Rejoined] counts. Safe at any time.
func (r *Reader) Wake() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wake >= 0 {
		one := [8]byte{1, 1} // not 0 in either byte order
		_, _ = unix.Write(r.wake, one[:])
	}
}

// monotonic returns CLOCK_MONOTONIC in nanoseconds.
func monotonic() (int64, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return ts.Nano(), nil
}

// Missed returns how many events the rings said were overwritten before they were read, at
// least; [Instance.Lost] counts them too, and others. Safe at any time.
func (r *Reader) Missed() int64 { return r.missed.Load() }

// Stop asks the reader to end: recording pauses, Read returns what happened before and then
// io.EOF. Safe at any time, any number of times.
func (r *Reader) Stop() {
	r.stopping.Store(true)
	r.Wake()
}

// Close gives the reader's files back; what it did not read stays in the instance. Later
// calls return nil.
func (r *Reader) Close() error {
	var errs []error
	for _, s := range r.streams {
		errs = append(errs, s.file.Close())
	}
	r.streams, r.polls = nil, nil
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wake >= 0 {
		errs = append(errs, unix.Close(r.wake))
		r.wake = -1
	}
	return errors.Join(errs...)
}
