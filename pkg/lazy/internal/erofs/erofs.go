// Package erofs mounts RAFS v6 bootstraps in the kernel's EROFS, from plain files.
//
// A mount is made in two steps. [New] makes a superblock over a bootstrap and the cache files
// of its blobs, and a mount of it that is attached nowhere ([Detached]); [Attach] puts such a
// mount into the caller's mount namespace. In between the mount's descriptor may be sent to
// another process. Whoever closes the last descriptor of a mount that was not attached ends it.
//
// A superblock is known afterwards by two names: Device, the device number that stat(2) and
// /proc/self/mountinfo show, and BDI, its backing device in /sys/class/bdi, which has
// read_ahead_kb and vanishes with the superblock ([Alive]). The kernel has no link between the
// two, so New finds the BDI by what appears when it makes the superblock.
//
//	d, err := erofs.New(ctx, erofs.Options{Bootstrap: "image.boot", Devices: []string{"blob0", "blob1"}, ReadAhead: 4})
//	…
//	err = erofs.Attach(d.File(), "/mnt")
//	err = d.Close()
//
// Limits: O_DIRECT is EINVAL on such a mount. BDI names are unique until the next boot only.
// Source: fs/erofs/super.c erofs_fc_get_tree, super_setup_bdi; fsopen(2).
package erofs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Errors of this package; all answer to errors.Is.
var (
	// ErrUnsupported: the kernel cannot mount EROFS from plain files.
	ErrUnsupported = errors.New("not supported by this kernel")
	// ErrPermission: CAP_SYS_ADMIN is missing.
	ErrPermission = errors.New("mounting needs CAP_SYS_ADMIN")
	// ErrBusy: the mount is in use and stays.
	ErrBusy = errors.New("mount is in use")
)

// Options says what to mount.
type Options struct {
	// Bootstrap is the bootstrap's file, Devices the cache files of its blobs in the order of
	// the blob table, all of them or none.
	Bootstrap string
	Devices   []string
	// ReadAhead is how many KiB the kernel reads ahead of a read through the mount, rounded
	// down to pages; 0 is none, negative leaves the kernel's value (128).
	ReadAhead int
}

// Detached is a mount that is attached nowhere. Not safe for concurrent use.
type Detached struct {
	// Device is st_dev of the files on the mount, as stat(2) gives it.
	Device uint64
	// BDI is the name of the superblock's backing device, "erofs-N".
	BDI string

	file *os.File
}

// File returns the mount's descriptor; it is the Detached's.
func (d *Detached) File() *os.File { return d.file }

// Close closes the descriptor: a mount that was not attached ends with it, one that was
// stays. Later calls return nil.
func (d *Detached) Close() error {
	if d.file == nil {
		return nil
	}
	err := d.file.Close()
	d.file = nil
	return err
}

// attempts bounds how often New makes a superblock again because somebody else made one at
// the same moment. Ours are made one at a time on the whole machine, unless somebody keeps the lock, so others are rare.
const attempts = 40

// New makes a superblock and a detached mount of it, read-only. The caller closes it.
// ErrUnsupported and ErrPermission where they apply; EINVAL for what the kernel finds wrong
// with the files, about which it tells its log (dmesg) alone. Safe for concurrent use, also by several
// processes: each waits for the others, for two seconds at most. The cause of ctx when it ends before.
func New(ctx context.Context, o Options) (*Detached, error) {
	fail := func(err error) (*Detached, error) {
		return nil, fmt.Errorf("mount erofs %s with %d devices: %w", o.Bootstrap, len(o.Devices), err)
	}
	unlock, err := lockBDIs(ctx, lockLimit)
	if err != nil {
		return fail(err)
	}
	defer unlock()
	for n := range attempts {
		d, err := try(o)
		if err != nil {
			return fail(err)
		}
		if d == nil {
			if err := pause(ctx, time.Millisecond<<min(n, 7)); err != nil {
				return fail(err)
			}
			continue
		}
		if o.ReadAhead >= 0 {
			if err := SetReadAhead(d.BDI, o.ReadAhead); err != nil {
				return fail(errors.Join(err, d.Close()))
			}
		}
		return d, nil
	}
	return fail(fmt.Errorf("others mount EROFS all the time: the backing device was not found in %d attempts", attempts))
}

// try makes one superblock; nil when its backing device cannot be told from another's.
func try(o Options) (d *Detached, err error) {
	before, err := bdis()
	if err != nil {
		return nil, err
	}
	mnt, err := mount(o)
	if err != nil {
		return nil, err
	}
	d = &Detached{file: os.NewFile(uintptr(mnt), "erofs mount")}
	defer func() {
		if err != nil || d.BDI == "" {
			err = errors.Join(err, d.Close())
			d = nil
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(mnt, &st); err != nil {
		return d, fmt.Errorf("stat: %w", err)
	}
	d.Device = st.Dev
	after, err := bdis()
	if err != nil {
		return d, err
	}
	var fresh []string
	for name := range after {
		if !before[name] {
			fresh = append(fresh, name)
		}
	}
	switch len(fresh) {
	case 0:
		return d, fmt.Errorf("no backing device appeared in %s", bdiDir)
	case 1:
		d.BDI = fresh[0]
	}
	return d, nil
}

// mount returns the descriptor of a detached mount. Options go to the kernel one by one
// through fsconfig(2), because those of many devices do not fit the one page of mount(2).
func mount(o Options) (fd int, err error) {
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen: %w", explain(err))
	}
	defer func() { err = errors.Join(err, unix.Close(fs)) }()
	// The descriptors behind shortened paths must live until the kernel opens them.
	var held []func()
	defer func() {
		for _, done := range held {
			done()
		}
	}()
	set := func(key, path string) error {
		value, done, err := shorten(path)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		held = append(held, done)
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fmt.Errorf("%s %s: %w", key, path, errors.Join(err, kernelLog(fs)))
		}
		return nil
	}
	if err := set("source", o.Bootstrap); err != nil {
		return -1, err
	}
	for _, d := range o.Devices {
		if err := set("device", d); err != nil {
			return -1, err
		}
	}
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return -1, fmt.Errorf("set ro: %w", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, errors.Join(explain(err), kernelLog(fs))
	}
	fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w", errors.Join(err, kernelLog(fs)))
	}
	return fd, nil
}

// maxValue is the longest string that fsconfig(2) takes, in bytes without its end
// (fs/fsopen.c: strndup_user(_value, 256)).
const maxValue = 255

// shorten returns path, or another name of the same file that fsconfig(2) takes, valid until
// done is called.
func shorten(path string) (short string, done func(), err error) {
	if len(path) <= maxValue {
		return path, func() {}, nil
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() { _ = unix.Close(fd) }, nil
}

// Attach puts a detached mount at dir in the caller's mount namespace. What is mounted there
// already is covered. It returns an *os.PathError for a dir that is not there or no directory.
func Attach(mount *os.File, dir string) error {
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "mount at", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(at) }()
	if err := unix.MoveMount(int(mount.Fd()), "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		if errors.Is(err, unix.EPERM) {
			err = errors.Join(ErrPermission, err)
		}
		return &os.PathError{Op: "mount at", Path: dir, Err: err}
	}
	return nil
}

// Unmount takes the topmost mount off dir in the caller's mount namespace. A mount with open
// files or processes in it stays, and the error answers to ErrBusy; with lazy it disappears
// from the tree at once and ends with its last user.
func Unmount(dir string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(dir, flags)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: %w", ErrPermission, err)
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("not a mount point: %w", err)
	}
	return &os.PathError{Op: "unmount", Path: dir, Err: err}
}

// Real returns the absolute path of the directory dir, without symbolic links, in the caller's mount namespace; dir itself, made absolute, where
// the kernel has none, as for a directory outside of the caller's root. It asks no server of a FUSE mount for anything.
func Real(dir string) (string, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "look at", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil || !filepath.IsAbs(real) {
		return filepath.Abs(dir)
	}
	return real, nil
}

// DeviceOf returns st_dev of what dir shows in the caller's mount namespace, and whether dir
// is on an EROFS at all. It opens no file, and asks no server of a FUSE mount for anything: it may be stopped.
func DeviceOf(dir string) (device uint64, isEROFS bool, err error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, false, &os.PathError{Op: "look at", Path: dir, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Statx_t
	// The device is there with any mask; statfs(2), which has the type, always asks.
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return 0, false, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		found := uint32(m.Major) == st.Dev_major && uint32(m.Minor) == st.Dev_minor //nolint:gosec // numbers of devices
		return !found, found
	})
	if err != nil {
		return 0, false, fmt.Errorf("mounts: %w", err)
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), len(mounts) == 1 && mounts[0].FSType == "erofs", nil
}

// explain adds what a bare errno means here; the errno stays reachable.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("EROFS: %w", errors.Join(ErrUnsupported, err))
	case errors.Is(err, unix.ENOTBLK):
		return fmt.Errorf("EROFS from plain files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE): %w", errors.Join(ErrUnsupported, err))
	case errors.Is(err, unix.EPERM):
		return errors.Join(ErrPermission, err)
	}
	return err
}

// kernelLog returns what the kernel has to say about a filesystem context, or nil: one
// message per read (fs/fsopen.c fscontext_read).
func kernelLog(fs int) error {
	var lines []string
	buf := make([]byte, 4096)
	for len(lines) < 16 {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[:n])))
	}
	if len(lines) == 0 {
		return nil
	}
	return errors.New("kernel: " + strings.Join(lines, "; "))
}

// Probe returns nil when the kernel has EROFS and mounts it from plain files, as far as that
// can be told: dir is where a small file may be put for a moment. Otherwise the error answers to
// ErrUnsupported or ErrPermission and names what is missing.
func Probe(dir string) error {
	// A file of zeros is no EROFS image: a kernel that reads it says EINVAL, one that takes
	// block devices only says ENOTBLK before.
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	name, err := filepath.Abs(f.Name())
	if err = errors.Join(err, f.Truncate(1<<14), f.Close()); err != nil {
		return err
	}
	fd, err := mount(Options{Bootstrap: name})
	switch {
	case err == nil:
		return unix.Close(fd)
	case errors.Is(err, ErrUnsupported), errors.Is(err, ErrPermission):
		return err
	case errors.Is(err, unix.EINVAL):
		return nil
	}
	return fmt.Errorf("probe EROFS: %w", err)
}
