package tracefs

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
// was read ahead a moment ago, and what lies between that and the last read of the file is cached.
//
// Not found is what is passed over by others that do not sleep that way (io_uring, RWF_NOWAIT); of more than 128 pages that were cached
// beforehand, or that somebody had asked for whose insertions are not recorded, and of fewer of the latter without sleep, or of a file of which
// nothing else was asked for lately, or by a first read of it that then brings pages itself; without sleep, of pages that are on their way for more than a quarter of a second; by a read that begins
// before the end of the same thread's last one of the file; by a read that never ends, or after the recording does; of more than 1,024 pages
// that did not come in a row. Nor is a page that could not be read ahead for want of memory, of which there is no event either.
//
// The zero value knows nothing yet. A Gaps is not safe for concurrent use. It needs some 12 MiB at most, whatever comes.
type Gaps struct {
	// Waits says that [Wait] is recorded. Without, each read of what came into the cache may have waited.
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
	runs gapSet // what came into the page cache
	at   uint64 // when something came last, by the clock
	// What of it was for reads and has not been read since: of this generation, which began at epoch, and of the one before.
	fresh, older gapSet
	epoch        int64
	// Of the last read: who did it, 0: nobody yet, where its event began, and the page behind it.
	by         int32
	first, end uint64
}

const (
	// gapRuns is how many runs are kept at most, and gapFileRuns in one set of a file.
	gapRuns, gapFileRuns = 1 << 14, 1 << 10
	// gapAge is after how many further insertions a file is forgotten where there are too many runs: what is on its way then came since, unless
	// a device has that many folios of other files on its way.
	gapAge = gapRuns / 2
	// gapThreads is how many threads are known at most.
	gapThreads = 1 << 14
	// gapTime is how long a page may be on its way, in nanoseconds, where nobody slept for it.
	gapTime = 250e6
	// gapMost is the most pages that a gap has, but for those that came in a row.
	gapMost = 1 << 10
	// gapForeign is the most pages in a row of a gap that nobody who is recorded asked for.
	gapForeign = 1 << 7
	// gapAwake is the same where nobody slept: more than a batch of small folios (include/linux/folio_batch.h FOLIO_BATCH_SIZE: 31).
	gapAwake = 1 << 5
)

// Note takes the events of an instance, in their order; of other kinds than those, and [Fork], it needs none. Where e is a [Read] it returns
// the pages right before it that the same read may have touched unsaid: an upper bound, as are those of [Around]. False: there are none.
func (g *Gaps) Note(e *Event) (gap Span, ok bool) {
	f := gapFile{e.Device, e.Inode}
	switch e.Kind {
	case Insert:
		g.insert(f, e, g.of(e.PID).bring(f, e))
	case Wait:
		g.of(e.PID).waits++
	case Fork: // there may have been one of this number
		g.begin(e.Other)
	case Fault:
		g.of(e.PID).fault(f, e)
	case Around: // of a read fault, in which no read of its is (mm/memory.c do_read_fault)
		t := g.of(e.PID)
		t.faults, t.waits = false, 0
	case Read:
		return g.read(f, e)
	default:
	}
	return Span{}, false
}

func (g *Gaps) read(f gapFile, e *Event) (gap Span, ok bool) {
	t, p := g.of(e.PID), g.files[f]
	began := g.began(f, p, e, t)
	if p != nil {
		p.by, p.first, p.end = e.PID, e.First, e.Last+1
		g.runs -= p.len()
		p.fresh.remove(began, e.Last)
		p.older.remove(began, e.Last)
		if g.runs += p.len(); g.runs > gapRuns {
			g.forget()
		}
	}
	t.read(f, e)
	if began >= e.First {
		return Span{}, false
	}
	return Span{First: began, Last: e.First - 1}, true
}

// of returns what is known of a thread.
func (g *Gaps) of(pid int32) *gapThread {
	if g.thread != nil && g.pid == pid {
		return g.thread
	}
	t := g.threads[pid]
	if t == nil {
		if t = g.begin(pid); g.forgot {
			t.waits = 2 // for all that is known
		}
	}
	g.pid, g.thread = pid, t
	return t
}

// begin makes a thread one that has done nothing.
func (g *Gaps) begin(pid int32) *gapThread {
	if g.threads == nil {
		g.threads = make(map[int32]*gapThread)
	}
	if len(g.threads) >= gapThreads {
		clear(g.threads)
		g.forgot = true
	}
	t := new(gapThread)
	g.threads[pid] = t
	if g.pid == pid {
		g.thread = nil
	}
	return t
}

// insert adds pages to what came into the cache, for a read or not.
func (g *Gaps) insert(f gapFile, e *Event, read bool) {
	if g.files == nil {
		g.files = make(map[gapFile]*gapPages)
	}
	p := g.files[f]
	if p == nil {
		p = &gapPages{epoch: e.Time}
		g.files[f] = p
	}
	g.clock++
	p.at = g.clock
	g.runs -= p.len()
	p.runs.add(e.First, e.Last)
	if e.Time-p.epoch > gapTime {
		p.older = nil
		if e.Time-p.epoch <= 2*gapTime {
			p.older = p.fresh
		}
		p.fresh, p.epoch = nil, e.Time
	}
	if read {
		p.fresh.add(e.First, e.Last)
	}
	if g.runs += p.len(); g.runs > gapRuns {
		g.forget()
	}
}

// len returns how many runs there are.
func (p *gapPages) len() int { return len(p.runs) + len(p.fresh) + len(p.older) }

// forget drops the files into whose cache nothing came for long, then what has not been read of the others, and them too where that is
// not enough.
func (g *Gaps) forget() {
	g.runs = 0
	for f, p := range g.files {
		if p.at+gapAge <= g.clock {
			delete(g.files, f)
			continue
		}
		p.runs.shrink()
		g.runs += p.len()
	}
	if g.runs <= gapRuns/2 {
		return
	}
	g.runs = 0
	for _, p := range g.files {
		p.fresh, p.older = nil, nil
		g.runs += p.len()
	}
	if g.runs > gapRuns/2 {
		clear(g.files)
		g.runs = 0
	}
}

// began returns where a read may have begun of which e is the first event: where e begins, unless pages were passed over.
func (g *Gaps) began(f gapFile, p *gapPages, e *Event, t *gapThread) uint64 {
	if p == nil {
		return e.First // was not on its way for anybody here
	}
	if !p.runs.has(e.First) {
		return p.foreign(f, e, t, e.First, 1)
	}
	goesOn := p.by == e.PID && p.first <= e.First
	least := max(e.First, gapMost) - gapMost
	if goesOn && p.runs.start(e.First) <= p.end {
		least = min(least, p.end) // over what came in a row, however much
	}
	page, waits := e.First, 1
	own, brought := t.with(f, e)
	if brought {
		// It has to wait once for what it brought itself. What it waited for besides came before.
		page, waits = max(own, least), 2
	}
	if g.Waits && t.waits < waits {
		return p.awake(page, least, brought, e, t.end(f))
	}
	began := max(min(p.runs.start(page), page), least)
	switch {
	case !goesOn:
	case page <= p.end:
		return page // the read goes on from there
	case least <= p.end:
		began = p.runs.reach(page, p.end, gapForeign) // over whatever was cached
	default:
	}
	if brought && p.runs.next(began) >= page {
		began = page // nothing that it may have waited for besides, of ours
	}
	if goesOn && began > p.end && began < page {
		return began
	}
	return p.foreign(f, e, t, began, waits)
}

// foreign returns where a read may have begun that passed over what comes before a page, which nobody here has asked for, of a file of which
// something else was asked for a moment ago: others may have, and the thread may have slept for that, besides for its own. If it did, it goes on
// from its last read of the file, or reads the file for the first time; not that where it brought what it finds: then it has slept for the file's
// metadata too, which nobody had read.
func (p *gapPages) foreign(f gapFile, e *Event, t *gapThread, page uint64, waits int) uint64 {
	end := t.end(f)
	if t.waits < waits || end >= page || page-end > gapForeign || end == 0 && waits > 1 || e.Time-p.epoch > 2*gapTime {
		return page
	}
	return end
}

// awake returns where a read may have begun that did not sleep for what it passed over before this page, as what it waited for came between the
// look at it and the sleep: where the last read of the file ended, if that had been read ahead and not been read yet. It is
// the page, or lies right before it where the thread brought the page itself. end is where the thread's own last read ended.
func (p *gapPages) awake(page, least uint64, brought bool, e *Event, end uint64) uint64 {
	if p.end <= page {
		end = p.end // whoever read that
	}
	waited := page
	if brought {
		waited--
	}
	if end >= page || e.Time-p.epoch > 2*gapTime || !p.fresh.has(waited) && !p.older.has(waited) {
		return page
	}
	return p.runs.reach(page, max(end, least), gapAwake)
}
