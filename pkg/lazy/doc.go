// Package lazy mounts Nydus images before their data is there: RAFS v6 in the kernel, v5 behind FUSE.
//
// An image's bootstrap is mounted as EROFS over cache files, one for each blob, that are filled
// when somebody reads what they do not have yet: the kernel tells of every such read before it takes
// place and waits for an answer (pre-content events of fanotify). The prefetch blob is fetched at
// once, in order; the rest by policy. When all of an image is local, nothing of this package
// is in the way of its readers any more.
//
// Five terms. The daemon, one for each state directory, answers the kernel; [RunDaemon]. The holder is a
// small process that keeps the daemon's descriptors and starts it again when it dies; [RunHolder]. There is a second one, the spare, for when both die at once.
// A [Client] asks the daemon, which it starts when there is none. A [Mount] is one superblock of the kernel,
// known by its Device, st_dev of its files; it ends when nobody has it mounted or has its files open.
// The state directory keeps what was fetched.
//
//	c, err := lazy.NewClient(lazy.ClientOptions{})
//	m, err := c.Mount(ctx, "/mnt", lazy.Request{Reference: "registry.example/app:v1"})
//	…
//	err = c.Unmount(ctx, "/mnt", false)
//
// A mount outlives the process that asked for it, and the daemon's death: readers wait until
// the daemon is there again. Credentials are never stored: the daemon reads the files that a
// [Request] names, whenever it needs them.
//
// Where that is not possible, and for RAFS v5, a mount is served behind FUSE, from the same cache files: see [Driver].
//
// Limits: EROFS takes Linux 6.14 with CONFIG_EROFS_FS_BACKED_BY_FILE and CONFIG_FANOTIFY_ACCESS_PERMISSIONS, CAP_SYS_ADMIN, a state
// directory on a file system with pre-content events (ext4, XFS, btrfs). O_DIRECT is EINVAL on the mount. When daemon,
// holder and spare die in the same moment, what is not local yet reads as zeros until the next daemon starts, from then on as EIO.
// FUSE takes Linux 5.4 and CAP_SYS_ADMIN; when all die, reads are ENOTCONN.
package lazy
