package fuse

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/splice"
	"golang.org/x/sys/unix"
)

// pipesOpen counts the process' descriptors of pipes.
func pipesOpen(t *testing.T) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

// As many pipes as were in use at once wait for the next answers, until they were not used for long enough; then all are closed.
func TestPipes(t *testing.T) {
	if err := OpenPipes(); err != nil { // what was done already is done
		t.Fatal(err)
	}
	ClosePipes(0)
	const many = 5
	before := pipesOpen(t)
	used := make([]*splice.Pair, many)
	for i := range used {
		var err error
		if used[i], err = getPipe(); err != nil {
			t.Fatal(err)
		}
	}
	for i, pipe := range used {
		if i == 0 {
			splice.Drop(pipe) // what an answer failed in
			continue
		}
		putPipe(pipe)
	}
	const kept = 2 * (many - 1)
	ClosePipes(time.Hour)
	if got := pipesOpen(t) - before; got != kept {
		t.Errorf("%d ends of pipes are kept, want %d", got, kept)
	}
	pipe, err := getPipe()
	if err != nil {
		t.Fatal(err)
	}
	putPipe(pipe)
	if got := pipesOpen(t) - before; got != kept {
		t.Errorf("%d ends after one was used again, want %d", got, kept)
	}
	ClosePipes(0)
	if got := pipesOpen(t) - before; got != 0 {
		t.Errorf("%d ends are left", got)
	}
}

// Large reads are what the file has, through a pipe and, where there are none, by a copy.
func TestLargeReads(t *testing.T) {
	if err := OpenPipes(); err != nil {
		t.Fatal(err)
	}
	var device [2]int
	if err := unix.Pipe2(device[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	kernel := os.NewFile(uintptr(device[0]), "kernel")
	defer kernel.Close()
	if _, err := unix.FcntlInt(uintptr(device[1]), unix.F_SETPIPE_SZ, 1<<20); err != nil {
		t.Fatal(err)
	}
	s := newFake(t, device[1])
	for _, through := range []bool{true, false} {
		pipes.open.Store(through)
		for _, size := range []uint32{4096, copyLimit - 1, copyLimit, copyLimit + 1, 300_001, maxRead} {
			for _, off := range []uint64{0, 4096, 5, fakeUnit - 1, 1<<20 - uint64(size)} {
				t.Run(fmt.Sprintf("pipe %v, %d at %d", through, size, off), func(t *testing.T) {
					p := request(opRead, 11, fakeFile, readBody(off, size))
					in := s.c.Table.inbox(0)[:len(p)]
					copy(in, p)
					(&reader{s: s}).handle(in)
					answer := make([]byte, sizeOutHeader+int(size))
					if n, err := io.ReadFull(kernel, answer); err != nil {
						t.Fatalf("%d bytes, %v", n, err)
					}
					if err := sound(p, answer); err != nil || errnoOf(answer) != 0 {
						t.Errorf("errno %d, %v", errnoOf(answer), err)
					}
				})
			}
		}
	}
	pipes.open.Store(true)
	ClosePipes(0)
}
