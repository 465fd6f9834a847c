package server

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// silent is a filesystem that has a file of every name, until it answers nobody any more.
type silent struct {
	fd    int
	quiet atomic.Bool
	asked atomic.Int64 // since it is quiet
	quit  chan struct{}
	done  chan struct{}
}

// mountSilent mounts one at dir.
func mountSilent(dir string) (*silent, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("silent", dir, "fuse", 0, options); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	s := &silent{fd: fd, quit: make(chan struct{}), done: make(chan struct{})}
	go s.serve()
	return s, nil
}

// serve answers until quit is closed. Who waits for an answer gets an error then.
func (s *silent) serve() {
	defer close(s.done)
	b := make([]byte, 1<<20)
	for {
		select {
		case <-s.quit:
			_ = unix.Close(s.fd)
			return
		default:
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: pollFD(s.fd), Events: unix.POLLIN}}, 10)
		n, err := unix.Read(s.fd, b)
		if err != nil || n < 40 {
			continue
		}
		if s.quiet.Load() {
			s.asked.Add(1)
			continue
		}
		if reply := answer(b[:n]); reply != nil {
			_, _ = unix.Write(s.fd, reply)
		}
	}
}

// answer returns the reply to a request. Source: include/uapi/linux/fuse.h.
func answer(request []byte) []byte {
	const forget, lookup, getattr, initialize, interrupt, forgets = 2, 1, 3, 26, 36, 42
	order := binary.NativeEndian
	reply := make([]byte, 16) // fuse_out_header
	attributes := func(mode uint32) []byte {
		b := make([]byte, 88) // fuse_attr
		order.PutUint64(b, 2)
		order.PutUint32(b[60:], mode)
		order.PutUint32(b[64:], 1)
		return b
	}
	switch order.Uint32(request[4:]) {
	case forget, interrupt, forgets:
		return nil
	case initialize:
		version := make([]byte, 64) // fuse_init_out
		order.PutUint32(version, 7)
		order.PutUint32(version[4:], 31)
		reply = append(reply, version...)
	case lookup:
		node := make([]byte, 40) // fuse_entry_out: valid for no time
		order.PutUint64(node, 2)
		reply = append(append(reply, node...), attributes(unix.S_IFREG|0o600)...)
	case getattr:
		mode := uint32(unix.S_IFREG | 0o600)
		if order.Uint64(request[16:]) == 1 { // the root
			mode = unix.S_IFDIR | 0o700
		}
		reply = append(append(reply, make([]byte, 16)...), attributes(mode)...)
	default:
		order.PutUint32(reply[4:], ^uint32(unix.ENOSYS)+1)
	}
	order.PutUint32(reply, uint32(len(reply)))
	copy(reply[8:], request[8:16])
	return reply
}

// covered makes a root in dir that has a file of its filesystem mounted at /other and, below a filesystem that s serves, at
// /served/file.
func covered(dir string) (tt *target, s *silent, id inode, err error) {
	err = errors.Join(
		unix.Mount("tmpfs", dir, "tmpfs", 0, ""),
		os.WriteFile(dir+"/of the host", nil, 0o600), os.WriteFile(dir+"/second", nil, 0o600),
		os.WriteFile(dir+"/other", nil, 0o600), os.Mkdir(dir+"/served", 0o700),
		unix.Mount(dir+"/second", dir+"/other", "", unix.MS_BIND, ""),
	)
	if err != nil {
		return nil, nil, id, err
	}
	if s, err = mountSilent(dir + "/served"); err != nil {
		return nil, nil, id, err
	}
	tt = &target{upper: -1, view: -1}
	err = unix.Mount(dir+"/of the host", dir+"/served/file", "", unix.MS_BIND, "")
	if err == nil {
		tt.root, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile("/proc/thread-self/mountinfo")
	}
	if err == nil {
		tt.mounts, err = mountinfo.GetMountsFromReader(strings.NewReader(string(text)), mountinfo.PrefixFilter(dir))
	}
	for _, m := range tt.mounts {
		if m.Mountpoint = strings.TrimPrefix(m.Mountpoint, dir); m.Mountpoint == "" {
			m.Mountpoint = "/"
			tt.layers = []layer{{fd: tt.root, dev: deviceOf(m), kind: "ext4"}} // as if it was
		}
	}
	var st unix.Stat_t
	err = errors.Join(err, unix.Stat(dir+"/of the host", &st))
	return tt, s, inode{st.Dev, st.Ino}, err
}

// TestBoundWaitsForNobody holds that nothing is looked up that a process of a container that runs may keep waiting, neither
// when it is attached to nor when its instance comes late.
func TestBoundWaitsForNobody(t *testing.T) {
	const limit = time.Minute
	pid, dir := process(t), t.TempDir()
	testenv.MountNamespace(t, func() error {
		tt, s, id, err := covered(dir)
		if s != nil {
			defer func() { close(s.quit); <-s.done }()
		}
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(tt.root) }()
		if tt.proc, err = unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		defer func() { _ = unix.Close(tt.proc) }()
		tt.pid = pid
		tt.survey()
		if _, ok := tt.outside[id]; !ok {
			t.Errorf("%+v is not among %+v, which are mounted", id, tt.outside)
		}
		s.quiet.Store(true)
		within := func(what string, f func()) bool {
			done := make(chan struct{})
			go func() { defer close(done); f() }()
			select {
			case <-done:
				return true
			case <-time.After(limit):
				t.Errorf("%s takes more than %v", what, limit)
				return false
			}
		}
		if !within("an instance that comes late", func() { arriveLate(t, tt, id) }) {
			return nil
		}
		running := *tt
		running.runs = true
		if !within("attaching", func() { running.survey() }) {
			return nil
		}
		if n := s.asked.Load(); n > 0 || len(running.outside) != 1 {
			t.Errorf("asked %d times; of a container that runs %+v is known, want the one file that nobody serves", n, running.outside)
		}
		return hears(s, tt.root, limit)
	})
}

// hears checks that who looks up a path does ask s.
func hears(s *silent, root int, limit time.Duration) error {
	go func() {
		var st unix.Stat_t
		_ = unix.Fstatat(root, "served/file", &st, unix.AT_SYMLINK_NOFOLLOW)
	}()
	for end := time.Now().Add(limit); s.asked.Load() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("nobody was asked for a file in %v", limit)
		}
	}
	return nil
}

// arriveLate has an instance come late to a session of tt.
func arriveLate(t *testing.T, tt *target, id inode) {
	fs, err := tracefs.Open()
	if err != nil {
		t.Error(err)
		return
	}
	instance, err := fs.Create(tracefs.Options{})
	if err != nil {
		t.Error(errors.Join(err, fs.Close()))
		return
	}
	s := &session{t: tt, out: &output{fd: -1}, comms: newComms(tt.proc, tt.pid), armed: time.Now()}
	fd, err := unix.FcntlInt(instance.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		s.armLate(Pages{Instance: os.NewFile(uintptr(fd), instance.Name()), Spec: instance.Spec()})
		if s.pages == nil {
			t.Error("an instance that came late was not armed")
		} else if _, ok := s.pages.outside[id]; !ok {
			t.Errorf("%+v is not among %+v", id, s.pages.outside)
		}
		err = s.closePages()
	}
	if err := errors.Join(err, instance.Close(), fs.Close()); err != nil {
		t.Error(err)
	}
}
