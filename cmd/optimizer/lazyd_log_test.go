package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A log that grows without end keeps its last lines, whole, for whoever writes to the same file too.
func TestBoundedLog(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	open := func() *os.File {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	const limit = 64 << 10
	logs := []*boundedLog{{out: open(), max: limit}, {out: open(), max: limit}}
	last := 20_000
	for i := range last + 1 {
		if _, err := fmt.Fprintf(logs[i%2], "line %d of a daemon that has much to say\n", i); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(name); err != nil || info.Size() > limit+limit/8 {
			t.Fatalf("after %d lines: %d bytes, %v, want about %d at most", i, info.Size(), err, limit)
		}
	}
	text, err := os.ReadFile(name)
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if err != nil || len(lines) < 100 || !strings.Contains(lines[0], "cut here") {
		t.Fatalf("%d lines, the first %q, %v", len(lines), lines[0], err)
	}
	for i, line := range lines[1:] {
		if want := fmt.Sprintf("line %d of", last-(len(lines)-2)+i); !strings.HasPrefix(line, want) {
			t.Fatalf("line %d is %q, want %q…", i+1, line, want)
		}
	}
}
