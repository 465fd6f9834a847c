package lazy

import (
	"runtime"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Mounts of one bootstrap have one tree, which goes with them.
func TestTrees(t *testing.T) {
	t.Parallel()
	var all trees
	get := func(digest string, size uint64) any {
		tree, err := all.get(digest, &rafs.Image{Root: &rafs.Inode{Size: size}})
		if err != nil {
			t.Fatal(err)
		}
		return tree
	}
	one := get("one", 1)
	if other := get("one", 1); other != one {
		t.Error("two trees of one bootstrap")
	}
	if two := get("two", 2); two == one {
		t.Error("one tree of two bootstraps")
	}
	runtime.KeepAlive(one)
	runtime.GC()
	runtime.GC()
	get("three", 3)
	all.mu.Lock()
	defer all.mu.Unlock()
	if len(all.live) != 1 {
		t.Errorf("%d trees are remembered, want that of the last", len(all.live))
	}
}
