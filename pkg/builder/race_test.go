//go:build race

package builder_test

// raceEnabled says that the race detector watches: what other programs make of our bytes, which it sees nothing of, is
// for other runs then.
const raceEnabled = true
