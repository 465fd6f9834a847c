// Package creation finds the files of an image that a container runtime read to create a
// container, which no tracer sees: they were read before the container's first process was there.
//
// What they are was measured with strace, over containerd 2.4.2 and runc 1.4.3: containerd reads
// /etc/passwd and /etc/group to find the user and its groups, in a mount of its own, and copies what the
// image holds at its volumes; runc's init reads /etc/passwd for the home directory, and
// only looks at (stat) the program. TestAgainstStrace repeats the measurement. What OCI hooks
// read that others put into the container is not known here.
package creation

import (
	"context"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace"
)

// maxVolumeFiles bounds how many files of volumes are listed.
const maxVolumeFiles = 10_000

// userFiles are read for users and groups.
var userFiles = []string{"/etc/passwd", "/etc/group"}

// Volume is a directory that the runtime filled with what the image holds at Destination.
type Volume struct {
	Source      string // on the host
	Destination string // in the container
}

// Options says where to look.
type Options struct {
	PID     int      // of the container's first process, which has its root already
	Volumes []Volume // may be empty
	// Before is when the container's first process had not run yet: what changed in a volume
	// later is the container's.
	Before time.Time
}

// Files returns the files that the runtime read: regular files of the image, whole, each
// once, with trace.Runtime. A process that is gone, and files that are not in the image or have something
// mounted over them, are none. It opens nothing for reading and ends early with ctx.
func Files(ctx context.Context, o Options) []trace.Access {
	found := inRoot(o.PID)
	for _, v := range o.Volumes {
		found = append(found, inVolume(ctx, v, o.Before, maxVolumeFiles-len(found))...)
	}
	return found
}

// inRoot looks in the root that the process has. Links are followed as inside of it.
func inRoot(pid int) []trace.Access {
	root, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/root", unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(root) //nolint:errcheck // only a reference
	var at unix.Statx_t
	if err := unix.Statx(root, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &at); err != nil {
		return nil
	}
	var found []trace.Access
	for _, name := range userFiles {
		if a, ok := lookUp(root, at.Mnt_id, name); ok && !slices.ContainsFunc(found, func(b trace.Access) bool { return b.Path == a.Path }) {
			found = append(found, a)
		}
	}
	return found
}

func lookUp(root int, mount uint64, name string) (trace.Access, bool) {
	fd, err := unix.Openat2(root, name, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return trace.Access{}, false
	}
	defer unix.Close(fd) //nolint:errcheck // only a reference
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mnt_id != mount || st.Size > 1<<62 {
		return trace.Access{}, false
	}
	p, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil || !names(root, p, &st) {
		// The path that was asked for, where no link is on the way.
		if p = name; !names(root, p, &st) {
			return trace.Access{}, false
		}
	}
	return trace.Access{Path: p, How: trace.Runtime, Size: int64(st.Size)}, true
}

// names reports whether the path inside root, without links, is the file that st is of.
func names(root int, name string, st *unix.Statx_t) bool {
	if !path.IsAbs(name) || path.Clean(name) != name {
		return false
	}
	fd, err := unix.Openat2(root, name, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // only a reference
	var got unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO, &got)
	return err == nil && got.Ino == st.Ino && got.Dev_major == st.Dev_major && got.Dev_minor == st.Dev_minor
}

// inVolume lists at most limit files that were in the volume before the container ran.
func inVolume(ctx context.Context, v Volume, before time.Time, limit int) []trace.Access {
	var found []trace.Access
	// What cannot be read is not listed; the walk ends with ctx.
	_ = filepath.WalkDir(v.Source, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipDir
		}
		if ctx.Err() != nil || len(found) >= limit {
			return fs.SkipAll
		}
		if !d.Type().IsRegular() {
			return nil
		}
		info, err := d.Info()
		if err != nil || changed(info).After(before) {
			return nil //nolint:nilerr // it is gone, or the container's
		}
		rel, err := filepath.Rel(v.Source, p)
		if err == nil {
			found = append(found, trace.Access{Path: path.Join("/", v.Destination, rel), How: trace.Runtime, Size: info.Size()})
		}
		return nil
	})
	return found
}

// changed is when the file's inode was changed last, which a copy of times does not set back.
func changed(info fs.FileInfo) time.Time {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return time.Unix(st.Ctim.Unix())
	}
	return info.ModTime()
}

// Merge adds what the runtime read to a run's accesses: files that the run touched too get the way
// of touching, the others come first, as they were read before. Whole files were read: their
// ranges are nil. The result is the caller's; accesses is left as it is.
func Merge(accesses, runtime []trace.Access) []trace.Access {
	if len(runtime) == 0 {
		return accesses
	}
	at := make(map[string]int, len(runtime))
	for i := range runtime {
		at[runtime[i].Path] = i
	}
	rest := slices.Clone(accesses)
	touched := make([]bool, len(runtime))
	for i := range rest {
		if j, ok := at[rest[i].Path]; ok {
			rest[i].How |= trace.Runtime
			rest[i].Ranges = nil
			touched[j] = true
		}
	}
	var first []trace.Access
	for i := range runtime {
		if !touched[i] && at[runtime[i].Path] == i {
			first = append(first, runtime[i])
		}
	}
	return append(first, rest...)
}
