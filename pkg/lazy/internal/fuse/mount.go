package fuse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Errors of this package; all answer to errors.Is.
var (
	// ErrUnsupported: the kernel has no FUSE, or an old one.
	ErrUnsupported = errors.New("not supported by this kernel")
	// ErrPermission: CAP_SYS_ADMIN is missing.
	ErrPermission = errors.New("mounting needs CAP_SYS_ADMIN")
)

// subtype is what mountinfo shows behind "fuse.".
const subtype = "headstart"

// Open returns a descriptor for a new connection. The caller closes it, which ends the connection when nobody else keeps it.
func Open() (*os.File, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		err = errors.Join(ErrUnsupported, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		err = errors.Join(ErrPermission, err)
	}
	if err != nil {
		return nil, fmt.Errorf("FUSE (CONFIG_FUSE_FS, a device /dev/fuse): %w", err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// Probe returns nil when FUSE mounts can be made, as far as that can be told without one; ErrUnsupported or ErrPermission when not.
func Probe() error {
	dev, err := Open()
	if err != nil {
		return err
	}
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err == nil {
		err = unix.Close(fs)
	}
	return errors.Join(explain(err), dev.Close())
}

func explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		err = errors.Join(ErrUnsupported, err)
	case errors.Is(err, unix.EPERM):
		err = errors.Join(ErrPermission, err)
	}
	return fmt.Errorf("mount FUSE (Linux 5.4): %w", err)
}

// Detached is a mount that is attached nowhere. Not safe for concurrent use.
type Detached struct {
	// Device is st_dev of the files on the mount, BDI the name of its backing device in /sys/class/bdi, and BDIInode that entry's inode number,
	// which tells it from later ones of the same name.
	Device   uint64
	BDI      string
	BDIInode uint64

	file *os.File
}

// Options says what a mount looks like.
type Options struct {
	// Source is what mountinfo shows; at most 255 bytes of it.
	Source string
}

// New makes a superblock of the connection dev, and a mount of it: read-only, open to all users by the modes, owners and ACLs of the files, with
// devices and set-user-ID programs, as the root of a container has them. The caller closes it, and has a [Server] run on dev before it
// calls [Detached.Identify] or touches the mount. ErrUnsupported and ErrPermission where they apply.
func New(dev *os.File, o Options) (*Detached, error) {
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, explain(err)
	}
	defer func() { _ = unix.Close(fs) }()
	for _, kv := range [][2]string{
		{"source", o.Source[:min(len(o.Source), 255)]},
		{"subtype", subtype},
		{"fd", strconv.Itoa(int(dev.Fd()))},
		{"rootmode", "40000"},
		{"user_id", "0"},
		{"group_id", "0"},
		{"max_read", strconv.Itoa(maxRead)},
	} {
		if kv[1] == "" {
			continue
		}
		if err := unix.FsconfigSetString(fs, kv[0], kv[1]); err != nil {
			return nil, explain(fmt.Errorf("set %s to %s: %w", kv[0], kv[1], err))
		}
	}
	for _, flag := range []string{"ro", "allow_other", "default_permissions"} {
		if err := unix.FsconfigSetFlag(fs, flag); err != nil {
			return nil, explain(fmt.Errorf("set %s: %w", flag, err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, explain(err)
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, explain(err)
	}
	return &Detached{file: os.NewFile(uintptr(mnt), "fuse mount")}, nil
}

// Identify fills in Device and BDI. It asks nobody: a process that is killed while it waits for an answer of its own does not end, since the
// wait for a request that was read cannot be interrupted (fs/fuse/dev.c request_wait_answer), and whoever keeps the connection keeps it waiting.
func (d *Detached) Identify() error {
	var st unix.Statx_t
	var bdi unix.Stat_t
	if err := unix.Statx(int(d.file.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		return fmt.Errorf("stat FUSE mount: %w", err)
	}
	d.Device = unix.Mkdev(st.Dev_major, st.Dev_minor)
	d.BDI = fmt.Sprintf("%d:%d", st.Dev_major, st.Dev_minor) // fs/fuse/inode.c fuse_bdi_init
	if err := unix.Lstat(filepath.Join(bdiDir, d.BDI), &bdi); err != nil {
		return fmt.Errorf("backing device of the FUSE mount: %w", &os.PathError{Op: "stat", Path: filepath.Join(bdiDir, d.BDI), Err: err})
	}
	d.BDIInode = bdi.Ino
	return nil
}

const bdiDir = "/sys/class/bdi"

// Alive reports whether the superblock with this backing device still exists: it is mounted
// somewhere, or somebody has a file of it open. Both must be of this boot.
func Alive(bdi string, inode uint64) (bool, error) {
	var st unix.Stat_t
	err := unix.Lstat(filepath.Join(bdiDir, bdi), &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil && st.Ino == inode, err
}

// File returns the mount's descriptor; it is the Detached's.
func (d *Detached) File() *os.File { return d.file }

// Close closes the descriptor: a mount that was not attached ends with it, one that was stays. Later calls return nil.
func (d *Detached) Close() error {
	if d.file == nil {
		return nil
	}
	err := d.file.Close()
	d.file = nil
	return err
}
