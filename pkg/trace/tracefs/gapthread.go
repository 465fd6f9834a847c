package tracefs

// gapThread is what a thread did since it last read.
type gapThread struct {
	waits int
	own   [4]gapOwn // what it did with the last files, the very last one first
	// It has been in a fault of a page of a file, at that time: what it brings around that is for the fault.
	faults  bool
	faulted gapFile
	page    uint64
	at      int64
}

// gapOwn is what a thread did with a file.
type gapOwn struct {
	file gapFile
	end  uint64 // the page behind its last read
	// What it brought into the page cache since lies in here, if there is any: the last of it after this many waits, at this time, or what lies
	// below it was read at this time.
	brought     bool
	first, last uint64
	below       uint64 // first, or what a file system added before
	time        int64
	waits       int
}

// gapFault is how far from the page of a fault lies what is read for it: half of a huge page (mm/filemap.c do_sync_mmap_readahead).
const gapFault = 1 << 9

// fault notes a fault of a page.
func (t *gapThread) fault(f gapFile, e *Event) {
	t.faults, t.faulted, t.page, t.at = true, f, e.First, e.Time
}

// of returns what the thread did with a file, which is the last one then.
func (t *gapThread) of(f gapFile) *gapOwn {
	i := 0
	for i < len(t.own)-1 && t.own[i].file != f {
		i++
	}
	o := t.own[i]
	if o.file != f {
		o = gapOwn{file: f}
	}
	copy(t.own[1:i+1], t.own[:i])
	t.own[0] = o
	return &t.own[0]
}

// bring notes that the thread brought pages into the cache, and reports whether that is for a read: not in a fault.
func (t *gapThread) bring(f gapFile, e *Event) bool {
	if t.faults && t.faulted == f {
		if e.First <= t.page+gapFault && t.page <= e.Last+gapFault && e.Time-t.at <= gapTime {
			return false
		}
		t.faults, t.waits = false, max(t.waits, 1)-1 // which is over, as is its wait
	}
	b := t.of(f)
	switch {
	case !b.brought:
		b.brought = true
		b.first, b.last, b.below = e.First, e.Last, e.First
	case e.First > b.last && e.First-b.last > gapMost || e.Last < b.first && b.first-e.Last > gapMost: // something else
		b.first, b.last, b.below = e.First, e.Last, e.First
	case e.First == e.Last && e.Last+1 == b.below: // what a file system adds before what was asked for (mm/readahead.c readahead_expand)
		b.below, b.waits, b.time = e.First, t.waits, e.Time
		return false
	default:
		b.first, b.last = min(b.first, e.First), max(b.last, e.Last)
		b.below = min(b.below, b.first)
	}
	b.waits, b.time = t.waits, e.Time
	return true
}

// read notes that a read of the file is said, for which all was that the thread did before: but for another file that it reads, and has brought
// pages of, since the file may lie in that one.
func (t *gapThread) read(f gapFile, e *Event) {
	b := t.of(f)
	b.brought, b.end = false, e.Last+1
	t.faults, t.waits = false, 0
	for i := 1; i < len(t.own); i++ {
		if o := &t.own[i]; o.brought {
			if o.time = e.Time; o.end > 0 { // others are of metadata, or written
				t.waits = max(t.waits, o.waits)
			}
		}
	}
}

// with returns the first page that the thread brought of a file, with that where e begins among it. False: it did not, or long ago, and has not waited since.
func (t *gapThread) with(f gapFile, e *Event) (first uint64, ok bool) {
	for i := range t.own {
		if b := &t.own[i]; b.brought && b.file == f && b.first <= e.First && e.First <= b.last {
			return b.first, t.waits > 0 || e.Time-b.time <= gapTime
		}
	}
	return 0, false
}

// end returns where the thread's last read of a file ended, 0 where that is not known.
func (t *gapThread) end(f gapFile) uint64 {
	for i := range t.own {
		if t.own[i].file == f {
			return t.own[i].end
		}
	}
	return 0
}
