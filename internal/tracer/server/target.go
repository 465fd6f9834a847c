package server

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// target is the traced container: the descriptors through which the server sees it.
// Everything of the host that is needed later is opened before the join, because the
// container may have no /proc, or one of another pid namespace.
type target struct {
	pid   int
	runs  bool // it was started before the recording, and does not stand by
	pidfd int  // becomes readable when the process ends
	proc  int  // the host's /proc
	fds   int  // the host's /proc/<self>/fd
	home  int  // the server's own mount namespace
	ns    int  // the container's mount namespace
	root  int  // the container's root, later the directory that is traced
	view  int  // the same directory without whatever is mounted below it
	upper int  // the overlay's writable layer, -1 when there is none or it is not visible
	host  int  // the host's mountinfo: whatever reads it sees the namespace it was opened in
	load  int  // the host's loadavg, -1 when there is none

	metacopy bool // the default of the overlay module

	hostDev string            // "major:minor" of the server's own root
	layers  []layer           // where the image's files come from; none when that is not known
	merged  bool              // the one layer is the root itself, an overlay: see takeMerged
	own     []*mountinfo.Info // of this process, before the join
	mounts  []*mountinfo.Info // of the process, before the join
	mount   *mountinfo.Info   // the mount that root lies on; nil when unknown
	stat    unix.Statx_t      // of root

	outside map[inode]struct{} // files on the layers' filesystems that are none of the image: see bound
}

// openTarget opens what is needed of process pid while still outside the container. A
// process id that is reused meanwhile is noticed: the pidfd is opened first and asked last.
func openTarget(pid int) (*target, error) {
	t := &target{pid: pid, pidfd: -1, proc: -1, fds: -1, home: -1, ns: -1, root: -1, view: -1, upper: -1, host: -1, load: -1}
	if err := t.open(); err != nil {
		return nil, errors.Join(err, t.close())
	}
	return t, nil
}

func (t *target) open() (err error) {
	const dir = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	if t.proc, err = unix.Open("/proc", dir, 0); err != nil {
		return fmt.Errorf("open /proc: %w", err)
	}
	if self := readlink(t.proc, "self"); self != strconv.Itoa(os.Getpid()) {
		return &failure{codeInternal, fmt.Errorf("/proc is of another pid namespace: self is %q, want %d", self, os.Getpid())}
	}
	if t.pidfd, err = unix.PidfdOpen(t.pid, 0); err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	name := strconv.Itoa(t.pid)
	if t.ns, err = unix.Openat(t.proc, name+"/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open mount namespace: %w", needs(err, "CAP_SYS_PTRACE, or CAP_SYS_ADMIN over the container's user namespace"))
	}
	if t.root, err = unix.Openat(t.proc, name+"/root", dir, 0); err != nil {
		return fmt.Errorf("open root: %w", err)
	}
	if t.mounts, err = t.mountinfo(t.pid); err != nil {
		return fmt.Errorf("read mountinfo: %w", err)
	}
	if t.ended() {
		return fmt.Errorf("process ended: %w", unix.ESRCH)
	}
	if t.home, err = unix.Openat(t.proc, "self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open own mount namespace: %w", err)
	}
	if t.host, err = unix.Openat(t.proc, "self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open own mountinfo: %w", err)
	}
	if t.fds, err = unix.Openat(t.proc, "self/fd", dir, 0); err != nil {
		return fmt.Errorf("open own descriptors: %w", err)
	}
	if t.load, err = unix.Openat(t.proc, "loadavg", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		t.load = -1
	}
	var st unix.Stat_t
	if err := unix.Stat("/", &st); err != nil {
		return fmt.Errorf("stat /: %w", err)
	}
	t.metacopy = readParameter("metacopy")
	t.hostDev = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	return t.locate()
}

// needs says what an operation takes that failed for want of privileges.
func needs(err error, what string) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("it takes %s: %w", what, err)
	}
	return err
}

// locate finds the mount the root lies on and, for an overlay, its writable layer.
func (t *target) locate() error {
	if err := unix.Statx(t.root, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &t.stat); err != nil {
		return fmt.Errorf("stat root: %w", err)
	}
	if t.stat.Mask&unix.STATX_MNT_ID == 0 { // before Linux 5.8
		t.stat.Mnt_id = noMount
	}
	t.mount = findMount(t.mounts, t.stat.Mnt_id)
	if t.own == nil {
		own, err := t.mountinfo(os.Getpid())
		if err != nil {
			return fmt.Errorf("read own mountinfo: %w", err)
		}
		t.own = own
	}
	if t.mount == nil || t.mount.FSType != "overlay" {
		return nil
	}
	if upper := upperDir(t.mount.VFSOptions); strings.HasPrefix(upper, "/") && t.upper < 0 {
		fd, err := unix.Open(upper, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			t.upper = fd
		} // else it is not visible from here, and file handles have to do
	}
	if len(t.layers) > 0 {
		return nil
	}
	var err error
	t.layers, err = openLayers(t.mount, t.own, t.metacopy)
	if errors.Is(err, errNoLayers) {
		err = nil
	}
	return err
}

// takeRoot makes the root, which was entered, the one layer where it is no overlay.
func (t *target) takeRoot() {
	m := t.mount
	if m == nil {
		// A process does not see the mount of a root below which it was put by chroot(2).
		for _, own := range t.own {
			if deviceOf(own) == unix.Mkdev(t.stat.Dev_major, t.stat.Dev_minor) {
				m = own
				break
			}
		}
	}
	if t.overlay() || len(t.layers) > 0 || m == nil || m.FSType == "overlay" || t.view < 0 {
		return
	}
	fd, err := unix.FcntlInt(uintptr(t.view), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		t.layers = []layer{{fd: fd, dev: deviceOf(m), kind: m.FSType}}
	}
}

// takeMerged makes the root the one layer where it is an overlay whose layers cannot be opened by their paths any more, as those of
// pods with users of their own: they were mounted for the overlay alone. Files of layers on the filesystem of the writable layer have the
// numbers there that page events give them; for all others see numbered.
func (t *target) takeMerged() {
	if !t.overlay() || len(t.layers) > 0 || t.upper < 0 || t.view < 0 || splitsData(t.mount.VFSOptions, t.metacopy) {
		return
	}
	var st unix.Statx_t
	if unix.Statx(t.upper, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st) != nil {
		return
	}
	m := findMount(t.own, mountOf(&st))
	if m == nil {
		return
	}
	fd, err := unix.FcntlInt(uintptr(t.view), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		t.layers, t.merged = []layer{{fd: fd, dev: deviceOf(m), kind: m.FSType}}, true
	}
}

// numbered reports whether the file at p, which has status st in a layer, has there the number that page events give it, and
// the content that it has in the image: in the layers themselves all have.
func (t *target) numbered(p string, st *unix.Stat_t) bool {
	return !t.merged || st.Dev == t.device() && st.Ino>>numberBits == 0 && !t.changed(p)
}

// device is the device number of the root.
func (t *target) device() uint64 { return unix.Mkdev(t.stat.Dev_major, t.stat.Dev_minor) }

// sees reports whether page events can be told to be of the image: its layers are known, and one
// at least is on a filesystem that uses the page cache.
func (t *target) sees() bool {
	return len(t.devices()) > 0 && (!t.overlay() || t.whole())
}

// join moves the calling thread, which must be locked, into the container's mount
// namespace and makes dir, inside the process' root, its root directory.
func (t *target) join(dir string) error {
	// setns(2) refuses a thread that shares its root and working directory.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare filesystem state: %w", err)
	}
	if err := unix.Setns(t.ns, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("setns: %w", needs(err, "CAP_SYS_ADMIN and CAP_SYS_CHROOT"))
	}
	if dir = strings.Trim(dir, "/"); dir != "" {
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
		fd, err := unix.Openat2(t.root, dir, &how)
		if err != nil {
			return fmt.Errorf("open /%s: %w", dir, err)
		}
		if err := replace(&t.root, fd); err != nil {
			return err
		}
		if err := t.locate(); err != nil {
			return err
		}
	}
	// The kernel names files relative to the thread's root.
	if err := unix.Fchdir(t.root); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	// A copy of the one mount shows what volumes and /proc are mounted over.
	view, err := unix.OpenTree(t.root, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		view, err = unix.FcntlInt(uintptr(t.root), unix.F_DUPFD_CLOEXEC, 0)
	}
	t.view = view
	return err
}

// mark marks the root and returns what kind of mark it took. opens asks for opened files only: reads
// are told by page events.
func (t *target) mark(g *fanotify.Group, opens bool) (fanotify.Kind, error) {
	m := fanotify.Mark{Kind: fanotify.Mount, Mask: fanotify.Open | fanotify.Access | fanotify.OpenExec, Dir: t.root, Path: "."}
	if opens {
		m.Mask &^= fanotify.Access
	}
	if t.ownSuperblock() {
		m.Kind = fanotify.Filesystem
		err := g.Mark(m)
		if err == nil || errors.Is(err, fanotify.ErrPermission) {
			return m.Kind, err
		}
		m.Kind = fanotify.Mount
	}
	return m.Kind, g.Mark(m)
}

// whole reports whether everything that the mark covers lies below the root.
func (t *target) whole() bool { return t.stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 }

// overlay reports whether the root is an overlay.
func (t *target) overlay() bool { return t.mount != nil && t.mount.FSType == "overlay" }

// ownSuperblock reports whether the root is the top of a superblock that nothing but
// this container uses: an overlay is, a directory of the host's filesystem is not.
func (t *target) ownSuperblock() bool {
	if t.mount == nil || t.mount.Root != "/" || !t.whole() {
		return false
	}
	dev := strconv.Itoa(t.mount.Major) + ":" + strconv.Itoa(t.mount.Minor)
	return dev != t.hostDev
}

// unstarted reports whether the process has yet to execute the container's command: what it executes still, the
// container runtime's program, is on no mount that the container has. It is false where that cannot be told, as
// before Linux 5.8.
func (t *target) unstarted() bool {
	var st unix.Statx_t
	err := unix.Statx(t.proc, strconv.Itoa(t.pid)+"/exe", 0, unix.STATX_MNT_ID, &st)
	return err == nil && st.Mask&unix.STATX_MNT_ID != 0 && len(t.mounts) > 0 && findMount(t.mounts, st.Mnt_id) == nil
}

// ended reports whether the process has ended.
func (t *target) ended() bool {
	fds := []unix.PollFd{{Fd: pollFD(t.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// part moves the thread back to where it came from and gives up the container's root and namespace by others. Where nothing else
// holds them any more the kernel takes a while to forget what was touched. Layers stay.
func (t *target) part(others *errgroup.Group) {
	if t.home < 0 || unix.Setns(t.home, unix.CLONE_NEWNS) != nil {
		return // leave tries it again
	}
	for _, fd := range []*int{&t.ns, &t.root, &t.view} {
		if old := *fd; old >= 0 {
			others.Go(func() error { return unix.Close(old) })
		}
		*fd = -1
	}
}

// leave gives up everything that would keep the container's namespace or root busy and
// moves the thread back to where it came from. The pidfd stays.
func (t *target) leave() error {
	var err error
	if t.home >= 0 {
		err = unix.Setns(t.home, unix.CLONE_NEWNS)
	}
	for _, fd := range []*int{&t.ns, &t.root, &t.view, &t.upper, &t.host, &t.load} {
		err = errors.Join(err, replace(fd, -1))
	}
	return errors.Join(err, closeLayers(t.layers))
}

func (t *target) close() error {
	err := closeLayers(t.layers)
	for _, fd := range []*int{&t.pidfd, &t.proc, &t.fds, &t.home, &t.ns, &t.root, &t.view, &t.upper, &t.host, &t.load} {
		err = errors.Join(err, replace(fd, -1))
	}
	return err
}

// replace closes *fd, when it is open, and puts next there.
func replace(fd *int, next int) error {
	old := *fd
	*fd = next
	if old < 0 {
		return nil
	}
	return unix.Close(old)
}

// readlink returns where a link points, "" when that cannot be told.
func readlink(dir int, name string) string {
	var b [unix.PathMax]byte
	n, err := unix.Readlinkat(dir, name, b[:])
	if err != nil || n >= len(b) {
		return ""
	}
	return string(b[:n])
}

// pollFD narrows a descriptor to what poll(2) takes; descriptors fit by construction.
func pollFD(fd int) int32 { return int32(fd) } //nolint:gosec // descriptors are below RLIMIT_NOFILE

// threads returns the threads of the container's first process and of all its descendants, as far as they
// can be found (CONFIG_PROC_CHILDREN): a container that runs already has some.
func (t *target) threads() ([]int, error) {
	all, err := t.task(t.pid)
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{t.pid: true}
	for next := 0; next < len(all) && len(all) < maxThreads; next++ {
		for _, child := range t.children(all[next]) {
			if seen[child] {
				continue
			}
			seen[child] = true
			if more, err := t.task(child); err == nil { // else it is gone
				all = append(all, more...)
			}
		}
	}
	return all, nil
}

// task returns the threads of a process.
func (t *target) task(pid int) ([]int, error) {
	fd, err := unix.Openat(t.proc, strconv.Itoa(pid)+"/task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("list threads: %w", err)
	}
	dir := os.NewFile(uintptr(fd), "task")
	names, err := dir.Readdirnames(-1)
	if err = errors.Join(err, dir.Close()); err != nil {
		return nil, fmt.Errorf("list threads: %w", err)
	}
	var threads []int
	for _, name := range names {
		n, err := strconv.Atoi(name)
		if err != nil {
			return nil, fmt.Errorf("list threads: %w", err)
		}
		threads = append(threads, n)
	}
	return threads, nil
}

// children returns the processes that a thread made and that still run.
func (t *target) children(thread int) []int {
	id := strconv.Itoa(thread)
	fd, err := unix.Openat(t.proc, id+"/task/"+id+"/children", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	file := os.NewFile(uintptr(fd), "children")
	text, err := io.ReadAll(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return nil
	}
	var pids []int
	for field := range strings.FieldsSeq(string(text)) {
		if n, err := strconv.Atoi(field); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}
