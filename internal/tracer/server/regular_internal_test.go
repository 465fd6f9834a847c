package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// watcher tells which inodes were opened, whatever they are called.
type watcher struct {
	fd    int
	names map[int32]string
}

// watch makes a watcher of files below dir.
func watch(dir string, names ...string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	o := &watcher{fd: fd, names: make(map[int32]string)}
	for _, name := range names {
		wd, err := unix.InotifyAddWatch(fd, filepath.Join(dir, name), unix.IN_OPEN|unix.IN_DONT_FOLLOW)
		if err != nil {
			return nil, errors.Join(err, unix.Close(fd))
		}
		o.names[int32(wd)] = name
	}
	return o, nil
}

// take returns what was opened first since it was last asked, "" when nothing was, and forgets the rest.
func (o *watcher) take() string {
	first := ""
	b := make([]byte, 64*unix.SizeofInotifyEvent)
	for {
		n, err := unix.Read(o.fd, b)
		if err != nil || n < 4 {
			return first
		}
		if first == "" {
			first = o.names[int32(b[0])|int32(b[1])<<8|int32(b[2])<<16|int32(b[3])<<24]
		}
	}
}

// special makes files of each kind in a directory of its own, and opens what a target needs of it.
func special(dir string) (tt *target, names []string, err error) {
	err = errors.Join(
		unix.Mount("tmpfs", dir, "tmpfs", 0, ""),
		unix.Mkfifo(dir+"/fifo", 0o600),
		unix.Mknod(dir+"/device", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))), // null
		os.WriteFile(dir+"/plain", []byte("content"), 0o600),
		os.Mkdir(dir+"/directory", 0o700),
		os.Symlink("plain", dir+"/link"),
	)
	if err != nil {
		return nil, nil, err
	}
	tt = &target{}
	if tt.upper, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, nil, err
	}
	tt.view = tt.upper
	if tt.fds, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, nil, errors.Join(err, unix.Close(tt.upper))
	}
	return tt, []string{"fifo", "device", "directory", "link"}, nil
}

// TestOpensRegularFiles holds that nothing of a container is opened but regular files, so that no device and no FIFO notices.
func TestOpensRegularFiles(t *testing.T) {
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		tt, names, err := special(dir)
		if err != nil {
			return err
		}
		defer func() { _ = errors.Join(unix.Close(tt.upper), unix.Close(tt.fds)) }()
		o, err := watch(dir, append(names, "plain")...)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(o.fd) }()
		l := &pageLog{t: tt, widener: &tracefs.Widener{}}
		f := l.files.add(pageFile{flags: pageAround})
		l.files.touch(f, 0, 0, 0, false)
		for _, name := range names {
			for what, open := range map[string]func() bool{
				"origin": func() bool { return newOrigin(tt).madeAt("/" + name) },
				"copy":   func() bool { _, ok := tt.copiedFrom("/" + name); return ok },
				"pages":  func() bool { return l.widen(f, tt.upper, "/"+name, 4096) },
				"itself": func() bool { _, err := tt.openRegular(tt.upper, "/"+name); return err == nil },
			} {
				if open() {
					t.Errorf("%s: there is a regular file at %s", what, name)
				}
				if got := o.take(); got != "" {
					t.Errorf("%s: %s was opened", what, got)
				}
			}
		}
		return notices(t, tt, o)
	})
}

// notices checks that a watcher tells.
func notices(t *testing.T, tt *target, o *watcher) error {
	fd, err := tt.openRegular(tt.upper, "/plain")
	if err != nil {
		return err
	}
	b := make([]byte, 16)
	n, err := unix.Read(fd, b)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return err
	}
	if got := o.take(); got != "plain" || string(b[:n]) != "content" {
		t.Errorf("%q was opened and has %q in it, want the regular file", got, b[:n])
	}
	for _, name := range []string{"fifo", "device"} {
		fd, err := unix.Openat(tt.upper, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if got := o.take(); got != name {
			t.Errorf("%q was opened, want %s", got, name)
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

// TestSwappedFile holds the same while a container puts a FIFO in the place of a regular file and back all the time.
func TestSwappedFile(t *testing.T) {
	const enough, limit = 2000, time.Minute
	dir := t.TempDir()
	testenv.MountNamespace(t, func() error {
		tt, _, err := special(dir)
		if err != nil {
			return err
		}
		defer func() { _ = errors.Join(unix.Close(tt.upper), unix.Close(tt.fds)) }()
		o, err := watch(dir, "fifo")
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(o.fd) }()
		stop, stopped := make(chan struct{}), make(chan error, 1)
		go func() { // not in this mount namespace, which takes a descriptor
			for {
				select {
				case <-stop:
					stopped <- nil
					return
				default:
				}
				if err := unix.Renameat2(tt.upper, "plain", tt.upper, "fifo", unix.RENAME_EXCHANGE); err != nil {
					stopped <- err
					return
				}
			}
		}()
		seen := map[bool]int{}
		from := newOrigin(tt)
		for end := time.Now().Add(limit); (seen[false] < enough || seen[true] < enough) && time.Now().Before(end); {
			seen[from.madeAt("/plain")]++
		}
		close(stop)
		if err := <-stopped; err != nil {
			return err
		}
		if seen[false] < enough || seen[true] < enough {
			return fmt.Errorf("the file was regular %d times and not so %d times in %v", seen[true], seen[false], limit)
		}
		if got := o.take(); got != "" {
			t.Errorf("the %s was opened", got)
		}
		return nil
	})
}
