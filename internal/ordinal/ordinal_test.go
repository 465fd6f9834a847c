package ordinal_test

import (
	"testing"

	"github.com/headstart-oci/headstart/internal/ordinal"
)

// TestIndex enters pointers to neighbours, beyond the room made for them.
func TestIndex(t *testing.T) {
	t.Parallel()
	for _, room := range []int{0, 1, 48, 49, 5000} {
		values := make([]int, 5000)
		list := make([]*int, 0, len(values))
		x := ordinal.New(room, func(i int) *int { return list[i] })
		for i := range values {
			p := &values[i]
			if at, ok := x.Find(p); ok {
				t.Fatalf("room %d: Find before Add(%d) = %d, want nothing", room, i, at)
			}
			list = append(list, p)
			x.Add(p)
		}
		if x.Len() != len(values) {
			t.Fatalf("room %d: Len() = %d, want %d", room, x.Len(), len(values))
		}
		for i := range values {
			if at, ok := x.Find(&values[i]); !ok || at != i {
				t.Fatalf("room %d: Find(%d) = %d, %v", room, i, at, ok)
			}
		}
		if at, ok := x.Find(new(int)); ok {
			t.Errorf("room %d: Find of a stranger = %d, want nothing", room, at)
		}
	}
}
