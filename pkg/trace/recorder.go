package trace

import (
	"fmt"
	"path"
	"slices"
)

// Recorder folds what a tracer reports, in any order, into a [Trace]: one access per
// path, ordered by first touch, with every way of touching merged. The zero value is
// ready. A Recorder is not safe for concurrent use.
type Recorder struct {
	touches []touch
	byPath  map[string]int
	byID    map[uint32]int
	losses  []Loss
	skipped int64
	events  int64
}

type touch struct {
	id uint32
	Access
}

// Touch records the first touch of a file. Tracers number the files they meet: of two
// touches, the one with the lower id came first. A second touch of a path adds its ways
// to the first and keeps what the earlier of the two says otherwise.
// It returns an error, and records nothing, when the path is not absolute and cleaned.
func (r *Recorder) Touch(id uint32, a Access) error {
	if len(a.Path) < 2 || a.Path[0] != '/' || path.Clean(a.Path) != a.Path {
		return fmt.Errorf("record access: path %q, want an absolute, cleaned path of a file", a.Path)
	}
	if r.byPath == nil {
		r.byPath, r.byID = make(map[string]int), make(map[uint32]int)
	}
	i, ok := r.byPath[a.Path]
	if !ok {
		r.byPath[a.Path], r.byID[id] = len(r.touches), len(r.touches)
		r.touches = append(r.touches, touch{id, a})
		return nil
	}
	r.byID[id] = i
	how := r.touches[i].How | a.How
	if id < r.touches[i].id {
		r.touches[i] = touch{id, a}
	}
	r.touches[i].How = how
	return nil
}

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
func (r *Recorder) Trace() Trace {
	order := slices.Clone(r.touches)
	slices.SortFunc(order, func(a, b touch) int {
		switch {
		case a.id < b.id:
			return -1
		case a.id > b.id:
			return 1
		}
		return 0
	})
	t := Trace{Losses: slices.Clone(r.losses), Skipped: r.skipped, Events: r.events}
	if len(order) > 0 {
		t.Accesses = make([]Access, len(order))
	}
	for i := range order {
		t.Accesses[i] = order[i].Access
	}
	return t
}
