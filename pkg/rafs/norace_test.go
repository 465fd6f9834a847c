//go:build !race

package rafs_test

const raceEnabled = false
