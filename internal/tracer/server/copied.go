package server

import (
	"math"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// cloning lists the filesystems that copy a file by sharing its blocks, so that nothing is read: what an
// overlay copies into a writable layer on the same filesystem then leaves no page event, nor does copy_file_range(2).
// Source: the file_operations that have remap_file_range.
var cloning = []string{"xfs", "btrfs", "bcachefs"}

// clones reports whether the layer's files may be copied without being read.
func (l *layer) clones() bool { return slices.Contains(cloning, l.kind) }

// copied adds the files that the run had copied into the writable layer, by a change, a new name or another
// owner, where that left no event: a copy takes all of a file, as it does on a filesystem that cannot share blocks.
func (d *identity) copied() {
	t := d.s.t
	shares := t.sharing()
	if t.upper < 0 || len(shares) == 0 {
		return
	}
	w := walk{view: t.upper, deadline: time.Now().Add(walkTime), beat: d.s.beat, buf: make([]byte, 32<<10), found: func(p string, _ inode) { d.copy(p, shares) }}
	if err := w.run(func() bool { return true }); err != nil {
		d.s.unresolved("the writable layer was not searched to its end for files that were copied into it: " + err.Error())
	}
}

// sharing returns the devices of layers whose files the writable layer may share blocks with.
func (t *target) sharing() map[uint64]bool {
	own := make(map[uint64]bool)
	var st unix.Statx_t
	var upper *mountinfo.Info
	if t.upper >= 0 && unix.Statx(t.upper, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st) == nil {
		upper = findMount(t.own, mountOf(&st))
	}
	for i := range t.layers {
		if l := &t.layers[i]; l.clones() && (upper == nil || deviceOf(upper) == l.dev) {
			own[l.dev] = true
		}
	}
	return own
}

// copy adds the file of the image that the writable layer has a copy of at p, if it is one.
func (d *identity) copy(p string, shares map[uint64]bool) {
	t := d.s.t
	number, ok := t.copiedFrom(p)
	if !ok {
		return
	}
	var own unix.Statx_t
	at := d.s.since()
	err := unix.Statx(t.upper, p[1:], unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &own)
	if err == nil && own.Mask&unix.STATX_BTIME != 0 { // of the copy
		at = min(at, max(0, time.Unix(own.Btime.Sec, int64(own.Btime.Nsec)).Sub(d.s.armed)))
	}
	for dev := range shares {
		d.s.pages.whole(inode{dev, number}, at)
	}
}

// copiedFrom returns the inode number of the file of the image that the writable layer has a copy of at p.
func (t *target) copiedFrom(p string) (uint64, bool) {
	fd, err := t.openRegular(t.upper, p)
	if err != nil {
		return 0, false
	}
	defer func() { _ = unix.Close(fd) }()
	for _, name := range []string{"trusted.overlay.origin", "user.overlay.origin"} {
		if _, err := unix.Fgetxattr(fd, name, nil); err != nil {
			continue
		}
		// The root shows a copy under the number of what it was copied from.
		// Source: Documentation/filesystems/overlayfs.rst, "Inode properties".
		var shown unix.Stat_t
		err := unix.Fstatat(t.view, p[1:], &shown, unix.AT_SYMLINK_NOFOLLOW)
		return shown.Ino << (64 - numberBits) >> (64 - numberBits), err == nil
	}
	// One of several names says nothing of where it comes from.
	for i := range t.layers {
		var st unix.Stat_t
		if unix.Fstatat(t.layers[i].fd, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			return st.Ino, st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink > 1 && !t.shadowed(i, p)
		}
	}
	return 0, false
}

// whole notes that all of a file was read at a time; its size is not known yet. It is for use after stop.
func (l *pageLog) whole(id inode, at time.Duration) {
	f := l.files.find(id)
	if f == nil {
		f = l.files.add(pageFile{inode: id, how: trace.Opened})
	}
	f.how |= trace.Read
	l.files.touch(f, 0, math.MaxUint32, at, true)
}
