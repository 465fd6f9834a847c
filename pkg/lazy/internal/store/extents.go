package store

import (
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// extent is a part of a disk, in bytes.
type extent struct{ at, end uint64 }

// fiemap asks for the extents of a file, native-endian. Source: struct fiemap in include/uapi/linux/fiemap.h.
type fiemap struct {
	Start, Length uint64 // of the file
	Flags         uint32
	Mapped        uint32 // out: how many came
	Count         uint32 // how many there is room for
	_             uint32
}

// fiemapExtent is what comes behind it. Source: struct fiemap_extent in the same file.
type fiemapExtent struct {
	Logical, Physical, Length uint64
	_                         [2]uint64
	Flags                     uint32
	_                         [3]uint32
}

const (
	sizeFiemap       = 32
	sizeFiemapExtent = 56
	fsIocFiemap      = 0xc020660b                      // _IOWR('f', 11, struct fiemap)
	extentLast       = 0x1                             // FIEMAP_EXTENT_LAST
	extentNowhere    = 0x2 | 0x4 | 0x8 | 0x200 | 0x400 // FIEMAP_EXTENT_UNKNOWN, _DELALLOC, _ENCODED, _DATA_INLINE, _DATA_TAIL: no blocks of its own, or of another length
	extentShared     = 0x2000                          // FIEMAP_EXTENT_SHARED
	extentsAtOnce    = 512
)

// sharedExtents returns where on the disk those blocks of a file are that other files have too, and how many bytes they are.
func sharedExtents(f *os.File) (list []extent, bytes int64, err error) {
	p := make([]byte, sizeFiemap+extentsAtOnce*sizeFiemapExtent)
	for start := uint64(0); ; {
		h := fiemap{Start: start, Length: ^uint64(0) - start, Count: extentsAtOnce}
		if _, err := binary.Encode(p, binary.NativeEndian, &h); err != nil {
			return nil, 0, err
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&p[0]))); errors.Is(errno, unix.EINTR) {
			continue
		} else if errno != 0 {
			return nil, 0, &os.PathError{Op: "fiemap", Path: f.Name(), Err: errno}
		}
		if _, err := binary.Decode(p, binary.NativeEndian, &h); err != nil {
			return nil, 0, err
		}
		more := h.Mapped > 0
		for i := range min(h.Mapped, extentsAtOnce) {
			var e fiemapExtent
			if _, err := binary.Decode(p[sizeFiemap+i*sizeFiemapExtent:], binary.NativeEndian, &e); err != nil {
				return nil, 0, err
			}
			if e.Flags&extentShared != 0 && e.Flags&extentNowhere == 0 && e.Physical+e.Length > e.Physical {
				list, bytes = append(list, extent{e.Physical, e.Physical + e.Length}), bytes+int64(e.Length) //nolint:gosec // of a file
			}
			more = more && e.Flags&extentLast == 0 && e.Logical+e.Length > start
			start = max(start, e.Logical+e.Length)
		}
		if !more {
			return list, bytes, nil
		}
	}
}

// sharing reports whether files below the state directory may have blocks in common: see [Blob.Clone].
func (s *Store) sharing() bool {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(s.lock.Fd()), &st); err != nil {
		return false
	}
	return st.Type == unix.XFS_SUPER_MAGIC || st.Type == unix.BTRFS_SUPER_MAGIC
}

// extentsOf returns the shared extents of the data file called name. It may take a while, as btrfs looks for all who have each of them: nobody waits
// for it but who wants to open or remove a blob that is not open, and only this one.
func (s *Store) extentsOf(name string) (list []extent, bytes int64, err error) {
	s.mu.Lock()
	for s.busy[name] {
		s.idle.Wait()
	}
	if b := s.blobs[name]; b != nil {
		b.refs++
		s.mu.Unlock()
		list, bytes, err = sharedExtents(b.data)
		if closed := b.giveBack(); closed != nil { // of what others make durable: nothing that was read here is wrong for it
			s.log.Warn("close a blob", zap.String("blob", name), zap.Error(closed))
		}
		return list, bytes, err
	}
	s.busy[name] = true // whoever found our descriptor would take it for that of a mount
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, name)
		s.idle.Broadcast()
	}()
	f, err := s.root.Open("blobs/" + name + "/data")
	if err != nil {
		return nil, 0, err
	}
	list, bytes, err = sharedExtents(f)
	return list, bytes, errors.Join(err, f.Close())
}

// giveBack is Close, which writes nothing while others have the blob.
func (b *Blob) giveBack() error {
	s := b.store
	s.mu.Lock()
	if b.refs > 1 {
		b.refs--
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	return b.Close()
}

// ledger counts blocks that several entries have once.
type ledger struct {
	bounds []uint64 // of segments of the disk, in order
	owners []int32  // of the segment from the bound of the same index on
}

// newLedger returns a ledger for what any of entries has; it counts none of them yet.
func newLedger(entries []Entry) *ledger {
	l := &ledger{}
	for i := range entries {
		for _, x := range entries[i].shared {
			l.bounds = append(l.bounds, x.at, x.end)
		}
	}
	slices.Sort(l.bounds)
	l.bounds = slices.Compact(l.bounds)
	l.owners = make([]int32, len(l.bounds))
	return l
}

// count adds by to the owners of e's segments and returns the bytes of those that had none before, or have none after.
func (l *ledger) count(e *Entry, by int32) int64 {
	n := e.Bytes - e.Shared
	for _, x := range e.shared {
		for i, _ := slices.BinarySearch(l.bounds, x.at); i < len(l.bounds)-1 && l.bounds[i] < x.end; i++ {
			before := l.owners[i]
			l.owners[i] += by
			if before == 0 || l.owners[i] == 0 {
				n += int64(l.bounds[i+1] - l.bounds[i]) //nolint:gosec // of a disk
			}
		}
	}
	return n
}

// take counts e and returns how many bytes more are taken; give is the end of that, and how many are free.
func (l *ledger) take(e *Entry) int64 { return l.count(e, 1) }
func (l *ledger) give(e *Entry) int64 { return l.count(e, -1) }
