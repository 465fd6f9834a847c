package fuse

import (
	"encoding/binary"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Operations. Source: include/uapi/linux/fuse.h enum fuse_opcode.
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opReadlink    = 5
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opGetxattr    = 22
	opListxattr   = 23
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opDestroy     = 38
	opNotifyReply = 41
	opBatchForget = 42
	opReaddirplus = 44
)

// What INIT says.
const (
	major    = 7
	minMinor = 31 // Linux 5.4
	ourMinor = 38 // fuse_init_out has had its 64 bytes since 23
	maxWrite = 4096
	// maxRead is the most that one request asks for: with it the pipe that it goes through is of the size that the
	// kernel's default limit allows (pipe-max-size, 1 MiB).
	maxRead = 512 << 10
	// background is how many reads through its cache the kernel sends at once; its own number is 12. Behind as many that wait for data, those of
	// data that is there would wait too (fs/fuse/dev.c fuse_get_req), so it is large; there are more slots. From congested on, the kernel
	// reads nothing ahead that nobody waits for.
	background = 1024
	congested  = background / 4

	wanted = fuse.CAP_ASYNC_READ | fuse.CAP_EXPORT_SUPPORT | fuse.CAP_READDIRPLUS | fuse.CAP_READDIRPLUS_AUTO | fuse.CAP_ASYNC_DIO |
		fuse.CAP_NO_OPEN_SUPPORT | fuse.CAP_PARALLEL_DIROPS | fuse.CAP_MAX_PAGES | fuse.CAP_CACHE_SYMLINKS | fuse.CAP_NO_OPENDIR_SUPPORT |
		fuse.CAP_EXPLICIT_INVAL_DATA | fuse.CAP_INIT_EXT
)

// Sizes in bytes.
const (
	sizeOutHeader = int(unsafe.Sizeof(fuse.OutHeader{}))
	sizeInHeader  = int(unsafe.Sizeof(fuse.InHeader{}))
	sizeReadIn    = int(unsafe.Sizeof(fuse.ReadIn{}))
)

// view returns p as a T; nil when p is too short. p begins at a multiple of 8 bytes.
func view[T any](p []byte) *T {
	if len(p) < int(unsafe.Sizeof(*new(T))) {
		return nil
	}
	return (*T)(unsafe.Pointer(&p[0]))
}

// raw returns the bytes of v.
func raw[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), int(unsafe.Sizeof(*v)))
}

// word returns the first word of p.
func word(p []byte) uint64 { return binary.NativeEndian.Uint64(p) }

// putHeader writes the header of an answer of n bytes in all.
func putHeader(p []byte, unique uint64, errno int32, n int) {
	binary.NativeEndian.PutUint32(p, uint32(n))          //nolint:gosec // at most maxRead and a header
	binary.NativeEndian.PutUint32(p[4:], uint32(-errno)) //nolint:gosec // the same bits
	binary.NativeEndian.PutUint64(p[8:], unique)
}
