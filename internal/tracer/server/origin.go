package server

import (
	"errors"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// whence tells where a file's content comes from.
type whence uint8

const (
	unknown whence = iota
	image          // it was there before the run, or is a changed copy of what was
	made           // it was made during the run, in the writable layer
)

// origin tells files of the image from files that the run made.
type origin struct {
	t       *target
	handles bool // overlay file handles tell the layer
	handle  fileHandle
}

// fileHandle is struct file_handle with room for the largest handle. unix.NameToHandleAt
// asks twice and allocates, which counts here: it is done for every file.
// Source: include/linux/fs.h struct file_handle; MAX_HANDLE_SZ in fcntl.h.
type fileHandle struct {
	size  uint32 // handle_bytes
	kind  int32  // handle_type
	bytes [maxHandleSize]byte
}

const maxHandleSize = 128

// of returns the handle of an open file; the bytes are valid until the next call.
func (h *fileHandle) of(fd int) (int32, []byte, syscall.Errno) {
	h.size = maxHandleSize
	var mount int32
	empty := [1]byte{}
	_, _, errno := unix.Syscall6(unix.SYS_NAME_TO_HANDLE_AT, uintptr(fd), uintptr(unsafe.Pointer(&empty)),
		uintptr(unsafe.Pointer(h)), uintptr(unsafe.Pointer(&mount)), unix.AT_EMPTY_PATH|atHandleFID, 0)
	if errno != 0 {
		return 0, nil, errno
	}
	return h.kind, h.bytes[:min(h.size, maxHandleSize)], 0
}

func newOrigin(t *target) *origin { return &origin{t: t, handles: t.overlay()} }

// fileTime is the time by which the kernel dates the files that are made from then on: that of its last tick, up to 10 ms
// behind the clock. Source: kernel/time/timekeeping.c ktime_get_coarse_real_ts64, fs/inode.c current_time.
func fileTime() time.Time {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &ts) // never fails
	return time.Unix(ts.Unix())
}

// of returns where the open file fd, with status st, comes from.
func (o *origin) of(fd int, st *unix.Statx_t, armed time.Time) whence {
	if o.t.overlay() {
		if o.handles {
			return o.ofHandle(fd)
		}
		return unknown
	}
	if st.Mask&unix.STATX_BTIME == 0 {
		return unknown
	}
	if !time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).Before(armed) {
		return made
	}
	return image
}

// madeSince reports whether the run, which began at armed, made the open file fd of an overlay, with status
// st, as far as its handle tells. A file that is older costs no system call: the run neither made nor
// changed it.
func (o *origin) madeSince(fd int, st *unix.Statx_t, armed time.Time) bool {
	if st.Mask&unix.STATX_BTIME != 0 && time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).Before(armed) {
		return false
	}
	return o.handles && o.ofHandle(fd) == made
}

// ofHandle asks the overlay for the file's handle, which since Linux 6.6 can be had for
// every file and says whether the file has a lower layer behind it, deleted or not,
// copied up or not. Source: fs/overlayfs/export.c ovl_check_encode_origin.
func (o *origin) ofHandle(fd int) whence {
	kind, b, errno := o.handle.of(fd)
	if errno != 0 {
		if errno == unix.EOPNOTSUPP || errno == unix.EINVAL {
			o.handles = false
		}
		return unknown
	}
	upper, ok := overlayUpper(kind, b)
	switch {
	case !ok:
		return unknown
	case upper:
		return made
	}
	return image
}

// atHandleFID asks for a handle that identifies a file and need not open it.
// Source: include/uapi/linux/fcntl.h AT_HANDLE_FID (Linux 6.5).
const atHandleFID = 0x200

// The overlay's file handles. Source: fs/overlayfs/overlayfs.h.
const (
	ovlFileIDV0   = 0xfb // OVL_FILEID_V0: struct ovl_fb
	ovlFileIDV1   = 0xf8 // OVL_FILEID_V1: 3 bytes of padding, then struct ovl_fb
	ovlPadding    = 3
	ovlMagic      = 0xfb // OVL_FH_MAGIC
	ovlOffMagic   = 1    // ovl_fb: version u8, magic u8, len u8, flags u8, type u8, uuid [16]u8, fid
	ovlOffFlags   = 3
	ovlHeaderSize = 5 + 16
	ovlPathUpper  = 1 << 2 // OVL_FH_FLAG_PATH_UPPER
)

// overlayUpper reports whether a file handle of an overlay is that of a file which is in
// the writable layer only; ok is false when b is no such handle.
func overlayUpper(kind int32, b []byte) (upper, ok bool) {
	switch kind {
	case ovlFileIDV0:
	case ovlFileIDV1:
		b = b[min(ovlPadding, len(b)):]
	default:
		return false, false
	}
	if len(b) < ovlHeaderSize || b[0] != 0 || b[ovlOffMagic] != ovlMagic {
		return false, false
	}
	return b[ovlOffFlags]&ovlPathUpper != 0, true
}

// madeAt answers for a file at path p of an overlay whose handles tell nothing: it was
// made during the run if the writable layer has it and does not say what it was copied
// from, or if it is gone from the merged tree and left no whiteout.
func (o *origin) madeAt(p string) bool {
	if o.t.upper < 0 {
		return false
	}
	var st unix.Stat_t
	err := unix.Fstatat(o.t.upper, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		missing := unix.Fstatat(o.t.view, p[1:], &st, unix.AT_SYMLINK_NOFOLLOW)
		return errors.Is(err, unix.ENOENT) && errors.Is(missing, unix.ENOENT)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false // a whiteout: the image had the file
	}
	fd, err := o.t.openRegular(o.t.upper, p)
	if err != nil {
		return false
	}
	_, trusted := unix.Fgetxattr(fd, "trusted.overlay.origin", nil)
	_, user := unix.Fgetxattr(fd, "user.overlay.origin", nil)
	if unix.Close(fd) != nil {
		return false
	}
	return errors.Is(trusted, unix.ENODATA) && user != nil
}
