package unpack

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// paxXattr begins the PAX records of extended attributes, as GNU tar, star and the OCI
// image specification have them.
const paxXattr = "SCHILY.xattr."

// Tar writes the tree to w as a PAX archive: the root as "./", then every entry in the
// order of the tree, parents first, later names of a file as hard links. The archive
// format has no sockets: they are left out and counted in skipped.
func Tar(ctx context.Context, src Source, w io.Writer) (skipped int, err error) {
	b := bufio.NewWriterSize(w, 1<<18)
	a := readAhead(ctx, src)
	defer a.stop()
	t := &tarWriter{copier: copier{src: src, ahead: a}, tw: tar.NewWriter(b), first: map[*rafs.Inode]string{}, above: map[*rafs.Inode]bool{}}
	if err := t.header(&tar.Header{Typeflag: tar.TypeDir, Name: "./"}, src.Image.Root); err != nil {
		return 0, fmt.Errorf("/: %w", err)
	}
	if err := t.fill(ctx, "", src.Image.Root); err != nil {
		return 0, err
	}
	if err := t.tw.Close(); err != nil {
		return 0, err
	}
	return t.skipped, b.Flush()
}

type tarWriter struct {
	copier
	tw      *tar.Writer
	first   map[*rafs.Inode]string
	above   map[*rafs.Inode]bool
	skipped int
}

// fill writes the entries of a directory whose path below the root is where.
func (t *tarWriter) fill(ctx context.Context, where string, dir *rafs.Inode) error {
	if t.above[dir] || len(t.above) >= maxDepth {
		return fmt.Errorf("%w: /%s: a directory in itself, or more than %d levels", ErrInvalid, where, maxDepth)
	}
	t.above[dir] = true
	defer delete(t.above, dir)
	for _, e := range dir.Children {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := checkName(e.Name); err != nil {
			return fmt.Errorf("/%s: %w", where, err)
		}
		name := join("/"+where, e.Name)
		if where == "" {
			name = "/" + e.Name
		}
		name = name[1:]
		if err := t.entry(ctx, name, e.Inode); err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
		if e.Inode.Mode&typeMask == typeDir {
			if err := t.fill(ctx, name, e.Inode); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *tarWriter) entry(ctx context.Context, name string, ino *rafs.Inode) error {
	h := &tar.Header{Name: name}
	if old, ok := t.first[ino]; ok {
		h.Typeflag, h.Linkname = tar.TypeLink, old
		return t.header(h, ino)
	}
	major, minor := device(ino.Rdev)
	switch ino.Mode & typeMask {
	case typeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case typeFile:
		h.Typeflag = tar.TypeReg
		var err error
		if h.Size, err = fileSize(ino); err != nil {
			return err
		}
	case typeLink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, ino.Target
	case typeChar:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(major), int64(minor)
	case typeBlock:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(major), int64(minor)
	case typeFIFO:
		h.Typeflag = tar.TypeFifo
	case typeSocket:
		t.skipped++
		return nil
	default:
		return fmt.Errorf("%w: type %#o", ErrInvalid, ino.Mode&typeMask)
	}
	if h.Typeflag != tar.TypeDir {
		t.first[ino] = name
	}
	if err := t.header(h, ino); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	return t.copy(ctx, ino, func(p []byte, _ int64) error { _, err := t.tw.Write(p); return err })
}

// header completes h with what ino says and writes it.
func (t *tarWriter) header(h *tar.Header, ino *rafs.Inode) error {
	h.Format = tar.FormatPAX
	h.Mode = int64(ino.Mode & 0o7777)
	h.Uid, h.Gid = int(ino.UID), int(ino.GID)
	h.ModTime = time.Unix(ino.Mtime, int64(ino.MtimeNsec))
	if len(ino.Xattrs) > 0 && h.Typeflag != tar.TypeLink {
		h.PAXRecords = map[string]string{}
		for _, x := range ino.Xattrs {
			h.PAXRecords[paxXattr+x.Name] = string(x.Value)
		}
	}
	return t.tw.WriteHeader(h)
}
