package report

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// timeline places first touches in columns of time.
type timeline struct {
	touches []persist.Touch
	end     time.Duration // of the last column
	untimed bool          // no touch has a time: a column is a part of the order
}

func newTimeline(touches []persist.Touch) *timeline {
	t := &timeline{touches: touches}
	for _, x := range touches {
		t.end = max(t.end, x.Range.Elapsed)
	}
	t.untimed = t.end == 0 && len(touches) > 0
	return t
}

// column returns the column of the i-th touch, 0 to buckets-1.
func (t *timeline) column(i int) int {
	part := float64(i) / float64(max(1, len(t.touches)))
	if !t.untimed {
		part = float64(t.touches[i].Range.Elapsed) / float64(max(1, t.end))
	}
	return min(buckets-1, int(part*buckets))
}

func (t *timeline) length() string {
	if t.untimed {
		return "unknown"
	}
	return duration(t.end)
}

// axis returns five marks with equal distances.
func (t *timeline) axis() []string {
	var out []string
	for i := range 5 {
		if t.untimed {
			out = append(out, strconv.Itoa(len(t.touches)*i/4))
			continue
		}
		out = append(out, duration(fraction(t.end, i, 4)))
	}
	return out
}

// fraction returns i/n of d, for i up to n; a list may have any time, so that d·i may be none.
func fraction(d time.Duration, i, n int) time.Duration {
	part, whole := time.Duration(i), time.Duration(n)
	return d/whole*part + d%whole*part/whole
}

// curve is the bytes touched so far, as outlines in a box of buckets × 100 units.
type curve struct {
	Upper, Lower string // of SVG paths
	Width        int
	Top          string // what the box's height means
}

func (t *timeline) curve() curve {
	var upper, lower [buckets]int64
	for i, x := range t.touches {
		c := t.column(i)
		upper[c] = add(upper[c], x.Range.Length)
		if x.Range.Certain {
			lower[c] = add(lower[c], x.Range.Length)
		}
	}
	var total int64
	for _, n := range upper {
		total = add(total, n)
	}
	outline := func(of [buckets]int64) string {
		var b strings.Builder
		b.WriteString("M0 100")
		var sum int64
		for i, n := range of {
			sum = add(sum, n)
			y := 100 - 100*float64(sum)/float64(max(1, total))
			fmt.Fprintf(&b, "L%d %.2fH%d", i, y, i+1)
		}
		fmt.Fprintf(&b, "V100Z")
		return b.String()
	}
	return curve{Upper: outline(upper), Lower: outline(lower), Width: buckets, Top: progress.Bytes(total)}
}

// row is a strip of the timeline.
type row struct {
	Name  string
	Text  string
	Marks []mark
	Width int
}

// mark is the touches of some columns; Strength is 1 to 4, by bytes.
type mark struct {
	X, Width, Strength int
	Title              string
}

// strips adds the bytes of touches up by row and column. rowOf returns -1 for a touch of no row.
func (t *timeline) strips(rows int, rowOf func(path string) int) [][buckets]int64 {
	out := make([][buckets]int64, rows)
	for i, x := range t.touches {
		if r := rowOf(x.Access.Path); r >= 0 {
			at := &out[r][t.column(i)]
			*at = add(*at, max(1, x.Range.Length))
		}
	}
	return out
}

// marks joins neighbouring columns of one strength.
func (t *timeline) marks(strip [buckets]int64) []mark {
	var top int64
	for _, n := range strip {
		top = max(top, n)
	}
	strength := func(n int64) int {
		if n == 0 {
			return 0
		}
		return 1 + min(3, int(4*math.Sqrt(float64(n)/float64(top))))
	}
	var out []mark
	var bytes int64
	for i := 0; i < buckets; {
		s, from := strength(strip[i]), i
		for bytes = 0; i < buckets && strength(strip[i]) == s; i++ {
			bytes = add(bytes, strip[i])
		}
		if s > 0 {
			out = append(out, mark{from, i - from, s, t.when(from) + ": " + progress.Bytes(bytes)})
		}
	}
	return out
}

func (t *timeline) when(column int) string {
	if t.untimed {
		return fmt.Sprintf("touch %d", column*len(t.touches)/buckets+1)
	}
	return duration(fraction(t.end, column, buckets))
}

// fileRows returns a strip for each of the largest files, in the order of their first touch,
// and one for all others.
func (t *timeline) fileRows(files []file) (rows []row, more string) {
	largest := make([]int, len(files))
	for i := range files {
		largest[i] = i
	}
	slices.SortStableFunc(largest, func(a, b int) int { return cmp.Compare(files[b].upper, files[a].upper) })
	shown := largest[:min(len(largest), MaxRows)]
	slices.Sort(shown)
	rowOf := map[string]int{}
	var rest int64
	for i, f := range shown {
		rowOf[files[f].Path] = i
	}
	for _, f := range files {
		if _, ok := rowOf[f.Path]; !ok {
			rest = add(rest, f.upper)
		}
	}
	others := len(files) - len(shown)
	strips := t.strips(len(shown)+1, func(path string) int {
		if i, ok := rowOf[path]; ok {
			return i
		}
		return len(shown)
	})
	for i, f := range shown {
		x := files[f]
		rows = append(rows, row{Name: clean(x.Path), Text: bounds(x.lower, x.upper), Marks: t.marks(strips[i]), Width: buckets})
	}
	if others > 0 {
		more = fmt.Sprintf("The %d largest of %d files are shown, in the order of their first touch; the last row is all others.", len(shown), len(files))
		rows = append(rows, row{Name: fmt.Sprintf("%d other files", others), Text: progress.Bytes(rest), Marks: t.marks(strips[len(shown)]), Width: buckets})
	}
	return rows, more
}

func bounds(lower, upper int64) string {
	if lower == upper {
		return progress.Bytes(upper)
	}
	return progress.Bytes(lower) + " to " + progress.Bytes(upper)
}

// layerRows returns a strip for each layer with a touched file, the lowest first.
func (t *timeline) layerRows(files []file, i *Image) []row {
	if i == nil || len(i.Layers) == 0 {
		return nil
	}
	type sums struct {
		files        int
		lower, upper int64
	}
	all := make([]sums, len(i.Layers)+1) // the last one: in no layer
	layerOf := map[string]int{}
	for _, f := range files {
		n := f.layer
		if n < 0 || n >= len(i.Layers) {
			n = len(i.Layers)
		}
		layerOf[f.Path] = n
		all[n].files++
		all[n].lower = add(all[n].lower, f.lower)
		all[n].upper = add(all[n].upper, f.upper)
	}
	strips := t.strips(len(all), func(path string) int {
		if n, ok := layerOf[path]; ok {
			return n
		}
		return -1
	})
	var out []row
	for n, s := range all {
		name := "not in the image"
		if n < len(i.Layers) {
			name = fmt.Sprintf("layer %d, %.19s, %s stored", n, i.Layers[n].Digest, progress.Bytes(i.Layers[n].Stored))
		} else if s.files == 0 {
			continue
		}
		out = append(out, row{
			Name: clean(name), Text: fmt.Sprintf("%d files, %s", s.files, bounds(s.lower, s.upper)),
			Marks: t.marks(strips[n]), Width: buckets,
		})
	}
	return out
}
