package main

import (
	"slices"
	"testing"
)

// What is missed later may be of the first blob, and the same thing may be missed again.
func TestWithout(t *testing.T) {
	all := []string{"a1", "a2", "a1", "b1", "b2"}
	if got, want := without(all, []string{"a1", "b1"}), []string{"a2", "a1", "b2"}; !slices.Equal(got, want) {
		t.Errorf("without() = %q, want %q", got, want)
	}
	if got := without(all, all); len(got) != 0 {
		t.Errorf("without(itself) = %q, want nothing", got)
	}
	if got := without(all, nil); !slices.Equal(got, all) {
		t.Errorf("without(nothing) = %q, want all", got)
	}
}
