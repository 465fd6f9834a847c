package trace

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// TestLookup holds the tables of paths and ids against maps.
func TestLookup(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var r Recorder
	byID := make(map[uint32]string) // the path that an id stands for
	name := func() string { return fmt.Sprintf("/%d", rnd.IntN(1500)) }
	for n := range uint32(10_000) {
		id := n
		switch {
		case n%1000 == 7:
			id = 1<<31 + n // far from all others
		case n%5 == 1:
			id = rnd.Uint32N(n + 1)
		}
		if to := name(); n%3 == 2 {
			from, known := byID[id]
			if err := r.Rename(id, to); err != nil {
				t.Fatal(err)
			}
			if known {
				for other, p := range byID {
					if p == from {
						byID[other] = to
					}
				}
			}
			continue
		}
		if _, known := byID[id]; known {
			continue // tracers number a file once
		}
		p := name()
		if err := r.Touch(id, Access{Path: p}); err != nil {
			t.Fatal(err)
		}
		byID[id] = p
	}
	paths := make(map[string]bool)
	for id, p := range byID {
		paths[p] = true
		i, ok := r.at(id)
		if !ok || r.touch(i).Path != p {
			t.Fatalf("id %d is touch %d, %t, want %s", id, i, ok, p)
		}
		if j, ok := r.paths.find(&r, p); !ok || j != i {
			t.Fatalf("%s is touch %d, %t, want %d", p, j, ok, i)
		}
	}
	for _, a := range r.Trace().Accesses {
		if !paths[a.Path] {
			t.Errorf("%s is listed, which no id stands for", a.Path)
		}
		delete(paths, a.Path)
	}
	if len(paths) > 0 {
		t.Errorf("%d paths are not listed", len(paths))
	}
	for _, p := range []string{"/none", "/1500"} {
		if i, ok := r.paths.find(&r, p); ok {
			t.Errorf("find(%s) = %d", p, i)
		}
	}
}
