package main

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// The bound grows with what is alive, and comes down again.
func TestLimitMemory(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	const least = 32 << 20
	stop := limitMemory(least)
	t.Cleanup(func() {
		stop()
		runtime.GC() // and with it the last call, if one was on its way
		debug.SetMemoryLimit(before)
	})
	reaches := func(what string, want func(limit int64) bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			runtime.GC()
			limit := debug.SetMemoryLimit(-1)
			if want(limit) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: the limit is %d MiB", what, limit>>20)
			}
		}
	}
	held := make([]byte, 96<<20)
	reaches("with 96 MiB alive", func(limit int64) bool { return limit >= 120<<20 })
	runtime.KeepAlive(held) // and no longer
	reaches("with nothing alive", func(limit int64) bool { return limit < 96<<20 })
}
