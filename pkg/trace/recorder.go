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
	touches   []touch
	byPath    map[string]int
	byID      map[uint32]int
	processes []Process
	losses    []Loss
	skipped   int64
	events    int64
}

type touch struct {
	id    uint32
	found bool // see [Recorder.Found]
	Access
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
	if r.byPath == nil {
		r.byPath, r.byID = make(map[string]int), make(map[uint32]int)
	}
	i, ok := r.byPath[n.Path]
	if !ok {
		r.byPath[n.Path], r.byID[n.id] = len(r.touches), len(r.touches)
		r.touches = append(r.touches, n)
		return nil
	}
	r.byID[n.id] = i
	have := r.touches[i]
	how, ranges := have.How|n.How, have.Ranges
	earlier := n.id < have.id
	if n.found != have.found {
		earlier = have.found // what saw the file itself knows more than what found its pages
	}
	if earlier {
		have = n
	}
	if ranges == nil {
		ranges = n.Ranges
	}
	have.How, have.Ranges = how, ranges
	r.touches[i] = have
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
	i, ok := r.byID[id]
	if !ok || r.touches[i].Path == to {
		return nil
	}
	moved := r.touches[i]
	delete(r.byPath, moved.Path)
	moved.Path = to
	j, taken := r.byPath[to]
	if !taken {
		r.touches[i], r.byPath[to] = moved, i
		return nil
	}
	r.touches[i].Path = "" // left out of the trace
	for other, at := range r.byID {
		if at == i {
			r.byID[other] = j
		}
	}
	return r.add(moved)
}

// Ranges adds the ranges that were touched of the file that was recorded under id, disjoint from
// those it has and in order of first touch. None at all says that no byte of it was touched. An id
// that was never recorded is ignored.
func (r *Recorder) Ranges(id uint32, ranges []Range) {
	i, ok := r.byID[id]
	if !ok {
		return
	}
	a := &r.touches[i].Access
	if a.Ranges == nil {
		a.Ranges = make([]Range, 0, len(ranges))
	}
	a.Ranges = append(a.Ranges, ranges...)
}

// Process records a process of the run, in the order of first sight.
func (r *Recorder) Process(p Process) { r.processes = append(r.processes, p) }

// Merge adds ways of touching to the file that was recorded under id. An id that was
// never recorded is ignored: its file was left out.
func (r *Recorder) Merge(id uint32, how How) {
	if i, ok := r.byID[id]; ok {
		r.touches[i].How |= how
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
func (r *Recorder) Len() int { return len(r.touches) }

// Trace returns what was recorded so far. The Trace is the caller's; recording may go on.
// Where engines disagree about a time, the one that says earlier is right: a tracer may hear of a
// touch late, but not early. The order of ids stands above both.
func (r *Recorder) Trace() Trace {
	t := Trace{Processes: slices.Clone(r.processes), Losses: slices.Clone(r.losses), Skipped: r.skipped, Events: r.events}
	order := make([]touch, 0, len(r.touches))
	for _, n := range r.touches {
		if n.Path == "" {
			continue
		}
		for _, g := range n.Ranges {
			n.Elapsed = min(n.Elapsed, g.Elapsed)
		}
		order = append(order, n)
	}
	slices.SortFunc(order, func(a, b touch) int { return cmp.Compare(a.id, b.id) })
	latest := time.Duration(math.MaxInt64)
	for i := len(order) - 1; i >= 0; i-- {
		if !order[i].found {
			latest = min(latest, order[i].Elapsed)
			order[i].Elapsed = latest
		}
	}
	slices.SortStableFunc(order, func(a, b touch) int { return cmp.Compare(a.Elapsed, b.Elapsed) })
	for _, n := range order {
		n.Ranges = slices.Clone(n.Ranges)
		t.Accesses = append(t.Accesses, n.Access)
	}
	return t
}
