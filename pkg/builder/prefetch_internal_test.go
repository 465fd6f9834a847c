package builder

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// planOf is a plan with chunks 0 to n-1.
func planOf(n int) *prefetchPlan {
	p := &prefetchPlan{}
	for i := range n {
		p.chunks = append(p.chunks, chunkOf(i))
	}
	return p
}

func chunkOf(i int) rafs.Chunk {
	var c rafs.Chunk
	binary.LittleEndian.PutUint64(c.Digest[:], uint64(i))
	return c
}

func fileOf(chunks ...int) *rafs.Inode {
	f := &rafs.Inode{}
	for _, i := range chunks {
		f.Chunks = append(f.Chunks, chunkOf(i))
	}
	return f
}

// TestFollow holds the pairs of a plan against what a search of all files says, for files with chunks that the plan has
// and others, repeated ones too.
func TestFollow(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		const chunks = 8
		var files []*rafs.Inode
		want := make([][]int, chunks)
		for range rnd.IntN(4) {
			var list []int
			for range rnd.IntN(12) {
				list = append(list, rnd.IntN(chunks+2))
			}
			files = append(files, fileOf(list...))
			for i := 1; i < len(list); i++ {
				first, second := list[i-1], list[i]
				if first < chunks && second < chunks && !slices.Contains(want[second], first) {
					want[second] = append(want[second], first)
				}
			}
		}
		p := planOf(chunks)
		if err := p.follow(t.Context(), files); err != nil {
			t.Fatal(err)
		}
		for i := range want {
			var got []int
			p.ahead(i, func(first int) { got = append(got, first) })
			slices.Sort(want[i])
			if diff := cmp.Diff(want[i], got); diff != "" {
				t.Fatalf("before chunk %d (-want +got):\n%s", i, diff)
			}
		}
	}
}

// TestFollowAlternating: a disk image whose blocks alternate between data and zeros has one chunk behind all others. A
// search of them for each would not end before the test's time does.
func TestFollowAlternating(t *testing.T) {
	t.Parallel()
	n := 1 << 19
	if testing.Short() {
		n = 1 << 16
	}
	list := make([]int, 0, 2*n)
	for i := 1; i < n; i++ {
		list = append(list, i, 0)
	}
	p := planOf(n)
	if err := p.follow(t.Context(), []*rafs.Inode{fileOf(list...)}); err != nil {
		t.Fatal(err)
	}
	got := 0
	p.ahead(0, func(int) { got++ })
	if got != n-1 {
		t.Errorf("chunk 0 is behind %d chunks, want %d", got, n-1)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := planOf(2).follow(ctx, []*rafs.Inode{fileOf(0, 1)}); !errors.Is(err, context.Canceled) {
		t.Errorf("follow of a cancelled context = %v", err)
	}
}
