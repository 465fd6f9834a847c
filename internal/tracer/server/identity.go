package server

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer/stream"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// identity joins what the two engines know after a run: files that fanotify named, and
// inodes whose pages were touched.
type identity struct {
	s       *session
	left    map[uint64]struct{} // numbers of inodes that were counted as skipped or lost
	renamed map[uint64][]uint32 // entries that are not where they were in the image, by inode number
	wanted  int                 // inodes with pages whose path is not known
	sure    bool                // every range so far is certain
	whole   bool                // some file counts as a whole
	ranges  bool                // some file has ranges, be they none
	scratch []trace.Range       // what put works with
}

// resolvePages gives the accesses their ranges, and the files that only page events show
// their paths. It runs after the last event.
func (s *session) resolvePages() {
	d := &identity{
		s: s, left: make(map[uint64]struct{}),
		renamed: make(map[uint64][]uint32), sure: true,
	}
	d.copied()
	d.wanted = s.pages.files.len()
	for i := range s.entries.n {
		d.entry(i)
		if i%256 == 0 {
			s.beat()
		}
	}
	if s.lean != nil && s.nameRest(d.send, d.left) == nil {
		d.settle()
	}
	err := d.search()
	for i := range s.pages.files.all.n {
		f := s.pages.files.all.at(i)
		_, known := d.left[f.ino]
		switch {
		case f.flags&pageSent != 0:
		case known: // it was counted already
		case err != nil:
			s.unresolved(fmt.Sprintf("no path of the image was found for pages that were touched (search ended early: %v)", err))
		default:
			s.skipped++
		}
	}
	s.skipped += int64(s.pages.others.len())
	s.grade = d.grade()
}

// settle takes what a search for all numbers did not find out of the next one: the run made it.
func (d *identity) settle() {
	s := d.s
	for i := range s.pages.files.all.n {
		f := s.pages.files.all.at(i)
		if first := s.firstOf(f.ino); first != nil && s.entries.at(first.entry).state == left {
			d.take(f)
		}
	}
}

// grade says how exact the list is.
func (d *identity) grade() string {
	switch {
	case !d.ranges || !d.s.pages.exact():
		return trace.GradeFile
	case d.sure && !d.whole:
		return trace.GradeExact
	}
	return trace.GradeFaultAround
}

// entry looks for a file that fanotify named in the layers and sends its ranges.
func (d *identity) entry(i uint32) {
	e := d.s.entries.at(i)
	switch {
	case e.state == left:
		d.left[e.ino] = struct{}{}
		return
	case e.state != listed:
		return
	}
	p := d.s.pathOf(i)
	if p == "" {
		d.whole = true
		return
	}
	l, st := d.s.t.inLayers(p, e.ino)
	if l == nil {
		d.renamed[e.ino] = append(d.renamed[e.ino], i)
		d.whole = true
		return
	}
	d.send(i, l, p, st.Ino, st.Size)
}

// send sends what is known of the pages of an entry that is the file of a layer at path p.
func (d *identity) send(i uint32, l *layer, p string, ino uint64, size int64) {
	var none pageFile
	e, id := d.s.entries.at(i), inode{l.dev, ino}
	if !l.visible() {
		d.whole = true
		return
	}
	f := d.s.pages.files.find(id)
	switch {
	case i < d.s.unseen: // what was touched before is not known
		if f != nil {
			d.take(f)
		}
		d.whole = true
		return
	case f != nil: // under each of its names, if it has several: the events do not say which
		d.take(f)
	default:
		// Bytes that came past the page cache, by direct I/O, leave no page event.
		unseen := e.how&trace.Read != 0 && !d.s.t.changed(p)
		if unseen || !d.s.pages.exact() {
			d.whole = true
			return
		}
		f = &none
	}
	if e.how|f.how&trace.Read != e.how {
		e.how |= trace.Read
		d.s.out.send(stream.Merge{ID: e.id, How: e.how})
	}
	d.put(e.id, f, l, p, size)
}

// take notes that a file's path is known.
func (d *identity) take(f *pageFile) {
	if f.flags&pageSent == 0 {
		f.flags |= pageSent
		d.wanted--
	}
}

// put sends the ranges of the file of size bytes that is at path p of a layer.
func (d *identity) put(id uint32, f *pageFile, l *layer, p string, size int64) {
	if d.s.pages.exact() && !d.s.pages.widen(f, l.fd, p, size) {
		d.whole = true
		return
	}
	d.scratch = d.s.pages.files.ranges(d.scratch[:0], f, size)
	ranges := d.scratch
	if !d.s.pages.exact() && f.touched() {
		last := time.Duration(0)
		for _, r := range ranges {
			last = max(last, r.Elapsed)
		}
		ranges = append(ranges, trace.Rest(ranges, size, last)...)
	}
	for _, r := range ranges {
		d.sure = d.sure && r.Certain
	}
	d.ranges = true
	for {
		n := min(len(ranges), stream.MaxRanges)
		d.s.out.ranges(id, ranges[:n])
		if ranges = ranges[n:]; len(ranges) == 0 {
			break
		}
	}
	if d.s.out.full() {
		d.s.out.flush()
	}
}

// search walks the layers, the topmost first, for the inodes that are missing.
func (d *identity) search() error {
	bound := time.Now().Add(walkTime)
	for i := range d.s.t.layers {
		l := &d.s.t.layers[i]
		w := walk{view: l.fd, deadline: bound, beat: d.s.beat, buf: make([]byte, 64<<10), wanted: d.maybe(l), found: func(p string, _ inode) {
			d.found(i, p)
		}}
		err := w.run(d.missing)
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *identity) missing() bool { return d.wanted > 0 || len(d.renamed) > 0 }

// maybe returns what tells a walk of l which inode numbers are worth a look.
func (d *identity) maybe(l *layer) func(ino uint64) bool {
	return func(ino uint64) bool {
		if f := d.s.pages.files.find(inode{l.dev, ino}); f != nil && f.flags&pageSent == 0 {
			return true
		}
		_, ok := d.renamed[ino]
		return ok
	}
}

// found handles a file of layer i that may be one of those that are missing.
func (d *identity) found(i int, p string) {
	l := &d.s.t.layers[i]
	var st unix.Stat_t
	if unix.Fstatat(l.fd, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || d.s.t.shadowed(i, p) {
		return
	}
	f := d.s.pages.files.find(inode{l.dev, st.Ino})
	if !d.s.t.numbered(p, &st) {
		if _, ok := d.renamed[st.Ino]; f != nil && f.flags&pageSent == 0 && !ok {
			d.foundChanged(p, f, &st)
		}
		return
	}
	for _, e := range d.renamed[st.Ino] {
		d.s.out.send(stream.Rename{ID: d.s.entries.at(e).id, Path: p})
		d.send(e, l, p, st.Ino, st.Size)
	}
	if _, ok := d.renamed[st.Ino]; ok {
		delete(d.renamed, st.Ino)
		if f != nil {
			d.take(f)
		}
		return
	}
	if f == nil || f.flags&pageSent != 0 {
		return
	}
	d.take(f)
	if !d.s.t.overlay() && d.s.t.younger(l.fd, p, d.s.dated) {
		d.s.skipped++
		return
	}
	a := trace.Access{Path: p, How: f.how, Size: st.Size, Elapsed: d.s.pages.files.first(f), PID: f.pid, Command: d.s.comms.called(f.comm)}
	d.s.out.send(stream.Found{ID: d.s.nextID, Access: a})
	d.put(d.s.nextID, f, l, p, st.Size)
	d.s.nextID++
}

// foundChanged handles a file that the run has at p in place of one of the image, and whose number pages were touched
// under: they were read to copy it, if it was.
func (d *identity) foundChanged(p string, f *pageFile, st *unix.Stat_t) {
	if st.Dev != d.s.t.device() || d.s.origin.madeAt(p) {
		return
	}
	d.take(f)
	d.whole = true
	d.s.out.send(stream.Found{ID: d.s.nextID, Access: trace.Access{
		Path: p, How: f.how, Size: st.Size, Elapsed: d.s.pages.files.first(f), PID: f.pid, Command: d.s.comms.called(f.comm),
	}})
	d.s.nextID++
}

// inLayers returns the layer in which a path of the image is the file with inode number ino, as the
// root shows it, and its status there; nil when it is in none.
func (t *target) inLayers(p string, ino uint64) (*layer, unix.Stat_t) {
	for i := range t.layers {
		var st unix.Stat_t
		err := unix.Fstatat(t.layers[i].fd, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		// A file that the run changed may have another number than the one it was copied from.
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && t.numbered(p, &st) && (sameNumber(st.Ino, ino) || (t.changed(p) && t.plain(i, p))) {
			return &t.layers[i], st
		}
		break
	}
	return nil, unix.Stat_t{}
}

// sameNumber compares inode numbers of an overlay and of a layer. The overlay may use the highest
// bits of its own for the layer (fs/overlayfs/util.c, xino).
func sameNumber(a, b uint64) bool { return (a^b)<<16 == 0 }

// changed reports whether the writable layer has a file at p.
func (t *target) changed(p string) bool {
	var st unix.Stat_t
	return t.upper >= 0 && unix.Fstatat(t.upper, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// plain reports whether no symbolic link is on the way to p in layer i.
func (t *target) plain(i int, p string) bool {
	fd, err := beneath(t.layers[i].fd, p, unix.O_PATH)
	return err == nil && unix.Close(fd) == nil
}

func beneath(dir int, p string, flags uint64) (int, error) {
	return unix.Openat2(dir, p[1:], &unix.OpenHow{
		Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
}

// shadowed reports whether a layer above layer i hides its file at p: by a whiteout or anything else at
// p, or by something that is no directory, or an opaque directory, on the way.
func (t *target) shadowed(i int, p string) bool {
	for j := range t.layers[:i] {
		for at := 1; at <= len(p); at++ {
			if at < len(p) && p[at] != '/' {
				continue
			}
			var st unix.Stat_t
			if unix.Fstatat(t.layers[j].fd, p[1:at], &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				break
			}
			if at == len(p) || st.Mode&unix.S_IFMT != unix.S_IFDIR || t.opaque(j, p[:at]) {
				return true
			}
		}
	}
	return false
}

// opaque reports whether a directory of layer j hides what layers below have there.
func (t *target) opaque(j int, dir string) bool {
	fd, err := beneath(t.layers[j].fd, dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	for _, name := range []string{"trusted.overlay.opaque", "user.overlay.opaque"} {
		var v [1]byte
		if n, err := unix.Fgetxattr(fd, name, v[:]); err == nil && n == 1 && v[0] == 'y' {
			return true
		}
	}
	return false
}

// younger reports whether a file was made after a point in time.
func (t *target) younger(dir int, p string, than time.Time) bool {
	var st unix.Statx_t
	err := unix.Statx(dir, p[1:], unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &st)
	return err == nil && st.Mask&unix.STATX_BTIME != 0 && !time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).Before(than)
}

// devices returns the device numbers of the layers' filesystems.
func (t *target) devices() map[uint64]bool {
	d := make(map[uint64]bool)
	for i := range t.layers {
		if t.layers[i].visible() {
			d[t.layers[i].dev] = true
		}
	}
	return d
}
