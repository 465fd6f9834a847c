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
// it. Where the read began follows from what the thread brought into the cache for it, and from where its last read of the file ended.
//
// Not found is what is passed over by who does not sleep that way (io_uring, RWF_NOWAIT, a page that arrives between the look at it and the
// sleep); for pages that somebody had asked for whose insertions are not recorded; by a read that begins before the end of the same thread's
// last one of the file; and over pages that were cached beforehand, by a thread that was not the last to read the file since something of it
// came into the cache. Nor is a page that could not be read ahead for want of memory, of which there is no event either.
//
// The zero value knows nothing yet. A Gaps is not safe for concurrent use. It needs some 20 MiB at most, whatever comes.
type Gaps struct {
	// Waits says that [Wait] is recorded. Without, each read may have waited.
	Waits bool

	files   map[gapFile]*gapPages
	runs    int    // of all files
	clock   uint64 // insertions so far
	threads map[int32]*gapThread
	forgot  bool  // some threads
	pid     int32 // the thread that was asked for last
	thread  *gapThread
}

type gapFile struct {
	device uint32
	inode  uint64
}

// gapPages is what is known of a file.
type gapPages struct {
	runs []Span // what came into the page cache; disjoint, in order, not adjacent
	at   uint64 // when something came last, by the clock
	// Of the last read: who did it, 0: nobody yet, where its event began, and the page behind it.
	by         int32
	first, end uint64
}

// gapThread is what a thread did since it last read.
type gapThread struct {
	waits int
	// What it brought into the page cache of one file, lies in here.
	brought     gapFile
	first, last uint64 // first > last: nothing
	faults      bool   // what it brings of a file now is for a fault
	faulted     gapFile
}

const (
	// gapRuns is how many runs are kept at most, and gapFileRuns of one file.
	gapRuns, gapFileRuns = 1 << 15, 1 << 10
	// gapAge is after how many further insertions a file is forgotten where there are too many runs: more than any device has
	// on its way (nr_requests: 64 to 1,023).
	gapAge = gapRuns / 2
	// gapThreads is how many threads are known at most.
	gapThreads = 1 << 16
	// gapMost is the most pages that a gap has where the beginning of the read is not known better.
	gapMost = 1 << 10
)

// Note takes the events of an instance, in their order. Where e is a [Read] it returns the pages right before it that the
// same read may have touched unsaid: an upper bound, as are those of [Around]. False: there are none.
func (g *Gaps) Note(e *Event) (gap Span, ok bool) {
	f := gapFile{e.Device, e.Inode}
	switch e.Kind {
	case Insert:
		g.insert(f, e.First, e.Last)
		g.of(e.PID).bring(f, e.First, e.Last)
	case Wait:
		g.of(e.PID).waits++
	case Fault:
		t := g.of(e.PID)
		t.faults, t.faulted = true, f
	case Around:
		g.of(e.PID).faults = false
	case Read:
		t := g.of(e.PID)
		if p := g.files[f]; p != nil {
			began := g.began(f, p, e, t)
			gap, ok = Span{First: began, Last: e.First - 1}, began < e.First
			p.by, p.first, p.end = e.PID, e.First, e.Last+1
		}
		*t = gapThread{first: 1}
	default:
	}
	return gap, ok
}

// of returns what is known of a thread.
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
			g.forgot = true
		}
		if t = (&gapThread{first: 1}); g.forgot {
			t.waits = 2 // for all that is known
		}
		g.threads[pid] = t
	}
	g.pid, g.thread = pid, t
	return t
}

// bring notes that the thread brought pages into the cache: for a read, unless it is in a fault.
func (t *gapThread) bring(f gapFile, first, last uint64) {
	switch {
	case t.faults && t.faulted == f:
	case t.first > t.last || t.brought != f:
		t.brought, t.first, t.last = f, first, last
	case first > t.last && first-t.last > gapMost || first < t.first && t.first-last > gapMost: // something else
		t.first, t.last = first, last
	default:
		t.first, t.last = min(t.first, first), max(t.last, last)
	}
}

// insert adds pages to what came into the cache.
func (g *Gaps) insert(f gapFile, first, last uint64) {
	if g.files == nil {
		g.files = make(map[gapFile]*gapPages)
	}
	p := g.files[f]
	if p == nil {
		p = new(gapPages)
		g.files[f] = p
	}
	g.clock++
	p.at = g.clock
	n := Span{First: first, Last: last}
	i := firstEnding(p.runs, max(first, 1)-1)
	end := i
	for end < len(p.runs) && (p.runs[end].First <= n.Last || p.runs[end].First-n.Last == 1) {
		n.First, n.Last = min(n.First, p.runs[end].First), max(n.Last, p.runs[end].Last)
		end++
	}
	g.runs -= len(p.runs)
	if p.runs = slices.Replace(p.runs, i, end, n); len(p.runs) > gapFileRuns {
		p.runs = []Span{n}
	} else if cap(p.runs) > 4*len(p.runs)+16 {
		p.runs = slices.Clone(p.runs) // gives the memory back
	}
	if g.runs += len(p.runs); g.runs > gapRuns {
		g.forget()
	}
}

// firstEnding returns the index of the first run that ends at or behind a page.
func firstEnding(runs []Span, page uint64) int {
	i, _ := slices.BinarySearchFunc(runs, page, func(r Span, p uint64) int {
		if r.Last < p {
			return -1
		}
		return 1
	})
	return i
}

// forget drops the files into whose cache nothing came for long, and all others too where that is not enough.
func (g *Gaps) forget() {
	g.runs = 0
	for f, p := range g.files {
		if p.at+gapAge <= g.clock {
			delete(g.files, f)
			continue
		}
		p.runs = slices.Clip(p.runs)
		g.runs += len(p.runs)
	}
	if g.runs > gapRuns/2 {
		clear(g.files)
		g.runs = 0
	}
}

// began returns where a read may have begun of which e is the first event: where e begins, unless pages were passed over.
func (g *Gaps) began(f gapFile, p *gapPages, e *Event, t *gapThread) uint64 {
	i := firstEnding(p.runs, e.First)
	if i == len(p.runs) || p.runs[i].First > e.First {
		return e.First // was not on its way
	}
	page, waits := e.First, 1
	brought := t.brought == f && t.first <= e.First && e.First <= t.last
	if brought {
		// It has to wait once for what it brought itself. What it waited for besides came before.
		page, waits = max(t.first, max(e.First, gapMost)-gapMost), 2
	}
	if g.Waits && t.waits < waits {
		return page
	}
	began := max(p.runs[firstEnding(p.runs, page)].First, max(page, gapMost)-gapMost)
	switch {
	case p.by != e.PID || page < p.first:
	case page <= p.end:
		began = page // the read goes on from there
	case page-p.end <= gapMost:
		began = p.end // over whatever was cached
	default:
		began = max(began, p.end)
	}
	if brought && p.runs[firstEnding(p.runs, began)].First >= page {
		return page // nothing that it may have waited for besides
	}
	return began
}
