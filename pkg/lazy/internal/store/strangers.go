package store

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// held reports whether the file is open anywhere else, as inUse does, and no where the file system knows no leases: it has no marks that anybody
// depends on then, either.
func held(f *os.File) bool {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
		return err != nil
	}
	return errors.Is(err, unix.EAGAIN)
}

// Strangers reports whether somebody has the data file open whom this process may not know, such as a mount whose record was lost, and not all
// that any image ever needed is durable: without the mark the holes would read as zeros. Descriptors that were kept are this process' own, wherever copies
// of them are. It may be one of which the kernel has not closed the files yet, too. See [Blob.NoStrangers].
func (b *Blob) Strangers() bool {
	return !b.known && !b.met.Load() && !b.Durable() && held(b.data)
}

// Known reports whether all who have the data file open opened it here. It does not change.
func (b *Blob) Known() bool { return b.known }

// NoStrangers notes whether the caller knows everybody who may have the data file open, who all have what they need of it.
func (b *Blob) NoStrangers(none bool) { b.met.Store(none) }

// Leave has the last [Blob.Close] leave the blob as it is found by a process that takes over, with its mark: its descriptors are among
// [Store.Unadopted] then, for somebody who opens it again, or for [Store.Release].
func (b *Blob) Leave() { b.stays.Store(true) }

// Left reports whether the descriptors of the blob called name are kept for somebody who has not come yet, or will be ([Blob.Leave]) when
// nobody lends of it or looks at it any more; of any blob when name is empty.
func (s *Store) Left(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == "" && len(s.kept) > 0 || s.kept[name].Data != nil {
		return true
	}
	for _, b := range s.blobs {
		if b.stays.Load() && (name == "" || name == b.name) {
			return true
		}
	}
	return false
}

// keep gives the descriptors to the store. The caller holds store.mu, and calls release.
func (b *Blob) keep() error {
	b.store.kept[b.name] = b.Descriptors()
	b.data = nil
	b.mu.Lock() // status may be looking
	defer b.mu.Unlock()
	b.gone = true
	return b.ready.Unmap()
}

// AsideInUse reports whether somebody has a data file open that was put aside and was not cut to nothing: without the mark that it may have
// its holes would read as zeros. What cannot be looked at counts as not in use, and is an error.
func (s *Store) AsideInUse() (used bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names, err := s.names()
	if errors.Is(err, fs.ErrNotExist) { // somebody has removed them
		return false, nil
	}
	for _, name := range names {
		if !strings.HasPrefix(name, asidePrefix) {
			continue
		}
		one, lookErr := s.heldAside(path.Join("blobs", name, "data"))
		if used = used || one; !errors.Is(lookErr, fs.ErrNotExist) { // removed meanwhile
			err = errors.Join(err, lookErr)
		}
	}
	return used, err
}

func (s *Store) heldAside(name string) (bool, error) {
	info, err := s.root.Lstat(name)
	if err != nil || info.Size() == 0 || !info.Mode().IsRegular() {
		return false, err
	}
	f, err := s.root.Open(name) // the file system may be read-only by now
	if err != nil {
		return false, err
	}
	return held(f), f.Close()
}
