package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/imageroot"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// exactPrefix begins the names of directories of exact recordings.
const exactPrefix = "exact-"

// newExactDir makes the directory of an exact recording below base. The file "lock" in it stays locked while this process lives.
func newExactDir(base string) (dir string, lock *os.File, err error) {
	held, err := lockFile(filepath.Join(base, "lock"), unix.LOCK_EX) // so that nobody cleans what has no lock yet
	if err != nil {
		return "", nil, err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	if dir, err = os.MkdirTemp(base, exactPrefix); err != nil {
		return "", nil, err
	}
	if lock, err = lockFile(filepath.Join(dir, "lock"), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, lock, nil
}

// lockFile opens a file, made when missing, and locks it until it is closed.
func lockFile(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

// cleanExact removes what exact recordings left that were killed: mount, daemon and directory. What cannot be removed is said, and keeps
// nobody from recording.
func (o *recordOptions) cleanExact(ctx context.Context) {
	base := cmp.Or(o.scratch, imageroot.DefaultBase)
	dirs, err := filepath.Glob(filepath.Join(base, exactPrefix+"*"))
	if err != nil || len(dirs) == 0 {
		return
	}
	held, err := lockFile(filepath.Join(base, "lock"), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return // somebody else is at it
	}
	defer func() { _ = held.Close() }()
	for _, dir := range dirs {
		lock, err := lockFile(filepath.Join(dir, "lock"), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue // it is being recorded, or gone
		}
		if err == nil {
			err = errors.Join(removeExact(ctx, dir), lock.Close())
		}
		if err != nil {
			o.warn("a recording that was killed left %s: %v", dir, err)
		}
	}
}

// exactLeave is how long a killed recording's daemon may take to end: it stays for exactIdle after its last mount.
const exactLeave = 10 * time.Second

// removeExact ends what serves the mount below dir, and removes dir.
func removeExact(ctx context.Context, dir string) error {
	mnt := filepath.Join(dir, "mnt")
	c, err := exactClient(dir)
	if err != nil {
		return err
	}
	for {
		// Nothing of it is in use: the run ended with its recorder. Several may lie on top of each other.
		if err := unix.Unmount(mnt, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		} else if err != nil {
			return &os.PathError{Op: "unmount", Path: mnt, Err: err}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, exactLeave)
	defer cancel()
	for {
		s, err := c.Status(ctx, false)
		if errors.Is(err, lazy.ErrNoDaemon) {
			return os.RemoveAll(dir)
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("its daemon %d does not end, with %d mounts", s.PID, len(s.Mounts)), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
