package server

import (
	"errors"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// layer is one directory that the image's files come from: a lower directory of the
// overlay, the topmost first, or the root itself where it is no overlay.
type layer struct {
	fd   int    // O_PATH
	dev  uint64 // s_dev of its superblock, which page events name; not always its st_dev
	kind string // of its filesystem
}

// cached lists the filesystems whose files are read through the page cache and nowhere else, so
// that what page events do not show was not touched. Source: their read_iter is
// generic_file_read_iter or calls filemap_read. Not among them: tmpfs (mm/shmem.c reads by itself),
// overlay (the events name the filesystem below it), FUSE and ZFS (may bypass or double the cache).
var cached = []string{"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "erofs", "squashfs", "iso9660", "jfs", "bcachefs"}

// visible reports whether page events tell everything that is read of the layer's files.
func (l *layer) visible() bool { return slices.Contains(cached, l.kind) }

var errNoLayers = errors.New("the image's layers cannot be seen from here")

// openLayers opens the lower directories of an overlay, as mounts, this process' own, show
// them; metacopy is what the overlay module does by default. It returns errNoLayers when any of them is not there.
func openLayers(overlay *mountinfo.Info, mounts []*mountinfo.Info, metacopy bool) ([]layer, error) {
	dirs := lowerDirs(overlay.VFSOptions)
	if len(dirs) == 0 || splitsData(overlay.VFSOptions, metacopy) {
		return nil, errNoLayers
	}
	for _, base := range bases(overlay, mounts) {
		layers, err := openDirs(dirs, base, overlay.Root, mounts)
		if err == nil {
			return layers, nil
		}
	}
	return nil, errNoLayers
}

// splitsData reports whether a file of the overlay may have its data in another layer than its
// metadata: then one path is two inodes. on is what the module does by default, which the
// options do not show.
func splitsData(options string, on bool) bool {
	for o := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(o, "=")
		switch {
		case key == "datadir+", key == "lowerdir" && strings.Contains(value, "::"):
			return true
		case key == "metacopy":
			on = value == "on"
		}
	}
	return on
}

// readParameter returns a default of the overlay module. It is for before the join: what a container has
// at the same path may be anything.
func readParameter(name string) bool {
	b, err := os.ReadFile("/sys/module/overlay/parameters/" + name)
	return err == nil && strings.HasPrefix(string(b), "Y")
}

func openDirs(dirs []string, base, below string, mounts []*mountinfo.Info) ([]layer, error) {
	var layers []layer
	for _, dir := range dirs {
		if !path.IsAbs(dir) {
			if base == "" {
				return nil, errors.Join(errNoLayers, closeLayers(layers))
			}
			dir = base + "/" + dir
		}
		l, err := openLayer(dir, below, mounts)
		if errors.Is(err, unix.ENOENT) && below != "/" {
			continue // what is mounted is a directory that this layer has not
		}
		if err != nil {
			return nil, errors.Join(err, closeLayers(layers))
		}
		layers = append(layers, l)
	}
	return layers, nil
}

// openLayer opens a directory and finds out what filesystem it is on.
func openLayer(dir, below string, mounts []*mountinfo.Info) (layer, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	fd, err := unix.Open(path.Join(dir, below), flags, 0)
	if err != nil {
		return layer{}, err
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return layer{}, errors.Join(err, unix.Close(fd))
	}
	m := findMount(mounts, mountOf(&st))
	if m == nil {
		return layer{}, errors.Join(errNoLayers, unix.Close(fd))
	}
	return layer{fd: fd, dev: deviceOf(m), kind: m.FSType}, nil
}

// deviceOf is the device number of a mount's superblock.
func deviceOf(m *mountinfo.Info) uint64 {
	return unix.Mkdev(uint32(m.Major), uint32(m.Minor)) //nolint:gosec // 12 and 20 bits
}

func closeLayers(layers []layer) (err error) {
	for i := range layers {
		err = errors.Join(err, replace(&layers[i].fd, -1))
	}
	return err
}

// bases yields directories that the relative paths of an overlay's options may be meant from. Container
// engines change into a directory above the layers when the options would be too long: it is
// above the writable layer, or above where the overlay is mounted.
func bases(overlay *mountinfo.Info, mounts []*mountinfo.Info) []string {
	found := []string{""}
	above := func(p string) {
		for p = path.Dir(p); path.IsAbs(p) && p != "/"; p = path.Dir(p) {
			found = append(found, p)
		}
	}
	above(upperDir(overlay.VFSOptions))
	for _, m := range mounts {
		if m.Major == overlay.Major && m.Minor == overlay.Minor {
			above(m.Mountpoint)
		}
	}
	return found
}

// lowerDirs returns the lower directories in an overlay's options, the topmost first, and then
// those that hold data only.
//
// The kernel shows them in one of three ways: as they were given, where a colon separates and a
// backslash, itself shown as \134, escapes; each escaped and joined by colons (Linux 6.5 to 6.7); or
// one by one. Source: fs/overlayfs/params.c ovl_show_options, ovl_parse_param_lowerdir.
func lowerDirs(options string) []string {
	var dirs []string
	for o := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			dirs = append(dirs, splitLower(value)...)
		case "lowerdir+", "datadir+":
			dirs = append(dirs, unescapeOctal(value))
		}
	}
	return dirs
}

func splitLower(s string) []string {
	var dirs []string
	var dir []byte
	escaped := false
	for i := 0; i <= len(s); i++ {
		if i == len(s) || (s[i] == ':' && !escaped) {
			if len(dir) > 0 { // "::" comes before layers of data
				dirs = append(dirs, string(dir))
			}
			dir = dir[:0]
			continue
		}
		c := s[i]
		if c == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				c = byte(v)
				i += 3
			}
		}
		if c == '\\' && !escaped {
			escaped = true
			continue
		}
		dir, escaped = append(dir, c), false
	}
	return dirs
}
