package lazy

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
)

// lateIndex is the index of chunks of a state directory without a daemon: it is opened when the first cache goes, by when the
// directory is locked. It implements store.Index.
type lateIndex struct {
	path string

	mu sync.Mutex // guards x
	x  *index.Index
}

// RemoveCache forgets what is said of one cache. Where there is no index, nothing is said of any.
func (l *lateIndex) RemoveCache(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.x == nil {
		if _, err := os.Lstat(l.path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		x, err := index.Open(l.path, index.Options{})
		if err != nil {
			return err
		}
		l.x = x
	}
	err := l.x.RemoveCache(context.Background(), name)
	if errors.Is(err, index.ErrBroken) {
		err = l.x.Reset() // the next daemon fills it again
	}
	return err
}

// Close closes what was opened.
func (l *lateIndex) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.x == nil {
		return nil
	}
	return l.x.Close()
}

// indexPath is the index of chunks of a state directory.
func indexPath(stateDir string) string { return filepath.Join(stateDir, "index") }
