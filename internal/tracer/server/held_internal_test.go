package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A tree whose directories have long paths, and many of them, ends a search before their paths take the memory.
func TestWalkHoldsLittle(t *testing.T) {
	top := t.TempDir()
	dir := top
	for n := range 15 {
		dir = filepath.Join(dir, strings.Repeat(string(rune('a'+n)), 250))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	view, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(view)
	deep, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer deep.Close()
	search := func() error {
		w := walk{view: view, deadline: time.Now().Add(time.Minute), found: func(string, inode) {}, buf: make([]byte, 32<<10)}
		return w.run(func() bool { return true })
	}
	const each = 15*251 + 201
	for n := range maxHeld/each + 1 {
		if n == maxHeld/each/2 {
			if err := search(); err != nil {
				t.Errorf("a search of %d directories = %v", n, err)
			}
		}
		if err := deep.Mkdir(fmt.Sprintf("%0200d", n), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := search(); !errors.Is(err, errWalkBound) {
		t.Errorf("a search of %d directories with paths of %d bytes = %v, want %v", maxHeld/each+1, each, err, errWalkBound)
	}
}
