package server

import (
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
	walkTime = 5 * time.Second // a stop waits no longer than this
	maxPath  = 32 << 10        // bytes; below stream.MaxFrame
)

// resolvePending looks for the files whose paths could not be told when they were
// touched, by walking the root once, and counts those it does not find: files of the image
// as lost, others as skipped.
func (s *session) resolvePending() {
	if len(s.pending) == 0 {
		return
	}
	w := walk{view: s.t.view, deadline: time.Now().Add(walkTime), found: s.found, buf: make([]byte, 32<<10)}
	err := w.run(s.worthSearching)
	detail := "no path of the image leads to a file that was touched"
	if err != nil {
		detail += fmt.Sprintf(" (search ended early: %v)", err)
	}
	for _, waiters := range s.pending {
		for _, p := range waiters {
			// Without a name there is no telling; a search that was cut short lost it.
			if p.image || err != nil {
				s.unresolved(1, detail)
			} else {
				s.skipped++
			}
		}
	}
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
		e := &s.entries[w.entry]
		w.access.Path, w.access.How = p, e.how
		e.state = listed
		s.out.send(stream.Touch{ID: e.id, Access: w.access})
	}
}

// walk visits the regular files below a directory.
type walk struct {
	view     int
	deadline time.Time
	found    func(p string, i inode)
	buf      []byte
	entries  int
}

var errWalkBound = errors.New("too much to search")

// run visits directories breadth first while more says so.
func (w *walk) run(more func() bool) error {
	dirs := []string{"/"}
	for len(dirs) > 0 && more() {
		dir := dirs[0]
		dirs = dirs[1:]
		below, err := w.dir(dir)
		if err != nil {
			return err
		}
		dirs = append(dirs, below...)
	}
	return nil
}

// dir visits one directory and returns those in it. A directory that cannot be read, or
// went away, has nothing in it.
func (w *walk) dir(dir string) ([]string, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC
	fd, err := unix.Openat(w.view, path.Join(".", dir), flags, 0)
	if err != nil {
		return nil, nil //nolint:nilerr // as said above
	}
	var below []string
	for err == nil {
		var n int
		if n, err = unix.ReadDirent(fd, w.buf); err != nil || n == 0 {
			break
		}
		_, _, names := unix.ParseDirent(w.buf[:n], -1, nil)
		for _, name := range names {
			var st unix.Stat_t
			p := path.Join(dir, name)
			if len(p) > maxPath || unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				continue
			}
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFDIR:
				below = append(below, p)
			case unix.S_IFREG:
				w.found(p, inode{st.Dev, st.Ino})
			}
		}
		w.entries += len(names)
		if w.entries > maxWalk || time.Now().After(w.deadline) {
			return nil, errors.Join(errWalkBound, unix.Close(fd))
		}
	}
	return below, unix.Close(fd)
}
