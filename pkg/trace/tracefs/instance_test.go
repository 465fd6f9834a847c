package tracefs_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// open returns a tracefs for the test, whose kernel has the page events.
func open(t testing.TB) *tracefs.FS {
	t.Helper()
	testenv.Root(t)
	fs, err := tracefs.Open()
	testenv.Kernel(t, "tracefs", err)
	t.Cleanup(func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err = fs.Probe(tracefs.Pages)
	testenv.Kernel(t, "page cache tracepoints (Linux 6.11)", err)
	return fs
}

// create returns an instance for the test.
func create(t testing.TB, fs *tracefs.FS, o tracefs.Options) *tracefs.Instance {
	t.Helper()
	in, err := fs.Create(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := in.Close(); err != nil {
			t.Error(err)
		}
	})
	return in
}

// drain stops r and returns all that it has left.
func drain(t testing.TB, r *tracefs.Reader) []tracefs.Event {
	t.Helper()
	r.Stop()
	var all []tracefs.Event
	events := make([]tracefs.Event, 1000)
	for {
		n, err := r.Read(events)
		all = append(all, events[:n]...)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Error(err)
			return all
		}
	}
}

func TestReadOfKnownPages(t *testing.T) {
	fs := open(t)
	path := filepath.Join(t.TempDir(), "file")
	page := os.Getpagesize()
	if err := os.WriteFile(path, make([]byte, 10*page), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	in := create(t, fs, tracefs.Options{})
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := in.Arm(unix.Gettid()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, page+1), int64(3*page)); err != nil {
		t.Fatal(err)
	}
	var got []tracefs.Event
	for _, e := range drain(t, r) {
		if e.Inode == st.Ino {
			got = append(got, e)
		}
	}
	if len(got) != 1 || got[0].First != 3 || got[0].Last != 4 || got[0].Kind != tracefs.Read {
		t.Errorf("events = %+v, want one read of pages 3 to 4", got)
	}
	lost, err := in.Lost()
	if err != nil || lost.Total() != 0 {
		t.Errorf("Lost() = %+v, %v; want nothing", lost, err)
	}
}
