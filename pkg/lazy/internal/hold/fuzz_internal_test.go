package hold

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// FuzzReceive sends any packet, with some descriptors, to a holder. What is understood can be sent again, and no descriptor
// stays open that the holder does not have.
func FuzzReceive(f *testing.F) {
	for _, m := range []message{
		{Op: opDaemon, Argv: []string{"optimizer", "lazyd"}},
		{Op: opKeep, Names: []string{"a"}},
		{Op: opKeep, Names: []string{"a", "b", "a"}},
		{Op: opKeep},
		{Op: opEnd, Whole: true},
		{Op: opDrop, Names: []string{"a", "z"}},
		{Op: opDone},
	} {
		p, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p, uint8(len(m.Names)))
	}
	f.Add([]byte(`{"op":"keep","names":["a"]}`), uint8(2))
	f.Add([]byte("["), uint8(1))
	f.Add([]byte(strings.Repeat(" ", maxMessage+1)+"{}"), uint8(1))
	f.Fuzz(func(t *testing.T, p []byte, descriptors uint8) {
		if len(p) == 0 || len(p) > 2*maxMessage {
			return // nothing is the end of a connection
		}
		conn, theirs, err := pair()
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := errors.Join(conn.Close(), theirs.Close()); err != nil {
				t.Error(err)
			}
		}()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		fds := make([]int, descriptors%4)
		for i := range fds {
			fds[i] = int(w.Fd())
		}
		if err := unix.Sendmsg(int(theirs.Fd()), p, unix.UnixRights(fds...), nil, 0); err != nil {
			t.Fatal(err)
		}
		m, files, err := receive(conn)
		if err != nil && (files != nil || !reflect.DeepEqual(m, message{})) {
			t.Errorf("receive = %+v, %d files, %v", m, len(files), err)
		}
		h := holder{log: zap.NewNop(), files: map[string]*os.File{}}
		if err == nil {
			resend(t, m, files)
			h.obey(m, files)
		}
		if len(h.files) > len(m.Names) {
			t.Errorf("%d files of %d names", len(h.files), len(m.Names))
		}
		for name := range h.files {
			h.drop(name)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		// A pipe ends when nobody has its other end open.
		if err := unix.SetNonblock(int(r.Fd()), true); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(int(r.Fd()), make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("a descriptor stays open: %d, %v", n, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}

// resend sends a message on and compares what arrives.
func resend(t *testing.T, m message, files []*os.File) {
	t.Helper()
	conn, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(theirs.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err = errors.Join(err, theirs.Close()); err != nil {
		t.Fatal(err)
	}
	to, err := adopt(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(conn.Close(), to.Close()); err != nil {
			t.Error(err)
		}
	}()
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	if err := send(conn, m, fds); err != nil {
		if p, _ := json.Marshal(m); len(p) <= maxMessage {
			t.Errorf("send %+v: %v", m, err)
		}
		return
	}
	got, copies, err := receive(to)
	if errors.Is(err, io.EOF) || err != nil || len(copies) != len(files) {
		t.Errorf("sent again, %+v arrives as %+v with %d of %d files, %v", m, got, len(copies), len(files), err)
	}
	a, _ := json.Marshal(m)
	if b, _ := json.Marshal(got); string(a) != string(b) {
		t.Errorf("sent again, %s arrives as %s", a, b)
	}
	for _, f := range copies {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}
