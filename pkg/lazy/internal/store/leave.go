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
// kernel closes the files of a superblock after it is gone, and holders close their descriptors when they get to it. Whoever keeps
// it longer is a mount that nobody guards. What was open in this process before is not waited for: see foreign.
const leaveLimit = 2 * time.Second

// maxVariants bounds how many data files of one blob there are.
const maxVariants = 64

// Patience is how long those who open blobs wait together until nobody else has the files open. The zero value is none.
type Patience struct{ until time.Time }

// NewPatience returns the patience of one mount, for all its blobs.
func NewPatience() Patience { return Patience{time.Now().Add(leaveLimit)} }

// Wait waits for a moment, if there is patience left for one.
func (p Patience) Wait() {
	if p.left() {
		<-time.After(20 * time.Millisecond)
	}
}

func (p Patience) left() bool { return time.Now().Before(p.until) }

// OpenBlob is [Store.TryOpenBlob], again and again, as long as there is patience.
func (s *Store) OpenBlob(b rafs.Blob, chunks []rafs.Chunk) (*Blob, error) {
	for p := NewPatience(); ; p.Wait() {
		blob, err := s.TryOpenBlob(b, chunks, p)
		if !errors.Is(err, ErrInUse) {
			return blob, err
		}
	}
}

// TryOpenBlob returns the data file of b for an image that uses chunks of it. A file that is
// open or was filled before is used again when it has the same chunks at the same
// places, or has room for them; else there is another one. The caller closes the Blob.
// It returns [ErrUnsupported] for blobs that EROFS cannot read, rafs.ErrInvalid for chunks
// that contradict each other, and [ErrInUse] for a file that is not complete and that somebody else has open: the caller waits and tries
// again. Without patience that one is put aside.
func (s *Store) TryOpenBlob(b rafs.Blob, chunks []rafs.Chunk, p Patience) (*Blob, error) {
	recs, err := check(b, chunks)
	if err != nil {
		return nil, err
	}
	for n := range maxVariants {
		name := b.ID
		if n > 0 {
			name = fmt.Sprintf("%s.%d", b.ID, n)
		}
		s.mu.Lock()
		blob, err := s.openBlob(name, b, recs, p.left())
		s.mu.Unlock()
		if errors.Is(err, errConflict) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open blob %s: %w", name, err)
		}
		return blob, nil
	}
	return nil, fmt.Errorf("open blob %s: %d images with other chunks have it: %w", b.ID, maxVariants, ErrUnsupported)
}

// file identifies a file.
type file struct{ dev, ino uint64 }

// foreign reports whether somebody may have the data file of b open who needs more of it than there is, and whom nobody guards. Of a file that was open here,
// and is not, everybody is known: the mounts of this daemon that needed more are gone, and whoever has it open still, like a holder that
// has not heard so yet, or a mount that has all it needs, reads no hole. The caller holds mu.
func (s *Store) foreign(b *Blob) bool {
	return s.left[b.name] != file{b.dev, b.ino} && inUse(b.data)
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
