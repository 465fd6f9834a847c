package tracefs

import "slices"

// Gaps finds pages that reads touched without an event. The kernel reads what is cached up to the first page that is
// still on its way from storage, and says nothing of that part when it has to wait for the page; the next event of
// the same read begins there (mm/filemap.c filemap_get_pages, from Linux 6.11 to 6.18 at least: where filemap_update_page
// returns AOP_TRUNCATED_PAGE, what comes before is returned past the tracepoint). A program that reads a cold file by the megabyte
// is so denied some of its pages, more where storage is slow.
//
// What is on its way came into the page cache a moment ago, which [Insert] tells, and who waits for it sleeps, which
// [Wait] tells: so whoever records all three kinds, as [FS.Probe] chooses, knows of each [Read] whether there may be a gap before
// it, and where that begins. Missed is what a read passes over for a page that an earlier one had asked for and that arrives between the look at it and the
// sleep, less than a microsecond. The zero value knows nothing yet. A Gaps is not safe for concurrent use. It needs some 10 MiB at most, whatever comes.
type Gaps struct {
	// Waits says that [Wait] is recorded. Without, each read may have waited.
	Waits bool

	files   map[gapFile][]gapRun
	runs    int    // of all files
	clock   uint64 // events so far
	threads map[int32]*gapThread
	pid     int32 // the thread that was asked for last
	thread  *gapThread
}

type gapFile struct {
	device uint32
	inode  uint64
}

// gapRun is neighbouring pages of which nobody read one since they came, as far as is known.
type gapRun struct {
	first, last uint64
	at          uint64 // when its last page came, by the clock
}

// gapThread says when a thread read and waited last, by the clock.
type gapThread struct{ read, waited uint64 }

const (
	// gapRuns is how many runs are kept at most.
	gapRuns = 1 << 15
	// gapAge is after how many further events a run is forgotten where there are too many: more than any device has
	// on its way (nr_requests: 64 to 1,023).
	gapAge = gapRuns / 2
	// gapThreads is how many threads are known at most.
	gapThreads = 1 << 16
)

// Note takes the events of an instance, in their order. Where e is a [Read] it returns the pages right before it that the
// same read may have touched unsaid: an upper bound, as are those of [Around]. False: there are none.
func (g *Gaps) Note(e *Event) (Span, bool) {
	switch e.Kind {
	case Insert:
		g.clock++
		g.insert(gapFile{e.Device, e.Inode}, e.First, e.Last)
	case Wait:
		g.clock++
		g.of(e.PID).waited = g.clock
	case Read:
		g.clock++
		t := g.of(e.PID)
		gap, ok := g.read(gapFile{e.Device, e.Inode}, e.First, e.Last, *t)
		t.read = g.clock
		return gap, ok
	default: // a fault is told before anything is looked up
	}
	return Span{}, false
}

// of returns what is known of a thread. One that was forgotten may have waited, for all that is known.
func (g *Gaps) of(pid int32) *gapThread {
	if g.thread != nil && g.pid == pid {
		return g.thread
	}
	if g.threads == nil {
		g.threads = make(map[int32]*gapThread)
	}
	t := g.threads[pid]
	if t == nil {
		if len(g.threads) >= gapThreads {
			clear(g.threads)
		}
		t = new(gapThread)
		g.threads[pid] = t
	}
	g.pid, g.thread = pid, t
	return t
}

// insert adds pages. They are of one run with those before them if these came just before, so that a run is of one time.
func (g *Gaps) insert(f gapFile, first, last uint64) {
	if g.files == nil {
		g.files = make(map[gapFile][]gapRun)
	}
	runs := g.files[f]
	g.runs -= len(runs)
	n := gapRun{first, last, g.clock}
	i := firstEnding(runs, first)
	end := i
	if i > 0 && runs[i-1].last == first-1 && runs[i-1].at == g.clock-1 {
		i--
		n.first = runs[i].first
	}
	for end < len(runs) && runs[end].first <= n.last { // they left the cache meanwhile
		n.first, n.last = min(n.first, runs[end].first), max(n.last, runs[end].last)
		end++
	}
	g.keep(f, slices.Replace(runs, i, end, n))
	if g.runs > gapRuns {
		g.forget()
	}
}

// firstEnding returns the index of the first run that ends at or behind a page.
func firstEnding(runs []gapRun, page uint64) int {
	i, _ := slices.BinarySearchFunc(runs, page, func(r gapRun, p uint64) int {
		if r.last < p {
			return -1
		}
		return 1
	})
	return i
}

// forget drops the runs to which nothing was added for long. Those that stay were added to at times of their own, so there are gapAge at most.
func (g *Gaps) forget() {
	g.runs = 0
	for f, runs := range g.files {
		g.keep(f, slices.Clip(slices.DeleteFunc(runs, func(r gapRun) bool { return r.at+gapAge <= g.clock })))
	}
}

// keep sets what is known of a file, which is not counted yet.
func (g *Gaps) keep(f gapFile, runs []gapRun) {
	if g.runs += len(runs); len(runs) == 0 {
		delete(g.files, f)
		return
	}
	g.files[f] = runs
}

// read returns the gap before a read. What was read, and what may have been, is of no further interest: only what comes before
// the next page that is on its way is.
func (g *Gaps) read(f gapFile, first, last uint64, by gapThread) (gap Span, ok bool) {
	runs, known := g.files[f]
	if !known {
		return gap, false
	}
	i := firstEnding(runs, first)
	end := i
	for end < len(runs) && runs[end].last <= last {
		end++
	}
	if i < len(runs) && runs[i].first <= first {
		came := runs[i].at
		for i > 0 && runs[i-1].last == runs[i].first-1 {
			i--
		}
		if runs[i].first < first {
			// Who found all that he read in the cache, which others or earlier reads had brought there, did not wait.
			if g.Waits && came <= by.read && by.waited <= by.read {
				return gap, false
			}
			gap, ok = Span{First: runs[i].first, Last: first - 1}, true
		}
	}
	g.runs -= len(runs)
	if end < len(runs) && runs[end].first <= last {
		runs[end].first = last + 1
	}
	g.keep(f, slices.Delete(runs, i, end))
	return gap, ok
}
