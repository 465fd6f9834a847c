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
// A page may arrive between the look at it and the sleep: so a thread that does not sleep may have passed over pages too, where what it finds
// was read ahead for it a moment ago and lies not far behind where its last read of the file ended.
//
// Not found is what is passed over by others that do not sleep that way (io_uring, RWF_NOWAIT); of more than 128 pages that somebody had asked
// for whose insertions are not recorded, and of fewer without sleep; by a read that begins before the end of the same thread's last one of the
// file; and over pages that were cached beforehand, by a thread that was not the last to read the file since something of it came into the
// cache. Nor is a page that could not be read ahead for want of memory, of which there is no event either.
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
	runs  gapSet // what came into the page cache
	fresh gapSet // what of it has not been read since
	at    uint64 // when something came last, by the clock
	time  int64  // of that event
	// Of the last read: who did it, 0: nobody yet, where its event began, and the page behind it.
	by         int32
	first, end uint64
}

// gapThread is what a thread did since it last read.
type gapThread struct {
	waits int
	// What it brought into the page cache of a file lies in here: of the two last files, as a file may lie in another one's.
	brought [2]gapBrought
	faults  bool // what it brings of a file now is for a fault
	faulted gapFile
	reads   gapFile // the last one
	end     uint64  // the page behind that read; 0: it has not read anything
}

type gapBrought struct {
	file        gapFile
	first, last uint64
	any         bool // false: nothing
}

const (
	// gapRuns is how many runs are kept at most, and gapFileRuns of one file.
	gapRuns, gapFileRuns = 1 << 14, 1 << 10
	// gapAge is after how many further insertions a file is forgotten where there are too many runs: more than any device has
	// on its way (nr_requests: 64 to 1,023).
	gapAge = gapRuns / 2
	// gapThreads is how many threads are known at most.
	gapThreads = 1 << 16
	// gapTime is for how long pages may be on their way, in nanoseconds, where nobody slept for them.
	gapTime = 1e9
	// gapMost is the most pages that a gap has where the beginning of the read is not known better.
	gapMost = 1 << 10
	// gapForeign is the most pages that a gap has before what threads that are not recorded may have asked for.
	gapForeign = 1 << 7
)

// Note takes the events of an instance, in their order. Where e is a [Read] it returns the pages right before it that the
// same read may have touched unsaid: an upper bound, as are those of [Around]. False: there are none.
func (g *Gaps) Note(e *Event) (gap Span, ok bool) {
	f := gapFile{e.Device, e.Inode}
	switch e.Kind {
	case Insert:
		g.insert(f, e)
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
		p := g.files[f]
		began := g.began(f, p, e, t)
		gap, ok = Span{First: began, Last: e.First - 1}, began < e.First
		if p != nil {
			p.by, p.first, p.end = e.PID, e.First, e.Last+1
			g.runs -= len(p.fresh)
			p.fresh.remove(began, e.Last)
			g.runs += len(p.fresh)
		}
		t.read(f, e.Last+1)
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
		if t = new(gapThread); g.forgot {
			t.waits = 2 // for all that is known
		}
		g.threads[pid] = t
	}
	g.pid, g.thread = pid, t
	return t
}

// bring notes that the thread brought pages into the cache: for a read, unless it is in a fault.
func (t *gapThread) bring(f gapFile, first, last uint64) {
	if t.faults && t.faulted == f {
		return
	}
	b := &t.brought[0]
	if b.file != f {
		t.brought[0], t.brought[1] = t.brought[1], t.brought[0]
	}
	switch {
	case !b.any || b.file != f || first > b.last && first-b.last > gapMost || first < b.first && b.first-last > gapMost: // something else
		*b = gapBrought{f, first, last, true}
	default:
		b.first, b.last = min(b.first, first), max(b.last, last)
	}
}

// read notes that a read of the file is said, for which all was that the thread did before.
func (t *gapThread) read(f gapFile, end uint64) {
	t.waits, t.faults, t.reads, t.end = 0, false, f, end
	for i := range t.brought {
		if t.brought[i].file == f {
			t.brought[i] = gapBrought{}
		}
	}
}

// with returns what the thread brought of a file with this page among it, false: nothing.
func (t *gapThread) with(f gapFile, page uint64) (gapBrought, bool) {
	for _, b := range t.brought {
		if b.any && b.file == f && b.first <= page && page <= b.last {
			return b, true
		}
	}
	return gapBrought{}, false
}

// insert adds pages to what came into the cache.
func (g *Gaps) insert(f gapFile, e *Event) {
	if g.files == nil {
		g.files = make(map[gapFile]*gapPages)
	}
	p := g.files[f]
	if p == nil {
		p = new(gapPages)
		g.files[f] = p
	}
	g.clock++
	p.at, p.time = g.clock, e.Time
	g.runs -= len(p.runs) + len(p.fresh)
	p.runs.add(e.First, e.Last)
	p.fresh.add(e.First, e.Last)
	if g.runs += len(p.runs) + len(p.fresh); g.runs > gapRuns {
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
		p.runs, p.fresh = slices.Clip(p.runs), slices.Clip(p.fresh)
		g.runs += len(p.runs) + len(p.fresh)
	}
	if g.runs > gapRuns/2 {
		clear(g.files)
		g.runs = 0
	}
}

// began returns where a read may have begun of which e is the first event: where e begins, unless pages were passed over.
func (g *Gaps) began(f gapFile, p *gapPages, e *Event, t *gapThread) uint64 {
	if p == nil || !p.runs.has(e.First) {
		return t.foreign(f, e)
	}
	page, waits := e.First, 1
	own, brought := t.with(f, e.First)
	if brought {
		// It has to wait once for what it brought itself. What it waited for besides came before.
		page, waits = max(own.first, max(e.First, gapMost)-gapMost), 2
	}
	if g.Waits && t.waits < waits {
		return p.awake(page, brought, e)
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

// awake returns where a read may have begun that did not sleep for what it passed over before this page, as what it waited for came between the
// look at it and the sleep: where the thread's last read of the file ended, if that had been read ahead and not been read yet. It is
// the page, or lies right before it where the thread brought the page itself.
func (p *gapPages) awake(page uint64, brought bool, e *Event) uint64 {
	began := page
	if p.by != e.PID || p.end >= page || page-p.end > gapMost || e.Time-p.time > gapTime {
		return began
	}
	if brought {
		page--
	}
	if !p.fresh.has(page) {
		return began
	}
	return p.end
}

// foreign returns where a read may have begun that finds what the threads that are recorded have not asked for: others may have, and the thread
// may have slept for that. If it did, it goes on from its last read of the file, or reads the file for the first time.
func (t *gapThread) foreign(f gapFile, e *Event) uint64 {
	end := uint64(0)
	if t.reads == f {
		end = t.end
	}
	if t.waits == 0 || end >= e.First || e.First-end > gapForeign {
		return e.First
	}
	return end
}

// gapSet holds pages: disjoint spans, in order, not adjacent, gapFileRuns at most.
type gapSet []Span

// add adds pages, and all between those that there are when they would be too many.
func (s *gapSet) add(first, last uint64) {
	n := Span{First: first, Last: last}
	i := firstEnding(*s, max(first, 1)-1)
	end := i
	for end < len(*s) && ((*s)[end].First <= n.Last || (*s)[end].First-n.Last == 1) {
		n.First, n.Last = min(n.First, (*s)[end].First), max(n.Last, (*s)[end].Last)
		end++
	}
	if *s = slices.Replace(*s, i, end, n); len(*s) > gapFileRuns {
		*s = gapSet{Span{First: (*s)[0].First, Last: (*s)[len(*s)-1].Last}}
	}
	s.shrink()
}

// shrink gives memory back.
func (s *gapSet) shrink() {
	if cap(*s) > 4*len(*s)+16 {
		*s = slices.Clone(*s)
	}
}

// remove takes pages out.
func (s *gapSet) remove(first, last uint64) {
	i := firstEnding(*s, first)
	end := i
	var left []Span
	for end < len(*s) && (*s)[end].First <= last {
		if r := (*s)[end]; r.First < first {
			left = append(left, Span{First: r.First, Last: first - 1})
		}
		if r := (*s)[end]; r.Last > last {
			left = append(left, Span{First: last + 1, Last: r.Last})
		}
		end++
	}
	if i < end {
		*s = slices.Replace(*s, i, end, left...)
		s.shrink()
	}
}

// has reports whether a page is there.
func (s gapSet) has(page uint64) bool {
	i := firstEnding(s, page)
	return i < len(s) && s[i].First <= page
}
