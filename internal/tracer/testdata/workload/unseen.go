package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// advise asks the kernel for bytes without reading them, or reads them past the page cache.
func advise(how string, fd int, off int64, size int) (int, error) {
	switch how {
	case "advise":
		return size, unix.Fadvise(fd, off, int64(size), unix.FADV_WILLNEED)
	case "readahead":
		_, _, errno := unix.Syscall(unix.SYS_READAHEAD, uintptr(fd), uintptr(off), uintptr(size))
		if errno != 0 {
			return 0, errno
		}
		return size, nil
	}
	// What direct I/O reads is aligned: the pages that the bytes are in.
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return 0, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT); err != nil {
		return 0, err
	}
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, err
	}
	n, err := unix.Pread(fd, buf, off)
	return n, errors.Join(err, unix.Munmap(buf))
}

// Source of what follows: include/uapi/linux/io_uring.h.
const (
	setupSQPoll    = 1 << 1
	opRead         = 22
	flagAsync      = 1 << 4
	enterGetEvents = 1 << 0
	enterWakeup    = 1 << 1
	offCQRing      = 0x8000000
	offSQEs        = 0x10000000
	sizeSQE        = 64
	sizeParams     = 120
)

// uring reads by io_uring: as the kernel likes ("uring"), by one of its worker threads ("uringasync"), or by
// its thread that looks for requests ("uringpoll").
func uring(how string, fd int, off int64, buf []byte) (n int, err error) {
	var params [sizeParams]byte
	le := binary.NativeEndian
	if how == "uringpoll" {
		le.PutUint32(params[8:], setupSQPoll)
		le.PutUint32(params[16:], 50) // milliseconds until that thread sleeps
	}
	r, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("io_uring_setup: %w", errno)
	}
	ring := int(r)
	defer func() { err = errors.Join(err, unix.Close(ring)) }()
	// The offsets of the rings' fields begin at byte 40, those of the completions at byte 80.
	sqTail, sqArray := le.Uint32(params[44:]), le.Uint32(params[64:])
	cqEntries, cqes := le.Uint32(params[4:]), le.Uint32(params[100:])
	sq, err := unix.Mmap(ring, 0, int(sqArray)+4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	cq, err := unix.Mmap(ring, offCQRing, int(cqes+16*cqEntries), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	sqe, err := unix.Mmap(ring, offSQEs, sizeSQE, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	var pin runtime.Pinner
	pin.Pin(&buf[0])
	defer pin.Unpin()
	sqe[0] = opRead
	if how == "uringasync" {
		sqe[1] = flagAsync
	}
	le.PutUint32(sqe[4:], uint32(fd))
	le.PutUint64(sqe[8:], uint64(off))
	le.PutUint64(sqe[16:], uint64(uintptr(unsafe.Pointer(&buf[0]))))
	le.PutUint32(sqe[24:], uint32(len(buf)))
	le.PutUint32(sq[sqArray:], 0)
	le.PutUint32(sq[sqTail:], 1) // one thread, and the system call is a barrier
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(ring), 1, 1, enterGetEvents|enterWakeup, 0, 0); errno != 0 {
		return 0, fmt.Errorf("io_uring_enter: %w", errno)
	}
	res := int32(le.Uint32(cq[cqes+8:]))
	if res < 0 {
		return 0, fmt.Errorf("read by io_uring: %w", unix.Errno(-res))
	}
	return int(res), errors.Join(unix.Munmap(sq), unix.Munmap(cq), unix.Munmap(sqe))
}
