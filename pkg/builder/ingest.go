package builder

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// MaxEntries is the number of tar entries that a layer may have; it bounds the memory
// that a small, highly compressed layer can ask for.
const MaxEntries = 1 << 23

// The names that layers give a meaning to. Source: OCI image-spec layer.md, "Whiteouts";
// ".wh..wh." others are AUFS bookkeeping.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

const (
	paxXattr = "SCHILY.xattr."

	maxXattrName  = 255   // XATTR_NAME_MAX
	maxXattrValue = 65535 // a v6 value's size has 16 bits
	// maxXattrs bounds all attributes of one inode: i_xattr_icount has 16 bits and counts
	// 4-byte words. Source: fs/erofs/erofs_fs.h erofs_xattr_ibody_size.
	maxXattrs  = math.MaxUint16 * 4
	maxSymlink = 4095 // PATH_MAX without the NUL, as symlink(2) refuses
)

// dataSink takes the content of regular files in tar order. It fills ino.Chunks, at the
// latest when the layer is complete.
type dataSink interface {
	writeFile(ctx context.Context, ino *rafs.Inode, r io.Reader, size int64) error
}

// layerReader builds the tree of one layer from its tar.
type layerReader struct {
	tree      *tree
	sink      dataSink
	chunkSize int64
	chunks    int64 // of all files so far

	// lastDir is the directory of the previous entry; most entries are in the same.
	lastName string
	lastDir  *dir

	xattrsIgnored int
}

// read builds the tree from r, which it reads up to the end of the archive.
func (l *layerReader) read(ctx context.Context, r io.Reader) error {
	tr := tar.NewReader(r)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			// Of several links to one file the last entry says what its attributes are.
			slices.SortFunc(l.tree.links, func(a, b *lowerLink) int { return cmp.Compare(a.turn, b.turn) })
			return nil
		}
		if err != nil {
			return fmt.Errorf("tar header of entry %d: %w", n, tarError(err))
		}
		if n >= MaxEntries {
			return fmt.Errorf("%w: more than %d entries", ErrUnsupported, MaxEntries)
		}
		if err := l.add(ctx, hdr, tr); err != nil {
			return fmt.Errorf("entry %q: %w", clip(hdr.Name), err)
		}
	}
}

// errTarSyntax marks bytes that are no tar, which may be the fault of what brought them.
var errTarSyntax = fmt.Errorf("%w: broken tar", ErrInvalid)

// tarError classifies an error of archive/tar; those of the stream below pass through.
func tarError(err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the archive is cut off", errTarSyntax)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong):
		return fmt.Errorf("%w: %w", errTarSyntax, err)
	}
	return err
}

// clip shortens a name for an error text.
func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// add puts one entry into the tree.
func (l *layerReader) add(ctx context.Context, hdr *tar.Header, r io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if name == "." {
		return l.setRoot(hdr)
	}
	dirName, base := path.Split(name)
	dirName = strings.TrimSuffix(dirName, "/")
	if skip, err := checkWhiteoutParents(dirName); skip || err != nil {
		return err
	}
	// The name of what a whiteout removes has to fit, not the whiteout's own, which no file gets.
	if err := checkNames(append(split(dirName), strings.TrimPrefix(base, whiteoutPrefix))); err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutMeta) && base != whiteoutOpaque {
		return nil
	}
	parent, err := l.parent(dirName)
	if err != nil {
		return err
	}
	if marker, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return addMarker(parent, base, marker)
	}
	// A copy, because base would keep the whole path in memory.
	return l.put(ctx, parent, strings.Clone(base), hdr, r)
}

// cleanName makes an entry's name relative to the root; "." is the root itself.
func cleanName(name string) (string, error) {
	if len(name) > 16*maxPath {
		return "", fmt.Errorf("%w: name of %d bytes, at most %d", ErrInvalid, len(name), maxPath)
	}
	clean := path.Clean(name)
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fmt.Errorf("%w: the path escapes the root", ErrInvalid)
	}
	clean = strings.TrimPrefix(clean, "/")
	if clean == "" {
		clean = "."
	}
	return clean, nil
}

// checkWhiteoutParents deals with entries below a marker: those of AUFS are skipped as the
// spec's reserved names, others make no sense.
func checkWhiteoutParents(dirName string) (skip bool, err error) {
	if !strings.Contains(dirName, whiteoutPrefix) {
		return false, nil
	}
	for n := range strings.SplitSeq(dirName, "/") {
		if strings.HasPrefix(n, whiteoutMeta) {
			return true, nil
		}
		if strings.HasPrefix(n, whiteoutPrefix) {
			return false, fmt.Errorf("%w: the parent %q is a whiteout", ErrInvalid, n)
		}
	}
	return false, nil
}

// addMarker records a whiteout or an opaque directory. Both concern lower layers only,
// wherever in the tar they are. Source: OCI image-spec layer.md.
func addMarker(parent *dir, base, name string) error {
	if base == whiteoutOpaque {
		parent.opaque = true
		return nil
	}
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%w: a whiteout of %q", ErrInvalid, name)
	}
	parent.whiteout(name)
	return nil
}

func (l *layerReader) setRoot(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return fmt.Errorf("%w: the root is no directory", ErrInvalid)
	}
	a, err := l.attrsOf(hdr)
	if err != nil {
		return err
	}
	l.tree.root.ino = a.inode(unix.S_IFDIR)
	l.tree.root.dir.explicit = true
	return nil
}

// parent returns the directory called name, which may go through symlinks of this layer.
func (l *layerReader) parent(name string) (*dir, error) {
	if l.lastDir != nil && l.lastName == name {
		return l.lastDir, nil
	}
	d, err := l.tree.mkdirs(name)
	if err != nil {
		return nil, err
	}
	l.lastName, l.lastDir = name, d
	return d, nil
}

// put replaces whatever base is in parent by the entry of hdr; a directory that meets a
// directory keeps its content.
func (l *layerReader) put(ctx context.Context, parent *dir, base string, hdr *tar.Header, r io.Reader) error {
	a, err := l.attrsOf(hdr)
	if err != nil {
		return err
	}
	old := parent.get(base)
	if hdr.Typeflag == tar.TypeDir {
		ino := a.inode(unix.S_IFDIR)
		if old.dir == nil {
			old = newDir(ino)
			l.lastDir = nil // a symlink that paths went through may be gone
		} else {
			ino.Xattrs = mergeXattrs(old.ino.Xattrs, ino.Xattrs)
		}
		old.ino = ino
		old.dir.explicit = true
		parent.put(base, old)
		return nil
	}
	if old.exists() {
		// What is replaced is gone before the new entry is made: a link to itself has no target.
		parent.remove(base)
		l.lastDir = nil
	}
	if hdr.Typeflag == tar.TypeLink {
		e, err := l.link(hdr, a)
		if err != nil {
			return err
		}
		parent.put(base, e)
		return nil
	}
	ino, err := l.inode(hdr, a)
	if err != nil {
		return err
	}
	parent.put(base, entry{ino: ino})
	if ino.Mode&unix.S_IFMT != unix.S_IFREG || hdr.Size == 0 {
		return nil
	}
	if err := l.sink.writeFile(ctx, ino, r, hdr.Size); err != nil {
		return fmt.Errorf("data: %w", tarError(err))
	}
	return nil
}

// inode makes the inode of anything but directories and hard links.
func (l *layerReader) inode(hdr *tar.Header, a attrs) (*rafs.Inode, error) {
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeGNUSparse: //nolint:staticcheck // TypeRegA: old tars have it
		ino := a.inode(unix.S_IFREG)
		if hdr.Size < 0 {
			return nil, fmt.Errorf("%w: size %d", ErrInvalid, hdr.Size)
		}
		// Sparse files make data of nothing, so what is bounded is the number of chunks.
		l.chunks += hdr.Size/l.chunkSize + 1
		if l.chunks > rafs.MaxChunks {
			return nil, fmt.Errorf("%w: %d bytes bring the layer above %d chunks of %d bytes", ErrUnsupported, hdr.Size, rafs.MaxChunks, l.chunkSize)
		}
		ino.Size = uint64(hdr.Size)
		return ino, nil
	case tar.TypeSymlink:
		if n := len(hdr.Linkname); n == 0 || n > maxSymlink {
			return nil, fmt.Errorf("%w: symlink target of %d bytes, want 1 to %d", ErrInvalid, n, maxSymlink)
		}
		ino := a.inode(unix.S_IFLNK)
		ino.Mode = unix.S_IFLNK | 0o777 // Linux knows no other
		ino.Target = hdr.Linkname
		ino.Size = uint64(len(hdr.Linkname))
		return ino, nil
	case tar.TypeFifo:
		return a.inode(unix.S_IFIFO), nil
	case tar.TypeChar, tar.TypeBlock:
		rdev, err := deviceNumber(hdr.Devmajor, hdr.Devminor)
		if err != nil {
			return nil, err
		}
		ino := a.inode(unix.S_IFCHR)
		if hdr.Typeflag == tar.TypeBlock {
			ino = a.inode(unix.S_IFBLK)
		}
		ino.Rdev = rdev
		return ino, nil
	}
	return nil, fmt.Errorf("%w: tar entry type %q", ErrUnsupported, hdr.Typeflag)
}

// deviceNumber encodes a device number as the kernel's dev_t of 32 bits.
// Source: include/linux/kdev_t.h new_encode_dev.
func deviceNumber(major, minor int64) (uint32, error) {
	const maxMajor, maxMinor = 1<<12 - 1, 1<<20 - 1
	if major < 0 || major > maxMajor || minor < 0 || minor > maxMinor {
		return 0, fmt.Errorf("%w: device number %d:%d, at most %d:%d", ErrInvalid, major, minor, maxMajor, maxMinor)
	}
	ma, mi := uint32(major), uint32(minor)
	return mi&0xff | ma<<8 | mi&^0xff<<12, nil
}

// link makes the entry of a hard link. As link(2) of an unpacked layer would, it shares the
// target's inode and gives it the attributes of the link's own header.
func (l *layerReader) link(hdr *tar.Header, a attrs) (entry, error) {
	target, err := cleanName(hdr.Linkname)
	if err != nil {
		return entry{}, fmt.Errorf("hard link to %q: %w", clip(hdr.Linkname), err)
	}
	_, e, err := l.tree.locate(target, false)
	if err != nil {
		return entry{}, fmt.Errorf("hard link to %q: %w", clip(hdr.Linkname), err)
	}
	switch {
	case e.dir != nil:
		return entry{}, fmt.Errorf("%w: hard link to directory %q", ErrInvalid, target)
	case e.link != nil:
		a.ino = nil
		e.link.attrs = e.link.attrs.merged(a)
		e.link.turn = l.tree.nextTurn()
		return e, nil
	case e.ino != nil:
		a.apply(e.ino)
		l.tree.shared[e.ino] = struct{}{}
		return e, nil
	}
	ll := &lowerLink{name: hdr.Name, target: target, attrs: a, turn: l.tree.nextTurn()}
	l.tree.links = append(l.tree.links, ll)
	return entry{link: ll}, nil
}

// attrs are the attributes of a tar header.
type attrs struct {
	perm     uint32
	uid, gid uint32
	mtime    int64
	nsec     uint32
	xattrs   []rafs.Xattr // sorted by name
	ino      *rafs.Inode  // of a lowerLink, when it is resolved
}

func (l *layerReader) attrsOf(hdr *tar.Header) (attrs, error) {
	if hdr.Uid < 0 || int64(hdr.Uid) > math.MaxUint32 || hdr.Gid < 0 || int64(hdr.Gid) > math.MaxUint32 {
		return attrs{}, fmt.Errorf("%w: owner %d:%d, at most %d", ErrInvalid, hdr.Uid, hdr.Gid, uint32(math.MaxUint32))
	}
	a := attrs{
		perm: uint32(hdr.Mode & 0o7777),
		uid:  uint32(hdr.Uid), gid: uint32(hdr.Gid),
		mtime: hdr.ModTime.Unix(),
		nsec:  uint32(hdr.ModTime.Nanosecond()), //nolint:gosec // below 10^9
	}
	if len(hdr.PAXRecords) == 0 {
		return a, nil
	}
	total := 12 // header of the attributes
	for _, key := range slices.Sorted(maps.Keys(hdr.PAXRecords)) {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok {
			continue
		}
		if !wantXattr(name, hdr.Typeflag) {
			l.xattrsIgnored++
			continue
		}
		value := hdr.PAXRecords[key]
		if len(name) > maxXattrName || len(value) > maxXattrValue {
			return attrs{}, fmt.Errorf("%w: xattr %q has a name of %d bytes and a value of %d, at most %d and %d", ErrInvalid, clip(name), len(name), len(value), maxXattrName, maxXattrValue)
		}
		if total += 8 + len(name) + len(value); total > maxXattrs {
			return attrs{}, fmt.Errorf("%w: xattrs of more than %d bytes", ErrInvalid, maxXattrs)
		}
		a.xattrs = append(a.xattrs, rafs.Xattr{Name: name, Value: []byte(value)})
	}
	return a, nil
}

// wantXattr tells which attributes an unpacked layer would have: containerd does not set
// trusted ones, and goes on where the kernel refuses a namespace or user attributes on
// what is neither file nor directory. Source: containerd pkg/archive createTarFile, xattr(7).
func wantXattr(name string, typ byte) bool {
	switch {
	case strings.HasPrefix(name, "user."):
		switch typ {
		case tar.TypeReg, tar.TypeRegA, tar.TypeGNUSparse, tar.TypeDir, tar.TypeLink: //nolint:staticcheck // TypeRegA: old tars have it
			return len(name) > len("user.")
		}
		return false
	case strings.HasPrefix(name, "security."):
		return len(name) > len("security.")
	case name == "system.posix_acl_access":
		return typ != tar.TypeSymlink
	case name == "system.posix_acl_default":
		return typ == tar.TypeDir
	}
	return false
}

// inode returns a new inode of the given type with a's attributes.
func (a attrs) inode(typ uint32) *rafs.Inode {
	return &rafs.Inode{
		Mode: typ | a.perm, UID: a.uid, GID: a.gid,
		Mtime: a.mtime, MtimeNsec: a.nsec, Xattrs: a.xattrs,
	}
}

// apply gives ino the attributes of a hard link's header; xattrs are set one by one, and before that the owner.
func (a attrs) apply(ino *rafs.Inode) {
	if ino.Mode&unix.S_IFMT != unix.S_IFLNK {
		ino.Mode = ino.Mode&unix.S_IFMT | a.perm
	}
	ino.UID, ino.GID = a.uid, a.gid
	ino.Mtime, ino.MtimeNsec = a.mtime, a.nsec
	ino.Xattrs = mergeXattrs(chowned(ino.Xattrs), a.xattrs)
}

// merged returns b's attributes with the xattrs of both.
func (a attrs) merged(b attrs) attrs {
	b.xattrs = mergeXattrs(chowned(a.xattrs), b.xattrs)
	return b
}

// chowned returns what chown(2) leaves of the attributes of anything but a directory: all but its capabilities.
// Source: Linux fs/open.c chown_common, ATTR_KILL_PRIV.
func chowned(xattrs []rafs.Xattr) []rafs.Xattr {
	isCapability := func(x rafs.Xattr) bool { return x.Name == "security.capability" }
	if !slices.ContainsFunc(xattrs, isCapability) {
		return xattrs
	}
	return slices.DeleteFunc(slices.Clone(xattrs), isCapability)
}

// mergeXattrs returns a with the attributes of b set over it, sorted by name.
func mergeXattrs(a, b []rafs.Xattr) []rafs.Xattr {
	if len(b) == 0 {
		return a
	}
	out := slices.Clone(b)
	for _, x := range a {
		if !slices.ContainsFunc(b, func(y rafs.Xattr) bool { return y.Name == x.Name }) {
			out = append(out, x)
		}
	}
	slices.SortFunc(out, func(x, y rafs.Xattr) int { return strings.Compare(x.Name, y.Name) })
	return out
}
