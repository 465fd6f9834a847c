package rafs

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// Mode bits of Linux (include/uapi/linux/stat.h).
const (
	modeType    = 0o170000
	modeSocket  = 0o140000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFifo    = 0o010000
)

func fileType(mode uint32) uint32 { return mode & modeType }

// IsDir reports whether the inode is a directory.
func (i *Inode) IsDir() bool { return fileType(i.Mode) == modeDir }

// IsRegular reports whether the inode is a regular file.
func (i *Inode) IsRegular() bool { return fileType(i.Mode) == modeRegular }

// IsSymlink reports whether the inode is a symbolic link.
func (i *Inode) IsSymlink() bool { return fileType(i.Mode) == modeSymlink }

// ModTime returns the modification time in UTC.
func (i *Inode) ModTime() time.Time { return time.Unix(i.Mtime, int64(i.MtimeNsec)).UTC() }

// Device returns the device numbers of a character or block device.
func (i *Inode) Device() (major, minor uint32) {
	return i.Rdev >> 8 & 0xfff, i.Rdev&0xff | i.Rdev>>12&^0xff
}

// EncodeDevice packs device numbers for [Inode.Rdev]. Bits of major above 12 and of
// minor above 20 are lost, as in the kernel's dev_t. Source: new_encode_dev.
func EncodeDevice(major, minor uint32) uint32 {
	return minor&0xff | major<<8&0xfff00 | minor&^0xff<<12
}

// FileMode returns type and permission bits as [io/fs] has them.
func (i *Inode) FileMode() fs.FileMode {
	m := fs.FileMode(i.Mode & 0o777)
	switch fileType(i.Mode) {
	case modeDir:
		m |= fs.ModeDir
	case modeSymlink:
		m |= fs.ModeSymlink
	case modeBlock:
		m |= fs.ModeDevice
	case modeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case modeFifo:
		m |= fs.ModeNamedPipe
	case modeSocket:
		m |= fs.ModeSocket
	}
	for _, b := range []struct {
		bit  uint32
		mode fs.FileMode
	}{{0o4000, fs.ModeSetuid}, {0o2000, fs.ModeSetgid}, {0o1000, fs.ModeSticky}} {
		if i.Mode&b.bit != 0 {
			m |= b.mode
		}
	}
	return m
}

// direntType returns the file type of a directory entry; 0 for a mode without a known type.
func direntType(mode uint32) uint8 {
	switch fileType(mode) {
	case modeRegular:
		return disk.TypeRegular
	case modeDir:
		return disk.TypeDir
	case modeChar:
		return disk.TypeChar
	case modeBlock:
		return disk.TypeBlock
	case modeFifo:
		return disk.TypeFifo
	case modeSocket:
		return disk.TypeSocket
	case modeSymlink:
		return disk.TypeSymlink
	}
	return disk.TypeUnknown
}

// Limits of names and symlink targets, in bytes.
const (
	MaxName   = 255
	MaxTarget = 4096
)

// checkInode applies the rules that need nothing but the inode itself.
func checkInode(i *Inode) error {
	switch t := fileType(i.Mode); {
	case direntType(i.Mode) == disk.TypeUnknown || i.Mode > math.MaxUint16:
		return invalid("attributes", -1, "mode", fmt.Sprintf("%#o", i.Mode), "a known file type")
	case i.MtimeNsec >= 1e9:
		return invalid("attributes", -1, "mtime nanoseconds", i.MtimeNsec, "below 1e9")
	case t == modeSymlink && (len(i.Target) == 0 || len(i.Target) > MaxTarget):
		return invalid("attributes", -1, "length of the symlink target", len(i.Target), fmt.Sprintf("1 to %d", MaxTarget))
	case t == modeSymlink && strings.ContainsRune(i.Target, 0):
		return invalid("attributes", -1, "symlink target", "holding NUL", nil)
	case t != modeRegular && len(i.Chunks) > 0:
		return invalid("attributes", -1, "chunks", len(i.Chunks), "none for this file type")
	case t != modeDir && len(i.Children) > 0:
		return invalid("attributes", -1, "children", len(i.Children), "none for this file type")
	}
	return nil
}

// checkChunks makes sure that the chunks of a regular file cover it and lie in their blobs.
func checkChunks(img *Image, ino *Inode) error {
	if fileType(ino.Mode) != modeRegular {
		return nil
	}
	unit := uint64(img.ChunkSize)
	if want := ino.Size/unit + min(1, ino.Size%unit); uint64(len(ino.Chunks)) != want {
		return invalid("chunks", -1, "number", len(ino.Chunks), want)
	}
	for i := range ino.Chunks {
		c := &ino.Chunks[i]
		if want := min(unit, ino.Size-uint64(i)*unit); uint64(c.UncompressedSize) != want {
			return invalid(fmt.Sprintf("chunk %d", i), -1, "size", c.UncompressedSize, want)
		}
		if int(c.Blob) >= len(img.Blobs) {
			return invalid(fmt.Sprintf("chunk %d", i), -1, "blob", c.Blob, fmt.Sprintf("below %d", len(img.Blobs)))
		}
		if err := img.Blobs[c.Blob].checkChunk(c); err != nil {
			return fmt.Errorf("chunk %d: %w", i, err)
		}
	}
	return nil
}

// checkChunk makes sure that c can be a chunk of the blob.
func (b *Blob) checkChunk(c *Chunk) error {
	bad := func(field string, got, want any) error { return invalid("record", -1, field, got, want) }
	switch end := c.UncompressedOffset + uint64(c.UncompressedSize); {
	case c.Index >= b.ChunkCount:
		return bad("index", c.Index, fmt.Sprintf("below %d", b.ChunkCount))
	case c.UncompressedOffset > disk.MaxBlobExpanded || end > b.UncompressedSize:
		return bad("uncompressed end", end, fmt.Sprintf("at most %d", b.UncompressedSize))
	case c.UncompressedOffset%disk.BlockSize != 0 && b.Features&disk.FeatureAligned != 0:
		return bad("uncompressed offset", c.UncompressedOffset, "a multiple of 4096")
	case c.CompressedOffset > disk.MaxBlobStored || c.CompressedOffset+uint64(c.CompressedSize) > b.CompressedSize:
		return bad("compressed end", c.CompressedOffset+uint64(c.CompressedSize), fmt.Sprintf("at most %d", b.CompressedSize))
	}
	return nil
}

// checkChildren makes sure that a directory's names are usable and sorted; it counts
// subdirectories. path names the directory, for errors.
func checkChildren(ino *Inode, path func() string) (subdirs uint32, err error) {
	bad := func(field string, got, want any) error { return invalid("directory "+path(), -1, field, got, want) }
	for i, c := range ino.Children {
		switch {
		case c.Inode == nil:
			return 0, bad(fmt.Sprintf("child %.300q", c.Name), "without an inode", nil)
		case !validName(c.Name):
			return 0, bad("name", fmt.Sprintf("%.300q", c.Name), fmt.Sprintf("1 to %d bytes without / and NUL, not . or ..", MaxName))
		case i > 0 && ino.Children[i-1].Name >= c.Name:
			return 0, bad("children", fmt.Sprintf("%.300q after %.300q", c.Name, ino.Children[i-1].Name), "sorted names, each once")
		case c.Inode.IsDir():
			subdirs++
		}
	}
	return subdirs, nil
}

// validName reports whether name can be an entry of a directory.
func validName(name string) bool {
	return name != "" && len(name) <= MaxName && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00")
}

// xattrPrefixes are the prefixes v6 can store, by number; a full name is a prefix without a remainder.
var xattrPrefixes = []struct {
	prefix string
	index  uint8
	full   bool
}{
	{"user.", disk.XattrUser, false},
	{"system.posix_acl_access", disk.XattrACLAccess, true},
	{"system.posix_acl_default", disk.XattrACLDefault, true},
	{"trusted.", disk.XattrTrusted, false},
	{"security.", disk.XattrSecurity, false},
}

// MaxXattrValue is the longest value of an xattr in bytes.
const MaxXattrValue = math.MaxUint16

// splitXattr returns the prefix number and the remainder of a full name.
func splitXattr(name string) (index uint8, rest string, err error) {
	for _, p := range xattrPrefixes {
		if r, ok := strings.CutPrefix(name, p.prefix); ok && (r == "") == p.full {
			return p.index, r, nil
		}
	}
	return 0, "", invalid("xattr", -1, "name", fmt.Sprintf("%.300q", name), "user.*, trusted.*, security.* or a POSIX ACL")
}

// xattrSize returns the bytes of the inline xattrs; 0 for none.
func xattrSize(xattrs []Xattr) (uint32, error) {
	if len(xattrs) == 0 {
		return 0, nil
	}
	total := uint64(disk.SizeXattrHeader)
	for i, x := range xattrs {
		_, rest, err := splitXattr(x.Name)
		switch {
		case err != nil:
			return 0, err
		case len(x.Name) > MaxName || strings.ContainsRune(x.Name, 0):
			return 0, invalid("xattr", -1, "name", fmt.Sprintf("%.300q", x.Name), fmt.Sprintf("at most %d bytes without NUL", MaxName))
		case len(x.Value) > MaxXattrValue:
			return 0, invalid("xattr "+x.Name, -1, "length of the value", len(x.Value), fmt.Sprintf("at most %d", MaxXattrValue))
		}
		for _, other := range xattrs[:i] {
			if other.Name == x.Name {
				return 0, invalid("xattr "+x.Name, -1, "name", "there twice", "once")
			}
		}
		total += alignUp(uint64(disk.SizeXattrEntry+len(rest)+len(x.Value)), disk.XattrAlign)
	}
	if total > maxXattrBytes {
		return 0, invalid("xattrs", -1, "total size", total, fmt.Sprintf("at most %d", uint64(maxXattrBytes)))
	}
	return uint32(total), nil
}

// maxXattrBytes is what a 16-bit i_xattr_icount can say.
const maxXattrBytes = (math.MaxUint16-1)*disk.XattrAlign + disk.SizeXattrHeader

// appendXattrs appends the inline xattrs, sorted by name.
func appendXattrs(p []byte, xattrs []Xattr) []byte {
	if len(xattrs) == 0 {
		return p
	}
	sorted := slices.SortedFunc(slices.Values(xattrs), func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	p = appendRecord(p, &disk.XattrHeader{})
	for _, x := range sorted {
		index, rest, err := splitXattr(x.Name)
		if err != nil {
			panic("rafs: unchecked xattr: " + err.Error())
		}
		p = appendRecord(p, &disk.XattrEntry{
			NameLen: uint8(len(rest)), PrefixIndex: index, ValueSize: uint16(len(x.Value)), //nolint:gosec // checked by xattrSize
		})
		p = append(p, rest...)
		p = append(p, x.Value...)
		if over := (disk.SizeXattrEntry + len(rest) + len(x.Value)) % disk.XattrAlign; over != 0 {
			p = append(p, make([]byte, disk.XattrAlign-over)...)
		}
	}
	return p
}

// validTag reports whether a blob id can be a device tag.
func validTag(id string) bool { return utf8.ValidString(id) && !bytes.ContainsRune([]byte(id), 0) }
