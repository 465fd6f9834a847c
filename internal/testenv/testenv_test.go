package testenv_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// fakeTB records how a helper ends its test.
type fakeTB struct {
	testing.TB
	skipped, failed bool
	text            string
}

func (f *fakeTB) Helper() {}

func (f *fakeTB) Skipf(format string, _ ...any) {
	f.skipped, f.text = true, format
	runtime.Goexit()
}

func (f *fakeTB) Fatalf(format string, _ ...any) {
	f.failed, f.text = true, format
	runtime.Goexit()
}

func record(f func(t testing.TB)) *fakeTB {
	fake := &fakeTB{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(fake)
	}()
	<-done
	return fake
}

func TestMissingToolSkipsOrFails(t *testing.T) {
	ask := func(t testing.TB) { testenv.Tool(t, "no-such-tool") }
	t.Setenv("REQUIRE_TOOLS", "")
	if got := record(ask); !got.skipped || got.failed {
		t.Errorf("Tool(no-such-tool) = %+v, want a skip", got)
	}
	t.Setenv("REQUIRE_TOOLS", "1")
	if got := record(ask); got.skipped || !got.failed {
		t.Errorf("Tool(no-such-tool) with REQUIRE_TOOLS=1 = %+v, want a failure", got)
	}
}

func TestKernelSkipsOrFails(t *testing.T) {
	ask := func(t testing.TB) { testenv.Kernel(t, "perpetual motion", errors.ErrUnsupported) }
	t.Setenv("REQUIRE_KERNEL", "")
	if got := record(ask); !got.skipped || got.failed {
		t.Errorf("Kernel(error) = %+v, want a skip", got)
	}
	t.Setenv("REQUIRE_KERNEL", "1")
	if got := record(ask); got.skipped || !got.failed {
		t.Errorf("Kernel(error) with REQUIRE_KERNEL=1 = %+v, want a failure", got)
	}
	if got := record(func(t testing.TB) { testenv.Kernel(t, "rest", nil) }); got.skipped || got.failed {
		t.Errorf("Kernel(nil) = %+v, want nothing", got)
	}
}

// TestSnapshotSeesLeaks leaks one thing of each kind and wants it named.
func TestSnapshotSeesLeaks(t *testing.T) {
	before, err := testenv.TakeSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	want := func(what string) {
		t.Helper()
		if err := before.Wait(0); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("Wait after a leak = %v, want %q", err, what)
		}
	}
	wantNothing := func() {
		t.Helper()
		if err := before.Wait(5 * time.Second); err != nil {
			t.Errorf("Wait after the clean-up = %v, want nil", err)
		}
	}
	t.Run("file", func(t *testing.T) {
		f, err := os.Open("testenv_test.go")
		if err != nil {
			t.Fatal(err)
		}
		want("testenv_test.go")
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		wantNothing()
	})
	t.Run("socket", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		want("leaked file: 1 more of socket")
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		wantNothing()
	})
	t.Run("goroutine", func(t *testing.T) {
		end := make(chan struct{})
		go func() { <-end }()
		want("leaked goroutine: 1 more, created by")
		close(end)
		wantNothing()
	})
	t.Run("daemon", func(t *testing.T) {
		// The shell ends; the sleep it leaves is nobody's child.
		file := filepath.Join(t.TempDir(), "pid")
		wait := testenv.Start(t, exec.Command("sh", "-c",
			"setsid sh -c 'echo $$ >"+file+"; exec sleep 600' >/dev/null 2>&1 & until [ -s "+file+" ]; do sleep 0.01; done"))
		if err := wait(); err != nil {
			t.Fatal(err)
		}
		want("sleep 600")
		if out, err := exec.Command("sh", "-c", "kill -KILL $(cat "+file+")").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		wantNothing()
	})
	t.Run("mount", func(t *testing.T) {
		testenv.Root(t)
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		want("leaked mount: " + dir)
		if err := testenv.Unmount(dir); err != nil {
			t.Fatal(err)
		}
		wantNothing()
	})
}

func TestStartEndsTheGroup(t *testing.T) {
	dir := t.TempDir()
	t.Run("leaves a child", func(t *testing.T) {
		cmd := exec.Command("sh", "-c", "sleep 600 & echo $! >child; wait")
		cmd.Dir = dir
		testenv.Start(t, cmd)
		deadline := time.Now().Add(10 * time.Second)
		for {
			if b, err := os.ReadFile(filepath.Join(dir, "child")); err == nil && len(b) > 1 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the shell did not start its child")
			}
			time.Sleep(time.Millisecond)
		}
	})
	b, err := os.ReadFile(filepath.Join(dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		stat, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(b)), "stat"))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return // killed, and at most not yet waited for by init
		}
		if time.Now().After(deadline) {
			t.Fatalf("the child outlived its test: %s", stat)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestMountNamespaceIsPrivate(t *testing.T) {
	dir := t.TempDir()
	marker := filepath.Join(dir, "inside")
	testenv.MountNamespace(t, func() error {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return err
		}
		return exec.Command("touch", marker).Run() // a child is inside too
	})
	if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat %s outside = %v, want that it does not exist", marker, err)
	}
}

func TestMountEROFS(t *testing.T) {
	testenv.Root(t)
	mkfs := testenv.Tool(t, "mkfs.erofs")
	src, dir := t.TempDir(), t.TempDir()
	want := strings.Repeat("headstart\n", 5000)
	if err := os.WriteFile(filepath.Join(src, "file"), []byte(want), 0o644); err != nil {
		t.Fatal(err)
	}
	image, blob := filepath.Join(dir, "image"), filepath.Join(dir, "blob")
	out, err := exec.Command(mkfs, "--chunksize=4096", "--blobdev="+blob, image, src).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	mnt := testenv.MountEROFS(t, image, blob)
	testenv.MountNamespace(t, func() error { // a copy would outlive the unmount
		if _, err := os.Stat(filepath.Join(mnt, "file")); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("a private mount namespace has the mount of the image: %w", err)
		}
		return nil
	})
	got, err := os.ReadFile(filepath.Join(mnt, "file"))
	if err != nil || string(got) != want {
		t.Errorf("read through the mount: %d bytes, %v, want the %d bytes written", len(got), err, len(want))
	}
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, make([]byte, 8192), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := testenv.MountEROFSAt(t.TempDir(), garbage); !errors.Is(err, unix.EINVAL) {
		t.Errorf("MountEROFSAt(zeros) = %v, want EINVAL", err)
	}
	if err := testenv.MountEROFSAt(t.TempDir(), filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("MountEROFSAt(no file) = %v, want ErrNotExist", err)
	}
}
