package tracer_test

import (
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/tracer"
)

// TestPlainRoot holds that a directory of the host's filesystem can be traced too, by a
// mark on the mount, and that what others do on that mount is left out.
func TestPlainRoot(t *testing.T) {
	needKernel(t)
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", "mode=755")
	for _, d := range []string{"/root", "/other"} {
		if err := os.MkdirAll(dir+d+"/s", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+d+"/s/f", []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(workload(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/root/program", program, 0o755); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond) // older than the run by more than a clock tick
	b := &box{merged: dir + "/root"}
	c := b.create(t, chroot, "/program", "read", "/s/f")
	s := start(t, c, tracer.Options{})
	c.run(t)
	r := result(t, s)
	if r.Err != nil || !r.Trace.Complete() {
		t.Fatalf("error %v, losses %q", r.Err, lossOf(r))
	}
	var got []string
	for _, a := range r.Trace.Accesses {
		got = append(got, howString(a.How)+" "+a.Path)
	}
	if want := []string{"ore /program", "or- /s/f"}; !slices.Equal(got, want) {
		t.Errorf("accesses %q, want %q (mark: %s)", got, want, r.Mark)
	}
}

// TestOutsiders holds that what the host reads of the container's files, through its own
// mount of them, is not what the container read.
func TestOutsiders(t *testing.T) {
	b := newBox(t, "mkdir s; echo x > s/f; echo x > s/host")
	c := b.create(t, pivot, "cat", "/s/f")
	s := start(t, c, tracer.Options{})
	if _, err := os.ReadFile(b.merged + "/s/host"); err != nil {
		t.Fatal(err)
	}
	c.run(t)
	r := result(t, s)
	if _, ok := find(r, "/s/host"); ok {
		t.Error("what the host read is listed")
	}
	if _, ok := find(r, "/s/f"); !ok {
		t.Error("what the container read is not listed")
	}
}

// TestRootGone holds that a root directory that was removed is no reason to fail.
func TestRootGone(t *testing.T) {
	needKernel(t)
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", "mode=755")
	if err := os.MkdirAll(dir+"/root", 0o755); err != nil {
		t.Fatal(err)
	}
	b := &box{merged: dir + "/root"}
	c := b.create(t, chroot, "/program")
	if err := os.Remove(dir + "/root"); err != nil {
		t.Fatal(err)
	}
	s := start(t, c, tracer.Options{})
	c.letGo(t)
	if err := c.wait(t); err == nil {
		t.Error("container ran a program that does not exist")
	}
	if r := result(t, s); r.Err != nil || len(r.Trace.Accesses) != 0 {
		t.Errorf("error %v, accesses %+v; want neither", r.Err, r.Trace.Accesses)
	}
}

// small hides most of this machine's files from a box, so that it can be searched as fast
// as an image.
const small = `
	mkdir -p usr/lib
	for d in /* /usr/* /usr/lib/*; do
		case $d in
		/usr | /bin | /sbin | /lib* | /etc | /proc | /dev | /s | /mnt) ;;
		/usr/bin | /usr/sbin | /usr/lib | /usr/lib64 | /usr/lib/*-linux-gnu* | /usr/lib/ld-*) ;;
		*) mknod .$d c 0 0 ;;
		esac
	done
`

// TestLateNames holds that a tracer which reads its events only after the processes and
// their mounts are gone still finds the image's paths.
func TestLateNames(t *testing.T) {
	for _, mode := range []string{pivotProc, chroot} {
		t.Run(mode, func(t *testing.T) {
			b := newBox(t, small+"mkdir -p s/dir s/deep/er mnt; for f in a dir/b deep/er/c dir/gone; do echo x > s/$f; done")
			c := b.create(t, mode, "bash", "-euc", `
				unshare -m bash -euc 'mkdir -p /mnt/x; mount --bind /s/dir /mnt/x; cat /mnt/x/b /mnt/x/gone'
				unshare -m bash -euc 'mount --bind /s/deep /mnt/x; chroot / cat /mnt/x/er/c'
				cat /s/a; rm /s/dir/gone`)
			s := start(t, c, tracer.Options{})
			server := childOf(t, os.Getpid(), "optimizer-server")
			signal(t, server, unix.SIGSTOP)
			c.run(t)
			signal(t, server, unix.SIGCONT)
			r := result(t, s)
			for _, p := range []string{"/s/a", "/s/dir/b", "/s/deep/er/c"} {
				if a, ok := find(r, p); !ok || howString(a.How) != "or-" {
					t.Errorf("%s: %+v, found %v", p, a, ok)
				}
			}
			for _, a := range r.Trace.Accesses {
				if _, err := stat(b.lower, a.Path); err != nil {
					if _, err := stat("/", a.Path); err != nil {
						t.Errorf("%s is listed and not in the image", a.Path)
					}
				}
			}
			// The one that was deleted may have no path any more; then it is lost.
			if _, ok := find(r, "/s/dir/gone"); !ok && lossOf(r) != "unresolved 1" {
				t.Errorf("/s/dir/gone is neither listed nor lost: losses %q", lossOf(r))
			}
		})
	}
}
