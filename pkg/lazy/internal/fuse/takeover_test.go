package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
)

// Servers follow each other on one connection while it is read: every request that one has read and not answered is answered by
// the next, and numbers stay what they are.
func TestTakeOver(t *testing.T) {
	r := openImage(t, "v5-zstd")
	s := r.mount()
	hold := make(chan struct{})
	for _, b := range r.blobs {
		b.mu.Lock()
		b.hold = hold
		b.mu.Unlock()
	}
	var g errgroup.Group
	for range 4 {
		g.Go(func() error { return compare(t, r.dir) })
	}
	for range 5 {
		eventually(t, func() string {
			for _, b := range r.blobs {
				if b.held.Load() > 0 {
					return ""
				}
			}
			return "nobody waits although nobody gets data"
		})
		r.stop(s)
		if r.table.Pending() == 0 {
			t.Error("what waited was answered by a server that stops")
		}
		// What the process keeps is what it finds in another: the memory is mapped anew.
		fd, err := unix.FcntlInt(r.table.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.table.Close(); err != nil {
			t.Fatal(err)
		}
		if r.table, err = fuse.OpenTable(os.NewFile(uintptr(fd), "table")); err != nil {
			t.Fatal(err)
		}
		s = r.server()
		r.run(s)
	}
	close(hold)
	done := make(chan error, 1)
	go func() { done <- g.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("readers hang")
	}
	if n := r.table.Pending(); n != 0 {
		t.Errorf("%d requests are pending after all", n)
	}
	if err := compare(t, r.dir); err != nil {
		t.Error(err)
	}
}

// stop ends a server while its connection lives.
func (r *rig) stop(s *fuse.Server) {
	r.t.Helper()
	if err := s.Close(); err != nil {
		r.t.Error(err)
	}
	select {
	case <-s.Ended():
	case <-time.After(time.Minute):
		r.t.Fatal("a server that was closed does not end")
	}
}

// python runs a script with arguments in a process of its own: one that serves FUSE must not read what it serves, since it could not
// stop its own threads that wait for it.
func python(t testing.TB, script string, args ...string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, testenv.Tool(t, "python3"), append([]string{"-c", script}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%.2000s", err, out)
	}
	return nil
}

// Data that cannot be had is an error of its read alone.
func TestFails(t *testing.T) {
	t.Parallel()
	r := openImage(t, "v6-zstd")
	s := r.mount()
	setErr := func(err error) {
		for _, b := range r.blobs {
			b.mu.Lock()
			b.err = err
			b.mu.Unlock()
		}
	}
	setErr(errors.New("no such luck"))
	const expect = `
import errno, os, sys
def fails(want, f, *args):
    try: f(*args)
    except OSError as e:
        if e.errno != want: raise
    else: sys.exit('no error, want ' + errno.errorcode[want])
root = sys.argv[1]; name = root + '/app/main'
`
	if err := python(t, expect+"fails(errno.EIO, lambda: open(name, 'rb').read())", r.dir); err != nil {
		t.Errorf("read without data: %v", err)
	}
	if s.Failed() == 0 {
		t.Error("no failed read was counted")
	}
	setErr(nil)
	if err := python(t, expect+`
open(name, 'rb').read()
fails(errno.EROFS, open, name, 'wb')
for i in range(2): fails(errno.ENOENT, os.stat, root + '/app/nosuchfile')
fails(errno.ENAMETOOLONG, os.stat, root + '/' + 256 * 'x')
fails(errno.ENOTDIR, os.stat, name + '/x')
fails(errno.ENODATA, os.getxattr, name, 'user.nosuchname')
s = os.statvfs(root)
assert s.f_namemax == 255 and s.f_bfree == 0 and s.f_files > 1500, s
for d in ('/', '/app'):
    st, up = os.stat(root + d), sum(e.is_dir(follow_symlinks=False) for e in os.scandir(root + d))
    assert st.st_nlink == 2 + up, (d, st, up)
fd = os.open(root + '/app', os.O_RDONLY)
os.stat('..', dir_fd=fd)
`, r.dir); err != nil {
		t.Error(err)
	}
}

// Reads of all sizes and places, also past the kernel's cache, give what is there.
func TestReads(t *testing.T) {
	t.Parallel()
	for _, variant := range []string{"v5-zstd", "v6-zstd-sha256-64k"} {
		r := openImage(t, variant)
		r.mount()
		if err := python(t, `
import hashlib, json, mmap, os, sys
root, expected = sys.argv[1:]
name = '/app/dup-in-other-layer' # of more than one chunk, with an odd end
want = [e['sha256'] for e in json.load(open(expected)) if e['path'] == name][0]
whole = open(root + name, 'rb').read()
assert hashlib.sha256(whole).hexdigest() == want
for flags in (0, os.O_DIRECT):
    fd = os.open(root + name, os.O_RDONLY | flags)
    for size in (512, 4096, 61440, 65536, 69632, 1 << 20):
        for off in (0, 512, 4096, 65536 - 512, (1 << 20) - 4096, len(whole) // 512 * 512, len(whole) + 512):
            buf = mmap.mmap(-1, size)
            n = os.preadv(fd, [buf], off)
            assert buf[:n] == whole[off:off+size], (flags, size, off, n)
for size in (1, 511, 65535, 65537):
    for off in (1, 4095, 65533, (1 << 20) - 5, len(whole) - 7):
        assert os.pread(fd := os.open(root + name, os.O_RDONLY), size, off) == whole[off:off+size], (size, off)
        os.close(fd)
fd = os.open(root + name, os.O_RDONLY)
assert mmap.mmap(fd, 0, prot=mmap.PROT_READ)[:] == whole
r, w = os.pipe()
assert os.splice(fd, w, 4096, 4096) == 4096 and os.read(r, 4096) == whole[4096:8192]
`, r.dir, filepath.Join(testenv.Fixtures(t), "expected.json")); err != nil {
			t.Errorf("%s: %v", variant, err)
		}
	}
}

// When nobody has the connection any more, its readers get errors, not zeros, and it can be unmounted.
func TestConnectionLost(t *testing.T) {
	t.Parallel()
	r := openImage(t, "v6-zstd")
	s := r.mount()
	r.stop(s)
	read := make(chan error, 1)
	go func() { read <- python(t, "import sys; open(sys.argv[1] + '/app/main', 'rb').read()", r.dir) }()
	select {
	case err := <-read:
		t.Errorf("read while nobody answers: %v, want none", err)
	case <-time.After(500 * time.Millisecond):
	}
	if err := r.dev.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err == nil || !strings.Contains(err.Error(), "Errno") {
		t.Errorf("a read of a connection that is lost: %v, want an error", err)
	}
	if err := python(t, `
import errno, sys
try: open(sys.argv[1] + '/app/main', 'rb').read()
except OSError as e: sys.exit(e.errno != errno.ENOTCONN)
sys.exit('no error')`, r.dir); err != nil {
		t.Error(err)
	}
	var err error
	if r.dev, err = os.Open(os.DevNull); err != nil { // for the end of the test
		t.Fatal(err)
	}
}
