package unpack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// ErrNotEmpty is returned for a directory that has something in it.
var ErrNotEmpty = errors.New("directory is not empty")

// Dir writes the tree into the directory dir, which is made when it is missing and must
// be empty. Everything is done relative to open directories and without following links,
// so nothing outside dir is touched, whatever the tree holds. When it fails, what it wrote is
// removed again, and dir too if Dir made it. It needs root for owners and devices.
func Dir(ctx context.Context, src Source, dir string) (err error) {
	err = os.Mkdir(dir, 0o700)
	made := err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := root.Close(); err == nil {
			err = cerr
		}
		if err != nil && made {
			err = errors.Join(err, os.Remove(dir))
		}
	}()
	if left, err := fs.ReadDir(root.FS(), "."); err != nil {
		return err
	} else if len(left) > 0 {
		return fmt.Errorf("%s: %w (it holds %q)", dir, ErrNotEmpty, left[0].Name())
	}
	a := readAhead(ctx, src)
	defer a.stop()
	d := &dirWriter{copier: copier{src: src, ahead: a}, root: root, first: map[*rafs.Inode]string{}, above: map[*rafs.Inode]bool{}}
	top, err := root.Open(".")
	if err != nil {
		return err
	}
	err = d.fill(ctx, top, "/", src.Image.Root)
	if err == nil {
		if err = setAttributes(top, ".", src.Image.Root); err != nil {
			err = entryFault("/", err)
		}
	}
	err = errors.Join(err, top.Close())
	if err != nil {
		return errors.Join(err, d.undo())
	}
	return nil
}

type dirWriter struct {
	copier
	root  *os.Root
	first map[*rafs.Inode]string // path of the first name of a file, relative to root
	above map[*rafs.Inode]bool   // directories that are being filled
	made  []string               // names that were made at the top
}

// undo removes what was written.
func (d *dirWriter) undo() error {
	var errs []error
	for _, name := range d.made {
		errs = append(errs, d.root.RemoveAll(name))
	}
	return errors.Join(errs...)
}

// fill writes the entries of a directory; at is the directory itself, open.
func (d *dirWriter) fill(ctx context.Context, at *os.File, where string, dir *rafs.Inode) error {
	if d.above[dir] || len(d.above) >= maxDepth {
		return fmt.Errorf("%w: %s: a directory in itself, or more than %d levels", ErrInvalid, where, maxDepth)
	}
	d.above[dir] = true
	defer delete(d.above, dir)
	for _, e := range dir.Children {
		name := join(where, e.Name)
		err := ctx.Err()
		if err == nil {
			err = checkName(e.Name)
		}
		if err == nil {
			if where == "/" {
				d.made = append(d.made, e.Name)
			}
			err = d.entry(ctx, at, name, e)
		}
		if err != nil {
			return entryFault(name, err)
		}
	}
	return nil
}

func (d *dirWriter) entry(ctx context.Context, at *os.File, where string, e rafs.Dirent) error {
	ino := e.Inode
	if old, ok := d.first[ino]; ok {
		return d.root.Link(old, where[1:])
	}
	if ino.Mode&typeMask == typeDir {
		return d.directory(ctx, at, where, e)
	}
	d.first[ino] = where[1:]
	fd := int(at.Fd())
	var err error
	switch ino.Mode & typeMask {
	case typeFile:
		err = d.file(ctx, at, e)
	case typeLink:
		err = unix.Symlinkat(ino.Target, fd, e.Name)
	case typeChar, typeBlock, typeFIFO, typeSocket:
		var dev uint64
		if t := ino.Mode & typeMask; t == typeChar || t == typeBlock {
			dev = unix.Mkdev(device(ino.Rdev))
		}
		err = unix.Mknodat(fd, e.Name, ino.Mode&typeMask|0o600, int(dev))
	default:
		err = fmt.Errorf("%w: type %#o", ErrInvalid, ino.Mode&typeMask)
	}
	if err != nil {
		return hint(err)
	}
	return setAttributes(at, e.Name, ino)
}

func (d *dirWriter) directory(ctx context.Context, at *os.File, where string, e rafs.Dirent) error {
	if err := unix.Mkdirat(int(at.Fd()), e.Name, 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(int(at.Fd()), e.Name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), where)
	if err := d.fill(ctx, f, where, e.Inode); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	return setAttributes(at, e.Name, e.Inode)
}

func (d *dirWriter) file(ctx context.Context, at *os.File, e rafs.Dirent) error {
	size, err := fileSize(e.Inode)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(int(at.Fd()), e.Name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), e.Name)
	err = d.copy(ctx, e.Inode, func(p []byte, at int64) error {
		if isZero(p) {
			return nil // stays a hole
		}
		_, err := f.WriteAt(p, at)
		return err
	})
	if err == nil {
		err = f.Truncate(size)
	}
	return errors.Join(err, f.Close())
}

// noID is no id of an owner: chown(2) takes it for "leave it".
const noID = math.MaxUint32

// setAttributes sets what ino says on the entry name of the directory at, which is not
// followed if it is a link. The order matters: a change of owner clears the set-id bits and
// capabilities, and everything changes the times.
func setAttributes(at *os.File, name string, ino *rafs.Inode) error {
	fd := int(at.Fd())
	if ino.UID == noID || ino.GID == noID {
		return fmt.Errorf("%w: owner %d:%d, at most %d", ErrInvalid, ino.UID, ino.GID, uint32(noID-1))
	}
	if err := unix.Fchownat(fd, name, int(ino.UID), int(ino.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return hint(fmt.Errorf("set owner %d:%d: %w", ino.UID, ino.GID, err))
	}
	isLink := ino.Mode&typeMask == typeLink
	if !isLink {
		// name was just made by us and is no link.
		if err := unix.Fchmodat(fd, name, ino.Mode&0o7777, 0); err != nil {
			return fmt.Errorf("set mode %#o: %w", ino.Mode&0o7777, err)
		}
	}
	// There is no setxattrat before Linux 6.13; the directory's descriptor as a path does the same. What ends in the
	// descriptor itself would be proc's symlink, so a "." stays.
	through := "/proc/self/fd/" + strconv.Itoa(fd) + "/" + name
	for _, x := range ino.Xattrs {
		if err := unix.Lsetxattr(through, x.Name, x.Value, 0); err != nil {
			return hint(fmt.Errorf("set extended attribute %s: %w", x.Name, err))
		}
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: ino.Mtime, Nsec: int64(ino.MtimeNsec)}}
	if err := unix.UtimesNanoAt(fd, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time %d.%09d: %w", ino.Mtime, ino.MtimeNsec, err)
	}
	return nil
}

// hint says what to do about what only root may do.
func hint(err error) error {
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		return fmt.Errorf("%w; unpack as root, or to a tar archive", err)
	}
	return err
}
