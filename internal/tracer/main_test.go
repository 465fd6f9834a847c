package tracer_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// Environment of the test binary when it is something other than the tests.
const (
	envPrivate = "HEADSTART_TEST_PRIVATE" // it is in a mount namespace of its own
	envRole    = "HEADSTART_TEST_ROLE"    // it is a container's first process; how it changes its root
	envRoot    = "HEADSTART_TEST_ROOT"
	envReserve = "HEADSTART_TEST_RESERVE" // it has a server of this binary stand by
)

// A container's first process executes its command with its first thread, as runc does; later the main
// goroutine may be on another.
func init() {
	if os.Getenv(envRole) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if role := os.Getenv(envRole); role != "" {
		fmt.Fprintf(os.Stderr, "%s: %v\n", role, initProcess(role))
		os.Exit(111)
	}
	if server := os.Getenv(envReserve); server != "" {
		holdReserve(server)
	}
	if os.Getenv(envPrivate) == "" && os.Getuid() == 0 {
		if err := enterPrivate(); err != nil {
			fmt.Fprintln(os.Stderr, "private mount namespace:", err)
		}
	}
	testenv.Main(m)
}

// enterPrivate executes this binary again in a mount namespace of its own, so that what
// the tests mount ends with them.
func enterPrivate() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := testenv.DropImages(); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), envPrivate+"=1"))
}

// initProcess plays a container's first process, which runc leaves waiting in the pivoted
// root until it may execute the command. The role lists what to do.
func initProcess(role string) error {
	root := os.Getenv(envRoot)
	has := func(word string) bool { return strings.Contains(role, word) }
	if has("unshare") {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if has("pivot") {
		if err := errors.Join(unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""), unix.Chdir(root), unix.PivotRoot(".", "."),
			unix.Unmount(".", unix.MNT_DETACH), unix.Chdir("/")); err != nil {
			return fmt.Errorf("pivot_root: %w", err)
		}
	} else if err := errors.Join(unix.Chroot(root), unix.Chdir("/")); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if has("proc") {
		if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
	}
	if _, err := os.NewFile(4, "standing by").Write([]byte("x")); err != nil {
		return err
	}
	if _, err := os.NewFile(3, "go").Read(make([]byte, 1)); err != nil {
		return err
	}
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	argv := os.Args[1:]
	path := argv[0]
	if !filepath.IsAbs(path) {
		path = "/usr/bin/" + path
	}
	return fmt.Errorf("execute %s: %w", path, syscall.Exec(path, argv, env))
}
