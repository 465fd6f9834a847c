package tracefs

import "slices"

// Gaps finds pages that reads touched without an event. The kernel reads what is cached up to the first page that is
// still on its way from storage, and says nothing of that part when it has to wait for the page; the next event of
// the same read begins there (mm/filemap.c filemap_get_pages, from Linux 6.11 to 6.18 at least: where filemap_update_page
// returns AOP_TRUNCATED_PAGE, what comes before is returned past the tracepoint). A program that reads a cold file by the megabyte
// is so denied some of its pages, more where storage is slow.
//
// What is on its way came into the page cache a moment ago, which [Insert] tells: so whoever records both kinds, as
// [FS.Probe] chooses, knows of each [Read] where it may have begun. The zero value knows nothing yet. A Gaps is not safe for
// concurrent use. It needs some 5 MiB at most, whatever comes.
type Gaps struct {
	files map[gapFile][]gapRun
	runs  int    // of all files
	clock uint64 // insertions so far
}

type gapFile struct {
	device uint32
	inode  uint64
}

// gapRun is neighbouring pages of which nobody read one since they came.
type gapRun struct {
	first, last uint64
	at          uint64 // when its last page came, by the clock
}

const (
	// gapRuns is how many runs are kept at most.
	gapRuns = 1 << 15
	// gapAge is after how many further insertions a run is forgotten where there are too many: 64 MiB of single pages, more of
	// large folios. No device has that much on its way.
	gapAge = gapRuns / 2
)

// Note takes the events of an instance, in their order. Where e is a [Read] it returns the pages right before it that the
// same read may have touched unsaid: an upper bound, as are those of [Around]. False: there are none.
func (g *Gaps) Note(e *Event) (Span, bool) {
	switch e.Kind {
	case Insert:
		g.insert(gapFile{e.Device, e.Inode}, e.First, e.Last)
	case Read:
		return g.read(gapFile{e.Device, e.Inode}, e.First, e.Last)
	default: // a fault is told before anything is looked up
	}
	return Span{}, false
}

func (g *Gaps) insert(f gapFile, first, last uint64) {
	if g.files == nil {
		g.files = make(map[gapFile][]gapRun)
	}
	runs := g.files[f]
	g.runs -= len(runs)
	g.clock++
	n := gapRun{first, last, g.clock}
	i := firstEnding(runs, max(first, 1)-1) // its neighbours join it
	end := i
	for end < len(runs) && (runs[end].first <= n.last || runs[end].first-n.last == 1) {
		n.first, n.last = min(n.first, runs[end].first), max(n.last, runs[end].last)
		end++
	}
	runs = slices.Replace(runs, i, end, n)
	g.files[f] = runs
	if g.runs += len(runs); g.runs > gapRuns {
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
		runs = slices.DeleteFunc(runs, func(r gapRun) bool { return r.at+gapAge <= g.clock })
		g.keep(f, slices.Clip(runs))
		g.runs += len(runs)
	}
}

// keep sets what is known of a file.
func (g *Gaps) keep(f gapFile, runs []gapRun) {
	if len(runs) == 0 {
		delete(g.files, f)
		return
	}
	g.files[f] = runs
}

// read returns the gap before a read. What was read, and what may have been, is of no further interest: only what comes before
// the next page that is on its way is.
func (g *Gaps) read(f gapFile, first, last uint64) (gap Span, ok bool) {
	runs, known := g.files[f]
	if !known {
		return gap, false
	}
	g.runs -= len(runs)
	i := firstEnding(runs, first)
	if i < len(runs) && runs[i].first < first {
		gap, ok = Span{First: runs[i].first, Last: first - 1}, true
	}
	end := i
	for end < len(runs) && runs[end].last <= last {
		end++
	}
	if end < len(runs) && runs[end].first <= last {
		runs[end].first = last + 1
	}
	runs = slices.Delete(runs, i, end)
	g.runs += len(runs)
	g.keep(f, runs)
	return gap, ok
}
