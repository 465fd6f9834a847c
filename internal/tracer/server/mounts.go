package server

import (
	"errors"
	"io"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// maxMountinfo bounds what is read of one mountinfo, in bytes.
const maxMountinfo = 8 << 20

// mountinfo returns the mounts that process pid sees.
func (t *target) mountinfo(pid int) ([]*mountinfo.Info, error) {
	fd, err := unix.Openat(t.proc, strconv.Itoa(pid)+"/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	mounts, err := readMountinfo(fd)
	return mounts, errors.Join(err, unix.Close(fd))
}

// readMountinfo reads an open mountinfo from its start.
func readMountinfo(fd int) ([]*mountinfo.Info, error) {
	return mountinfo.GetMountsFromReader(io.LimitReader(&fileAt{fd: fd}, maxMountinfo), nil)
}

// fileAt reads a descriptor, which stays its owner's, from the start.
type fileAt struct {
	fd  int
	off int64
}

// Read implements io.Reader.
func (f *fileAt) Read(p []byte) (int, error) {
	n, err := unix.Pread(f.fd, p, f.off)
	if err == nil && n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	f.off += int64(max(n, 0))
	return max(n, 0), err
}

func findMount(mounts []*mountinfo.Info, id uint64) *mountinfo.Info {
	for _, m := range mounts {
		if m.ID >= 0 && uint64(m.ID) == id {
			return m
		}
	}
	return nil
}

// upperDir returns the writable layer's path from an overlay's options, "" without one.
func upperDir(options string) string {
	for o := range strings.SplitSeq(options, ",") {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return unescapeOctal(dir)
		}
	}
	return ""
}

// unescapeOctal undoes seq_file's escapes (\040 and the like).
// Source: fs/seq_file.c mangle_path, lib/string_helpers.c string_escape_mem.
func unescapeOctal(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b = append(b, byte(v))
				i += 3
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}

// outsiders tells accesses of the host to the container's files, which come in through the
// mounts of the host's namespace, from those of the container.
type outsiders struct {
	t    *target
	host map[uint64]bool // by mount id: whether it is one of the host's
	off  bool            // the container uses a mount of the host's itself
}

func newOutsiders(t *target) *outsiders {
	o := &outsiders{t: t, host: make(map[uint64]bool)}
	o.off = t.stat.Mask&unix.STATX_MNT_ID == 0
	return o
}

// has reports whether mount is one of the host's. Ids that were not seen before cost a
// read of the host's mountinfo.
func (o *outsiders) has(mount uint64) bool {
	if o.off || mount == o.t.stat.Mnt_id {
		return false
	}
	if known, ok := o.host[mount]; ok {
		return known
	}
	if len(o.host) >= maxMountRoots {
		clear(o.host)
	}
	mounts, err := readMountinfo(o.t.host)
	if err != nil {
		o.off = true // then its accesses are listed too
		return false
	}
	if findMount(mounts, o.t.stat.Mnt_id) != nil {
		o.off = true // nothing tells them apart
		return false
	}
	o.host[mount] = findMount(mounts, mount) != nil
	return o.host[mount]
}
