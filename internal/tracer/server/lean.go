package server

import (
	"fmt"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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
	byNumber index // firsts, by inode number
	firsts   blocks[first]
	unnamed  int  // entries without a path
	fresh    bool // a file was touched for the first time
	quiet    int  // milliseconds until the next look-up
}

// first is what is known of a first touch, as long as its file has no name.
type first struct {
	ino     uint64 // in its layer
	size    int64
	at      time.Duration
	entry   uint32
	pid     int32
	comm    uint16 // see comms.number
	settled bool   // nobody changed the file shortly before, so that its size is that in its layer
}

// settling is how long before the run the last change of a file was that counts as none of the run's: far
// more than the grain of the clock by which the kernel dates changes.
const settling = time.Second

// numbersDo reports whether the inode numbers that the root shows may tell which file of the image is
// meant: that takes an overlay whose layers are on one filesystem, which page events cover.
func (t *target) numbersDo() bool {
	if !t.overlay() || len(t.layers) == 0 || t.merged {
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
	return &lean{numbering: n, quiet: quietTime}
}

// handleLean digests an event of the regular file fd that has one name and a number in the layers.
func (s *session) handleLean(e *fanotify.Event, fd int, ino uint64, st *unix.Statx_t) {
	how := ways(e.Mask)
	f := s.firstOf(ino)
	if f == nil {
		s.firstLean(ino, fd, how, e.PID, st)
		if how&trace.Executed != 0 {
			s.comms.executes(e.PID, strings.TrimSuffix(s.names.raw(fd), deletedSuffix))
		}
		return
	}
	if how&trace.Executed != 0 {
		s.comms.changes(e.PID)
	}
	if have := s.entries.at(f.entry); have.state == waiting && have.how|how != have.how {
		have.how |= how
		return
	}
	s.again(f.entry, fd, how, 1)
}

// firstOf returns the first touch of the file with a number, nil when there was none.
func (s *session) firstOf(ino uint64) *first {
	l := s.lean
	n, ok := l.byNumber.find(ino, func(n uint32) bool { return l.firsts.at(n).ino == ino })
	if !ok {
		return nil
	}
	return l.firsts.at(n)
}

func (s *session) firstLean(ino uint64, fd int, how trace.How, pid int32, st *unix.Statx_t) {
	if s.full() {
		return
	}
	l := s.lean
	i := s.entries.add(entry{ino: ino, id: s.nextID, how: how, state: waiting})
	n := l.firsts.add(first{
		ino: ino, size: size(st), at: s.now, entry: i, pid: pid, comm: s.comms.number(s.comms.of(pid, how&trace.Executed != 0)),
		// Changing a file makes a copy of it, whose change is dated then.
		settled: time.Unix(st.Ctime.Sec, int64(st.Ctime.Nsec)).Before(s.armed.Add(-settling)),
	})
	l.byNumber.add(n, ino)
	s.nextID++
	if s.origin.madeSince(fd, st, s.dated) {
		// A run that goes on making files does not go on touching the image.
		s.entries.at(i).state = left
		s.skipped++
		return
	}
	l.unnamed++
	l.fresh = true
}

// foundEntry handles entry i, which is the file at path p of a layer, with its number and size there.
type foundEntry func(i uint32, l *layer, p string, ino uint64, size int64)

// nameEntries looks for the paths of the files that were touched, and calls found for each once it
// was sent.
func (s *session) nameEntries(found foundEntry) error {
	bound := time.Now().Add(walkTime)
	for i := range s.t.layers {
		var f *first
		w := walk{view: s.t.layers[i].fd, deadline: bound, beat: s.beat, buf: make([]byte, 64<<10)}
		w.wanted = func(ino uint64) bool {
			f = s.firstOf(ino)
			return f != nil && s.entries.at(f.entry).state == waiting
		}
		w.found = func(p string, _ inode) { s.named(i, w.dirfd, p, f, found) } // of what was wanted last
		if err := w.run(func() bool { return s.lean.unnamed > 0 }); err != nil {
			return err
		}
	}
	return nil
}

// named handles a path of layer j, in the open directory dir, that is perhaps the one of a file that
// was touched.
func (s *session) named(j, dir int, p string, f *first, found foundEntry) {
	size := f.size
	if !f.settled {
		var st unix.Stat_t
		if unix.Fstatat(dir, path.Base(p), &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Ino != f.ino {
			return
		}
		size = st.Size
	}
	if s.t.shadowed(j, p) {
		return
	}
	e := s.entries.at(f.entry)
	e.state = listed
	s.lean.unnamed--
	a := trace.Access{Path: p, How: e.how, Size: size, Elapsed: f.at, PID: f.pid, Command: s.comms.called(f.comm)}
	s.out.touch(e.id, &a)
	found(f.entry, &s.t.layers[j], p, f.ino, size)
	if s.out.full() {
		s.out.flush()
	}
}

// nameRest looks for what is missing still, at the end, and notes the numbers of what it does not find: what
// no layer has the run made. The error says that the search ended early.
func (s *session) nameRest(found foundEntry, missing map[uint64]struct{}) error {
	err := s.nameEntries(found)
	for n := range s.lean.firsts.n {
		if e := s.entries.at(s.lean.firsts.at(n).entry); e.state == waiting {
			e.state = left
			missing[e.ino] = struct{}{}
			if err != nil {
				s.unresolved(fmt.Sprintf("no path was found for a file that was touched (search ended early: %v)", err))
				continue
			}
			s.skipped++
		}
	}
	return err
}
