package tracefs

import (
	"slices"
	"testing"
	"time"
)

func TestNewcomers(t *testing.T) {
	for _, c := range []struct{ before, now, want []int }{
		{nil, nil, nil},
		{nil, []int{3, 1}, []int{3, 1}},
		{[]int{1, 3}, []int{3, 1}, nil},
		{[]int{1, 2, 3}, []int{2}, nil},
		{[]int{7, 1, 3}, []int{9, 3, 2, 1}, []int{9, 2}},
	} {
		if got := newcomers(c.before, c.now); !slices.Equal(got, c.want) {
			t.Errorf("newcomers(%v, %v) = %v, want %v", c.before, c.now, got, c.want)
		}
	}
}

// What tells the late threads of a large process takes a look at each thread, not at each pair of them: of a million, which
// is a quarter of what the kernel has numbers for, there are a million millions.
func TestNewcomersOfMany(t *testing.T) {
	const many, limit = 1_000_000, time.Minute
	before, now := make([]int, many), make([]int, many)
	for i := range many {
		before[i], now[i] = i, many+i
	}
	now[0] = 0
	done := make(chan []int)
	go func() { done <- newcomers(before, now) }()
	select {
	case got := <-done:
		if !slices.Equal(got, now[1:]) {
			t.Errorf("%d threads are late, want %d", len(got), many-1)
		}
	case <-time.After(limit):
		t.Fatalf("%d threads were not told apart within %v", many, limit)
	}
}
