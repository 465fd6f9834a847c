// Package atomicfile puts whole files in place: a reader sees the old bytes or the new
// ones. A file is written under a temporary name, synced, renamed, and its directory
// synced. A temporary file is locked while its writer lives, so that [Clean] can tell
// what a killed writer left from what another process is writing.
package atomicfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// TempPrefix begins the name of every temporary file.
const TempPrefix = ".headstart-tmp-"

// Write creates or replaces the file name below root with what fill writes. The temporary
// file is made in the directory temp below root, which must exist and lie on the same
// file system. When fill or the system fails, the old file stays and no temporary file
// is left. Safe for concurrent use, also between processes: the last rename wins.
func Write(root *os.Root, temp, name string, perm fs.FileMode, fill func(io.Writer) error) (err error) {
	f, tmp, err := create(root, temp, perm)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", name, errors.Join(err, ignoreMissing(root.Remove(tmp))))
		}
	}()
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		// Before the close, which gives the lock away.
		err = root.Rename(tmp, name)
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return SyncDir(root, path.Dir(name))
}

// Try returns why [Write] could not make its temporary file in the directory temp below root, nil when it could.
func Try(root *os.Root, temp string) error {
	f, tmp, err := create(root, temp, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(ignoreMissing(root.Remove(tmp)), f.Close())
}

// Symlink creates or replaces name below root by a symbolic link to target, in one step.
func Symlink(root *os.Root, temp, target, name string) error {
	for {
		tmp := tempName(temp)
		if err := root.Symlink(target, tmp); err != nil {
			return fmt.Errorf("link %s: %w", name, err)
		}
		err := root.Rename(tmp, name)
		if err == nil {
			return SyncDir(root, path.Dir(name))
		}
		// A link has no lock: when another process' Clean took it away, make it again.
		if _, statErr := root.Lstat(tmp); !errors.Is(statErr, fs.ErrNotExist) {
			return fmt.Errorf("link %s: %w", name, errors.Join(err, root.Remove(tmp)))
		}
		if _, dirErr := root.Lstat(path.Dir(name)); dirErr != nil {
			return fmt.Errorf("link %s: %w", name, dirErr)
		}
	}
}

// Clean removes the temporary files and links in the directory temp below root whose
// writers are gone. A directory that does not exist is clean.
func Clean(root *os.Root, temp string) error {
	entries, err := fs.ReadDir(root.FS(), temp)
	if err != nil {
		return ignoreMissing(err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), TempPrefix) {
			if err := removeStale(root, path.Join(temp, e.Name())); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func removeStale(root *os.Root, name string) error {
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return root.Remove(name)
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = root.Remove(name)
	} else if errors.Is(err, unix.EWOULDBLOCK) {
		err = nil // its writer lives
	}
	return errors.Join(err, f.Close())
}

// SyncDir makes the names in the directory name below root durable.
func SyncDir(root *os.Root, name string) error {
	d, err := root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// create makes and locks a temporary file. A cleaner that comes between the two takes
// the file away; then another is made.
func create(root *os.Root, temp string, perm fs.FileMode) (*os.File, string, error) {
	for {
		name := tempName(temp)
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
		if err != nil {
			return nil, "", err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			var st unix.Stat_t
			if err = unix.Fstat(int(f.Fd()), &st); err == nil && st.Nlink == 1 {
				return f, name, nil
			}
		}
		gone := err == nil || errors.Is(err, unix.EWOULDBLOCK)
		err = errors.Join(err, f.Close(), ignoreMissing(root.Remove(name)))
		if !gone {
			return nil, "", err
		}
	}
}

func tempName(dir string) string { return path.Join(dir, TempPrefix+rand.Text()) }

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
