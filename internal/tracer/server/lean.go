package server

import (
	"fmt"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Where page events tell what is read of every layer, fanotify need tell only which files are opened,
// and their inode numbers say which files of the image those are: names and origins are looked up
// when nothing else is to be done. It halves the time that the server takes for an event while the
// workload runs.

const (
	// leanRest is restTime for it.
	leanRest = 10
	// quietTime is how many milliseconds nothing must happen before names are looked up while the
	// container runs, so that little is lost when the tracer dies. It doubles each time.
	quietTime = 1000
)

// lean is what is kept of files that are known by their inode numbers.
type lean struct {
	numbering
	byNumber map[uint64]uint32 // firsts, by inode number
	firsts   []first
	unnamed  int  // entries without a path
	fresh    bool // a file was touched for the first time
	quiet    int  // milliseconds until the next look-up
}

// first is what is known of a first touch, as long as its file has no name.
type first struct {
	entry uint32
	at    time.Duration
	pid   int32
	comm  uint16 // see comms.number
}

// numbersDo reports whether the inode numbers that the root shows may tell which file of the image is
// meant: that takes an overlay whose layers are on one filesystem, which page events cover.
func (t *target) numbersDo() bool {
	if !t.overlay() || len(t.layers) == 0 || t.upper < 0 {
		return false
	}
	for i := range t.layers {
		// What is copied without being read only fanotify tells; and subvolumes of a btrfs have inode numbers of
		// their own.
		if l := &t.layers[i]; !l.visible() || l.clones() || l.dev != t.layers[0].dev {
			return false
		}
	}
	return true
}

// numbering is how an overlay numbers the files of its layers: all have this device number and, but
// for the highest bits, the number they have in their layer. Where the writable layer is on the
// same filesystem they keep it when they are changed or renamed.
// Source: Documentation/filesystems/overlayfs.rst, "Inode properties"; fs/overlayfs/inode.c ovl_map_dev_ino.
type numbering struct{ dev, high uint64 }

// numberBits are the bits of an inode number that an overlay leaves to the layer, at least.
const numberBits = 48

// learn finds out the numbering from the first file of the layers that can be found in the
// root; false: from none.
func (t *target) learn() (n numbering, ok bool) {
	for i := range t.layers {
		tried := 0
		w := walk{
			view: t.layers[i].fd, deadline: time.Now().Add(learnTime), buf: make([]byte, 32<<10),
			wanted: func(uint64) bool { tried++; return !ok && tried <= maxTries },
			found: func(p string, id inode) {
				var st unix.Stat_t
				if unix.Fstatat(t.view, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Nlink != 1 || t.shadowed(i, p) || t.changed(p) {
					return
				}
				high := st.Ino ^ id.ino
				if st.Mode&unix.S_IFMT == unix.S_IFREG && high<<(64-numberBits) == 0 {
					n, ok = numbering{st.Dev, high}, true
				}
			},
		}
		err := w.run(func() bool { return !ok && tried <= maxTries })
		if ok || err != nil {
			break
		}
	}
	return n, ok
}

// Bounds of learn: arming waits for it.
const (
	maxTries  = 64
	learnTime = 20 * time.Millisecond
)

// of returns the number in its layer of a file with status st; false when it is in none.
func (n numbering) of(st *unix.Statx_t) (uint64, bool) {
	ino := st.Ino ^ n.high
	return ino, ino>>numberBits == 0 && unix.Mkdev(st.Dev_major, st.Dev_minor) == n.dev
}

func newLean(n numbering) *lean {
	return &lean{
		numbering: n,
		byNumber:  make(map[uint64]uint32), quiet: quietTime,
	}
}

// handleLean digests an event of the regular file fd that has one name and a number in the layers.
func (s *session) handleLean(e *fanotify.Event, fd int, ino uint64) {
	how := ways(e.Mask)
	n, known := s.lean.byNumber[ino]
	if !known {
		s.firstLean(ino, how, e.PID)
		if how&trace.Executed != 0 {
			s.comms.executes(e.PID, strings.TrimSuffix(s.names.raw(fd), deletedSuffix))
		}
		return
	}
	if how&trace.Executed != 0 {
		s.comms.changes(e.PID)
	}
	i := s.lean.firsts[n].entry
	if s.entries[i].state == waiting && s.entries[i].how|how != s.entries[i].how {
		s.entries[i].how |= how
		return
	}
	s.again(i, fd, how, 1)
}

func (s *session) firstLean(ino uint64, how trace.How, pid int32) {
	if len(s.entries) >= s.c.MaxFiles {
		s.losses.Lose(trace.Loss{Reason: "limit", Count: -1, Detail: fmt.Sprintf("more than %d files were touched", s.c.MaxFiles)})
		return
	}
	l := s.lean
	i := s.entryIndex()
	l.byNumber[ino] = uint32(len(l.firsts)) //nolint:gosec // at most Config.MaxFiles, which fits
	l.firsts = append(l.firsts, first{entry: i, at: s.since(), pid: pid, comm: s.comms.number(s.comms.of(pid, how&trace.Executed != 0))})
	s.entries = append(s.entries, entry{ino: ino, id: s.nextID, how: how, state: waiting})
	s.nextID++
	l.unnamed++
	l.fresh = true
}

// nameEntries looks for the paths of the files that were touched, and calls found for each, which is file
// st of a layer, once it was sent.
func (s *session) nameEntries(found func(i uint32, l *layer, p string, st *unix.Stat_t)) error {
	bound := time.Now().Add(walkTime)
	for i := range s.t.layers {
		w := walk{view: s.t.layers[i].fd, deadline: bound, buf: make([]byte, 64<<10), wanted: s.waits}
		w.found = func(p string, id inode) { s.named(i, w.dirfd, p, id.ino, found) }
		if err := w.run(func() bool { return s.lean.unnamed > 0 }); err != nil {
			return err
		}
	}
	return nil
}

// waits reports whether a number is that of a file that has no path yet.
func (s *session) waits(ino uint64) bool {
	n, ok := s.lean.byNumber[ino]
	return ok && s.entries[s.lean.firsts[n].entry].state == waiting
}

// named handles a path of layer j, in the open directory dir, that is perhaps the one of a file that
// was touched.
func (s *session) named(j, dir int, p string, ino uint64, found func(i uint32, l *layer, p string, st *unix.Stat_t)) {
	var st unix.Stat_t
	if unix.Fstatat(dir, path.Base(p), &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Ino != ino || s.t.shadowed(j, p) {
		return
	}
	l := s.lean
	f := l.firsts[l.byNumber[ino]]
	e := &s.entries[f.entry]
	e.state = listed
	l.unnamed--
	a := trace.Access{Path: p, How: e.how, Size: st.Size, Elapsed: f.at, PID: f.pid, Command: s.comms.called(f.comm)}
	s.out.send(stream.Touch{ID: e.id, Access: a})
	found(f.entry, &s.t.layers[j], p, &st)
	if s.out.full() {
		s.out.flush()
	}
}

// nameRest looks for what is missing still, at the end. What no layer has the run made.
func (s *session) nameRest(found func(i uint32, l *layer, p string, st *unix.Stat_t)) {
	err := s.nameEntries(found)
	for _, f := range s.lean.firsts {
		if e := &s.entries[f.entry]; e.state == waiting {
			e.state = left
			if err != nil {
				s.unresolved(fmt.Sprintf("no path was found for a file that was touched (search ended early: %v)", err))
				continue
			}
			s.skipped++
		}
	}
}
