package persist

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
)

// Bounds of a profile.
const (
	MaxRuns         = 32      // runs that a profile keeps
	MaxProfileSize  = 1 << 28 // bytes of its file
	MaxProfileLines = 1 << 22 // lines of its file
)

// ErrMixed is returned by [Merge] for lists that are not of one image, platform and workload.
var ErrMixed = errors.New("lists of different images, platforms or workloads")

// Run is one recorded run in a [Profile].
type Run struct {
	// ID is "sha256:" and the hash of the list's native bytes: a list that is merged twice is one run.
	ID   string
	List *List // not to be changed
}

// Profile is what is known of the start of one workload: the lists of its runs. It is a
// value: [Merge] returns a new one. The zero value is a profile without runs.
//
// Runs with losses are kept and marked, but take part in the union alone: what they did
// not see says nothing, so they count neither for an intersection nor for a weight, unless
// no run is complete: all count then.
type Profile struct {
	// Runs are ordered: complete ones first, then the latest by its start, then by ID. There
	// are at most [MaxRuns], those that come first in this order.
	Runs []Run
}

// NewProfile returns the profile of one run. It returns [ErrInvalid] when [List.Validate] does.
func NewProfile(l *List) (*Profile, error) {
	id, err := runID(l)
	if err != nil {
		return nil, err
	}
	return &Profile{Runs: []Run{{ID: id, List: l}}}, nil
}

func runID(l *List) (string, error) {
	h := sha256.New()
	if _, err := l.WriteTo(h); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}

// compareRuns is the order of runs. That it is total and looks at the runs alone makes
// merging with a bound commutative and associative.
func compareRuns(a, b Run) int {
	if x, y := a.List.Complete(), b.List.Complete(); x != y {
		if x {
			return -1
		}
		return 1
	}
	return cmp.Or(b.List.Started.Compare(a.List.Started), cmp.Compare(a.ID, b.ID))
}

// MergeOptions are the options of [Merge]; the zero value is the default.
type MergeOptions struct {
	// Mixed allows runs of different images, platforms and workloads.
	Mixed bool
}

// Merge returns the profile with the runs of all ps, each once, of which the first [MaxRuns]
// in the order of [Profile.Runs] are kept. It is commutative, associative and idempotent.
// Without o.Mixed, profiles that are not of one image (manifest digest), platform and
// workload (argument vector) are [ErrMixed] with the first difference. The result shares
// its lists with ps.
func Merge(o MergeOptions, ps ...*Profile) (*Profile, error) {
	out := &Profile{}
	for _, p := range ps {
		out.Runs = append(out.Runs, p.Runs...)
	}
	if !o.Mixed {
		for i := 1; i < len(out.Runs); i++ {
			if err := sameWorkload(out.Runs[0].List, out.Runs[i].List); err != nil {
				return nil, err
			}
		}
	}
	slices.SortFunc(out.Runs, compareRuns)
	out.Runs = slices.CompactFunc(out.Runs, func(a, b Run) bool { return a.ID == b.ID })
	out.Runs = slices.Clip(out.Runs[:min(len(out.Runs), MaxRuns)])
	return out, nil
}

func sameWorkload(a, b *List) error {
	for _, f := range []struct{ what, a, b string }{
		{"image", a.Digest, b.Digest},
		{"platform", a.Platform, b.Platform},
	} {
		if f.a != f.b {
			return fmt.Errorf("%w: %s %s and %s", ErrMixed, f.what, clip(f.a), clip(f.b))
		}
	}
	if !slices.Equal(a.Command, b.Command) {
		return fmt.Errorf("%w: command %s and %s", ErrMixed, clipAll(a.Command), clipAll(b.Command))
	}
	return nil
}

// Keep returns the profile of the first n runs of p.
func (p *Profile) Keep(n int) *Profile {
	return &Profile{Runs: slices.Clone(p.Runs[:min(max(n, 0), len(p.Runs))])}
}

// Mixed returns nil when all runs are of one image, platform and workload, else
// [ErrMixed] with the first difference.
func (p *Profile) Mixed() error {
	_, err := Merge(MergeOptions{}, p)
	return err
}

// Complete returns how many runs have no loss.
func (p *Profile) Complete() int {
	n := 0
	for _, r := range p.Runs {
		if r.List.Complete() {
			n++
		}
	}
	return n
}
