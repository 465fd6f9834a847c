package server

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const (
	// flushAt is how many bytes are gathered before they are written while events keep coming.
	flushAt = 32 << 10
	// gather is how many bytes may wait for the reader once nothing else is to be done.
	gather = 8 * flushAt
	// hurry is how long such bytes wait before they are kept in memory instead: the container is
	// not to be held for a parent that hangs.
	hurry = time.Second
	// patience is how long the last bytes may take to be read; a parent that hangs is
	// left behind then.
	patience = 30 * time.Second
)

// output gathers frames and writes them without ever making the server wait while it
// traces: a parent that does not read must not let the kernel's queue grow. What is
// gathered is bounded by the number of files of a trace.
type output struct {
	fd    int
	block bool // the descriptor is no pipe or socket, so writing may wait
	buf   []byte
	off   int
	idle  bool  // nothing else is to be done: see gather
	err   error // the first error of writing; everything after it is dropped
}

func newOutput(f *os.File) *output {
	o := &output{fd: int(f.Fd()), buf: []byte(stream.Magic)}
	var st unix.Stat_t
	err := unix.Fstat(o.fd, &st)
	o.block = err != nil || (st.Mode&unix.S_IFMT != unix.S_IFIFO && st.Mode&unix.S_IFMT != unix.S_IFSOCK)
	if !o.block {
		if err := unix.SetNonblock(o.fd, true); err != nil {
			o.block = true
		}
	}
	return o
}

func (o *output) send(f stream.Frame) {
	if o.err == nil {
		o.buf = stream.Append(o.buf, f)
	}
}

// touch is send of a [stream.Touch], of which there may be very many.
func (o *output) touch(id uint32, a *trace.Access) {
	if o.err == nil {
		o.buf = stream.AppendTouch(o.buf, id, a)
	}
}

// ranges is send of a [stream.Ranges]; ranges stay the caller's.
func (o *output) ranges(id uint32, ranges []trace.Range) {
	if o.err == nil {
		o.buf = stream.AppendRanges(o.buf, id, ranges)
	}
}

// waiting reports whether there is something to write.
func (o *output) waiting() bool { return o.err == nil && o.off < len(o.buf) }

// full reports whether enough was gathered to be worth a write.
func (o *output) full() bool { return len(o.buf)-o.off >= flushAt }

// flush writes what can be written now.
func (o *output) flush() {
	for o.waiting() {
		n, err := unix.Write(o.fd, o.buf[o.off:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			if o.idle && len(o.buf)-o.off > gather && o.ready(hurry) {
				continue
			}
			o.compact()
			return
		case err != nil:
			o.err = fmt.Errorf("write trace: %w", err)
			return
		}
		o.off += n
	}
	o.compact()
}

// ready waits until the reader takes something; once it does not for so long, o no longer waits.
func (o *output) ready(long time.Duration) bool {
	fds := []unix.PollFd{{Fd: pollFD(o.fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, int(long.Milliseconds()))
	o.idle = n > 0 || errors.Is(err, unix.EINTR)
	return o.idle
}

// orphaned reports whether nobody can read any more what is written.
func (o *output) orphaned() bool {
	fds := []unix.PollFd{{Fd: pollFD(o.fd)}}
	n, err := unix.Poll(fds, 0)
	return o.err != nil || (err == nil && n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0)
}

// compact moves what is left to the front once it is less than what was written.
func (o *output) compact() {
	if o.off == len(o.buf) && cap(o.buf) > 2*gather {
		o.buf, o.off = nil, 0
		return
	}
	if o.off >= len(o.buf)-o.off {
		o.buf = o.buf[:copy(o.buf, o.buf[o.off:])]
		o.off = 0
	}
}

// finish writes the rest, waiting up to patience for the reader.
func (o *output) finish() error {
	deadline := time.Now().Add(patience)
	for o.flush(); o.waiting(); o.flush() {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("write trace: nobody read %d bytes for %v", len(o.buf)-o.off, patience)
		}
		fds := []unix.PollFd{{Fd: pollFD(o.fd), Events: unix.POLLOUT}}
		if _, err := unix.Poll(fds, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the reader: %w", err)
		}
	}
	return o.err
}
