package fuse

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Inodes of fakeImage, level by level.
const (
	fakeRoot = 1 + iota
	fakeDir
	fakeFile
	fakeLink
	fakeOdd
	fakeInner
)

const (
	fakeUnit = 64 << 10
	fakeSize = 1<<20 + 77 // of fakeFile
)

// fakeImage has a file of one blob, one whose chunks are nowhere, a link, a directory and xattrs.
func fakeImage() *rafs.Image {
	file := &rafs.Inode{Mode: modeFile | 0o644, Size: fakeSize, Xattrs: []rafs.Xattr{{Name: "user.a", Value: []byte("value")}, {Name: "trusted.b", Value: make([]byte, 300)}}}
	for off := uint64(0); off < fakeSize; off += fakeUnit {
		file.Chunks = append(file.Chunks, rafs.Chunk{Index: uint32(off / fakeUnit), UncompressedOffset: off, UncompressedSize: uint32(min(fakeUnit, fakeSize-off))})
	}
	inner := &rafs.Inode{Mode: modeFile | 0o600, Size: 10, Chunks: []rafs.Chunk{{UncompressedOffset: 4096, UncompressedSize: 10}}}
	odd := &rafs.Inode{Mode: modeFile | 0o600, Size: 1 << 62, Chunks: []rafs.Chunk{{Blob: 9, UncompressedSize: 1}, {}}}
	dir := &rafs.Inode{Mode: 0o040755, Children: []rafs.Dirent{{Name: "inner", Inode: inner}}}
	link := &rafs.Inode{Mode: modeLink | 0o777, Target: "d/inner", Size: 7}
	return &rafs.Image{ChunkSize: fakeUnit, Root: &rafs.Inode{Mode: 0o040755, Children: []rafs.Dirent{{Name: "d", Inode: dir}, {Name: "file", Inode: file}, {Name: "link", Inode: link}, {Name: "odd", Inode: odd}}}}
}

// fakeBlob has everything, but what is beyond missing, which nobody can fetch.
type fakeBlob struct {
	file    *os.File
	missing int64
}

func (b *fakeBlob) File() *os.File { return b.file }

func (b *fakeBlob) ReadyRange(off, n int64) bool { return off+n <= b.missing }

func (b *fakeBlob) Ensure(context.Context, int64, int64) error { return errors.New("nobody has it") }

// fakeByte is what the file has at off.
func fakeByte(off int64) byte { return byte(off>>12) ^ byte(off) }

// newFake returns a server of fakeImage whose requests come from the other end of the device fd.
func newFake(t testing.TB, fd int) *Server {
	t.Helper()
	p := make([]byte, fakeSize)
	for i := range p {
		p[i] = fakeByte(int64(i))
	}
	name := filepath.Join(t.TempDir(), "cache")
	if err := os.WriteFile(name, p, 0o600); err != nil {
		t.Fatal(err)
	}
	cache, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	table, err := NewTable()
	if err != nil {
		t.Fatal(err)
	}
	tree, err := NewTree(fakeImage())
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewServer(Config{Device: os.NewFile(uintptr(fd), "device"), Table: table, Tree: tree, Blobs: []Blob{&fakeBlob{cache, 1 << 20}}})
	if err != nil {
		t.Fatal(err)
	}
	s.ready.fd = fd
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		<-s.Ended()
		if err := errors.Join(s.c.Device.Close(), table.Close(), cache.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// pair returns two sockets that keep messages apart, as /dev/fuse does, and take large ones.
func pair(t testing.TB) (fd, kernel int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20); err != nil && unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20) != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Close(fds[1]); err != nil {
			t.Error(err)
		}
	})
	return fds[0], fds[1]
}

// request returns the bytes of a request.
func request(op uint32, unique, node uint64, body []byte) []byte {
	h := fuse.InHeader{Length: uint32(sizeInHeader + len(body)), Opcode: op, Unique: unique, NodeId: node}
	return append(append([]byte(nil), raw(&h)...), body...)
}

// readBody is what follows the header of a READ, a READDIR and a READDIRPLUS.
func readBody(off uint64, size uint32) []byte {
	in := fuse.ReadIn{Offset: off, Size: size}
	return append([]byte(nil), raw(&in)[sizeInHeader:]...)
}

// answered returns the answer that the kernel would see, nil when there is none.
func answered(t testing.TB, kernel int, wait bool) []byte {
	t.Helper()
	p := make([]byte, maxRead+blockSize)
	flags := unix.MSG_TRUNC
	if !wait {
		flags |= unix.MSG_DONTWAIT
	}
	n, _, err := unix.Recvfrom(kernel, p, flags)
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	if err != nil || n < sizeOutHeader || n > len(p) {
		t.Fatalf("answer of %d bytes, %v", n, err)
	}
	if said := binary.NativeEndian.Uint32(p); int(said) != n {
		t.Fatalf("an answer of %d bytes says that it has %d", n, said)
	}
	return p[:n]
}

// errnoOf returns the errno of an answer; negative: it is none.
func errnoOf(answer []byte) int {
	return -int(int32(binary.NativeEndian.Uint32(answer[4:])))
}

// sound returns what is wrong with an answer.
func sound(request, answer []byte) error {
	h, errno := view[fuse.InHeader](request), errnoOf(answer)
	if unique := binary.NativeEndian.Uint64(answer[8:]); unique != h.Unique {
		return fmt.Errorf("answer to %d, want to %d", unique, h.Unique)
	}
	if errno < 0 || errno >= 512 || errno != 0 && len(answer) != sizeOutHeader {
		return fmt.Errorf("errno %d with %d bytes", errno, len(answer)) // include/linux/errno.h: 512 and above is the kernel's own
	}
	data := answer[sizeOutHeader:]
	switch h.Opcode {
	case opRead, opReaddir, opReaddirplus:
		q := view[fuse.ReadIn](request)
		if q == nil {
			if errno != int(unix.EINVAL) && errno != int(unix.ESTALE) {
				return fmt.Errorf("a short request is answered with errno %d", errno)
			}
			return nil
		}
		if len(data) > int(q.Size) {
			return fmt.Errorf("%d bytes, asked for %d", len(data), q.Size)
		}
		if h.Opcode != opRead || errno != 0 {
			return nil
		}
		if want := min(uint64(q.Size), fakeSize-min(q.Offset, fakeSize)); h.NodeId == fakeFile && uint64(len(data)) != want {
			return fmt.Errorf("%d bytes at %d, want %d of %d", len(data), q.Offset, want, q.Size)
		}
		for i, b := range data {
			if h.NodeId == fakeFile && b != fakeByte(int64(q.Offset)+int64(i)) {
				return fmt.Errorf("byte %d at %d is %#x", i, q.Offset, b)
			}
		}
	case opGetxattr, opListxattr:
		if q := view[fuse.GetXAttrIn](request); q != nil && q.Size != 0 && len(data) > int(q.Size) {
			return fmt.Errorf("%d bytes, room for %d", len(data), q.Size)
		}
	case opForget, opBatchForget, opNotifyReply:
		return errors.New("an answer to what has none")
	}
	return nil
}
