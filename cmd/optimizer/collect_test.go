package main

import "testing"

func TestGarbagePercent(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for live, want := range map[uint64]int{
		0: frugal, mib: 400, 2 * mib: 400, 4 * mib: 300, 8 * mib: 100, 12 * mib: frugal, 16 * mib: frugal, 1 << 40: frugal,
	} {
		if got := garbagePercent(live, 16*mib); got != want {
			t.Errorf("garbagePercent(%d MiB, 16 MiB) = %d, want %d", live/mib, got, want)
		}
	}
}
