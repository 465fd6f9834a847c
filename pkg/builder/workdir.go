package builder

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	workPrefix = "headstart-build-"

	// staleAge is how old a directory without a lock must be: a builder has made it and
	// will lock it at once, or it is dead.
	staleAge = time.Minute
)

// workDir is the directory of one conversion's files. Its builder holds a lock on it, so
// that the next one can tell which were left by builders that were killed.
type workDir struct {
	path   string
	remove func() error // removes it; the same answer each time
}

// makeWorkDir removes what dead builders have left in parent and makes a directory there.
func makeWorkDir(parent string) (*workDir, error) {
	if parent == "" {
		parent = os.TempDir()
	}
	sweepWorkDirs(parent)
	dir, err := os.MkdirTemp(parent, workPrefix)
	if err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), os.Remove(dir))
	}
	return &workDir{path: dir, remove: sync.OnceValue(func() error {
		return errors.Join(os.RemoveAll(dir), lock.Close())
	})}, nil
}

// lockDir opens a directory and locks it until it is closed; it does not wait.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// sweepWorkDirs removes this user's directories that nobody holds a lock on. What cannot be
// removed stays: it hinders nobody.
func sweepWorkDirs(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return // making a directory there says more
	}
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), workPrefix) {
			sweepWorkDir(filepath.Join(parent, e.Name()))
		}
	}
}

func sweepWorkDir(dir string) {
	info, err := os.Lstat(dir)
	if err != nil || time.Since(info.ModTime()) < staleAge || !ours(info) {
		return
	}
	lock, err := lockDir(dir)
	if err != nil {
		return
	}
	_ = os.RemoveAll(dir)
	_ = lock.Close()
}

func ours(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
