package builder

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestDir holds a directory against a map while names come, change and go.
func TestDir(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for _, names := range []int{3, 8, 9, 40, 3000} {
		var d dir
		want := map[string]entry{}
		for i := range 20 * names {
			name := fmt.Sprint(r.IntN(names))
			switch r.IntN(5) {
			case 0, 1:
				delete(want, name)
				d.remove(name)
			case 2:
				want[name] = newDir(&rafs.Inode{Mtime: int64(i)})
				d.put(name, want[name])
			case 3:
				want[name] = entry{link: &lowerLink{}}
				d.put(name, want[name])
			default:
				want[name] = entry{ino: &rafs.Inode{Mtime: int64(i)}}
				d.put(name, want[name])
			}
			if got := d.get(name); got != want[name] {
				t.Fatalf("%d names, step %d: get(%s) = %+v, want %+v", names, i, name, got, want[name])
			}
			if d.len() != len(want) {
				t.Fatalf("%d names, step %d: len() = %d, want %d", names, i, d.len(), len(want))
			}
			if len(d.names) > 2*names+2*fewNames {
				t.Fatalf("%d names, step %d: the list has grown to %d", names, i, len(d.names))
			}
		}
		if got := maps.Collect(d.all()); !maps.Equal(got, want) {
			t.Errorf("%d names: all() = %v, want %v", names, got, want)
		}
		sorted := slices.Sorted(maps.Keys(want))
		if got := d.sorted(); !slices.Equal(got, sorted) {
			t.Errorf("%d names: sorted() = %v, want %v", names, got, sorted)
		}
		list, subdirs := d.take()
		if d.len() != 0 || len(d.names) != 0 {
			t.Errorf("%d names: %d are left", names, d.len())
		}
		for i, name := range sorted {
			if i >= len(list) || list[i].Name != name || list[i].Inode != want[name].ino || subdirs[list[i].Inode] != want[name].dir {
				t.Fatalf("%d names: take() differs at %d, want %q", names, i, name)
			}
		}
		if len(list) != len(sorted) {
			t.Errorf("%d names: take() has %d, want %d", names, len(list), len(sorted))
		}
	}
}
