//go:build race

package rafs_test

// raceEnabled says that the race detector watches, under which code is about seven times slower: what other
// runs go through whole is gone through in part then.
const raceEnabled = true
