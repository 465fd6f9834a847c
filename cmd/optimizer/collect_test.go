package main

import "testing"

func TestGarbagePercent(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for live, want := range map[uint64]int{
		0: frugal, 1: generous, mib: generous, 4 * mib: generous, 5 * mib: 60, 6 * mib: frugal, 8 * mib: frugal, 1 << 40: frugal,
	} {
		if got := garbagePercent(live, 8*mib); got != want {
			t.Errorf("garbagePercent(%d MiB, 8 MiB) = %d, want %d", live/mib, got, want)
		}
	}
}
