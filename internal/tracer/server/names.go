package server

import (
	"iter"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// deletedSuffix is what the kernel adds to the path of a name that is gone. A file may
// really be called so. Source: fs/d_path.c d_path.
const deletedSuffix = " (deleted)"

// maxMountRoots bounds the cache of mounts; it is emptied when full.
const maxMountRoots = 1024

// maxLearned bounds the mounts that are tried for a file of an unknown one.
const maxLearned = 16

// namer finds the path in the image of a file that was opened through any mount, in any
// root, in any mount namespace.
//
// The kernel names an open file as seen through the mount it was opened by: below a bind
// mount, a chroot, or in a namespace whose mounts we cannot reach, that is another path
// than the image's. So a path is believed only when the image has the same inode there.
// If not, the start of the path is replaced by the place in the filesystem that the mount
// shows, as mountinfo has it.
type namer struct {
	t     *target
	buf   []byte
	guess rewrite // what helped last
	roots map[uint64]mountRoot
	learn []string // roots of mounts that helped before
}

// rewrite replaces the start of a path.
type rewrite struct{ from, to string }

func (r rewrite) apply(p string) (string, bool) {
	rest, ok := strings.CutPrefix(p, r.from)
	if !ok || (rest != "" && rest[0] != '/') {
		return "", false
	}
	return path.Clean(r.to + "/" + rest), true
}

// mountRoot is what a mount shows: a directory or a file below the root. pid is who was
// asked; found tells whether the answer was there.
type mountRoot struct {
	root  string
	pid   int32
	found bool
}

func newNamer(t *target) *namer {
	return &namer{t: t, buf: make([]byte, unix.PathMax), roots: make(map[uint64]mountRoot)}
}

// raw returns the kernel's name of an open file, "" when it has none that fits
// PATH_MAX.
func (n *namer) raw(fd int) string {
	l, err := unix.Readlinkat(n.t.fds, strconv.Itoa(fd), n.buf)
	if err != nil || l >= len(n.buf) {
		return ""
	}
	return string(n.buf[:l])
}

// path returns the path below the root of the file st that the kernel calls raw and that
// process pid touched. gone files are looked for too, unless whence says they were made
// during the run. It returns false when no candidate is the file.
func (n *namer) path(raw string, pid int32, st *unix.Statx_t, whence whence) (string, bool) {
	if raw == "" || raw[0] != '/' {
		return "", false
	}
	base, deleted := strings.CutSuffix(raw, deletedSuffix)
	// Through the traced root's own mount the kernel's name is the image's path.
	if (n.own(mountOf(st)) && !deleted) || n.is(raw, st) {
		return raw, true
	}
	if n.guess.to != "" {
		if p, ok := n.guess.apply(raw); ok && n.is(p, st) {
			return p, true
		}
	}
	for r := range n.rewrites(raw, pid, mountOf(st)) {
		if p, ok := r.apply(raw); ok && n.is(p, st) {
			n.remember(r)
			return p, true
		}
	}
	if !deleted || whence == made || !n.t.whole() {
		// Below a directory that shares its mount with others, a name that is gone may
		// as well be theirs.
		return "", false
	}
	return n.gone(base, pid, mountOf(st))
}

// own reports whether mount is the one whose top is the traced root.
func (n *namer) own(mount uint64) bool {
	return mount == n.t.stat.Mnt_id && mount != noMount && n.t.whole()
}

// gone returns the path of a name that no longer exists: the first candidate that the
// writable layer hides, or, where the mount is known, whose directory exists.
func (n *namer) gone(base string, pid int32, mount uint64) (string, bool) {
	if n.own(mount) {
		return base, true
	}
	for r := range n.rewrites(base, pid, mount) {
		if p, ok := r.apply(base); ok && n.hidden(p) {
			return p, true
		}
	}
	root, known := n.mountRoot(pid, mount)
	for r := range n.rewrites(base, pid, mount) {
		if !known || r.to != root {
			break
		}
		if p, ok := r.apply(base); ok && p != "/" && n.isDir(path.Dir(p)) {
			return p, true
		}
	}
	return "", false
}

// hidden reports whether the overlay's writable layer hides what the image has at p: by a
// whiteout there or above, or by another file.
func (n *namer) hidden(p string) bool {
	if n.t.upper < 0 {
		return false
	}
	for q := p; len(q) > 1; q = path.Dir(q) {
		var st unix.Stat_t
		if err := unix.Fstatat(n.t.upper, q[1:], &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			continue // nothing there; perhaps its directory is hidden
		}
		whiteout := st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
		return whiteout || (q == p && st.Mode&unix.S_IFMT == unix.S_IFREG)
	}
	return false
}

// rewrites yields the ways in which p may have to be read: below the root of the mount,
// below the traced root itself, and below what helped before; each with ever more of p's
// start dropped.
func (n *namer) rewrites(p string, pid int32, mount uint64) iter.Seq[rewrite] {
	return func(yield func(rewrite) bool) {
		var tops []string
		if root, ok := n.mountRoot(pid, mount); ok {
			tops = append(tops, root)
		}
		tops = append(append(tops, "/"), n.learn...)
		for _, top := range tops {
			for i := 0; i <= len(p); i++ {
				if i < len(p) && p[i] != '/' {
					continue
				}
				if !yield(rewrite{from: p[:i], to: top}) {
					return
				}
			}
		}
	}
}

// remember keeps a rewrite that was right.
func (n *namer) remember(r rewrite) {
	n.guess = r
	if r.to != "/" && len(n.learn) < maxLearned && !slices.Contains(n.learn, r.to) {
		n.learn = append(n.learn, r.to)
	}
}

// mountRoot returns what mount shows, relative to the traced root, as process pid or the
// container's first process sees it.
func (n *namer) mountRoot(pid int32, mount uint64) (string, bool) {
	if m, ok := n.roots[mount]; ok && (m.found || m.pid == pid) {
		return m.root, m.found
	}
	if len(n.roots) >= maxMountRoots {
		clear(n.roots)
	}
	got := mountRoot{pid: pid}
	for _, p := range []int{int(pid), n.t.pid} {
		mounts, err := n.t.mountinfo(p)
		if err != nil {
			continue // the process is gone
		}
		if m := findMount(mounts, mount); m != nil {
			got.root, got.found = n.below(m.Root)
			break
		}
	}
	n.roots[mount] = got
	return got.root, got.found
}

// below turns a path inside the filesystem into one below the traced root.
func (n *namer) below(p string) (string, bool) {
	top := "/"
	if n.t.mount != nil {
		top = n.t.mount.Root
	}
	if top == "/" {
		return p, true
	}
	rest, ok := strings.CutPrefix(p, top)
	if !ok || (rest != "" && rest[0] != '/') {
		return "", false
	}
	return path.Clean("/" + rest), true
}

// is reports whether the file st is at path p below the root.
func (n *namer) is(p string, st *unix.Statx_t) bool {
	if len(p) < 2 {
		return false
	}
	var have unix.Stat_t
	if err := unix.Fstatat(n.t.view, p[1:], &have, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false
	}
	return inode{have.Dev, have.Ino} == inodeOf(st)
}

func (n *namer) isDir(p string) bool {
	if p == "/" {
		return true
	}
	var have unix.Stat_t
	err := unix.Fstatat(n.t.view, p[1:], &have, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && have.Mode&unix.S_IFMT == unix.S_IFDIR
}
