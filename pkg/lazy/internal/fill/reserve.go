package fill

import (
	"errors"
	"syscall"
	"time"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Reserver is a [Cache] that can take the room for a chunk before it is asked for.
type Reserver interface {
	// Reserve returns nil when there is room for chunk c, or that cannot be told, else the file system's error.
	Reserve(c rafs.Chunk) error
}

// fullFor is how long after its last refusal a disk is asked for room before a source is asked for data. Room that is given back is
// used at once all the same.
const fullFor = 10 * time.Second

// began is what times are counted from, whatever is done to the clock.
var began = time.Now()

// noteFull remembers that the disk was full, if err says so, and returns it.
func (s *Scheduler) noteFull(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		s.full.Store(int64(time.Since(began) + fullFor))
	}
	return err
}

// isFull reports whether it was of late. Nothing is fetched then that nobody waits for.
func (s *Scheduler) isFull() bool { return int64(time.Since(began)) < s.full.Load() }

// reserve takes the room for chunks that are not there where the disk was full of late: what is fetched for a full one is thrown away, and the next
// read fetches it again.
func (b *Blob) reserve(chunks []rafs.Chunk) error {
	r, ok := b.cache.(Reserver)
	if !ok || !b.s.isFull() {
		return nil
	}
	for _, c := range chunks {
		if b.cache.Ready(c) {
			continue
		}
		if err := b.s.noteFull(r.Reserve(c)); err != nil {
			return &cacheError{err}
		}
	}
	return nil
}
