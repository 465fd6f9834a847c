package tracer_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestUnseen holds that files of which bytes come in ways that leave no event of the run are listed all the same, and
// complete where their bytes come in other ways too. What the kernel tells of those ways it logs: README.md, Limits,
// says that it is nothing.
func TestUnseen(t *testing.T) {
	page := int64(os.Getpagesize())
	ways := []string{"advise", "readahead", "direct", "pread"}
	if allowed := uringAllowed(); allowed == nil {
		ways = append(ways, "uring", "uringasync", "uringpoll")
	} else {
		t.Logf("no io_uring here: %v", allowed)
	}
	for _, state := range []string{"warm", "cold"} {
		b := newDiskBox(t, "for f in "+strings.Join(ways, " ")+"; do head -c 200000 /dev/urandom > s/$f; done; sync")
		args := []string{"/program", "ranges"}
		for _, way := range ways {
			args = append(args, fmt.Sprintf("%s:/s/%s:%d:%d", way, way, 4*page, 2*page), fmt.Sprintf("pread:/s/%s:%d:1", way, 20*page))
			if state == "cold" {
				if err := unix.Fadvise(fdOf(t, b.lower+"/s/"+way), 0, 0, unix.FADV_DONTNEED); err != nil {
					t.Fatal(err)
				}
			}
		}
		r := b.record(t, pivot, args...)
		for _, way := range ways {
			a, ok := find(r, "/s/"+way)
			if !ok || a.How != trace.Opened|trace.Read {
				t.Errorf("%s, %s: %+v, listed %v", state, way, a, ok)
				continue
			}
			lower, upper := bounds(t, r, a.Path, a.Size)
			if !lower[20] || way == "pread" && (len(lower) != 3 || len(upper) != 3) {
				t.Errorf("%s, %s: ranges %+v", state, way, a.Ranges)
			}
			if way != "pread" {
				t.Logf("%s, %s of pages 4 and 5: told %t and %t", state, way, upper[4], upper[5])
			}
		}
	}
}

// uringAllowed returns why this kernel refuses io_uring, if it does.
func uringAllowed() error {
	var params [120]byte // struct io_uring_params
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	return unix.Close(int(fd))
}
