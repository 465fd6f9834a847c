package trace

import (
	"cmp"
	"fmt"
	"math"
	"path"
	"slices"
	"time"
)

// Recorder folds what a tracer reports, in any order, into a [Trace]: one access per
// path, ordered by first touch, with every way of touching merged. The zero value is
// ready. A Recorder is not safe for concurrent use.
type Recorder struct {
	touches   []*[touchBlock]touch // they never move: see touch
	n         int
	paths     paths
	ids       ids
	processes []Process
	losses    []Loss
	skipped   int64
	events    int64
}

// touchBlock is how many touches are allocated at once.
const touchBlock = 256

type touch struct {
	// id is the tracer's; of a touch without a path, which is left out of the trace, the number of the touch
	// that it became a part of.
	id    uint32
	found bool // see [Recorder.Found]
	Access
}

func (r *Recorder) touch(i int) *touch { return &r.touches[i/touchBlock][i%touchBlock] }

// at returns the number of the touch that was recorded under id, or of which that became a part.
func (r *Recorder) at(id uint32) (int, bool) {
	first, ok := r.ids.get(id)
	if !ok {
		return 0, false
	}
	i := first
	for r.touch(i).Path == "" {
		next := r.touch(i).id
		if n := r.touch(int(next)); n.Path == "" {
			r.touch(i).id = n.id // half the way for whoever comes next
		}
		i = int(next)
	}
	if i != first {
		r.ids.set(id, i)
	}
	return i, true
}

// Touch records the first touch of a file. Tracers number the files they meet: of two
// touches, the one with the lower id came first. A second touch of a path adds its ways
// to the first and keeps what the earlier of the two says otherwise.
// It returns an error, and records nothing, when the path is not absolute and cleaned.
func (r *Recorder) Touch(id uint32, a Access) error { return r.add(touch{id: id, Access: a}) }

// Found records a file whose touch came to light later, by an engine that knows its time: it is
// sorted in by that, whatever its id. It is else as Touch.
func (r *Recorder) Found(id uint32, a Access) error {
	return r.add(touch{id: id, found: true, Access: a})
}

func (r *Recorder) add(n touch) error {
	if err := checkPath(n.Path); err != nil {
		return err
	}
	i, ok := r.paths.find(r, n.Path)
	if !ok {
		if r.n%touchBlock == 0 {
			r.touches = append(r.touches, new([touchBlock]touch))
		}
		*r.touch(r.n) = n
		r.paths.add(r, r.n)
		r.ids.set(n.id, r.n)
		r.n++
		return nil
	}
	r.ids.set(n.id, i)
	have := r.touch(i)
	how, ranges := have.How|n.How, have.Ranges
	earlier := n.id < have.id
	if n.found != have.found {
		earlier = have.found // what saw the file itself knows more than what found its pages
	}
	if earlier {
		*have = n
	}
	if ranges == nil {
		ranges = n.Ranges
	}
	have.How, have.Ranges = how, ranges
	return nil
}

func checkPath(p string) error {
	if len(p) < 2 || p[0] != '/' || path.Clean(p) != p {
		return fmt.Errorf("record access: path %q, want an absolute, cleaned path of a file", p)
	}
	return nil
}

// Rename gives the file that was recorded under id another path: the one it has in the image. When
// another file has that path already, the two are one. An id that was never recorded is
// ignored. It returns an error, and changes nothing, when the path is not absolute and cleaned.
func (r *Recorder) Rename(id uint32, to string) error {
	if err := checkPath(to); err != nil {
		return err
	}
	i, ok := r.at(id)
	if !ok || r.touch(i).Path == to {
		return nil
	}
	j, taken := r.paths.find(r, to)
	if !taken {
		r.paths.remove(r, i)
		r.touch(i).Path = to
		r.paths.add(r, i)
		return nil
	}
	moved := *r.touch(i)
	moved.Path = to
	r.paths.remove(r, i)
	*r.touch(i) = touch{id: uint32(j)} //nolint:gosec // far fewer touches fit in memory
	return r.add(moved)
}

// Ranges adds the ranges that were touched of the file that was recorded under id, disjoint from
// those it has and in order of first touch; they become the Recorder's. None at all says that no
// byte of it was touched. An id that was never recorded is ignored.
func (r *Recorder) Ranges(id uint32, ranges []Range) {
	i, ok := r.at(id)
	if !ok {
		return
	}
	a := &r.touch(i).Access
	if a.Ranges == nil {
		if a.Ranges = ranges; ranges == nil {
			a.Ranges = []Range{}
		}
		return
	}
	a.Ranges = append(a.Ranges, ranges...)
}

// Process records a process of the run, in the order of first sight.
func (r *Recorder) Process(p Process) { r.processes = append(r.processes, p) }

// Merge adds ways of touching to the file that was recorded under id. An id that was
// never recorded is ignored: its file was left out.
func (r *Recorder) Merge(id uint32, how How) {
	if i, ok := r.at(id); ok {
		r.touch(i).How |= how
	}
}

// Lose records a loss. Losses of one reason add up; -1, a count that nobody knows, stays -1.
// The first detail is kept.
func (r *Recorder) Lose(l Loss) {
	for i := range r.losses {
		have := &r.losses[i]
		if have.Reason != l.Reason {
			continue
		}
		if have.Count < 0 || l.Count < 0 {
			have.Count = -1
		} else {
			have.Count += l.Count
		}
		if have.Detail == "" {
			have.Detail = l.Detail
		}
		return
	}
	r.losses = append(r.losses, l)
}

// Skip counts n touched files that are no content of the image.
func (r *Recorder) Skip(n int64) { r.skipped += n }

// Saw counts n kernel events.
func (r *Recorder) Saw(n int64) { r.events += n }

// Len returns how many files were recorded so far.
func (r *Recorder) Len() int { return r.n }

// Trace returns what was recorded so far. The Trace is the caller's; recording may go on.
// Where engines disagree about a time, the one that says earlier is right: a tracer may hear of a
// touch late, but not early. The order of ids stands above both.
func (r *Recorder) Trace() Trace {
	t := Trace{Processes: slices.Clone(r.processes), Losses: slices.Clone(r.losses), Skipped: r.skipped, Events: r.events}
	// By id; the times are those of the accesses, put right.
	type entry struct {
		at time.Duration
		*touch
	}
	order := make([]entry, 0, r.n)
	ranges := 0
	for i := range r.n {
		n := r.touch(i)
		if n.Path == "" {
			continue
		}
		at := n.Elapsed
		for _, g := range n.Ranges {
			at = min(at, g.Elapsed)
		}
		ranges += len(n.Ranges)
		order = append(order, entry{at, n})
	}
	slices.SortFunc(order, func(a, b entry) int { return cmp.Compare(a.id, b.id) })
	latest := time.Duration(math.MaxInt64)
	for i := len(order) - 1; i >= 0; i-- {
		if !order[i].found {
			latest = min(latest, order[i].at)
			order[i].at = latest
		}
	}
	byTime := func(a, b entry) int { return cmp.Compare(a.at, b.at) }
	if !slices.IsSortedFunc(order, byTime) {
		slices.SortStableFunc(order, byTime)
	}
	if len(order) == 0 {
		return t
	}
	t.Accesses = make([]Access, len(order))
	all := make([]Range, 0, ranges)
	for i, n := range order {
		a := n.Access
		a.Elapsed = n.at
		if a.Ranges != nil {
			from := len(all)
			all = append(all, a.Ranges...)
			a.Ranges = all[from:len(all):len(all)]
		}
		t.Accesses[i] = a
	}
	return t
}
