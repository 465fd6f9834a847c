package main

import (
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

// limitMemory bounds what Go's part of the process takes: to least bytes, or to what is alive and a quarter more where that exceeds it, so that the
// images that are mounted may need more without the collector running all the time. The bound follows each collection, in the background, until
// stop is called.
func limitMemory(least int64) (stop func()) {
	debug.SetMemoryLimit(least)
	last := least
	return followCollections(func() {
		parts := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
		metrics.Read(parts)
		const overhead = 4 << 20 // what the runtime keeps about the heap
		next := int64(overhead)
		for _, p := range parts {
			if p.Value.Kind() != metrics.KindUint64 {
				return
			}
			next += int64(min(p.Value.Uint64(), math.MaxInt64/8)) / 4 * 5
		}
		if next = max(least, next); next != last {
			debug.SetMemoryLimit(next)
			last = next
		}
	})
}

// followCollections calls f after each garbage collection, one call at a time, until stop is called.
func followCollections(f func()) (stop func()) {
	type object struct{ _ *byte } // with a pointer, so that it is an allocation of its own
	var stopped atomic.Bool
	var again func(struct{})
	again = func(struct{}) {
		if !stopped.Load() {
			f()
			runtime.AddCleanup(new(object), again, struct{}{})
		}
	}
	runtime.AddCleanup(new(object), again, struct{}{})
	return func() { stopped.Store(true) }
}
