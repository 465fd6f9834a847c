package tracefs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// dir is an open directory of a tracefs. Names are relative to it, so that it does not
// matter whether and where the tracefs is mounted, or in whose mount namespace. Its methods
// may be called concurrently, except with close.
type dir struct{ file *os.File }

// retry calls f until it is not interrupted by a signal, of which the Go runtime sends many.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// open opens name with flags of open(2).
func (d dir) open(name string, flags int) (*os.File, error) {
	fd := -1
	err := retry(func() (err error) {
		fd, err = unix.Openat(int(d.file.Fd()), name, flags|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// sub opens the directory name.
func (d dir) sub(name string) (dir, error) {
	f, err := d.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	return dir{f}, err
}

func (d dir) close() error { return d.file.Close() }

// maxText bounds what is read of a file, in bytes; format files have one page.
const maxText = 1 << 20

// read returns the content of name.
func (d dir) read(name string) ([]byte, error) {
	f, err := d.open(name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxText))
	return text, errors.Join(err, f.Close())
}

// write writes value to name in one write(2). It empties name before: some files append.
func (d dir) write(name, value string) error {
	f, err := d.open(name, unix.O_WRONLY|unix.O_TRUNC)
	if err != nil {
		return err
	}
	if value != "" {
		_, err = f.WriteString(value)
	}
	return errors.Join(err, f.Close())
}

// append writes value to name in one write(2).
func (d dir) append(name, value string) error {
	f, err := d.open(name, unix.O_WRONLY|unix.O_APPEND)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// has reports whether name exists.
func (d dir) has(name string) (bool, error) {
	err := retry(func() error { return unix.Faccessat(int(d.file.Fd()), name, unix.F_OK, 0) })
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, &fs.PathError{Op: "access", Path: name, Err: err}
	}
	return true, nil
}

// names returns the sorted names in the directory name.
func (d dir) names(name string) ([]string, error) {
	s, err := d.sub(name)
	if err != nil {
		return nil, err
	}
	names, err := s.file.Readdirnames(-1)
	slices.Sort(names)
	return names, errors.Join(err, s.close())
}

// mkdir makes the directory name.
func (d dir) mkdir(name string) error {
	err := retry(func() error { return unix.Mkdirat(int(d.file.Fd()), name, 0o700) })
	if err != nil {
		return &fs.PathError{Op: "mkdir", Path: name, Err: err}
	}
	return nil
}

// rmdir removes the directory name.
func (d dir) rmdir(name string) error {
	err := retry(func() error { return unix.Unlinkat(int(d.file.Fd()), name, unix.AT_REMOVEDIR) })
	if err != nil {
		return &fs.PathError{Op: "rmdir", Path: name, Err: err}
	}
	return nil
}

// lock takes the lock on the directory, or fails with EWOULDBLOCK. It belongs to the open
// file, hence also to processes that inherit it, and ends with the last descriptor.
func (d dir) lock() error {
	return retry(func() error { return unix.Flock(int(d.file.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
}
