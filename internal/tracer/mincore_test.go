package tracer_test

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mincore asks which pages of a mapping are in memory; vec has a byte for each page.
func mincore(b, vec []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
