package runroot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/continuity/fs"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// mountImage mounts the overlay of an image's layers and returns where.
func mountImage(s spec) (string, error) {
	rw, merged := filepath.Join(s.Scratch, "rw"), filepath.Join(s.Scratch, "root")
	upper, work := filepath.Join(rw, "upper"), filepath.Join(rw, "work")
	make := func() error {
		return errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755), os.MkdirAll(merged, 0o755),
			copyOwner(s.Layers[len(s.Layers)-1], upper))
	}
	if err := make(); err != nil {
		return "", err
	}
	lowers := slices.Clone(s.Layers)
	slices.Reverse(lowers) // overlay wants the topmost first
	err := mountOverlay(lowers, upper, work, merged)
	if err == nil {
		return merged, nil
	}
	// A filesystem that cannot be an upper layer, such as another overlay: what is written is kept in
	// memory then.
	if terr := unix.Mount("tmpfs", rw, "tmpfs", 0, "mode=0755"); terr != nil {
		return "", errors.Join(err, fmt.Errorf("mount a tmpfs on %s: %w", rw, terr))
	}
	if err := make(); err != nil {
		return "", err
	}
	return merged, mountOverlay(lowers, upper, work, merged)
}

// mountOverlay mounts an overlay with the lower directories, topmost first. The options of mount(2)
// are a page at most; more layers take fsconfig(2), which adds them one by one (Linux 6.8).
func mountOverlay(lowers []string, upper, work, at string) error {
	escaped := make([]string, len(lowers))
	for i, l := range lowers {
		escaped[i] = escapeOption(l)
	}
	options := "lowerdir=" + strings.Join(escaped, ":") + ",upperdir=" + escapeOption(upper) + ",workdir=" + escapeOption(work)
	if len(options) < os.Getpagesize() {
		if err := unix.Mount("overlay", at, "overlay", 0, options); err != nil {
			return fmt.Errorf("mount an overlay of %d layers at %s: %w", len(lowers), at, err)
		}
		return nil
	}
	if err := mountMany(lowers, upper, work, at); err != nil {
		return fmt.Errorf("mount an overlay of %d layers at %s (more than a page of options takes Linux 6.8): %w", len(lowers), at, err)
	}
	return nil
}

func mountMany(lowers []string, upper, work, at string) error {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fs) //nolint:errcheck // a handle
	for _, l := range lowers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", l); err != nil {
			return fmt.Errorf("lower directory %s: %w", l, err)
		}
	}
	err = errors.Join(unix.FsconfigSetString(fs, "upperdir", upper), unix.FsconfigSetString(fs, "workdir", work))
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return err
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(m) //nolint:errcheck // a handle
	return unix.MoveMount(m, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// taken are mounts, held while the host's root goes away.
type taken struct {
	spec    spec
	mounts  []int // of spec.Mounts
	volumes []int // of spec.VolumeDirs
	image   int   // the new root, without what is mounted in it later
}

// takeMounts takes copies of what is to be mounted from the host, and of the new root as it is now: before
// /proc and /sys are mounted there, which volumes may link to.
func takeMounts(s spec, root string) (_ *taken, err error) {
	t := &taken{spec: s}
	take := func(path string, recursive uint) (int, error) {
		fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|recursive)
		if err != nil {
			return -1, fmt.Errorf("take %s to be mounted: %w", path, err)
		}
		return fd, nil
	}
	for _, m := range s.Mounts {
		fd, err := take(m.Source, unix.AT_RECURSIVE)
		if err != nil {
			return nil, err
		}
		t.mounts = append(t.mounts, fd)
	}
	for _, dir := range s.VolumeDirs {
		fd, err := take(dir, 0)
		if err != nil {
			return nil, err
		}
		t.volumes = append(t.volumes, fd)
	}
	t.image, err = take(root, unix.AT_RECURSIVE)
	return t, err
}

// attach mounts what was taken, in the new root: paths and links are its own.
func (t *taken) attach() error {
	for i, at := range t.spec.Volumes {
		if slices.ContainsFunc(t.spec.Mounts, func(m Mount) bool { return filepath.Clean(m.Target) == filepath.Clean(at) }) {
			continue // the user's mount is there instead
		}
		if err := volumePlace(at); err != nil {
			return fmt.Errorf("volume %s: %w", at, err)
		}
		if err := t.fill(t.volumes[i], at); err != nil {
			return fmt.Errorf("copy volume %s out of the image: %w", at, err)
		}
		if err := put(t.volumes[i], at, false); err != nil {
			return fmt.Errorf("mount volume %s: %w", at, err)
		}
	}
	for i, m := range t.spec.Mounts {
		if err := place(t.mounts[i], m.Target); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
		if err := put(t.mounts[i], m.Target, m.ReadOnly); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.Source, m.Target, err)
		}
	}
	for _, fd := range slices.Concat(t.mounts, t.volumes, []int{t.image}) {
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

// volumePlace makes the directory that a volume is put on, where there is none. One in /proc is refused, as
// runc does: it would hide what a command must find there.
func volumePlace(at string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	to, err := filepath.EvalSymlinks(at)
	if err == nil && (to == "/proc" || strings.HasPrefix(to, "/proc/")) {
		err = fmt.Errorf("it leads to %s, want a place outside /proc", to)
	}
	return err
}

// fill copies what the image itself holds at a path to a volume.
func (t *taken) fill(volume int, at string) error {
	from, err := unix.Openat2(t.image, at, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) {
		return nil // it is a directory of /sys or /dev
	}
	if err != nil {
		return err
	}
	const name = "/proc/self/fd/%d/."
	// A copy keeps owners, modes and times, also the directory's own.
	return errors.Join(fs.CopyDir(fmt.Sprintf(name, volume), fmt.Sprintf(name, from)), unix.Close(from))
}

// place makes the file or directory that the mount is put on, where there is none.
func place(mount int, at string) error {
	var st unix.Stat_t
	if err := unix.Fstat(mount, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return os.MkdirAll(at, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}

func put(mount int, at string, readOnly bool) error {
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return fmt.Errorf("make it read-only: %w", err)
		}
	}
	return unix.MoveMount(mount, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
}

// loopback brings up the interface lo.
func loopback() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s) //nolint:errcheck // nothing was sent
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, lo); err != nil {
		return err
	}
	lo.SetUint16(lo.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

// becomeContainer makes this process what a container's first process is, in the image's root.
func becomeContainer(s spec) (path string, _ spec, err error) {
	if err := shield(); err != nil {
		return "", s, err
	}
	// Read like any runtime does; see package creation.
	u, err := user.GetExecUserPath(s.User, &user.ExecUser{Home: "/"}, "/etc/passwd", "/etc/group")
	if err != nil {
		return "", s, fmt.Errorf("user %q: %w", s.User, err)
	}
	if !slices.ContainsFunc(s.Env, func(e string) bool { return strings.HasPrefix(e, "HOME=") }) {
		s.Env = append(s.Env, "HOME="+u.Home)
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return "", s, fmt.Errorf("working directory %s: %w", s.Dir, err)
	}
	if path, err = lookUp(s); err != nil {
		return "", s, err
	}
	if err := dropCapabilities(); err != nil {
		return "", s, fmt.Errorf("drop capabilities: %w", err)
	}
	groups := append([]int{u.Gid}, u.Sgids...)
	if err := errors.Join(unix.Setgroups(groups), unix.Setresgid(u.Gid, u.Gid, u.Gid), unix.Setresuid(u.Uid, u.Uid, u.Uid)); err != nil {
		return "", s, fmt.Errorf("become user %q: %w", s.User, err)
	}
	// As the user, as container runtimes do: a directory of somebody else's is no place to start.
	if err := unix.Chdir(s.Dir); err != nil {
		return "", s, fmt.Errorf("working directory %s: %w", s.Dir, err)
	}
	return path, s, nil
}

// shield keeps what is the host's in /proc from the command. Source of the paths: DefaultLinuxSpec in
// containerd pkg/oci. A kernel may lack any.
func shield() error {
	for _, name := range []string{"bus", "fs", "irq", "sys", "sysrq-trigger"} {
		at := "/proc/" + name
		err := unix.Mount(at, at, "", unix.MS_BIND|unix.MS_REC, "")
		if err == nil {
			err = unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("make %s read-only: %w", at, err)
		}
	}
	for _, name := range []string{"kcore", "keys", "latency_stats", "timer_list", "sched_debug"} {
		if err := unix.Mount("/dev/null", "/proc/"+name, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("hide /proc/%s: %w", name, err)
		}
	}
	return nil
}

// kept are the capabilities that containers have. Source: defaultUnixCaps in containerd pkg/oci.
var kept = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW,
	unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE,
	unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
}

// dropCapabilities takes the others out of the calling thread's bounding set: what is executed next, even
// as root, does not have them. Nothing is inheritable from then on.
func dropCapabilities() error {
	for c := range uintptr(64) { // of 64 bits; the kernel refuses those it does not know
		if slices.Contains(kept, c) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) {
				break
			}
			return err
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return unix.Capset(&header, &data[0])
}
