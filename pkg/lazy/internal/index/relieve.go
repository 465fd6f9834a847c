package index

import (
	bolt "go.etcd.io/bbolt"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// relieveEvery is how many calls there are between two reliefs. Each call maps some pages, and the kernel 64 KiB around each:
	// mm/memory.c fault_around_pages.
	relieveEvery = 32
	// relieveFrom is the size of the smallest file that is worth it, in bytes.
	relieveFrom = 1 << 20
)

// relieve gives the pages of the file that are mapped back to the page cache, which has them all the same, now and then: they count as memory of
// this process, where an index of millions of chunks would have hundreds of megabytes.
func (x *Index) relieve() {
	if x.calls.Add(1)%relieveEvery != 0 {
		return
	}
	err := x.look(func(tx *bolt.Tx) error { // while it reads nobody maps the file anew
		size := tx.Size()
		if size < relieveFrom {
			return nil
		}
		// Writers use write(2), so that no page of the mapping has what the file has not.
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, tx.DB().Info().Data, uintptr(size), unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
		return nil
	})
	if err != nil {
		x.log.Debug("give mapped pages of the index back", zap.Error(err))
	}
}
