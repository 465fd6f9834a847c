package main

import (
	"io"
	"testing"
)

// TestVerbs holds the table of commands against what they call themselves, and that a command line gets
// its command alone, and all commands where it names none.
func TestVerbs(t *testing.T) {
	t.Parallel()
	s := streams{out: io.Discard, err: io.Discard}
	for _, v := range verbs() {
		if got := v.make(&global{streams: s}).Name(); got != v.name {
			t.Errorf("verbs() has %q, which calls itself %q", v.name, got)
		}
		root := newRoot(s, []string{v.name, "--quiet"})
		if got := root.Commands(); len(got) != 1 || got[0].Name() != v.name {
			t.Errorf("newRoot(%q) has %d commands, want that one", v.name, len(got))
		}
	}
	for _, args := range [][]string{nil, {"--quiet", "check"}, {"help", "check"}, {"__complete", "check", ""}, {"chekc"}, {"--help"}} {
		if got, want := len(newRoot(s, args).Commands()), len(verbs()); got != want {
			t.Errorf("newRoot(%q) has %d commands, want all %d", args, got, want)
		}
	}
}
