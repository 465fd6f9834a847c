package lazy

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// talkers returns two connected stream sockets.
func talkers(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// framed returns v as it is on the wire.
func framed(t testing.TB, v any) []byte {
	t.Helper()
	p, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(p))), p...)
}

// hear sends p, with a descriptor if there is one, hangs up and returns whether a message was understood.
func hear(t *testing.T, p []byte, with *os.File, v any) bool {
	t.Helper()
	a, b := talkers(t)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	var rights []byte
	if with != nil {
		rights = unix.UnixRights(int(with.Fd()), int(with.Fd()))
	}
	_, _, err := a.WriteMsgUnix(p, rights, nil)
	if err = errors.Join(err, a.Close()); err != nil {
		t.Fatal(err)
	}
	f, err := readMessage(b, v)
	if err != nil && f != nil {
		t.Errorf("readMessage gives a file with error %v", err)
	}
	if f != nil {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	return err == nil
}

// same fails unless v is the same JSON again after it was read into again.
func same(t *testing.T, v, again any) {
	t.Helper()
	one, err := json.Marshal(v)
	if err == nil {
		err = json.Unmarshal(one, again)
	}
	two, err2 := json.Marshal(again)
	if err != nil || err2 != nil || !bytes.Equal(one, two) {
		t.Errorf("%s is %s when it is kept, %v, %v", one, two, err, err2)
	}
}

// FuzzMessage has daemon and client hear any bytes. What they understand stays the same, and no descriptor stays open.
func FuzzMessage(f *testing.F) {
	for _, v := range []any{
		call{Protocol: Protocol, Op: opMount, Dir: "/mnt", Request: &Request{Reference: "registry.test/a:b", Rate: 5}, Files: []fileID{{Path: "/etc", Dev: 1, Ino: 2}}},
		call{Protocol: Protocol, Op: opStatus, Detail: true},
		answer{Protocol: Protocol, Status: &Status{Mounts: []Mount{{ID: "a"}}}},
		failure(ErrFailed), failure(unix.ENOSPC),
		answer{Mount: &Mount{State: StateLazy, Misses: []Miss{{}}}},
	} {
		f.Add(framed(f, v), true)
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, '{', '}'}, true)
	f.Add([]byte{2, 0}, false)
	f.Fuzz(func(t *testing.T, p []byte, descriptor bool) {
		if len(p) == 0 || len(p) > 1<<16 {
			return // more waits for a reader
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		with := w
		if !descriptor {
			with = nil
		}
		var q call
		if hear(t, p, with, &q) {
			same(t, q, new(call))
			if q.Request != nil && q.Request.check() == nil {
				if _, err := q.Request.background(); err != nil || q.Request.readAhead(true) < 0 || q.Request.Rate < 0 {
					t.Errorf("request %+v passes: %v", q.Request, err)
				}
			}
		}
		var a answer
		if hear(t, p, with, &a) {
			same(t, a, new(answer))
			if err := a.err(); err != nil {
				first := failure(err)
				if second := failure(first.err()); second.Error != a.Error || !slices.Equal(second.Classes, first.Classes) {
					t.Errorf("%+v is told on as %+v", first, second)
				}
			}
		}
		if err := errors.Join(w.Close(), unix.SetNonblock(int(r.Fd()), true)); err != nil {
			t.Fatal(err)
		}
		// A pipe ends when nobody has its other end open.
		if n, err := unix.Read(int(r.Fd()), make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("a descriptor stays open: %d, %v", n, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}

// FuzzRecord reads any bytes as the record of a mount, as a daemon that takes over does.
func FuzzRecord(f *testing.F) {
	p, err := json.Marshal(record{ID: "a", Boot: "b", BDI: "erofs-1", Blobs: []string{"c"}, Request: Request{Bootstrap: "/b", BlobDir: "/d"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p)
	f.Add([]byte(`{"blobs":["a"],"origin":{"blobs":[]},"complete":true,"total":-1}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, p []byte) {
		var r record
		if json.Unmarshal(p, &r) == nil {
			same(t, r, new(record))
		}
	})
}
