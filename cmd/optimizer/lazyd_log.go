package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// maxLog and keptLog bound a daemon's log file in bytes: one that grew beyond the one is cut to its last ones. What a failing registry
// makes of it is otherwise without end.
const (
	maxLog  = 8 << 20
	keptLog = 1 << 20
)

// boundedLog writes to out, which is cut when it is a regular file that became too long. Others may write to the same file, if
// they append. Not safe for concurrent use.
type boundedLog struct {
	out     io.Writer
	max     int64 // 0: maxLog
	written int64 // since the last look
}

// Write implements io.Writer.
func (l *boundedLog) Write(p []byte) (int, error) {
	limit := l.max
	if limit == 0 {
		limit = maxLog
	}
	if l.written += int64(len(p)); l.written > limit/64 {
		l.written = 0
		if f, ok := l.out.(*os.File); ok {
			_ = cutLog(f, limit) // a log that cannot be cut is still one
		}
	}
	return l.out.Write(p)
}

// Sync implements zapcore.WriteSyncer.
func (l *boundedLog) Sync() error { return nil }

// cutLog leaves the end of a file that is longer than limit.
func cutLog(f *os.File, limit int64) error {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() <= limit {
		return err
	}
	// The descriptor is for writing only, and the file may have another name by this time.
	r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return err
	}
	kept := min(keptLog, limit/8)
	end := make([]byte, kept)
	_, err = r.ReadAt(end, info.Size()-kept)
	if err = errors.Join(err, r.Close()); err != nil {
		return err
	}
	if _, whole, ok := bytes.Cut(end, []byte("\n")); ok {
		end = whole
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.Write(append([]byte("… cut here\n"), end...))
	return err
}
