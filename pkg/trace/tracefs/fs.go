package tracefs

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Errors of this package besides [ErrInvalid]; all answer to errors.Is.
var (
	// ErrUnsupported: the kernel has no tracefs, or none of the wanted events; or this
	// process lives in a PID namespace whose numbers the kernel's filter does not know.
	ErrUnsupported = errors.New("page tracing is not supported here")
	// ErrPermission: privileges are missing.
	ErrPermission = errors.New("page tracing needs CAP_SYS_ADMIN and root's access to tracefs")
	// ErrLimit: no further instance can be had, of the kernel or of a [Pool].
	ErrLimit = errors.New("no further trace instance")
	// ErrClosed: the object was closed.
	ErrClosed = errors.New("closed")
)

// explain makes one of this package's errors of the kernel's.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%w: %w", ErrLimit, err)
	}
	return err
}

// FS is one mount of tracefs. It is safe for concurrent use, except Close with anything.
type FS struct {
	root      dir
	instances dir

	// mu guards what follows: answers of Probe that will not change while the kernel runs.
	mu        sync.Mutex
	has       Set // events that the kernel has
	lacks     Set // events that it does not
	calibrate calibration
}

// places are where a tracefs is looked for when a private one cannot be had.
// Source: Documentation/trace/ftrace.rst.
var places = []string{"/sys/kernel/tracing", "/sys/kernel/debug/tracing"}

// initialPIDNamespace is the inode number of the initial PID namespace.
// Source: include/uapi/linux/nsfs.h PID_NS_INIT_INO (include/linux/proc_ns.h before 6.18).
const initialPIDNamespace = 0xEFFFFFFC

// Open returns a tracefs: one mounted for this call alone and attached nowhere, so that
// nobody sees it and nobody can unmount it; or, where that is refused, the one mounted in one
// of the usual places. The caller closes it. It returns [ErrUnsupported] or [ErrPermission]
// with what is missing.
func Open() (*FS, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err == nil && st.Ino != initialPIDNamespace {
		return nil, fmt.Errorf("%w: not in the initial PID namespace (found %d)", ErrUnsupported, st.Ino)
	}
	f, err := private()
	if err == nil {
		return newFS(f)
	}
	for _, p := range places {
		if fs, perr := OpenAt(p); perr == nil {
			return fs, nil
		}
	}
	return nil, fmt.Errorf("mount tracefs: %w; and it is mounted at none of %s", explain(err), strings.Join(places, ", "))
}

// OpenAt returns the tracefs mounted at path, which may be unmounted later without harm.
// The caller closes it. It returns [ErrUnsupported] when there is another filesystem.
func OpenAt(path string) (*FS, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open tracefs: %w", explain(err))
	}
	var st unix.Statfs_t
	err = retry(func() error { return unix.Fstatfs(int(f.Fd()), &st) })
	if err == nil && st.Type != unix.TRACEFS_MAGIC {
		err = fmt.Errorf("%w: %s is no tracefs (filesystem type %#x)", ErrUnsupported, path, st.Type)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return newFS(f)
}

// newFS takes over the root directory of a tracefs.
func newFS(root *os.File) (*FS, error) {
	d := dir{root}
	in, err := d.sub("instances")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tracefs: %w", explain(err)), root.Close())
	}
	return &FS{root: d, instances: in}, nil
}

// private mounts a tracefs that is attached nowhere; it goes with its last descriptor.
func private() (*os.File, error) {
	ctx, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(ctx) //nolint:errcheck // nothing was written
	if err := retry(func() error { return unix.FsconfigCreate(ctx) }); err != nil {
		return nil, fmt.Errorf("fsconfig: %w", err)
	}
	mnt, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	// The mount's descriptor is one of O_PATH, in which directories cannot be read.
	defer unix.Close(mnt) //nolint:errcheck // only a reference
	fd := -1
	err = retry(func() (err error) {
		fd, err = unix.Openat(mnt, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open root: %w", err)
	}
	return os.NewFile(uintptr(fd), "tracefs"), nil
}

// Close gives the mount up; instances go on. Later calls return nil.
func (f *FS) Close() error {
	err := errors.Join(f.instances.close(), f.root.close())
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// Probe returns which of the wanted events should be recorded here; want 0 means the best
// there is: [Pages] where the kernel has all three, with [Inserts] and [Waits] for [Gaps], else [Inserts] alone, and [Processes] with
// either. Otherwise it is want, less what is missing of Processes and Waits. It returns
// [ErrUnsupported] with the names of what is missing, or [ErrPermission], and then nothing is
// known. Conclusive answers are remembered.
func (f *FS) Probe(want Set) (Set, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for k := range Kind(kinds) {
		if f.has.Has(k) || f.lacks.Has(k) {
			continue
		}
		ok, err := f.root.has("events/" + tracepoints[k].dir + "/format")
		switch {
		case err != nil:
			return 0, fmt.Errorf("probe %s: %w", k, explain(err))
		case ok:
			f.has |= 1 << k
		default:
			f.lacks |= 1 << k
		}
	}
	return choose(f.has, want)
}

// choose is the rule of [FS.Probe].
func choose(has, want Set) (Set, error) {
	if want != 0 {
		if missing := want &^ (Processes | Waits) &^ has; missing != 0 {
			return 0, fmt.Errorf("%w: no tracepoint %s (CONFIG_FTRACE, Linux 6.11 or newer)", ErrUnsupported, missing)
		}
		return want & has, nil
	}
	switch {
	case has.Contains(Pages):
		return has, nil
	case has.Contains(Inserts):
		return has &^ (Pages | Waits), nil
	}
	return 0, fmt.Errorf("%w: no tracepoint %s (CONFIG_FTRACE, Linux 6.11 or newer), nor %s", ErrUnsupported, Pages&^has, Inserts)
}
