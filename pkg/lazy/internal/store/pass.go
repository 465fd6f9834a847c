package store

import (
	"errors"
	"fmt"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"
)

// Durable identifies the data file called name, as fstat(2) does, and reports of ranges of it whether all that any image ever needed of them is
// durable: [Blob.ReadyRange] for who has all it needs, as it is at this moment. It opens nothing that raises an event.
func (s *Store) Durable(name string) (dev, ino uint64, ready func(offset, length int64) bool, err error) {
	durable, recs, err := s.state(name)
	if err != nil {
		return 0, 0, nil, fmt.Errorf("blob %s: %w", name, err)
	}
	info, err := s.root.Lstat(path.Join("blobs", name, "data"))
	if err != nil {
		return 0, 0, nil, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return 0, 0, nil, fmt.Errorf("blob %s: data: %w: no regular file", name, errCorrupt)
	}
	missing := []uint64(nil)
	if n := len(recs); n > 0 {
		missing = newView(nil, recs, int(recs[n-1].end()+63)/64).need //nolint:gosec // at most maxBlocks
	}
	if covered(durable, recs) {
		missing = nil
	}
	for w := range min(len(missing), len(durable)) {
		missing[w] &^= durable[w]
	}
	return st.Dev, st.Ino, func(offset, length int64) bool {
		if offset < 0 || length <= 0 {
			return length == 0
		}
		end := (uint64(offset) + uint64(length) + BlockSize - 1) / BlockSize // they add up to less than 2^64
		return eachWord(uint64(offset)/BlockSize, min(end, uint64(len(missing))*64), func(w, mask uint64) bool { return missing[w]&mask == 0 })
	}, nil
}

// ReleaseWhole is [Store.Release], also while somebody else has the file open: all that any image ever needed of it is durable, so that
// without the mark nobody reads a hole. [ErrInUse] when it is not.
func (s *Store) ReleaseWhole(name string, unmark func(data *os.File) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.kept[name]
	if !ok {
		return nil
	}
	if whole, err := s.complete(name); err != nil || !whole {
		return fmt.Errorf("release blob %s: %w", name, errors.Join(ErrInUse, err))
	}
	return s.giveUp(name, k, unmark)
}

// ReleaseKnown is [Store.Release], also while somebody else has the file open: the caller knows everybody who may, and all have what they need of it.
func (s *Store) ReleaseKnown(name string, unmark func(data *os.File) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, ok := s.kept[name]
	if !ok {
		return nil
	}
	return s.giveUp(name, k, unmark)
}

// giveUp takes the mark off a kept file and closes what is kept. From now on everybody is known who has it: see foreign. The caller holds mu.
func (s *Store) giveUp(name string, k Kept, unmark func(data *os.File) error) error {
	var st unix.Stat_t
	err := unix.Fstat(int(k.Data.Fd()), &st)
	if err == nil {
		err = unmark(k.Data)
	}
	if err != nil {
		return fmt.Errorf("release blob %s: %w", name, err)
	}
	s.left[name] = file{st.Dev, st.Ino}
	delete(s.kept, name)
	return errors.Join(k.Data.Close(), k.Bits.Close())
}
