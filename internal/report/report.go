// Package report draws a profile as one HTML page that needs nothing else: no network, no
// script, no font.
package report

import (
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// What the page shows at most; the rest is added up in a line that says so.
const (
	MaxRows        = 50  // files of a table, rows of the timeline
	maxDirectories = 20  // rows of the table of directories
	maxLosses      = 100 // lines about losses
	buckets        = 240 // columns of a timeline
)

// Image is what is known of the image that a profile is of.
type Image struct {
	Name   string
	Bytes  int64 // of all its regular files
	Layers []Layer
	// Layer returns the layer that has the data of a path, 0 being the lowest.
	Layer func(path string) (int, bool)
}

// Layer is a layer of an image.
type Layer struct {
	Digest string
	Stored int64 // bytes, compressed
}

// Options are the options of [Write]; the zero value is the default.
type Options struct {
	Policy persist.Policy
	// PolicyName is what the page calls the policy.
	PolicyName string
	// Image is the profile's image; nil: its size and layers are not shown.
	Image *Image
}

//go:embed page.html
var source string

// page returns the template, parsed by the first call; it is not changed.
var page = sync.OnceValue(func() *template.Template { return template.Must(template.New("page").Parse(source)) })

// Write writes the page of p. Its length is bounded, whatever the number of files: of long
// tables it has the first [MaxRows] rows and says how many more there are. Nothing that a
// profile holds can become markup.
func Write(w io.Writer, p *persist.Profile, o Options) error {
	d := newData(p, o)
	return page().Execute(w, d)
}

// file is a file of the profile with its numbers.
type file struct {
	persist.File
	lower, upper int64
	layer        int // -1: unknown
}

// data is what the template shows. All text in it is for a person, and escaped by the template.
type data struct {
	Title    string
	Facts    [][2]string
	Complete bool
	Verdict  string
	Notes    []string
	Tiles    []tile
	Share    *share
	Curve    curve
	Axis     []string
	Rows     []row
	MoreRows string
	Layers   []row
	Dirs     table
	Largest  table
	Earliest table
	Runs     table
	Losses   []string
}

type tile struct{ Value, Label string }

// share says how much of the image a start needs, in percent.
type share struct {
	Lower, Upper float64
	Text         string
}

type table struct {
	Head []string
	Rows [][]string
	More string
}

func newData(p *persist.Profile, o Options) *data {
	l := p.List(o.Policy)
	files := newFiles(p, o)
	line := newTimeline(l.Touches())
	d := &data{Complete: l.Complete(), Axis: line.axis()}
	d.Title = clean(cmp.Or(l.Reference, imageName(o), l.Digest, "a profile"))
	d.Verdict = verdict(p)
	for _, f := range [][2]string{
		{"Image", imageName(o)},
		{"Reference", l.Reference},
		{"Manifest", l.Digest},
		{"Platform", l.Platform},
		{"Command", strings.Join(l.Command, " ")},
		{"Engine", l.Engine},
		{"Grade", l.Grade},
		{"Bytes of", o.PolicyName},
	} {
		if f[1] != "" {
			d.Facts = append(d.Facts, [2]string{f[0], clean(f[1])})
		}
	}
	var lower, upper, size int64
	whole := 0
	for _, f := range files {
		lower, upper, size = add(lower, f.lower), add(upper, f.upper), add(size, f.Size)
		if f.Ranges == nil {
			whole++
		}
	}
	d.Tiles = []tile{
		{strconv.Itoa(len(files)), "files"},
		{progress.Bytes(upper), "touched at most"},
		{progress.Bytes(lower), "touched for certain"},
		{progress.Bytes(size), "in those files"},
		{line.length(), "to the last first touch"},
		{fmt.Sprintf("%d of %d", p.Complete(), len(p.Runs)), "runs are complete"},
	}
	if whole > 0 && whole < len(files) {
		d.Notes = append(d.Notes, fmt.Sprintf("%d of %d files have no ranges: they count whole.", whole, len(files)))
	}
	if whole == len(files) && whole > 0 {
		d.Notes = append(d.Notes, "No ranges were recorded: every file counts whole, and nothing is certain.")
	}
	if line.untimed {
		d.Notes = append(d.Notes, "No times were recorded: the timeline is the order of the files.")
	}
	d.Share = newShare(o.Image, lower, upper)
	d.Curve = line.curve()
	d.Rows, d.MoreRows = line.fileRows(files)
	d.Layers = line.layerRows(files, o.Image)
	d.Dirs = directories(files)
	d.Largest, d.Earliest = hottest(files)
	d.Runs, d.Losses = runs(p)
	return d
}

func verdict(p *persist.Profile) string {
	complete, all := p.Complete(), len(p.Runs)
	switch complete {
	case all:
		return "complete: nothing is known to be missing"
	case 0:
		return "incomplete: see what was lost"
	}
	return fmt.Sprintf("complete: %d of %d runs are; what the others lost is below", complete, all)
}

// add adds two numbers of at least 0; a list may claim files of 2^63-1 bytes.
func add(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

func imageName(o Options) string {
	if o.Image == nil {
		return ""
	}
	return o.Image.Name
}

func newFiles(p *persist.Profile, o Options) []file {
	var out []file
	for _, f := range p.Files(o.Policy) {
		one := file{File: f, lower: persist.Lower(&f.Access), upper: persist.Upper(&f.Access), layer: -1}
		if o.Image != nil && o.Image.Layer != nil {
			if n, ok := o.Image.Layer(f.Path); ok {
				one.layer = n
			}
		}
		out = append(out, one)
	}
	return out
}

func newShare(i *Image, lower, upper int64) *share {
	if i == nil || i.Bytes <= 0 {
		return nil
	}
	percent := func(n int64) float64 { return min(100, 100*float64(n)/float64(i.Bytes)) }
	return &share{
		Lower: percent(lower), Upper: percent(upper),
		Text: fmt.Sprintf("%s to %s of %s: %.1f %% to %.1f %% of the bytes of the image's files",
			progress.Bytes(lower), progress.Bytes(upper), progress.Bytes(i.Bytes), percent(lower), percent(upper)),
	}
}

// clean returns a name as it is, or quoted where it holds what cannot be seen.
func clean(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

func duration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

func fileCells(f file) []string {
	kind := ""
	if f.How&trace.Runtime != 0 {
		kind = " (container runtime)"
	}
	return []string{
		clean(f.Path) + kind, duration(f.Elapsed), fmt.Sprintf("%.0f %%", f.Weight*100), progress.Bytes(f.lower), progress.Bytes(f.upper),
		progress.Bytes(f.Size),
	}
}

func hottest(files []file) (largest, earliest table) {
	head := []string{"Path", "First touch", "Runs", "Certain", "At most", "Size"}
	fill := func(files []file) table {
		t := table{Head: head}
		for _, f := range files[:min(len(files), MaxRows)] {
			t.Rows = append(t.Rows, fileCells(f))
		}
		if more := len(files) - len(t.Rows); more > 0 {
			var upper int64
			for _, f := range files[len(t.Rows):] {
				upper = add(upper, f.upper)
			}
			t.More = fmt.Sprintf("and %d more files with %s", more, progress.Bytes(upper))
		}
		return t
	}
	bySize := slices.Clone(files)
	slices.SortStableFunc(bySize, func(a, b file) int { return cmp.Compare(b.upper, a.upper) })
	return fill(bySize), fill(files)
}

// directories adds the files up by the first two names of their paths.
func directories(files []file) table {
	type sums struct {
		name         string
		files        int
		lower, upper int64
	}
	at := map[string]int{}
	var all []sums
	for _, f := range files {
		name := path.Dir(f.Path)
		if parts := strings.SplitN(name, "/", 4); len(parts) > 3 {
			name = strings.Join(parts[:3], "/")
		}
		i, ok := at[name]
		if !ok {
			i = len(all)
			at[name] = i
			all = append(all, sums{name: name})
		}
		all[i].files++
		all[i].lower = add(all[i].lower, f.lower)
		all[i].upper = add(all[i].upper, f.upper)
	}
	slices.SortStableFunc(all, func(a, b sums) int { return cmp.Compare(b.upper, a.upper) })
	t := table{Head: []string{"Directory", "Files", "Certain", "At most"}}
	for _, s := range all[:min(len(all), maxDirectories)] {
		t.Rows = append(t.Rows, []string{clean(s.name), strconv.Itoa(s.files), progress.Bytes(s.lower), progress.Bytes(s.upper)})
	}
	if more := len(all) - len(t.Rows); more > 0 {
		t.More = fmt.Sprintf("and %d more directories", more)
	}
	return t
}

func runs(p *persist.Profile) (t table, losses []string) {
	t.Head = []string{"Run", "Started", "Took", "Ended", "Files", "Left out", "Verdict"}
	more := 0
	for _, r := range p.Runs {
		l := r.List
		started := "unknown"
		if !l.Started.IsZero() {
			started = l.Started.Format("2006-01-02 15:04:05")
		}
		id := strings.TrimPrefix(r.ID, "sha256:")
		id = id[:min(len(id), 12)]
		t.Rows = append(t.Rows, []string{
			id, started, duration(l.Duration), clean(cmp.Or(l.End, "unknown")),
			strconv.Itoa(len(l.Accesses)), strconv.FormatInt(l.Skipped, 10), l.Verdict(),
		})
		for _, x := range l.Losses {
			if len(losses) == maxLosses {
				more++
				continue
			}
			count := "an unknown number"
			if x.Count >= 0 {
				count = strconv.FormatInt(x.Count, 10)
			}
			losses = append(losses, strings.TrimSuffix(fmt.Sprintf("run %s: %s (%s): %s", id, clean(x.Reason), count, clean(x.Detail)), ": "))
		}
	}
	if more > 0 {
		losses = append(losses, fmt.Sprintf("and %d more losses", more))
	}
	return t, losses
}
