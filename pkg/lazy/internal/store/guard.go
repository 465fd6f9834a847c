package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// asidePrefix begins the names of directories that wait for their users to go.
const asidePrefix = ".aside-"

// guard looks at every data file that was not kept. One that is incomplete and that somebody
// has open is put aside. When nothing was kept (fresh) its mark is gone, so that its holes
// would read as zeros: it is cut to nothing. Else its mark lives, and reads of it
// are events that fail; to cut it would be one too, which nobody answers yet.
func (s *Store) guard(kept map[string]Kept, fresh bool) error {
	entries, err := fs.ReadDir(s.root.FS(), "blobs")
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		if _, ok := kept[name]; ok {
			continue
		}
		if !e.IsDir() {
			s.log.Warn("what lies among the blobs is none", zap.String("name", name))
			continue
		}
		if strings.HasPrefix(name, asidePrefix) {
			errs = append(errs, s.removeAside(name, fresh))
			continue
		}
		complete, err := s.complete(name)
		if err != nil {
			s.log.Warn("state of a blob cannot be read", zap.String("blob", name), zap.Error(err))
		}
		if !complete {
			errs = append(errs, s.guardOne(name, err != nil, fresh))
		}
	}
	return errors.Join(errs...)
}

// complete reports whether all that was ever needed of a blob is durable. An error means
// that nobody can tell.
func (s *Store) complete(name string) (_ bool, err error) {
	dir, err := s.root.OpenRoot(path.Join("blobs", name))
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	id, err := blobOf(dir)
	if err != nil {
		return false, err
	}
	size, recs, err := readTable(dir, id)
	if err != nil {
		return false, err
	}
	info, err := dir.Stat("data")
	if err != nil {
		return false, err
	}
	durable, err := readReady(dir, id, size, info.Size())
	if err != nil {
		return false, err
	}
	return covered(durable, recs), nil
}

// Whole identifies the data file called name, as fstat(2) does, when all that any image ever needed of it is
// durable. It opens nothing that raises an event.
func (s *Store) Whole(name string) (dev, ino uint64, ok bool) {
	if complete, err := s.complete(name); err != nil || !complete {
		return 0, 0, false
	}
	info, err := s.root.Lstat(path.Join("blobs", name, "data"))
	if err != nil || !info.Mode().IsRegular() {
		return 0, 0, false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, false
	}
	return st.Dev, st.Ino, true
}

// covered reports whether all blocks of recs are in bits.
func covered(bits []uint64, recs []chunkRecord) bool {
	for i := range recs {
		if !eachWord(recs[i].first(), recs[i].end(), func(w, mask uint64) bool {
			return w < uint64(len(bits)) && mask&^bits[w] == 0
		}) {
			return false
		}
	}
	return true
}

// guardOne puts one incomplete blob aside when somebody has it open, or when it is of no
// use.
func (s *Store) guardOne(name string, useless, fresh bool) error {
	f, err := s.root.OpenFile(path.Join("blobs", name, "data"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return s.root.RemoveAll(path.Join("blobs", name))
	}
	if err != nil {
		return err
	}
	used := inUse(f)
	if err := f.Close(); err != nil {
		return err
	}
	if !used && !useless {
		return nil
	}
	return s.putAside(name, fresh)
}

// inUse reports whether the file is open anywhere else. f must be its only descriptor
// here. A write lease is granted to the only one who has a file open
// (fs/locks.c check_conflicting_open); it is given back at once. An EROFS mount has its
// devices open. Where the file system knows no leases every file counts as used.
func inUse(f *os.File) bool {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return true
	}
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return err != nil
}

// putAside takes a blob's directory out of use; see removeAside.
func (s *Store) putAside(name string, cut bool) error {
	if err := s.forget(name); err != nil { // nobody may go without a cache for it: whoever follows it compares what is there
		s.log.Warn("the index does not forget a cache", zap.String("blob", name), zap.Error(err))
	}
	aside, err := s.rename(name)
	if err != nil {
		return err
	}
	return s.removeAside(aside, cut)
}

// removeAside deletes a directory that was put aside once nobody uses it. Until then, with cut, the data
// file is cut to nothing: a read of it fails, where a hole would give zeros.
func (s *Store) removeAside(name string, cut bool) error {
	f, err := s.root.OpenFile(path.Join("blobs", name, "data"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return s.root.RemoveAll(path.Join("blobs", name))
	}
	if err != nil {
		return err
	}
	used := inUse(f)
	if used && cut {
		s.log.Warn("a mount lost its data: unmount it and mount again", zap.String("blob", name))
		err = f.Truncate(0)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("cut data of %s: %w", name, err)
	}
	if used {
		return nil
	}
	return s.root.RemoveAll(path.Join("blobs", name))
}
