package workload

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// treeOptions say what [writeTree] takes of a directory tree.
type treeOptions struct {
	prefix string                               // where the tree stands in the image, without slashes at its ends
	base   string                               // a tree to compare with: only what differs is written; empty: everything
	skip   func(rel string, d fs.DirEntry) bool // left out, directories with all below; nil: nothing
	root   bool                                 // all files belong to root, as in an image made by a build
}

// inodeID names an inode of the host, to find hard links.
type inodeID struct{ dev, ino uint64 }

// treeWriter is the state of one [writeTree].
type treeWriter struct {
	treeOptions
	tw    *tar.Writer
	dir   string
	links map[inodeID]string // first names
	dirs  map[string]bool    // directories that were written, relative to dir
}

// writeTree writes the files below dir as layer entries, in lexical order: types, modes,
// owners, times, hard links, devices and extended attributes, and whiteouts for what
// only o.base has. The directories above a written file are written too, as every image
// builder does. Sockets are left out, as in every layer.
func writeTree(ctx context.Context, tw *tar.Writer, dir string, o treeOptions) error {
	w := &treeWriter{treeOptions: o, tw: tw, dir: dir, links: map[inodeID]string{}, dirs: map[string]bool{".": true}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if o.skip != nil && rel != "." && o.skip(rel, d) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.Type()&fs.ModeSocket != 0 {
			return nil
		}
		if err := w.add(rel); err != nil {
			return fmt.Errorf("%s: %w", rel, err)
		}
		return nil
	})
	if err != nil || o.base == "" {
		return err
	}
	return w.whiteouts()
}

// add writes the file unless the base has it, after the directories above it.
func (w *treeWriter) add(rel string) error {
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(w.dir, rel), &st); err != nil {
		return err
	}
	if w.base != "" && unchanged(filepath.Join(w.base, rel), &st) {
		return nil
	}
	return w.write(rel, &st)
}

// above writes the directories above rel that were not written.
func (w *treeWriter) above(rel string) error {
	for _, dir := range parents(rel) {
		if w.dirs[dir] {
			continue
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(w.dir, dir), &st); err != nil {
			return err
		}
		if err := w.write(dir, &st); err != nil {
			return err
		}
	}
	return nil
}

func (w *treeWriter) write(rel string, st *unix.Stat_t) error {
	if err := w.above(rel); err != nil {
		return err
	}
	path := filepath.Join(w.dir, rel)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		w.dirs[rel] = true
	}
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name = filepath.Join(w.prefix, rel)
	if h.Name == "." {
		return nil
	}
	if h.Typeflag == tar.TypeDir {
		h.Name += "/"
	}
	h.Format, h.Uname, h.Gname = tar.FormatPAX, "", ""
	if w.root {
		h.Uid, h.Gid = 0, 0
	}
	if h.Typeflag == tar.TypeReg && st.Nlink > 1 {
		id := inodeID{st.Dev, st.Ino}
		if first, ok := w.links[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return w.tw.WriteHeader(h)
		}
		w.links[id] = h.Name
	}
	if err := addXattrs(h, path); err != nil {
		return err
	}
	if err := w.tw.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	return copyContent(w.tw, path)
}

func copyContent(tw *tar.Writer, path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.Copy(tw, f)
	return err
}

// unchanged reports whether the file at base is the one that st describes, going by what
// a copy with "cp -a" keeps. A changed status time alone does not count.
func unchanged(base string, st *unix.Stat_t) bool {
	var b unix.Stat_t
	if err := unix.Lstat(base, &b); err != nil {
		return false
	}
	return b.Mode == st.Mode && b.Uid == st.Uid && b.Gid == st.Gid && b.Rdev == st.Rdev &&
		b.Mtim == st.Mtim && (b.Size == st.Size || st.Mode&unix.S_IFMT == unix.S_IFDIR)
}

// whiteouts writes a whiteout for each topmost file that the base has and the tree has not.
func (w *treeWriter) whiteouts() error {
	return filepath.WalkDir(w.base, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(w.base, path)
		if err != nil {
			return err
		}
		gone := w.skip != nil && rel != "." && w.skip(rel, d)
		if !gone {
			_, err := os.Lstat(filepath.Join(w.dir, rel))
			if err == nil {
				return nil
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		name := filepath.Join(w.prefix, filepath.Dir(rel), ".wh."+filepath.Base(rel))
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, ModTime: fixedTime()}
		if err := w.above(rel); err != nil {
			return err
		}
		if err := w.tw.WriteHeader(h); err != nil {
			return err
		}
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

// addXattrs records the file's extended attributes as PAX records.
func addXattrs(h *tar.Header, path string) error {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list xattrs: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		m, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return fmt.Errorf("read xattr %s: %w", name, err)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = string(value[:m])
	}
	return nil
}
