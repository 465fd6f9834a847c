package tracer_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// limit is how long anything in these tests may take before it counts as hung.
const limit = 60 * time.Second

// box is an overlay like the ones containerd makes: the image is a small layer of the test
// above this machine's own root, the writable layer is empty.
type box struct {
	lower, upper, merged string
}

func needKernel(t *testing.T) {
	t.Helper()
	testenv.Root(t)
	for _, f := range []fanotify.Feature{fanotify.FeatureGroup, fanotify.FeatureFilesystemMark, fanotify.FeatureOpenExec} {
		testenv.Kernel(t, f.String(), fanotify.Probe(f))
	}
	if os.Getenv(envPrivate) == "" {
		testenv.Kernel(t, "a private mount namespace", errors.New("refused"))
	}
}

// newBox returns a box whose test layer was filled by the shell script setup, run in the
// layer's top directory.
func newBox(t *testing.T, setup string, options ...string) *box {
	t.Helper()
	needKernel(t)
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", "mode=755")
	b := &box{lower: dir + "/lower", upper: dir + "/upper", merged: dir + "/merged"}
	for _, d := range []string{b.lower, b.upper, b.merged, dir + "/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash", "-euc", "mkdir dev; mknod -m 666 dev/null c 1 3; "+setup)
	cmd.Dir = b.lower
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup: %v\n%s", err, out)
	}
	mount(t, "overlay", b.merged, "overlay", strings.Join(append([]string{
		"lowerdir=" + b.lower + ":/", "upperdir=" + b.upper, "workdir=" + dir + "/work",
	}, options...), ","))
	return b
}

func mount(t *testing.T, source, target, kind, data string) {
	t.Helper()
	if err := unix.Mount(source, target, kind, 0, data); err != nil {
		t.Fatalf("mount %s on %s: %v", kind, target, err)
	}
	t.Cleanup(func() {
		// EBUSY would mean that somebody still holds the container's root.
		if err := unix.Unmount(target, 0); err != nil {
			t.Errorf("unmount %s: %v", target, err)
			_ = unix.Unmount(target, unix.MNT_DETACH)
		}
	})
}

// container is a process in a box that waits to execute its command.
type container struct {
	cmd   *exec.Cmd
	start *os.File
	ended chan error
	out   strings.Builder
}

// Modes of containers: how the root is changed, and whether there is a /proc.
const (
	pivotProc = "pivot+proc"
	pivot     = "pivot"
	chroot    = "chroot"
)

// create returns a container that stands by inside the box.
func (b *box) create(t *testing.T, mode string, argv ...string) *container {
	t.Helper()
	goR, goW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	byR, byW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &container{start: goW, ended: make(chan error, 1)}
	c.cmd = exec.Command(self(t), argv...)
	c.cmd.Env = append(os.Environ(), envRole+"="+mode, envRoot+"="+b.merged)
	c.cmd.ExtraFiles = []*os.File{goR, byW}
	c.cmd.Stdout, c.cmd.Stderr = &c.out, &c.out
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { c.ended <- c.cmd.Wait() }()
	t.Cleanup(func() {
		_ = c.start.Close()
		_ = c.cmd.Process.Kill()
		if err := <-c.ended; err != nil {
			t.Logf("container: %v", err)
		}
	})
	_, _ = goR.Close(), byW.Close()
	if n, err := byR.Read(make([]byte, 1)); n != 1 {
		t.Fatalf("container does not stand by: %v\n%s", err, c.out.String())
	}
	_ = byR.Close()
	return c
}

func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func (c *container) pid() int { return c.cmd.Process.Pid }

// run lets the container go and waits for its end.
func (c *container) run(t *testing.T) {
	t.Helper()
	c.letGo(t)
	if err := c.wait(t); err != nil {
		t.Fatalf("container: %v\n%s", err, c.out.String())
	}
}

func (c *container) letGo(t *testing.T) {
	t.Helper()
	if _, err := io.WriteString(c.start, "x"); err != nil {
		t.Fatal(err)
	}
}

func (c *container) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-c.ended:
		c.ended <- err
		return err
	case <-time.After(limit):
		t.Fatalf("container still runs after %v", limit)
		return nil
	}
}

// start starts a session for the container and waits until it is armed.
func start(t *testing.T, c *container, o tracer.Options) *tracer.Session {
	t.Helper()
	s := startUnarmed(t, c.pid(), o)
	select {
	case <-s.Ready():
	case <-s.Done():
		t.Fatalf("tracer ended before it was armed: %v", s.Result().Err)
	case <-time.After(limit):
		t.Fatalf("tracer not armed after %v", limit)
	}
	return s
}

func startUnarmed(t *testing.T, pid int, o tracer.Options) *tracer.Session {
	t.Helper()
	o.PID = pid
	if o.Server == "" {
		o.Server = testenv.Binary(t, "optimizer-server")
	}
	o.Log = zaptest.NewLogger(t)
	if o.Pages == nil {
		o.Pages = poolOf(t)
	}
	s, err := tracer.Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop("cleanup")
		<-s.Done()
	})
	return s
}

func result(t *testing.T, s *tracer.Session) tracer.Result {
	t.Helper()
	select {
	case <-s.Done():
		return s.Result()
	case <-time.After(limit):
		t.Fatalf("session has not ended after %v", limit)
		return tracer.Result{}
	}
}

// record runs a command in the box from its first instruction to its end and returns the
// complete trace.
func (b *box) record(t *testing.T, mode string, argv ...string) tracer.Result {
	t.Helper()
	c := b.create(t, mode, argv...)
	s := start(t, c, tracer.Options{})
	c.run(t)
	r := result(t, s)
	if r.Err != nil || !r.Trace.Complete() || r.End != tracer.EndExit {
		t.Fatalf("result: end %q, error %v, losses %+v; want a complete trace that ends with %q", r.End, r.Err, r.Trace.Losses, tracer.EndExit)
	}
	return r
}

// find returns the access of one path.
func find(r tracer.Result, path string) (trace.Access, bool) {
	for _, a := range r.Trace.Accesses {
		if a.Path == path {
			return a, true
		}
	}
	return trace.Access{}, false
}

// howString writes "ore" for opened, read, executed; "-" for what is missing.
func howString(h trace.How) string {
	b := []byte("---")
	for i, bit := range []trace.How{trace.Opened, trace.Read, trace.Executed} {
		if h&bit != 0 {
			b[i] = "ore"[i]
		}
	}
	return string(b)
}

// stat returns the numbers of a file below a directory without following its last link.
func stat(dir, path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Lstat(filepath.Join(dir, path), &st)
	if err != nil {
		return st, fmt.Errorf("stat %s in %s: %w", path, dir, err)
	}
	return st, nil
}
