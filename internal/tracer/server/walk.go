package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
)

// Bounds on the search at the end of a run.
const (
	maxWalk  = 4 << 20         // directory entries
	walkTime = 5 * time.Second // each search; there are up to four, and what waits for the end of a run gives them 30 s
	beatTime = time.Second     // the parent hears of the server at least so often meanwhile: it kills one that is silent
	maxPath  = 32 << 10        // bytes; below stream.MaxFrame
)

// resolvePending looks for the files whose paths could not be told when they were
// touched, by walking the root once, and counts those it does not find: files of the image
// as lost, others as skipped.
func (s *session) resolvePending() {
	if len(s.pending) == 0 {
		return
	}
	w := walk{view: s.t.view, deadline: time.Now().Add(walkTime), found: s.found, beat: s.beat, buf: make([]byte, 32<<10)}
	err := w.run(s.worthSearching)
	detail := "no path of the image leads to a file that was touched"
	if err != nil {
		detail += fmt.Sprintf(" (search ended early: %v)", err)
	}
	for _, waiters := range s.pending {
		for _, p := range waiters {
			// Without a name there is no telling; a search that was cut short lost it.
			if p.image || err != nil {
				s.unresolved(detail)
			} else {
				s.skipped++
			}
		}
	}
}

// beat tells the parent, at the end of a recording, that the server lives. While the workload runs that is nobody's
// concern, and would count as a touch.
func (s *session) beat() {
	if s.beaten.IsZero() || time.Since(s.beaten) < beatTime {
		return
	}
	s.beaten = time.Now()
	s.out.send(stream.Pending{})
	s.out.flush()
}

// worthSearching reports whether a file is missing that a search may find.
func (s *session) worthSearching() bool {
	for _, waiters := range s.pending {
		if !waiters[0].gone {
			return true
		}
	}
	return false
}

// found sends what waited for the file that is at p.
func (s *session) found(p string, i inode) {
	waiters, ok := s.pending[i]
	if !ok {
		return
	}
	delete(s.pending, i)
	for _, w := range waiters {
		if !w.image && s.origin.madeAt(p) {
			s.skipped++
			continue
		}
		e := s.entries.at(w.entry)
		w.access.Path, w.access.How = p, e.how
		s.noted(w.entry, p)
		e.state = listed
		s.out.send(stream.Touch{ID: e.id, Access: w.access})
	}
}

// walk visits the regular files below a directory, on its filesystem.
type walk struct {
	view     int
	deadline time.Time
	found    func(p string, i inode)
	dirfd    int // while found is called: the open directory of p
	// wanted, when set, says by the number that a directory has for a file whether it is worth
	// a visit; what is visited then has that number and no device.
	wanted  func(ino uint64) bool
	beat    func() // when set, is called often
	buf     []byte
	entries int
}

// maxHeld bounds the paths of the directories that are yet to be visited, in bytes: half a million of usual ones.
const maxHeld = 32 << 20

var errWalkBound = errors.New("too much to search")

// run visits directories breadth first while further says so.
func (w *walk) run(further func() bool) error {
	dirs, held := []string{"/"}, 0
	for len(dirs) > 0 && further() {
		dir := dirs[0]
		dirs[0], dirs, held = "", dirs[1:], held-len(dirs[0])
		more, err := w.dir(dir)
		if err != nil {
			return err
		}
		for _, m := range more {
			held += len(m)
		}
		if held > maxHeld {
			return errWalkBound
		}
		dirs = append(dirs, more...)
	}
	return nil
}

// dir visits one directory and returns those in it. A directory that cannot be read, or
// went away, has nothing in it.
func (w *walk) dir(dir string) ([]string, error) {
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(w.view, path.Join(".", dir), &how)
	if err != nil {
		return nil, nil //nolint:nilerr // as said above
	}
	var dirs []string
	for {
		n, err := unix.ReadDirent(fd, w.buf)
		if err != nil || n == 0 {
			break
		}
		for b := w.buf[:n]; len(b) > 0; {
			var e dirent
			e, b = nextDirent(b)
			if w.visit(fd, dir, e) {
				dirs = append(dirs, below(dir, e.name))
			}
			w.entries++
		}
		if w.beat != nil {
			w.beat()
		}
		if w.entries > maxWalk || time.Now().After(w.deadline) {
			return nil, errors.Join(errWalkBound, unix.Close(fd))
		}
	}
	return dirs, unix.Close(fd)
}

// below returns the path of an entry of a directory.
func below(dir, name string) string {
	if dir == "/" {
		return dir + name
	}
	return dir + "/" + name
}

// visit looks at one entry of the open directory and reports whether it is one itself.
func (w *walk) visit(fd int, dir string, e dirent) bool {
	w.dirfd = fd
	if e.name == "" || e.name == "." || e.name == ".." || len(dir)+len(e.name) >= maxPath {
		return false
	}
	if w.wanted != nil && e.kind == unix.DT_REG {
		if w.wanted(e.ino) {
			w.found(below(dir, e.name), inode{ino: e.ino})
		}
		return false
	}
	if e.kind != unix.DT_UNKNOWN && e.kind != unix.DT_REG {
		return e.kind == unix.DT_DIR
	}
	var st unix.Stat_t
	if unix.Fstatat(fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return false
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG && (w.wanted == nil || w.wanted(st.Ino)) {
		w.found(below(dir, e.name), inode{st.Dev, st.Ino})
	}
	return st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// dirent is struct linux_dirent64: ino u64, off s64, reclen u16, type u8, name.
// Source: include/linux/dirent.h.
type dirent struct {
	ino  uint64
	kind uint8
	name string
}

const (
	offReclen = 8 + 8
	offType   = offReclen + 2
	offName   = offType + 1
)

// nextDirent takes the first entry off b, which the kernel wrote; what is left is empty when b is
// no such thing.
func nextDirent(b []byte) (dirent, []byte) {
	if len(b) < offName {
		return dirent{}, nil
	}
	order := binary.NativeEndian
	size := int(order.Uint16(b[offReclen:]))
	if size < offName || size > len(b) {
		return dirent{}, nil
	}
	name, _, _ := bytes.Cut(b[offName:size], []byte{0})
	return dirent{ino: order.Uint64(b), kind: b[offType], name: string(name)}, b[size:]
}
