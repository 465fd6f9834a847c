package rebuild

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// material is the share of a run's chunks that an image has to lack to be built again. Two runs of one workload are rarely the
// same to the page.
const material = 0.01

// extend compares the list of r with the one at base, for which the image was built or is to be. Where the image has what
// the run read it says so in d; else it returns the list of both, so that images do not go back and forth between two runs. It returns
// nil where there is nothing to compare with: the list of r stands for itself then.
func (q *Queue) extend(d *Decision, image, base string, r *Request) *persist.List {
	res, built, err := q.last(image)
	if err != nil || (!built && d.Verdict != Replaced) {
		return nil
	}
	have, err := readList(q.root.Open(base))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	next, nerr := readList(os.Open(r.List))
	if err := errors.Join(err, nerr); err != nil {
		q.warn("compare lists of one image", err)
		return nil
	}
	if have.Grade == trace.GradeFile && next.Grade != trace.GradeFile {
		return nil // what is known by range takes the place of what was known by file
	}
	next = sharpen(next, have)
	lacks := lacking(have, next, r.Options.ChunkSize)
	switch {
	case lacks > material:
	case d.Verdict == Replaced:
		d.Verdict = AlreadyQueued
		return nil
	default:
		d.Verdict, d.Result, d.Lacks = Unchanged, &res, lacks
		return nil
	}
	union, err := unite(have, next)
	q.warn("unite lists of one image", err)
	if union == nil {
		return nil
	}
	all := len(union.Accesses)
	if union = union.Fit(); len(union.Accesses) < all {
		q.o.Log.Warn("one image was read by so many runs in so many places that no list holds it all: it is built for the last run alone", zap.String("image", r.Image.Reference))
		return nil
	}
	return union
}

// sharpen returns l with the ranges that have knows of files of which l knows only that they were touched: such a run, which found no
// trace instance ready, adds the files that are new. Where all of l is of whole files it gets the grade of have, which the union has then: the
// next run with ranges is to be united with that, too.
func sharpen(l, have *persist.List) *persist.List {
	known := make(map[string][]trace.Range, len(have.Accesses))
	for i := range have.Accesses {
		if a := &have.Accesses[i]; len(a.Ranges) > 0 {
			known[a.Path] = a.Ranges
		}
	}
	out := *l
	out.Accesses = slices.Clone(l.Accesses)
	for i := range out.Accesses {
		a := &out.Accesses[i]
		// Among ranges a file that was read is whole when it was read unseen: all of it may have been.
		if a.Ranges == nil && (l.Grade == trace.GradeFile || a.How&trace.Read == 0) {
			a.Ranges = known[a.Path]
		}
	}
	if l.Grade == trace.GradeFile {
		out.Grade = have.Grade
		if out.Grade == trace.GradeExact {
			out.Grade = trace.GradeFaultAround // nobody knows the pages of what is new
		}
	}
	return &out
}

func readList(f *os.File, err error) (*persist.List, error) {
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	l, err := persist.Read(f)
	if err != nil {
		return nil, fmt.Errorf("read the list %s: %w", f.Name(), err)
	}
	return l, nil
}

// unite returns the list of what either of two lists names.
func unite(a, b *persist.List) (*persist.List, error) {
	var ps [2]*persist.Profile
	for i, l := range []*persist.List{a, b} {
		p, err := persist.NewProfile(l)
		if err != nil {
			return nil, err
		}
		ps[i] = p
	}
	p, err := persist.Merge(persist.MergeOptions{Mixed: true}, ps[:]...)
	if err != nil {
		return nil, err
	}
	return p.List(persist.Union), nil
}

// lacking returns the share of the bytes of want, in whole chunks, that have does not name, 0 to 1.
func lacking(have, want *persist.List, chunk int64) float64 {
	ranges := make(map[string][]trace.Range, len(have.Accesses))
	for i := range have.Accesses {
		ranges[have.Accesses[i].Path] = chunks(&have.Accesses[i], chunk)
	}
	var all, missing int64
	for i := range want.Accesses {
		a := &want.Accesses[i]
		w := chunks(a, chunk)
		all += bytesOf(w)
		if h, ok := ranges[a.Path]; ok {
			w = persist.Missing(w, h, a.Size)
		}
		missing += bytesOf(w)
	}
	if missing == 0 {
		return 0
	}
	return float64(missing) / float64(all)
}

// chunks returns what an access names in whole chunks, never nil.
func chunks(a *trace.Access, chunk int64) []trace.Range {
	if a.Ranges == nil {
		return persist.Disjoint([]trace.Range{{Length: a.Size}})
	}
	chunk = max(chunk, 1)
	out := make([]trace.Range, 0, len(a.Ranges))
	for _, r := range persist.Disjoint(a.Ranges) {
		first := r.Offset / chunk * chunk
		end := min((r.Offset+r.Length-1)/chunk*chunk+chunk, max(a.Size, r.Offset+r.Length))
		out = append(out, trace.Range{Offset: first, Length: end - first})
	}
	return persist.Disjoint(out)
}

func bytesOf(ranges []trace.Range) int64 {
	var n int64
	for _, r := range ranges {
		n += r.Length
	}
	return n
}

// keepBuilt keeps the list that an image was built for.
func (q *Queue) keepBuilt(job *Job) error {
	name := filepath.Join(dirBuilt, job.imageKey()+".list")
	return q.copyList(filepath.Join(q.dir, dirLists, job.Key+".list"), name)
}
