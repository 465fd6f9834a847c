package builder

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// planned makes a root with files a, b and c of four chunks of 100 bytes each, and returns which chunks a plan has: "a0" is the first of a.
// The third chunk of c is the second one of a.
func planned(l *persist.List) (names []string) {
	root := &rafs.Inode{Mode: 0o040755}
	known := map[rafs.Digest]string{}
	for i, name := range []string{"a", "b", "c"} {
		ino := &rafs.Inode{Mode: 0o100644, Size: 400}
		for n := range 4 {
			c := rafs.Chunk{Digest: rafs.Digest{byte(i + 1), byte(n)}, UncompressedSize: 100}
			if name == "c" && n == 2 {
				c.Digest = rafs.Digest{1, 1}
			} else {
				known[c.Digest] = name + string(rune('0'+n))
			}
			ino.Chunks = append(ino.Chunks, c)
		}
		root.Children = append(root.Children, rafs.Dirent{Name: name, Inode: ino})
	}
	for _, c := range planPrefetch(root, l, 100).chunks {
		names = append(names, known[c.Digest])
	}
	return names
}

func TestPlanOrder(t *testing.T) {
	t.Parallel()
	at := func(off, n int64, elapsed time.Duration) trace.Range {
		return trace.Range{Offset: off, Length: n, Elapsed: elapsed}
	}
	for name, test := range map[string]struct {
		accesses []trace.Access
		want     []string
	}{
		"heads of all files before the middle of the first": {
			[]trace.Access{
				{Path: "/a", Elapsed: 1, Ranges: []trace.Range{at(0, 10, 1), at(100, 250, 9), at(390, 10, 3)}},
				{Path: "/b", Elapsed: 2, Ranges: []trace.Range{at(50, 100, 2)}},
			},
			[]string{"a0", "b0", "b1", "a3", "a1", "a2"},
		},
		"no times": {
			[]trace.Access{{Path: "/b", Ranges: []trace.Range{at(300, 1, 0), at(0, 1, 0)}}, {Path: "/a"}},
			[]string{"b0", "b3", "a0", "a1", "a2", "a3"},
		},
		"a whole file keeps its place": {
			[]trace.Access{
				{Path: "/a", Elapsed: 1, Ranges: []trace.Range{at(0, 1, 1), at(100, 1, 7)}},
				{Path: "/b", Elapsed: 5},
				{Path: "/c", Elapsed: 6, Ranges: []trace.Range{at(0, 1, 6)}},
			},
			[]string{"a0", "b0", "b1", "b2", "b3", "c0", "a1"},
		},
		"one without a time follows those before it": {
			[]trace.Access{
				{Path: "/a", Elapsed: 4, Ranges: []trace.Range{at(0, 1, 4), at(100, 1, 8)}},
				{Path: "/b", Ranges: []trace.Range{at(0, 1, 0)}},
				{Path: "/c", Elapsed: 5, Ranges: []trace.Range{at(0, 1, 5)}},
			},
			[]string{"a0", "b0", "c0", "a1"},
		},
		"a chunk that two files have comes when the first one wants it": {
			[]trace.Access{
				{Path: "/a", Elapsed: 1, Ranges: []trace.Range{at(0, 1, 1), at(100, 1, 9)}},
				{Path: "/c", Elapsed: 2, Ranges: []trace.Range{at(0, 1, 5), at(200, 1, 2)}},
			},
			[]string{"a0", "a1", "c0"},
		},
		"what the runtime read comes before all, wherever it is in the list": {
			[]trace.Access{
				{Path: "/a", Elapsed: 1, Ranges: []trace.Range{at(0, 1, 1)}},
				{Path: "/b", Elapsed: 5, How: trace.Runtime | trace.Read, Ranges: []trace.Range{at(100, 1, 5)}},
				{Path: "/c", How: trace.Runtime, Ranges: []trace.Range{at(300, 1, 0)}},
			},
			[]string{"b1", "c3", "a0"},
		},
		"ranges beyond the end, and that overlap": {
			[]trace.Access{{Path: "/a", Elapsed: 1, Ranges: []trace.Range{
				at(0, math.MaxInt64, 8), at(350, math.MaxInt64, 2), at(300, 100, 3), at(1<<40, 1, 1), at(100, 200, 5),
			}}},
			[]string{"a3", "a1", "a2", "a0"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := planned(&persist.List{Engine: "test", Trace: trace.Trace{Accesses: test.accesses}}); !slices.Equal(got, test.want) {
				t.Errorf("planPrefetch = %q, want %q", got, test.want)
			}
		})
	}
}
