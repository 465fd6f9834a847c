package tracefs_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// What does not fit is counted, to the event.
func TestOverrunIsCounted(t *testing.T) {
	in := create(t, open(t), tracefs.Options{Events: 1 << tracefs.Read, Ring: 1})
	f, inode := subject(t, true)
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
	const reads = 20_000 // of 44 bytes: 860 KiB
	b := make([]byte, 1)
	for i := range reads {
		if _, err := unix.Pread(int(f.Fd()), b, int64(i%filePages)*int64(os.Getpagesize())); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Pause(); err != nil {
		t.Fatal(err)
	}
	lost, err := in.Lost()
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	var last int64
	for _, e := range drain(t, r) {
		if e.Inode != inode {
			continue
		}
		got++
		if e.Time < last {
			t.Errorf("time goes back by %d ns", last-e.Time)
		}
		last = e.Time
	}
	if lost.Total() == 0 || int64(got)+lost.Total() != reads {
		t.Errorf("%d events read, %+v lost, want %d together and some lost", got, lost, reads)
	}
	if err := in.Reset(); err != nil {
		t.Fatal(err)
	}
	if lost, err := in.Lost(); err != nil || lost != (tracefs.Lost{}) {
		t.Errorf("Lost() after Reset = %+v, %v", lost, err)
	}
}

// A tracefs that is unmounted, and the one it was opened through closed, does not end what
// is recorded.
func TestUnmountedInBetween(t *testing.T) {
	open(t) // skips
	dir := t.TempDir()
	f, inode := subject(t, true)
	var fsys *tracefs.FS
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tracefs", dir, "tracefs", 0, ""); err != nil {
			return err
		}
		var err error
		if fsys, err = tracefs.OpenAt(dir); err != nil {
			return err
		}
		return unix.Unmount(dir, unix.MNT_DETACH)
	})
	in, err := fsys.Create(tracefs.Options{})
	if err != nil {
		t.Fatal(err)
	}
	events := armed(t, in, func() error { _, err := f.ReadAt(make([]byte, 1), 0); return err })
	if got := of(events, tracefs.Read, inode, filePages); len(got) != 1 {
		t.Errorf("read pages %v, want the first", got)
	}
	if err := errors.Join(in.Close(), in.Close(), fsys.Close(), fsys.Close()); err != nil {
		t.Error(err)
	}
}

func TestOpenAtRefuses(t *testing.T) {
	for _, path := range []string{t.TempDir(), filepath.Join(t.TempDir(), "nothing")} {
		if fs, err := tracefs.OpenAt(path); !errors.Is(err, tracefs.ErrUnsupported) {
			t.Errorf("OpenAt(%s) = %v, %v, want ErrUnsupported", path, fs, err)
		}
	}
	f, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if in, err := tracefs.FromFile(f, tracefs.Spec{Events: tracefs.Pages}); !errors.Is(err, tracefs.ErrUnsupported) {
		t.Errorf("FromFile(a directory) = %v, %v, want ErrUnsupported", in, err)
	}
}

// The error says what is missing where the kernel's filter would not understand us.
func TestOpenSaysWhatIsMissing(t *testing.T) {
	open(t)
	for name, tt := range map[string]struct {
		attr *syscall.SysProcAttr
		want string
	}{
		"root":            {&syscall.SysProcAttr{}, "opened"},
		"mount namespace": {&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, "opened"},
		"pid namespace":   {&syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, "unsupported: "},
		"nobody":          {&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "permission: "},
	} {
		cmd := helper("open")
		if tt.attr.Credential != nil { // who may not pass the directories of go test
			exe := filepath.Join(t.TempDir(), "helper")
			self, err := os.ReadFile("/proc/self/exe")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(exe, self, 0o755); err != nil {
				t.Fatal(err)
			}
			for dir := filepath.Dir(exe); dir != filepath.Dir(os.TempDir()); dir = filepath.Dir(dir) {
				if err := os.Chmod(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			cmd.Path = exe
		}
		cmd.SysProcAttr = tt.attr
		out, err := cmd.Output()
		if err != nil || !strings.HasPrefix(string(out), tt.want) {
			t.Errorf("%s: %q, %v; want %q", name, out, err, tt.want)
		}
		t.Logf("%s: %s", name, out)
	}
}

// What cannot be had says so and leaves nothing behind.
func TestNoDescriptorsLeft(t *testing.T) {
	fsys := open(t)
	in := create(t, fsys, tracefs.Options{})
	before := instances(t, os.Getpid())
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	for spare := range 6 {
		var err, rerr error
		var made *tracefs.Instance
		var r *tracefs.Reader
		func() {
			var held []*os.File
			low := limit
			low.Cur = 100
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
				t.Fatal(err)
			}
			defer func() {
				for _, f := range held {
					f.Close()
				}
				if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
					t.Fatal(err)
				}
			}()
			for {
				f, err := os.Open(os.DevNull)
				if err != nil {
					break
				}
				held = append(held, f)
			}
			for range spare {
				held[0].Close()
				held = held[1:]
			}
			if made, err = fsys.Create(tracefs.Options{}); err == nil {
				err = made.Close()
				return
			}
			if r, rerr = in.Reader(); rerr == nil {
				rerr = r.Close()
			}
		}()
		if err != nil && !errors.Is(err, tracefs.ErrLimit) || err == nil && spare == 0 {
			t.Errorf("%d descriptors left: Create() = %v, want ErrLimit", spare, err)
		}
		if rerr != nil && !errors.Is(rerr, tracefs.ErrLimit) && !errors.Is(rerr, unix.EMFILE) {
			t.Errorf("%d descriptors left: Reader() = %v", spare, rerr)
		}
		if after := instances(t, os.Getpid()); !slices.Equal(before, after) {
			t.Fatalf("%d descriptors left: instances %v, had %v", spare, after, before)
		}
	}
}

// An instance that is being read is not removed, and the pool tries again.
func TestPutWhileRead(t *testing.T) {
	p := pool(t, open(t), tracefs.PoolOptions{Ready: 1, Max: 3})
	in := get(t, p)
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	p.Put(in)
	next := get(t, p)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	p.Put(next)
}

// Stop ends a Read that waits, and what is closed stays closed.
func TestStopUnblocks(t *testing.T) {
	in := create(t, open(t), tracefs.Options{})
	r, err := in.Reader()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := r.Read(make([]tracefs.Event, 1))
		done <- err
	}()
	r.Stop()
	r.Stop()
	if err := <-done; !errors.Is(err, io.EOF) {
		t.Errorf("Read() = %v, want EOF", err)
	}
	if n, err := r.Read(make([]tracefs.Event, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("Read() again = %d, %v, want EOF", n, err)
	}
	if _, err := r.Read(nil); err == nil {
		t.Error("Read(nil) has no error")
	}
	if err := errors.Join(r.Close(), r.Close()); err != nil {
		t.Error(err)
	}
	r.Stop()
	r.Wake()
}

// What dead processes left is removed, what the living hold is not, also those that
// inherited it.
func TestCleanAfterTheDead(t *testing.T) {
	fsys := open(t)
	for _, inherited := range []bool{false, true} {
		cmd := helper("own")
		if inherited {
			cmd.Args = append(cmd.Args, "inherited")
		}
		stdin, in, err := os.Pipe() // not StdinPipe, which Wait closes, hence for the heir too
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		cmd.Stdin = stdin
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(cmd.Start(), stdin.Close()); err != nil {
			t.Fatal(err)
		}
		name, err := bufio.NewReader(out).ReadString('\n')
		name = strings.TrimSpace(name)
		if err != nil || !strings.HasPrefix(name, fmt.Sprintf("%s%d-", tracefs.Prefix, cmd.Process.Pid)) {
			t.Fatalf("helper says %q, %v", name, err)
		}
		there := func(when string, want bool) {
			t.Helper()
			if err := fsys.Clean(); err != nil {
				t.Error(err)
			}
			if got := slices.Contains(instances(t, cmd.Process.Pid), name); got != want {
				t.Errorf("inherited %t: %s is there %s: %t, want %t", inherited, name, when, got, want)
			}
		}
		there("while its maker lives", true)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if inherited {
			there("while its heir lives", true)
		}
		in.Close()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if err := fsys.Clean(); err != nil {
				t.Error(err)
			}
			if !slices.Contains(instances(t, cmd.Process.Pid), name) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s is still there", name)
			}
		}
	}
}

// A process that inherits an instance records through it, in a mount namespace without any
// tracefs.
func TestHandedOver(t *testing.T) {
	in := create(t, open(t), tracefs.Options{})
	f, inode := subject(t, true)
	wait, say, threads := start(t)
	spec, err := in.Spec().MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	cmd := helper("record", string(spec), strconv.Itoa(threads[0]), strconv.FormatUint(inode, 10))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	cmd.ExtraFiles = []*os.File{in.File()}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	if line, err := lines.ReadString('\n'); line != "armed\n" {
		t.Fatalf("helper says %q, %v", line, err)
	}
	say("fork", "read", f.Name())
	if err := wait(); err != nil {
		t.Error(err)
	}
	stdin.Close()
	if line, err := lines.ReadString('\n'); line != "1\n" {
		t.Errorf("helper saw %q, %v, want one page", line, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// Containers that come and go leave nothing: the pool's descriptors and instances are what
// they were.
func TestPoolCyclesLeaveNothing(t *testing.T) {
	cycles := 500
	if testing.Short() {
		cycles = 20
	}
	before := instances(t, os.Getpid())
	fsys := open(t)
	p := pool(t, fsys, tracefs.PoolOptions{})
	for range cycles {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		in, err := p.Get(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		r, err := in.Reader()
		if err != nil {
			t.Fatal(err)
		}
		if err := in.Arm(os.Getpid()); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		p.Put(in)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	ours := 0
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if strings.Contains(to, tracefs.Prefix) {
			ours++
		}
	}
	if ours > tracefs.DefaultMax/4+2 {
		t.Errorf("%d descriptors of instances are open, want those of the pool", ours)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if after := instances(t, os.Getpid()); !slices.Equal(before, after) {
		t.Errorf("instances %v, had %v", after, before)
	}
}
