package builder

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// earlyBytes is how much of a file is written to the disk at once: enough for large requests, and little against what
// a machine keeps unwritten.
const earlyBytes = 4 << 20

// earlyWriter writes to a file and has the kernel begin to write it to the disk.
type earlyWriter struct {
	f           *os.File
	size, begun int64 // bytes
}

// writer returns what writes to f, which is empty.
func (o *Options) writer(f *os.File) io.Writer {
	if !o.WriteEarly {
		return f
	}
	return &earlyWriter{f: f}
}

// Write writes p behind what was written.
func (w *earlyWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.size += int64(n)
	if left := w.size - w.begun; left >= earlyBytes && err == nil {
		// A file system that cannot has the data written later, as all others: who needs them there syncs the file.
		_ = unix.SyncFileRange(int(w.f.Fd()), w.begun, left, unix.SYNC_FILE_RANGE_WRITE)
		w.begun = w.size
	}
	return n, err
}
