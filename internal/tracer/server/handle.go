package server

import (
	"fmt"
	"hash/maphash"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// handle digests one event. The caller closes it.
func (s *session) handle(e *fanotify.Event) {
	if e.Mask&fanotify.Overflow != 0 {
		s.losses.Lose(trace.Loss{Reason: "overflow", Count: -1, Detail: "the kernel's event queue overflowed"})
		return
	}
	if e.PID == s.self {
		return
	}
	s.seen++
	if e.Err != 0 {
		s.unopened(e.Err)
		return
	}
	if e.FD < 0 {
		s.unopened(unix.EPERM) // its negative is FAN_NOFD
		return
	}
	var st unix.Statx_t
	fd := int(e.FD)
	const want = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, want, &st); err != nil {
		s.unresolved(fmt.Sprintf("stat of an opened file: %v", err))
		return
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	if s.others.has(mountOf(&st)) {
		return
	}
	how := ways(e.Mask)
	if how&trace.Executed != 0 && s.pages != nil {
		s.pages.reader.Wake() // it may leave the kernel's filter, see tracefs.Reader.Rejoined
	}
	if s.lean != nil && st.Nlink == 1 && mountOf(&st) == s.t.stat.Mnt_id {
		if ino, ok := s.lean.of(&st); ok {
			s.handleLean(e, fd, ino, &st)
			return
		}
	}
	f := file{inode: inodeOf(&st)}
	var name string
	if st.Nlink > 1 {
		name = s.names.raw(fd)
		f.name = maphash.String(s.seed, name) | 1
	}
	if i, ok := s.known[f]; ok {
		if how&trace.Executed != 0 {
			s.comms.changes(e.PID)
		}
		s.again(i, fd, how, st.Nlink)
		return
	}
	s.first(f, fd, name, how, e.PID, &st)
}

// ways translates an event's mask.
func ways(m fanotify.Mask) trace.How {
	var how trace.How
	if m&fanotify.Open != 0 {
		how |= trace.Opened
	}
	if m&fanotify.Access != 0 {
		how |= trace.Read
	}
	if m&fanotify.OpenExec != 0 {
		how |= trace.Executed
	}
	return how
}

// unopened counts an event whose file the kernel could not open for us.
func (s *session) unopened(errno syscall.Errno) {
	switch errno {
	case unix.ENXIO, unix.ENODEV:
		s.skipped++ // a device or a socket
	default:
		s.unresolved(fmt.Sprintf("open of a touched file: %v", errno))
	}
}

func (s *session) unresolved(detail string) {
	s.losses.Lose(trace.Loss{Reason: "unresolved", Count: 1, Detail: detail})
}

// again handles an event of a file that is known.
func (s *session) again(i uint32, fd int, how trace.How, links uint32) {
	e := s.entries.at(i)
	if e.how|how != e.how {
		e.how |= how
		e.hot = 0
		if e.state == listed {
			s.out.send(stream.Merge{ID: e.id, How: e.how})
		}
		return
	}
	if e.hot++; e.hot < hotAfter || !s.cool || links > 1 {
		e.hot = min(e.hot, hotAfter)
		return
	}
	// A file that is read a million times would cost the workload, and us, a million
	// events. With one name, nothing that is already recorded can be news. The kernel may
	// drop the mark together with the cached inode; then the count starts over.
	e.hot = 0
	var mask fanotify.Mask
	if e.how&trace.Opened != 0 || e.state == left {
		mask |= fanotify.Open
	}
	if e.how&trace.Read != 0 || e.state == left {
		mask |= fanotify.Access
	}
	if mask != 0 && s.current().group.Mark(fanotify.Mark{Kind: fanotify.Inode, Mask: mask, Dir: fd, Ignore: true}) != nil {
		s.cool = false // before Linux 5.19; events just keep coming
	}
}

// full reports whether no further file can be held, which is a loss then.
func (s *session) full() bool {
	if int(s.entries.n) < s.c.MaxFiles {
		return false
	}
	s.losses.Lose(trace.Loss{Reason: "limit", Count: -1, Detail: fmt.Sprintf("more than %d files were touched", s.c.MaxFiles)})
	return true
}

// first handles the first event of a file, which is regular.
func (s *session) first(f file, fd int, raw string, how trace.How, pid int32, st *unix.Statx_t) {
	if s.full() {
		return
	}
	e := entry{ino: f.ino, id: s.nextID, how: how}
	s.nextID++
	a := trace.Access{
		How: how, Size: size(st), Elapsed: s.now, PID: pid,
		Command: s.comms.of(pid, how&trace.Executed != 0),
	}
	if raw == "" {
		raw = s.names.raw(fd)
	}
	whence := s.origin.of(fd, st, s.dated)
	if whence == made {
		e.state = left
	} else {
		s.name(&e, a, raw, st, whence)
	}
	if e.state == left {
		s.skipped++
	}
	s.known[f] = s.entries.add(e)
}

// name finds the path of a file's first touch and sends it, or keeps it for the end.
func (s *session) name(e *entry, a trace.Access, raw string, st *unix.Statx_t, whence whence) {
	p, ok := s.names.path(raw, a.PID, st, whence)
	switch {
	case ok && whence == unknown && s.origin.madeAt(p):
		e.state = left
	case ok:
		a.Path = p
		if a.How&trace.Executed != 0 {
			s.comms.executes(a.PID, p)
		}
		s.noted(s.entries.n, p)
		s.touched = true
		s.out.send(stream.Touch{ID: e.id, Access: a})
	case !s.t.whole():
		e.state = left // a file of the same mount that lies outside the root
	default:
		e.state = waiting
		s.out.send(stream.Pending{})
		i := inodeOf(st)
		s.pending[i] = append(s.pending[i], pending{
			entry: s.entries.n, access: a,
			image: whence == image, gone: strings.HasSuffix(raw, deletedSuffix),
		})
	}
}

// noMount is the mount id of a file whose mount is unknown, before Linux 5.8.
const noMount = ^uint64(0)

// mountOf is the id of the mount through which a file was opened.
func mountOf(st *unix.Statx_t) uint64 {
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return noMount
	}
	return st.Mnt_id
}

func inodeOf(st *unix.Statx_t) inode {
	return inode{unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino}
}

// size is the file's size in bytes; the kernel's is a loff_t and fits.
func size(st *unix.Statx_t) int64 {
	return int64(min(st.Size, 1<<63-1))
}
