package fuse_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// holdAll makes who asks for data that is not there wait until release is called.
func (r *rig) holdAll() (release func()) {
	hold := make(chan struct{})
	for _, b := range r.blobs {
		b.mu.Lock()
		b.hold = hold
		b.mu.Unlock()
	}
	return func() { close(hold) }
}

// A hundred reads wait for data; one of a file that is there does not wait with them.
func TestReadsThatWait(t *testing.T) {
	t.Parallel()
	const many = 100
	r := openImage(t, "v6-zstd")
	r.mount()
	// What is read at random is what the kernel hands out as background, also when many wait.
	const script = `
import os, sys, threading
ready = sys.argv[1] + '/app/dup-in-other-layer'
def read(name, off, n):
    fd = os.open(name, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    assert len(os.pread(fd, n, off)) == n
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED) # the next one asks again
    os.close(fd)
`
	const one = script + "read(ready, 4096, 8192)"
	if err := python(t, one, r.dir); err != nil {
		t.Fatal(err)
	}
	release := r.holdAll()
	done := make(chan error, 1)
	go func() {
		done <- python(t, script+`
names = [os.path.join(d, f) for d, _, files in os.walk(sys.argv[1]) for f in files]
places = [(n, off) for n in names if os.path.isfile(n) and not os.path.islink(n) and n != ready for off in range(0, os.path.getsize(n) - 4096, 16384)]
threads = [threading.Thread(target=read, args=(n, off, 4096)) for n, off in places[:2*int(sys.argv[2])]]
for t in threads: t.start()
for t in threads: t.join()
`, r.dir, fmt.Sprint(many))
	}()
	eventually(t, func() string {
		if n := r.table.Pending(); n < many {
			return fmt.Sprintf("%d reads wait, want %d", n, many)
		}
		return ""
	})
	ready := make(chan error, 1)
	go func() { ready <- python(t, one, r.dir) }()
	select {
	case err := <-ready:
		if err != nil {
			t.Errorf("read of a file that is there: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("a read of a file that is there waits for others")
	}
	release()
	if err := <-done; err != nil {
		t.Errorf("reads that waited: %v", err)
	}
}

// What fetches hangs and obeys nobody: the reader gets an error, others go on, and the server ends all the same.
func TestStuck(t *testing.T) {
	t.Parallel()
	r := openImage(t, "v6-zstd")
	s := r.mount()
	if err := python(t, "import sys; open(sys.argv[1] + '/app/dup-in-other-layer', 'rb').read()", r.dir); err != nil {
		t.Fatal(err)
	}
	r.stop(s)
	r.limit = time.Second
	s = r.server()
	r.run(s)
	for _, b := range r.blobs {
		b.mu.Lock()
		b.deaf = true
		b.mu.Unlock()
	}
	release := r.holdAll()
	defer release()
	if err := python(t, `
import errno, os, sys
try: open(sys.argv[1] + '/app/main', 'rb').read()
except OSError as e:
    if e.errno != errno.EIO: raise
else: sys.exit('no error of a read that hangs')
fd = os.open(sys.argv[1] + '/app/dup-in-other-layer', os.O_RDONLY | os.O_DIRECT)
assert os.splice(fd, os.pipe()[1], 4096) == 4096
`, r.dir); err != nil {
		t.Error(err)
	}
	if s.Failed() == 0 || r.table.Pending() != 0 {
		t.Errorf("%d reads failed, %d are pending, want some and none", s.Failed(), r.table.Pending())
	}
	if err := s.Close(); !errors.Is(err, fuse.ErrStuck) {
		t.Errorf("Close() = %v, want ErrStuck", err)
	}
	select {
	case <-s.Ended():
	case <-time.After(time.Minute):
		t.Error("a server whose blob is stuck does not end")
	}
}

// What is no connection is an error, not an endless try; one that was never run ends with Close.
func TestNoConnection(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	testenv.Kernel(t, "FUSE", fuse.Probe())
	dev, err := fuse.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	table, err := fuse.NewTable()
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	tree, err := fuse.NewTree(&rafs.Image{Root: &rafs.Inode{}})
	if err != nil {
		t.Fatal(err)
	}
	for _, run := range []bool{true, false} {
		s, err := fuse.NewServer(fuse.Config{Device: dev, Table: table, Tree: tree})
		if err != nil {
			t.Fatal(err)
		}
		if run {
			if err := s.Run(); !errors.Is(err, unix.EPERM) {
				t.Errorf("Run() on a device that is not mounted = %v, want EPERM", err)
			}
		}
		if err := s.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
		<-s.Ended()
		if err := s.Run(); err != nil {
			t.Errorf("Run() after Close = %v", err)
		}
	}
}
