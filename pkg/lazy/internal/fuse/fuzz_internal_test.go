package fuse

import (
	"slices"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// FuzzRequest has the server answer any bytes as a request, as they lie in an inbox: it answers once, if at all, with what the kernel takes,
// and of the file's bytes no others than those that were asked for.
func FuzzRequest(f *testing.F) {
	for op := uint32(0); op <= 52; op++ {
		f.Add(request(op, 7, fakeFile, readBody(4096, 8192)))
		f.Add(request(op, 7, fakeRoot, readBody(1, 200)))
	}
	for _, name := range []string{"file", "d", "..", ".", "none", "", "a/b"} {
		f.Add(request(opLookup, 1, fakeRoot, append([]byte(name), 0)))
	}
	f.Add(request(opRead, 1, fakeFile, readBody(0, 1<<32-1)))
	f.Add(request(opRead, 1, fakeFile, readBody(fakeSize-1, 4096)))
	f.Add(request(opRead, 1, fakeOdd, readBody(1<<61, 4096)))
	f.Add(request(opRead, 1, fakeInner, readBody(0, 4096)))
	f.Add(request(opGetxattr, 1, fakeFile, append([]byte{0, 1, 0, 0, 0, 0, 0, 0}, "trusted.b\x00"...)))
	f.Add(request(opListxattr, 1, fakeFile, []byte{3, 0, 0, 0, 0, 0, 0, 0}))
	f.Add(request(opReadlink, 1, fakeLink, nil))
	f.Add([]byte("short"))
	fd, kernel := pair(f)
	s := newFake(f, fd)
	f.Fuzz(func(t *testing.T, p []byte) {
		p = p[:min(len(p), inboxBytes)]
		in := s.c.Table.inbox(0)[:len(p)]
		copy(in, p)
		if h := view[fuse.ReadIn](in); h != nil && h.Opcode == opRead && h.Size > copyLimit && h.Offset < fakeSize-copyLimit {
			t.Skip("goes through a pipe, which a socket has no room for") // see TestLargeReads
		}
		before := slices.Clone(in)
		if !(&reader{s: s}).handle(in) {
			t.Fatal("the server says that it stops")
		}
		s.fetches.Wait()
		answer := answered(t, kernel, false)
		h := view[fuse.InHeader](before)
		if h == nil {
			if answer != nil {
				t.Errorf("%d bytes to what is no request", len(answer))
			}
			return
		}
		none := slices.Contains([]uint32{opForget, opBatchForget, opNotifyReply}, h.Opcode)
		if none != (answer == nil) {
			t.Errorf("operation %d: %d bytes of an answer", h.Opcode, len(answer))
		}
		if answer != nil {
			if err := sound(before, answer); err != nil {
				t.Errorf("operation %d of inode %d: %v", h.Opcode, h.NodeId, err)
			}
			if more := answered(t, kernel, false); more != nil {
				t.Errorf("operation %d is answered twice", h.Opcode)
			}
		}
		if s.c.Table.Pending() != 0 {
			t.Errorf("operation %d stays pending", h.Opcode)
		}
	})
}

// A READ of more than was agreed on is an error where there is more, as what is less would be the end of the file; at the end of the file it is none.
func TestLongReads(t *testing.T) {
	fd, kernel := pair(t)
	s := newFake(t, fd)
	for _, c := range []struct {
		node, off uint64
		size      uint32
		errno     unix.Errno
		n         int
	}{
		{fakeFile, 0, maxRead + 1, unix.EIO, 0},
		{fakeFile, 0, 1<<32 - 1, unix.EIO, 0},
		{fakeFile, fakeSize - maxRead - 1, maxRead + 1, unix.EIO, 0},
		{fakeFile, 1<<20 - 10, 1 << 31, unix.EIO, 0}, // nobody has the end
		{fakeFile, 1<<20 - 10, 10, 0, 10},
		{fakeFile, fakeSize, 1<<32 - 1, 0, 0},
		{fakeFile, 1 << 62, 4096, 0, 0},
		{fakeFile, 1<<62 + 1, 4096, unix.EINVAL, 0},
		{fakeInner, 3, 1<<32 - 1, 0, 7},
		{fakeDir, 0, 4096, unix.EISDIR, 0},
		{fakeLink, 0, 4096, unix.EINVAL, 0},
		{fakeOdd, 0, 4096, unix.EIO, 0},
		{99, 0, 4096, unix.ESTALE, 0},
		{0, 0, 4096, unix.ESTALE, 0},
	} {
		p := request(opRead, 5, c.node, readBody(c.off, c.size))
		in := s.c.Table.inbox(0)[:len(p)]
		copy(in, p)
		(&reader{s: s}).handle(in)
		s.fetches.Wait()
		answer := answered(t, kernel, false)
		if answer == nil || errnoOf(answer) != int(c.errno) || len(answer) != sizeOutHeader+c.n {
			t.Errorf("READ of %d bytes at %d of inode %d = %d bytes, errno %d; want %d, %d", c.size, c.off, c.node, len(answer)-sizeOutHeader, errnoOf(answer), c.n, c.errno)
		}
	}
}
