package testenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// MountNamespace runs f on a thread of its own in a mount namespace of its own,
// whose mounts end with it and reach nobody else. Images that were mounted before
// are not in it ([DropImages]). Commands that f starts are in
// that namespace too; goroutines that it starts are not. f must not call t.Fatal
// and the like, which work on the test's goroutine only: it returns its error,
// which fails the test. It needs root.
func MountNamespace(t testing.TB, f func() error) {
	t.Helper()
	Root(t)
	done := make(chan error, 1)
	go onOwnThread(func() {
		done <- func() (err error) {
			defer func() {
				if r := recover(); r != nil {
					err = fmt.Errorf("panic: %v", r)
				}
			}()
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("unshare the mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("make mounts private: %w", err)
			}
			if err := DropImages(); err != nil {
				return err
			}
			return f()
		}()
	})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// DropImages detaches the EROFS and FUSE mounts below the directory of temporary files in the mount namespace of this thread, which must be
// private. They are copies of mounts that other tests unmount, and then wait for their ends.
func DropImages() error {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	all, err := mountinfo.GetMountsFromReader(bytes.NewReader(text), nil)
	if err != nil {
		return err
	}
	temp := strings.TrimSuffix(os.TempDir(), "/") + "/"
	for _, m := range slices.Backward(all) { // what lies on others first
		if (m.FSType == "erofs" || strings.HasPrefix(m.FSType, "fuse")) && strings.HasPrefix(m.Mountpoint, temp) {
			if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return &os.PathError{Op: "detach", Path: m.Mountpoint, Err: err}
			}
		}
	}
	return nil
}

// OwnThread calls f on a thread that ends with it, and with the thread whatever of it f changed, such as its user. Goroutines that f
// starts are on others. It returns when f has, with its error.
func OwnThread(f func() error) error {
	done := make(chan error, 1)
	go onOwnThread(func() { done <- f() })
	return <-done
}

// onOwnThread calls f on a thread that ends with it, and with the thread what it
// unshared. The first thread of a process never ends before the process, and is
// the one that /proc/self shows: f never gets it.
func onOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f() // never unlocked: the thread ends with the goroutine
		return
	}
	defer runtime.UnlockOSThread()
	ended := make(chan struct{})
	go func() { // not on the first thread, which is held here
		defer close(ended)
		onOwnThread(f)
	}()
	<-ended
}

// MountEROFS mounts the EROFS image bootstrap read-only with one device file per
// blob, in the order of the image's device table, and returns the mount point.
// It is unmounted when the test ends. Images are mounted from files directly,
// which takes Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE; an older kernel
// skips the test. Any other refusal of the kernel fails it with the kernel's
// words.
func MountEROFS(t testing.TB, bootstrap string, devices ...string) string {
	t.Helper()
	Root(t)
	dir := t.TempDir()
	err := MountEROFSAt(dir, bootstrap, devices...)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOTBLK) || errors.Is(err, unix.ENOSYS) {
		Kernel(t, "EROFS mounts of plain files (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE)", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// MountEROFSAt is [MountEROFS] without a test: it mounts at dir, and the caller
// unmounts. Options go to the kernel one by one through fsconfig(2), because
// those of many devices do not fit the one page of mount(2). The error holds what
// the kernel said on the mount's log.
func MountEROFSAt(dir, bootstrap string, devices ...string) (err error) {
	fail := func(step string, err error) error {
		return fmt.Errorf("mount erofs %s at %s: %s: %w", bootstrap, dir, step, err)
	}
	fs, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fail("fsopen", err)
	}
	defer func() { _ = unix.Close(fs) }()
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fail("set "+key+"="+value, errors.Join(err, kernelLog(fs)))
		}
		return nil
	}
	if err := set("source", bootstrap); err != nil {
		return err
	}
	for _, d := range devices {
		if err := set("device", d); err != nil {
			return err
		}
	}
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return fail("set ro", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fail("create", errors.Join(err, kernelLog(fs)))
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return fail("fsmount", errors.Join(err, kernelLog(fs)))
	}
	defer func() { _ = unix.Close(mnt) }()
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fail("move_mount", err)
	}
	return nil
}

// kernelLog returns what the kernel has to say about a filesystem context, or
// nil: one message per read, see fs/fsopen.c fscontext_read.
func kernelLog(fs int) error {
	var lines []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[:n])))
	}
	if len(lines) == 0 {
		return nil
	}
	return errors.New("kernel: " + strings.Join(lines, "; "))
}

// Unmount unmounts dir, waiting a little while it is busy, then detaches it.
func Unmount(dir string) error {
	for range 50 {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if !errors.Is(err, unix.EBUSY) {
			if err != nil {
				return &os.PathError{Op: "unmount", Path: dir, Err: err}
			}
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "detach", Path: dir, Err: err}
	}
	return fmt.Errorf("unmount %s: busy for a second, detached", dir)
}

// MountDisk makes a file system of size bytes in a file with mkfs, a command with its arguments, mounts it, and returns where. It is
// unmounted when the test ends. A kernel that has no such file system, or no loop devices, skips the test.
func MountDisk(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	return MountImage(t, NewDisk(t, size, mkfs...), "")
}

// NewDisk makes a file system of size bytes with mkfs, a command with its arguments, in a file, which it returns. mkfs.ext4, which is in every
// installation, need not be a path.
func NewDisk(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	Root(t)
	if mkfs[0] == "mkfs.ext4" {
		path, err := exec.LookPath(mkfs[0])
		if err != nil {
			Missing(t, "no mkfs.ext4")
		}
		mkfs = append([]string{path}, mkfs[1:]...)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, size)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], disk)...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	return disk
}

// MountImage mounts the file system in the file image with options, such as "commit=300", and returns where. It is unmounted when the
// test ends.
func MountImage(t testing.TB, image, options string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop,"+options, image, dir).CombinedOutput(); err != nil {
		Kernel(t, "the file system of "+image+" in a loop device", fmt.Errorf("%w: %s", err, out))
	}
	t.Cleanup(func() {
		if err := Unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
