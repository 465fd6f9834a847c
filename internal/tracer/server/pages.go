package server

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

const (
	// pageBatch is how many page events are taken from the reader at once.
	pageBatch = 512
	// maxThreads bounds the cache of threads, and of the table of processes.
	maxThreads = 1 << 16
)

// pageLog folds page events, file by file. One goroutine reads them; what it found is for
// others after stop.
type pageLog struct {
	spec     tracefs.Spec
	instance *tracefs.Instance
	reader   *tracefs.Reader
	widener  *tracefs.Widener   // of the session; nil: folios cannot be looked up
	devices  map[uint64]bool    // of the image's layers
	outside  map[inode]struct{} // files on those devices that are none of the image's
	t        *target
	comms    *comms
	max      int   // files
	start    int64 // CLOCK_MONOTONIC at arming, in nanoseconds

	begun   bool
	done    chan struct{}
	err     error // of reading; nil at the regular end
	files   pageFiles
	others  pageFiles       // on other filesystems: volumes and the like
	gaps    tracefs.Gaps    // of reads
	threads map[int32]int32 // thread to process
	events  int64
	full    bool // more files than max were touched
}

// newPageLog returns a log of an instance that is handed over; the instance stays its
// owner's.
func newPageLog(p Pages, t *target, c *comms, maxFiles int, w *tracefs.Widener) (*pageLog, error) {
	in, err := tracefs.FromFile(p.Instance, p.Spec)
	if err != nil {
		return nil, err
	}
	r, err := in.Reader()
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	return &pageLog{
		widener: w, spec: p.Spec, instance: in, reader: r, t: t, comms: c, max: maxFiles,
		done: make(chan struct{}), threads: make(map[int32]int32), gaps: tracefs.Gaps{Waits: p.Spec.Events.Has(tracefs.Wait)},
	}, nil
}

// arm names the threads of the container's processes to the kernel. by is who did so already, and says how that went; nil: nobody.
func (l *pageLog) arm(by func() error) error {
	l.devices, l.outside = l.t.devices(), l.t.outside
	if by != nil {
		return by()
	}
	return l.instance.ArmAll(l.t.threads)
}

// begin starts the clock, so long after arming, and the reading.
func (l *pageLog) begin(since time.Duration) {
	l.begun, l.start = true, monotonic()-int64(since)
	go l.run()
}

// Engines, as lists name them.
const (
	engineFiles   = "fanotify"
	enginePages   = "fanotify+filemap"    // tracefs: reads and faults
	engineInserts = "fanotify+page-cache" // tracefs: what was read into the page cache
)

// exact reports whether the events show everything that is touched, cached or not.
func (l *pageLog) exact() bool { return l.spec.Events.Contains(tracefs.Pages) }

func (l *pageLog) engine() string {
	if l.exact() {
		return enginePages
	}
	return engineInserts
}

// monotonic is CLOCK_MONOTONIC in nanoseconds, which never fails.
func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}

func (l *pageLog) run() {
	defer close(l.done)
	// Without the privilege it is an ordinary thread, and what is lost for that is counted.
	restore, _ := tracefs.Prioritize()
	defer restore()
	events := make([]tracefs.Event, pageBatch)
	for {
		n, err := l.reader.Read(events)
		for i := range events[:n] {
			l.fold(&events[i])
		}
		switch {
		case errors.Is(err, io.EOF):
			return
		case errors.Is(err, tracefs.ErrInvalid):
			l.err = err // of one page; the others tell more
		case err != nil:
			l.err = err
			return
		}
	}
}

// fold adds one event to what is known of its file.
func (l *pageLog) fold(e *tracefs.Event) {
	l.events++
	at := time.Duration(e.Time - l.start)
	switch e.Kind {
	case tracefs.Fork:
		delete(l.threads, e.Other) // an older one of this number
		if l.exact() {
			l.gaps.Note(e)
		}
		l.comms.forked(e.Other, l.process(e.PID))
		return
	case tracefs.Exec: // a thread that did is its process' first, whatever it was before
		if len(l.threads) < maxThreads {
			l.threads[e.PID] = e.PID
		}
		return
	default:
	}
	gap, passed := tracefs.Span{}, false
	if l.exact() {
		gap, passed = l.gaps.Note(e)
	}
	if e.Kind == tracefs.Wait || e.Kind == tracefs.Insert && l.exact() {
		return // nobody has touched anything yet
	}
	id := inode{unix.Mkdev(e.Major(), e.Minor()), e.Inode}
	f := l.files.find(id)
	if f == nil {
		if _, out := l.outside[id]; out || !l.devices[id.dev] {
			if l.others.len() < l.max && l.others.find(id) == nil {
				l.others.add(pageFile{inode: id})
			}
			return
		}
		if l.files.len() >= l.max {
			l.full = true
			return
		}
		pid := l.process(e.PID)
		f = l.files.add(pageFile{inode: id, pid: pid, how: trace.Opened, comm: l.comms.number(l.comms.of(pid, false))})
	}
	switch e.Kind {
	case tracefs.Read:
		f.how |= trace.Read
	case tracefs.Around:
		f.flags |= pageAround
	default:
	}
	if passed {
		l.files.touch(f, gap.First, gap.Last, at, false)
	}
	l.files.touch(f, e.First, e.Last, at, l.exact() && (e.Kind == tracefs.Read || e.Kind == tracefs.Fault))
}

// process returns the process of a thread, see comms.process.
func (l *pageLog) process(thread int32) int32 {
	if p, ok := l.threads[thread]; ok {
		return p
	}
	p := l.comms.process(thread)
	if len(l.threads) >= maxThreads {
		clear(l.threads)
	}
	l.threads[thread] = p
	return p
}

// stop reads what happened before and ends the log. It returns what is known to be missing.
func (l *pageLog) stop() []trace.Loss {
	l.quit()
	var losses []trace.Loss
	if l.err != nil {
		losses = append(losses, trace.Loss{Reason: "pages", Count: -1, Detail: fmt.Sprintf("page events could not be read: %v", l.err)})
	}
	lost, err := l.instance.Lost()
	if err != nil {
		losses = append(losses, trace.Loss{Reason: "pages", Count: -1, Detail: fmt.Sprintf("how many page events were lost is not known: %v", err)})
	} else if lost.Total() > 0 {
		losses = append(losses, trace.Loss{Reason: "overrun", Count: lost.Total(), Detail: "the ring buffers of page events were full"})
	}
	if n := l.reader.Rejoined(); n > 0 {
		losses = append(losses, trace.Loss{Reason: "exec", Count: -1, Detail: fmt.Sprintf("%d programs were started by a thread that was not its process' first: pages of their first milliseconds may be missing", n)})
	}
	if l.full {
		losses = append(losses, trace.Loss{Reason: "limit", Count: -1, Detail: fmt.Sprintf("pages of more than %d files were touched", l.max)})
	}
	return losses
}

// quit waits until nobody reads any more.
func (l *pageLog) quit() {
	if l.begun {
		l.reader.Stop()
		<-l.done
	}
}

// close ends the log, if nobody has, and gives up the descriptors.
func (l *pageLog) close() error {
	l.quit()
	return errors.Join(l.reader.Close(), l.instance.Close())
}

// widen adds to f what the kernel mapped together with what it says: see [tracefs.Widener]. name
// is the file, below the directory dir. It reports whether f has all that may have been
// touched then.
func (l *pageLog) widen(f *pageFile, dir int, name string, size int64) bool {
	huge := size >= tracefs.HugeSize
	if f.flags&pageAround == 0 && !huge {
		return true
	}
	var spans []tracefs.Span
	var at []time.Duration
	page := os.Getpagesize()
	for _, r := range l.files.ranges(nil, f, size) {
		if !r.Certain {
			spans = append(spans, tracefs.Span{First: uint64(r.Offset) / uint64(page), Last: uint64(r.Offset+r.Length-1) / uint64(page)}) //nolint:gosec // positive
			at = append(at, r.Elapsed)
		}
	}
	if len(spans) == 0 && !huge {
		return true
	}
	if l.widener == nil {
		return false
	}
	fd, err := l.t.openRegular(dir, name)
	if err != nil {
		return false
	}
	file := os.NewFile(uintptr(fd), name)
	wide, err := l.widener.Widen(file, spans)
	if huge && err == nil {
		var more []tracefs.Span
		more, err = l.widener.Huge(file) // in no event, if they were mapped
		first := l.files.first(f)
		for _, s := range more {
			wide, at = append(wide, s), append(at, first)
		}
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return false
	}
	for i, s := range wide {
		l.files.touch(f, s.First, s.Last, at[i], false)
	}
	return true
}
