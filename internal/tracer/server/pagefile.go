package server

import (
	"math"
	"os"
	"time"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// pageFile is what is known of one inode. Of most files one range is touched, which is kept here; a
// million files are 50 MB.
type pageFile struct {
	inode
	at          time.Duration // of the range from page first to page last, if there is one
	first, last uint32
	many        uint32 // 0, or the number of its set of ranges plus 1, which then has the one here too
	pid         int32  // of the first touch
	comm        uint16 // its name, see comms.number
	how         trace.How
	flags       pageFlags
}

type pageFlags uint8

const (
	pageTouched pageFlags = 1 << iota // there is a range
	pageCertain                       // and the run asked for each page of it
	pageAround                        // some were mapped around a fault
	pageSent                          // the file has a path
)

// pageFiles are the inodes with pages that were touched. The zero value is empty.
type pageFiles struct {
	all  blocks[pageFile]
	ids  index
	sets []trace.PageSet
	// ranges that sets have together, and how many they may have before fit does something
	spans, most int
}

// maxSpans is how many ranges all sets may have together, at 24 bytes each and as much again for their
// growth: 6 MiB. A start that is not made to be a nuisance has some tens of thousands.
const maxSpans = 1 << 17

// fit sees to it that the sets do not outgrow maxSpans: then those that have the most ranges give up
// detail, as [trace.PageSet.Shrink] has it, but no pages. Where so many files were touched that one range for each is
// more than that, the number of files is what bounds them.
func (p *pageFiles) fit() {
	if p.spans <= max(maxSpans, p.most) {
		return
	}
	for most := trace.MaxPageRanges / 2; most > 0 && p.spans > maxSpans/2; most /= 2 {
		p.spans = 0
		for i := range p.sets {
			p.sets[i].Shrink(most)
			p.spans += p.sets[i].Len()
		}
	}
	p.most = 2 * p.spans
}

// key is what an inode is looked up by; different ones may share it.
func (i inode) key() uint64 { return i.ino ^ i.dev<<40 }

func (p *pageFiles) len() int { return int(p.all.n) }

// find returns what is known of an inode, nil when that is nothing. The pointer stays valid.
func (p *pageFiles) find(id inode) *pageFile {
	i, ok := p.ids.find(id.key(), func(i uint32) bool { return p.all.at(i).inode == id })
	if !ok {
		return nil
	}
	return p.all.at(i)
}

// add adds an inode that is not there yet.
func (p *pageFiles) add(f pageFile) *pageFile {
	i := p.all.add(f)
	p.ids.add(i, f.key())
	return p.all.at(i)
}

// touch is [trace.PageSet.Add] for the pages of a file.
func (p *pageFiles) touch(f *pageFile, first, last uint64, at time.Duration, certain bool) {
	at = max(at, 0)
	switch {
	case f.many > 0:
		set := &p.sets[f.many-1]
		before := set.Len()
		set.Add(first, last, at, certain)
		p.spans += set.Len() - before
		p.fit()
	case first > last || first > math.MaxUint32:
	case f.flags&pageTouched == 0:
		f.first, f.last, f.at = uint32(first), uint32(min(last, math.MaxUint32)), at
		f.flags |= pageTouched
		if certain {
			f.flags |= pageCertain
		}
	case uint64(f.first) <= first && last <= uint64(f.last) && f.at <= at && (f.flags&pageCertain != 0 || !certain):
		// What a program reads a second time changes nothing.
	default:
		var set trace.PageSet
		set.Add(uint64(f.first), uint64(f.last), f.at, f.flags&pageCertain != 0)
		set.Add(first, last, at, certain)
		p.sets = append(p.sets, set)
		f.many = uint32(len(p.sets)) //nolint:gosec // at most one for each file
		p.spans += set.Len()
		p.fit()
	}
}

// ranges appends what [trace.PageSet.Ranges] returns of a file of size bytes to out.
func (p *pageFiles) ranges(out []trace.Range, f *pageFile, size int64) []trace.Range {
	switch {
	case f.many > 0:
		return append(out, p.sets[f.many-1].Ranges(size, os.Getpagesize())...)
	case f.flags&pageTouched == 0:
		return out
	}
	r, ok := trace.PageRange(f.first, f.last, size, os.Getpagesize())
	if !ok {
		return out
	}
	r.Elapsed, r.Certain = f.at, f.flags&pageCertain != 0
	return append(out, r)
}

// first is when a file was touched first.
func (p *pageFiles) first(f *pageFile) time.Duration {
	if f.many > 0 {
		at, _ := p.sets[f.many-1].First()
		return at
	}
	return f.at
}

// touched reports whether any page of a file was touched.
func (f *pageFile) touched() bool { return f.many > 0 || f.flags&pageTouched != 0 }
