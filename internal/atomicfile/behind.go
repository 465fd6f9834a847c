package atomicfile

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// behindStep is how many bytes the system is asked to write at a time: enough for any disk, and an eighth of
// what a hundred megabytes leave to the end otherwise.
const behindStep = 8 << 20

// Behind is a writer that has the system write to disk while more is being made, so that the sync at the
// end of a large file has little left to do. It changes nothing about what is durable when. Not safe for
// concurrent use.
type Behind struct {
	f           *os.File
	begun, size int64 // of what was written, where the next step begins, and the end

	busy sync.Mutex // held while the system is asked
}

// NewBehind returns a writer that appends to f, a regular file at offset 0. The caller closes the
// Behind, then f.
func NewBehind(f *os.File) *Behind { return &Behind{f: f} }

// Write implements io.Writer.
func (b *Behind) Write(p []byte) (int, error) {
	n, err := b.f.Write(p)
	b.size += int64(n)
	if b.size-b.begun >= behindStep && b.busy.TryLock() {
		from, to := b.begun, b.size
		b.begun = b.size
		go func() {
			defer b.busy.Unlock()
			// Only a hint: what it cannot do, or fails to write, the sync does, or reports.
			_ = unix.SyncFileRange(int(b.f.Fd()), from, to-from, unix.SYNC_FILE_RANGE_WRITE)
		}()
	}
	return n, err
}

// Close waits for the system to have taken the last request. It closes no file and cannot fail.
func (b *Behind) Close() error {
	b.busy.Lock()
	defer b.busy.Unlock()
	return nil
}
