package server

import (
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestPageFiles holds files that are kept small against a map of page sets.
func TestPageFiles(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	got := pageFiles{most: math.MaxInt} // for the bound see TestPageFilesBound
	want := make(map[inode]*trace.PageSet)
	page := os.Getpagesize()
	for i := range 200_000 {
		// Numbers as filesystems give them: dense ones, and some that differ in the high bits only.
		id := inode{dev: 1 + r.Uint64N(3), ino: r.Uint64N(10_000)}
		if i%7 == 0 {
			id.ino = r.Uint64N(500) << 40
		}
		first := r.Uint64N(40)
		last := first + r.Uint64N(20)
		switch i % 1000 {
		case 1:
			first, last = last+1, first // nothing
		case 2:
			last = math.MaxUint64
		case 3:
			first = 1 << 33
			last = first
		}
		at := time.Duration(i) * time.Microsecond
		if i%11 == 0 {
			at = -at
		}
		certain := r.IntN(2) == 0
		f := got.find(id)
		if f == nil {
			if want[id] != nil {
				t.Fatalf("%v is not found", id)
			}
			want[id] = new(trace.PageSet)
			f = got.add(pageFile{inode: id})
		}
		got.touch(f, first, last, at, certain)
		want[id].Add(first, last, at, certain)
	}
	if got.len() != len(want) {
		t.Fatalf("%d files, want %d", got.len(), len(want))
	}
	for id, set := range want {
		f := got.find(id)
		if f == nil || f.inode != id {
			t.Fatalf("find(%v) = %v", id, f)
		}
		first, ok := set.First()
		if f.touched() != ok || (ok && got.first(f) != first) {
			t.Errorf("%v: touched %t at %v, want %t at %v", id, f.touched(), got.first(f), ok, first)
		}
		for _, size := range []int64{0, 1, int64(page), 10*int64(page) + 1, math.MaxInt64} {
			if diff := cmp.Diff(set.Ranges(size, page), got.ranges([]trace.Range{}, f, size)); diff != "" {
				t.Fatalf("%v of %d bytes (-want +got):\n%s", id, size, diff)
			}
		}
	}
	if f := got.find(inode{9, 9}); f != nil {
		t.Errorf("find of what was never added = %+v", f)
	}
}

// TestIndexSpread holds that keys as they come do not pile up.
func TestIndexSpread(t *testing.T) {
	for name, key := range map[string]func(i uint64) uint64{
		"dense":     func(i uint64) uint64 { return i },
		"steps":     func(i uint64) uint64 { return i * 4096 },
		"high bits": func(i uint64) uint64 { return i << 44 },
		"two ends":  func(i uint64) uint64 { return i<<40 | i },
	} {
		t.Run(name, func(t *testing.T) {
			const n = 100_000
			var x index
			keys := make([]uint64, n)
			for i := range uint32(n) {
				keys[i] = key(uint64(i) % (1 << 20))
				x.add(i, keys[i])
			}
			asked := 0
			for i := range uint32(n) {
				got, ok := x.find(keys[i], func(j uint32) bool { asked++; return keys[j] == keys[i] })
				if !ok || got != i {
					t.Fatalf("find(%#x) = %d, %t, want %d", keys[i], got, ok, i)
				}
			}
			if mean := float64(asked) / n; mean > 1.1 {
				t.Errorf("%.2f keys looked at for each that is found, want hardly more than it", mean)
			}
			far := 0
			for at, s := range x.slots {
				if s.number != 0 {
					far += (at-x.start(s.hash))&(len(x.slots)-1) + 1
				}
			}
			if mean := float64(far) / n; mean > 4 {
				t.Errorf("%.1f slots looked at for each key that is found, want a few", mean)
			}
		})
	}
}

// TestPageFilesBound holds that reads made to fill memory, every second page of very many files, do not: files
// give up detail, the largest first, and no page.
func TestPageFilesBound(t *testing.T) {
	const files, pages = 500, 3000
	var p pageFiles
	small := p.add(pageFile{inode: inode{1, 1}})
	p.touch(small, 3, 3, 0, true)
	p.touch(small, 7, 7, 0, true)
	most := 0
	for n := range uint64(files) {
		f := p.add(pageFile{inode: inode{2, n}})
		for i := range uint64(pages) {
			p.touch(f, 2*i, 2*i, time.Duration(i)*time.Millisecond, true)
		}
		sum := 0
		for i := range p.sets {
			sum += p.sets[i].Len()
		}
		most = max(most, sum)
	}
	if most > maxSpans {
		t.Errorf("%d ranges, want at most %d", most, maxSpans)
	}
	page := int64(os.Getpagesize())
	for n := range uint64(files) {
		var have int64
		ranges := p.ranges(nil, p.find(inode{2, n}), math.MaxInt64)
		for _, r := range ranges {
			have += (r.Length/page + 1) / 2
			if r.Offset/page%2 != 0 || (r.Length > page && r.Certain) {
				t.Fatalf("file %d has range %+v", n, r)
			}
		}
		if have != pages {
			t.Fatalf("file %d has %d of its pages, want %d", n, have, pages)
		}
	}
	if got := p.ranges(nil, small, math.MaxInt64); len(got) != 2 || !got[0].Certain || !got[1].Certain {
		t.Errorf("the small file has %+v, want what it had", got)
	}
}

// TestPageFilesMany holds the same of more files than there may be ranges.
func TestPageFilesMany(t *testing.T) {
	var p pageFiles
	const files = maxSpans + maxSpans/2
	for n := range uint64(files) {
		f := p.add(pageFile{inode: inode{2, n}})
		for i := range uint64(8) {
			p.touch(f, 2*i, 2*i, 0, true)
		}
	}
	if p.spans > 3*files {
		t.Errorf("%d ranges of %d files", p.spans, files)
	}
	for n := range uint64(files) {
		r := p.ranges(nil, p.find(inode{2, n}), math.MaxInt64)
		if first, last := r[0], r[len(r)-1]; first.Offset != 0 || last.Offset+last.Length != 15*int64(os.Getpagesize()) {
			t.Fatalf("file %d has %+v", n, r)
		}
	}
}
