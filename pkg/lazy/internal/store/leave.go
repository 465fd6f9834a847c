package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// leaveLimit is how long OpenBlob waits for those who have a data file open although no mount of this daemon has it any more: the
// kernel closes the files of a superblock after it is gone, and the holder closes its descriptor when it gets to it. Whoever keeps
// it longer is a mount that nobody guards.
const leaveLimit = 2 * time.Second

// openPatiently is openBlob, again and again until nobody else has the file open, or the deadline: then it is put aside.
func (s *Store) openPatiently(name string, b rafs.Blob, recs []chunkRecord, deadline time.Time) (*Blob, error) {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		s.mu.Lock()
		blob, err := s.openBlob(name, b, recs, time.Now().Before(deadline))
		s.mu.Unlock()
		if !errors.Is(err, ErrInUse) {
			return blob, err
		}
		<-time.After(wait)
	}
}

// Present returns an error when the state directory is not the one any more that was opened: somebody has removed it, or
// its content. What is open goes on; nothing can be put there.
func (s *Store) Present() error {
	was, err := s.lock.Stat()
	if err != nil {
		return err
	}
	is, err := os.Stat(filepath.Join(s.path, "lock"))
	for _, d := range directories {
		if err == nil {
			_, err = s.root.Stat(d)
		}
	}
	if err == nil && !os.SameFile(was, is) {
		err = errors.New("it is another one")
	}
	if err != nil {
		return fmt.Errorf("state directory %s was removed: %w", s.path, err)
	}
	return nil
}
