package builder

import (
	"cmp"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// prefetchPlanner fills a prefetchPlan from a list.
type prefetchPlanner struct {
	prefetchPlan
	root      *rafs.Inode
	chunkSize int64
	chunkSeen map[rafs.Digest]int // where in chunks
	when      []time.Duration     // of chunks: when the first of their bytes was touched
	last      time.Duration       // the latest time that a listed file has, so far
	inodeSeen map[*rafs.Inode]struct{}
}

// planPrefetch resolves the accesses of list in the tree below root. Symlinks are followed inside the root, also the
// last one: opening the path would. Relative paths name nothing. In a list that no engine recorded, patterns and
// directories stand for files; see [Optimize].
func planPrefetch(root *rafs.Inode, list *persist.List, chunkSize uint32) *prefetchPlan {
	p := &prefetchPlanner{
		root: root, chunkSize: int64(chunkSize),
		chunkSeen: map[rafs.Digest]int{}, inodeSeen: map[*rafs.Inode]struct{}{},
	}
	if list == nil {
		return &p.prefetchPlan
	}
	p.stats.Listed = len(list.Accesses)
	for i := range list.Accesses {
		a := &list.Accesses[i]
		found := p.resolve(list, a)
		if len(found) == 0 {
			if p.stats.Missing++; len(p.missing) < MaxMissingPaths {
				p.missing = append(p.missing, a.Path)
			}
		}
		spans := persist.Disjoint(a.Ranges)
		p.last = max(p.last, a.Elapsed) // a file without a time keeps its place in the list
		ranges, at := a.Ranges, p.last
		if a.How&trace.Runtime != 0 {
			ranges, at = nil, 0 // before the container starts, wherever in the list
		}
		for _, ino := range found {
			p.add(ino, spans, ranges, at)
		}
	}
	p.order()
	return &p.prefetchPlan
}

// order sorts the chunks by their first touch, what the container runtime reads before all: a start reads the heads of many files before it comes to the middle of the first one. Those of
// one moment, and of a list without times, stay in the order of the list.
func (p *prefetchPlanner) order() {
	at := make([]int, len(p.chunks))
	for i := range at {
		at[i] = i
	}
	slices.SortStableFunc(at, func(i, j int) int { return cmp.Compare(p.when[i], p.when[j]) })
	sorted := make([]rafs.Chunk, len(at))
	for i, n := range at {
		sorted[i] = p.chunks[n]
	}
	p.chunks = sorted
}

// firsts returns when each of n chunks was touched first, by those of ranges that have a time; otherwise where such a range does not reach.
func firsts(ranges []trace.Range, n int, chunkSize int64, otherwise time.Duration) []time.Duration {
	chunkSize = max(1, chunkSize)
	when, next := make([]time.Duration, n), make([]int, n+1) // next: the first chunk from there on that has no time yet
	for i := range next {
		next[i] = i
	}
	for i := range when {
		when[i] = otherwise
	}
	free := func(i int) int {
		for next[i] != i {
			next[i] = next[next[i]]
			i = next[i]
		}
		return i
	}
	timed := slices.DeleteFunc(slices.Clone(ranges), func(r trace.Range) bool { return r.Elapsed == 0 || r.Offset < 0 || r.Length <= 0 })
	slices.SortFunc(timed, func(a, b trace.Range) int { return cmp.Compare(a.Elapsed, b.Elapsed) })
	for _, r := range timed {
		if r.Offset/chunkSize >= int64(n) {
			continue
		}
		end := min(int64(n)-1, (r.Offset+min(r.Length, math.MaxInt64-r.Offset)-1)/chunkSize)
		for i := free(int(r.Offset / chunkSize)); int64(i) <= end; i = free(i) {
			when[i], next[i] = r.Elapsed, i+1
		}
	}
	return when
}

// Resolve calls visit for every access of list in turn, with what it stands for in the tree below root as [Optimize] and
// [Convert] understand it: one inode of any kind, several regular files in the order of the tree, or none. It returns the first error of visit.
func Resolve(root *rafs.Inode, list *persist.List, visit func(a *trace.Access, found []*rafs.Inode) error) error {
	p := prefetchPlanner{root: root}
	for i := range list.Accesses {
		a := &list.Accesses[i]
		if err := visit(a, p.resolve(list, a)); err != nil {
			return err
		}
	}
	return nil
}

// resolve returns what an access of list stands for.
func (p *prefetchPlanner) resolve(list *persist.List, a *trace.Access) []*rafs.Inode {
	if !path.IsAbs(a.Path) {
		return nil
	}
	return p.find(path.Clean(a.Path), list.Engine == "", a.Ranges == nil)
}

// find returns what the cleaned absolute path name stands for: one inode, or regular files. In a list that a person
// typed, these are what is below a directory that is listed as a whole, and what a pattern matches.
func (p *prefetchPlanner) find(name string, typed, whole bool) []*rafs.Inode {
	g := globber{root: p.root, steps: maxGlobSteps, found: map[*rafs.Inode]struct{}{}, visited: map[globState]struct{}{}}
	if at, ino := locateReal(p.root, name, nil); ino != nil {
		if typed && whole && ino.IsDir() {
			if g.match(at, ino, []string{"**"}); len(g.files) > 0 {
				p.stats.Directories++
				return g.files
			}
		}
		return []*rafs.Inode{ino}
	}
	// A path that was recorded is a path, whatever it looks like.
	if !typed || !strings.ContainsAny(name, "*?[") {
		return nil
	}
	g.match(nil, p.root, patternOf(name))
	if len(g.files) > 0 {
		p.stats.Patterns++
	}
	return g.files
}

// add selects the chunks of ino that spans touch. They were touched when ranges say, otherwise at that time.
func (p *prefetchPlanner) add(ino *rafs.Inode, spans, ranges []trace.Range, otherwise time.Duration) {
	if !ino.IsRegular() {
		p.stats.NotRegular++
		return
	}
	if _, ok := p.inodeSeen[ino]; ok {
		p.stats.Repeated++
	} else {
		p.inodeSeen[ino] = struct{}{}
		p.stats.Files++
		if len(ino.Chunks) > 0 {
			p.inodes = append(p.inodes, ino)
		}
	}
	when := firsts(ranges, len(ino.Chunks), p.chunkSize, otherwise)
	for n, ch := range ino.Chunks {
		if !touched(spans, int64(n)*p.chunkSize, int64(ch.UncompressedSize)) {
			continue
		}
		if at, ok := p.chunkSeen[ch.Digest]; ok {
			p.when[at] = min(p.when[at], when[n])
		} else {
			p.chunkSeen[ch.Digest] = len(p.chunks)
			p.chunks, p.when = append(p.chunks, ch), append(p.when, when[n])
			p.stats.RawBytes += int64(ch.UncompressedSize)
		}
	}
}

// locateReal finds the inode at a cleaned absolute path, with every symlink followed
// inside the root, also the last one; nil when there is none. at is its path without symlinks. steps, unless it is nil, is how many names may be
// looked up still: with none left there is nothing either.
func locateReal(root *rafs.Inode, name string, steps *int) (at []string, ino *rafs.Inode) {
	todo := split(name[1:])
	ino = root
	for links := 0; len(todo) > 0; {
		if steps != nil {
			if *steps--; *steps < 0 {
				return nil, nil
			}
		}
		next := todo[0]
		todo = todo[1:]
		child := ino.Child(next)
		if child == nil {
			return nil, nil
		}
		if !child.IsSymlink() {
			at, ino = append(at, next), child
			continue
		}
		if links++; links > maxLinks {
			return nil, nil
		}
		target := child.Target
		if !path.IsAbs(target) {
			target = strings.Join(at, "/") + "/" + target
		}
		// Cleaning below "/" keeps ".." inside the root.
		if steps != nil {
			*steps -= len(target)/16 + len(todo)/8 // to take it apart and to join it costs as well
		}
		todo = slices.Concat(split(path.Clean("/" + target)[1:]), todo)
		at, ino = nil, root
	}
	return at, ino
}

// patternOf cuts the pattern name, a cleaned absolute path, into elements for [path.Match], which does not know the [!…] of shells.
func patternOf(name string) []string {
	b := []byte(name)
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '[':
			if i+1 < len(b) && b[i+1] == '!' {
				b[i+1] = '^'
			}
			for i++; i < len(b) && b[i] != ']' && b[i] != '/'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		}
	}
	return split(string(b[1:]))
}

// maxGlobSteps bounds how many names are looked up to follow the symlinks that one pattern matches: some seconds. Those of real images lead a few
// names far; an image may have millions that each go through hundreds of others.
const maxGlobSteps = 1 << 24

// globber gathers the regular files that a pattern matches, in the order of the tree. A symlink whose name matches stands
// for what it leads to, as in a shell; ** follows none.
type globber struct {
	root    *rafs.Inode
	steps   int // see maxGlobSteps
	files   []*rafs.Inode
	found   map[*rafs.Inode]struct{}
	visited map[globState]struct{} // so that many ** cost no more than one
}

type globState struct {
	at   *rafs.Inode
	left int // elements of the pattern
}

// match adds what pattern matches below at, whose path without symlinks is dir.
func (g *globber) match(dir []string, at *rafs.Inode, pattern []string) {
	if len(pattern) == 0 {
		if _, ok := g.found[at]; !ok && at.IsRegular() {
			g.found[at] = struct{}{}
			g.files = append(g.files, at)
		}
		return
	}
	state := globState{at, len(pattern)}
	if _, ok := g.visited[state]; ok || !at.IsDir() {
		return
	}
	g.visited[state] = struct{}{}
	if pattern[0] == "**" {
		g.match(dir, at, pattern[1:])
	}
	for _, d := range at.Children {
		if pattern[0] == "**" {
			switch {
			case d.Inode.IsDir():
				g.match(append(slices.Clip(dir), d.Name), d.Inode, pattern)
			case len(pattern) == 1:
				g.match(nil, d.Inode, nil)
			}
			continue
		}
		// A pattern that is none matches nothing.
		if ok, err := path.Match(pattern[0], d.Name); !ok || err != nil {
			continue
		}
		below, ino := append(slices.Clip(dir), d.Name), d.Inode
		if ino.IsSymlink() {
			if below, ino = locateReal(g.root, "/"+strings.Join(below, "/"), &g.steps); ino == nil {
				continue
			}
		}
		g.match(below, ino, pattern[1:])
	}
}
