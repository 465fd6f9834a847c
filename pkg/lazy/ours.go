package lazy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// maxStack is how deep overlays may lie on overlays: the kernel's FILESYSTEM_MAX_STACK_DEPTH.
const maxStack = 2

// elsewhere refuses a file that lies on a mount of this daemon, or on an overlay over one, like a container's root: the next daemon would read it
// before it answers, and wait for itself. A file that is not there, or cannot be reached, is left to who opens it. It asks no file system for
// anything but names.
func (d *daemon) elsewhere(path string) error { return d.notOurs(path, path, maxStack) }

// notOurs is elsewhere for what path reads, which is below, through at most depth overlays.
func (d *daemon) notOurs(path, below string, depth int) error {
	fd, err := unix.Open(below, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // who opens it says why
	}
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &st) // asks nobody
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return &os.PathError{Op: "look at", Path: below, Err: err}
	}
	device := unix.Mkdev(st.Dev_major, st.Dev_minor)
	d.mu.Lock()
	for _, m := range d.mounts {
		if m.rec.Device == device && !m.gone {
			defer d.mu.Unlock()
			return fmt.Errorf("%w: %s lies on the lazy mount at %s, which this daemon serves: it could not start again; want a file that lies elsewhere", ErrUnsupported, path, m.dir)
		}
	}
	d.mu.Unlock()
	if st.Dev_major != 0 || depth == 0 || st.Mask&unix.STATX_MNT_ID == 0 { // of a disk, or of a kernel before 5.8
		return nil
	}
	layers, err := overlayLayers(st.Mnt_id)
	for _, layer := range layers {
		err = errors.Join(err, d.notOurs(path, layer, depth-1))
	}
	return err
}

// overlayLayers returns the directories that the overlay with this id reads, as far as this mount namespace can name them; none for
// what is no overlay. Files of an overlay may have other devices than its mount.
func overlayLayers(id uint64) ([]string, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		found := uint64(m.ID) == id //nolint:gosec // ids of mounts
		return !found, found
	})
	if err != nil {
		return nil, fmt.Errorf("mounts: %w", err)
	}
	if len(mounts) == 0 || mounts[0].FSType != "overlay" {
		return nil, nil
	}
	return layersOf(mounts[0].VFSOptions), nil
}

// layersOf reads the lower directories out of an overlay's options as the kernel shows them (fs/overlayfs/params.c ovl_show_options): "lowerdir=" with
// colons in between, or one "lowerdir+=" or "datadir+=" each. Commas and spaces in names are octal there, colons have a backslash.
func layersOf(options string) (layers []string) {
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		value = unoctal(value)
		switch key {
		case "lowerdir":
			layers = append(layers, splitColons(value)...)
		case "lowerdir+", "datadir+":
			layers = append(layers, value)
		}
	}
	kept := layers[:0]
	for _, l := range layers {
		if filepath.IsAbs(l) { // others are names of who mounted it
			kept = append(kept, l)
		}
	}
	return kept
}

// unoctal puts in what stands as a backslash and three octal digits.
func unoctal(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// splitColons splits a list in which a backslash stands before what is no separator.
func splitColons(s string) (list []string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case s[i] == ':':
			list = append(list, b.String())
			b.Reset()
		default:
			b.WriteByte(s[i])
		}
	}
	return append(list, b.String())
}
