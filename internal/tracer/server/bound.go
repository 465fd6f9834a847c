package server

import (
	"errors"
	"fmt"
	"path"
	"runtime"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// survey finds out what page events are compared with. It is for before the container runs, unless that does already: from then on
// it may be a process of the container that answers whoever looks up a path, or does not.
func (t *target) survey() {
	t.takeRoot()
	t.takeMerged()
	t.outside = t.bound()
}

// bound returns files that are on the layers' filesystems and not of the image, as far as that
// is known beforehand: what is mounted over a file, as resolv.conf is, and the program that is to
// execute the container's command, unless that runs already.
func (t *target) bound() map[inode]struct{} {
	out := make(map[inode]struct{})
	devices := t.devices()
	// Subvolumes of a btrfs, which stat(2) gives device numbers of their own, share what events call the
	// device, and count their inodes each from the start: what is on another one cannot be told apart.
	spaces := make(map[uint64]bool)
	for i := range t.layers {
		var st unix.Stat_t
		if unix.Fstat(t.layers[i].fd, &st) == nil {
			spaces[st.Dev] = true
		}
	}
	for _, m := range t.mounts {
		if !devices[deviceOf(m)] || m.Mountpoint == "/" {
			continue
		}
		if st, ok := t.mounted(m); ok && st.Mode&unix.S_IFMT == unix.S_IFREG && spaces[unix.Mkdev(st.Dev_major, st.Dev_minor)] {
			out[inode{deviceOf(m), st.Ino}] = struct{}{}
		}
	}
	var st unix.Stat_t
	if !t.runs && unix.Fstatat(t.proc, fmt.Sprintf("%d/exe", t.pid), &st, 0) == nil {
		out[inode{st.Dev, st.Ino}] = struct{}{}
	}
	return out
}

// mounted returns the status of what a mount of the container shows at its top; false when that cannot be told, or not
// without waiting for a process of the container.
func (t *target) mounted(m *mountinfo.Info) (unix.Statx_t, bool) {
	var st unix.Statx_t
	fd, err := t.mountPoint(strings.TrimPrefix(path.Clean(m.Mountpoint), "/"))
	if err != nil {
		return st, false
	}
	defer func() { _ = unix.Close(fd) }()
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st)
	// Another mount may be over it by now.
	return st, err == nil && (st.Mask&unix.STATX_MNT_ID == 0 || m.ID >= 0 && st.Mnt_id == uint64(m.ID))
}

// mountPoint opens, as O_PATH, what is mounted at a path below the root. The kernel holds mount points, and the directories on the
// way, so that it need not ask a filesystem that a process or another machine serves, if that does not want to be asked.
func (t *target) mountPoint(p string) (int, error) {
	const tries = 20 // it gives up where something is renamed or mounted meanwhile, anywhere
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | resolveCached}
	fd, err := -1, error(unix.EAGAIN)
	for range tries {
		if fd, err = unix.Openat2(t.root, p, &how); !errors.Is(err, unix.EAGAIN) {
			break
		}
		runtime.Gosched()
	}
	if (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINVAL)) && !t.runs { // EINVAL: before Linux 5.12
		// The container runtime has just come along here.
		how.Resolve &^= resolveCached
		fd, err = unix.Openat2(t.root, p, &how)
	}
	return fd, err
}

// resolveCached makes openat2(2) fail with EAGAIN where it would have to wait for more than the kernel holds.
// Source: include/uapi/linux/openat2.h RESOLVE_CACHED (Linux 5.12).
const resolveCached = 0x20
