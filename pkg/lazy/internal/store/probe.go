package store

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
)

// Probe returns nil when files below dir, which must exist, can be the devices of lazy
// mounts: the kernel has pre-content events, and the file system takes part in them.
// fanotify.ErrUnsupported when not, fanotify.ErrPermission without CAP_SYS_ADMIN; then nothing is
// known. It leaves nothing behind.
func Probe(dir string) (err error) {
	if err := fanotify.Probe(fanotify.FeaturePreAccess); err != nil {
		return fmt.Errorf("lazy mounts: %w", err)
	}
	f, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	g, err := fanotify.New(fanotify.Options{PreContent: true})
	if err != nil {
		return fmt.Errorf("lazy mounts: %w", err)
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	err = g.Mark(fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(f.Fd())})
	if errors.Is(err, fanotify.ErrUnsupported) {
		return fmt.Errorf("state directory %s is on %s, whose files raise no pre-content events: put it on ext4, xfs or btrfs: %w",
			dir, fileSystem(f), fanotify.ErrUnsupported)
	}
	return err
}

// fileSystem names the file system of f. Source of the numbers: include/uapi/linux/magic.h.
func fileSystem(f *os.File) string {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return "an unknown file system"
	}
	names := map[int64]string{
		unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.EXT4_SUPER_MAGIC: "ext4",
		unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.NFS_SUPER_MAGIC: "NFS",
		unix.FUSE_SUPER_MAGIC: "FUSE", unix.F2FS_SUPER_MAGIC: "f2fs", unix.RAMFS_MAGIC: "ramfs",
	}
	if name, ok := names[int64(st.Type)]; ok { //nolint:unconvert // its type depends on the architecture
		return name
	}
	return fmt.Sprintf("a file system of type %#x", st.Type)
}
