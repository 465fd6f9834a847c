// Package unpack writes the tree of a RAFS image out again: into an empty directory or as
// a tar archive, with types, modes, owners, times, extended attributes, hard links and
// device numbers as the image has them.
package unpack

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// ErrInvalid is returned for a tree that cannot be written: a name that is no name, a
// directory in itself, a file whose chunks have other sizes than it says.
var ErrInvalid = errors.New("invalid tree")

// maxDepth bounds how deep directories nest. A path of PATH_MAX (4096) bytes reaches 2048 levels.
const maxDepth = 4096

// Source is what is unpacked.
type Source struct {
	// Image is best opened by [rafs.OpenStrict]: what is damaged may be another tree otherwise.
	Image *rafs.Image
	// Read leaves the uncompressed, verified bytes of a chunk in buf.Raw. It is called from several goroutines
	// at once, each with buffers of its own.
	Read func(ctx context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error
	// Progress, when set, is told how many bytes of file data are written.
	Progress func(done int64)
}

// Linux file types; sys/stat.h.
const (
	typeMask   = 0o170000
	typeSocket = 0o140000
	typeLink   = 0o120000
	typeFile   = 0o100000
	typeBlock  = 0o060000
	typeDir    = 0o040000
	typeChar   = 0o020000
	typeFIFO   = 0o010000
)

// entryError names the entry that a fault belongs to.
type entryError struct {
	path string
	err  error
}

func (e *entryError) Error() string { return e.path + ": " + e.err.Error() }
func (e *entryError) Unwrap() error { return e.err }

// entryFault names the entry of err, unless it is named already.
func entryFault(path string, err error) error {
	if _, ok := errors.AsType[*entryError](err); ok {
		return err
	}
	return &entryError{path, err}
}

func checkName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w: name %q", ErrInvalid, name)
	}
	return nil
}

// device splits the kernel's 32-bit encoding (new_encode_dev in linux/kdev_t.h).
func device(rdev uint32) (major, minor uint32) {
	return rdev >> 8 & 0xfff, rdev&0xff | rdev>>12&0xfff00
}

// fileSize returns the size of a file as the system has it.
func fileSize(ino *rafs.Inode) (int64, error) {
	if ino.Size > math.MaxInt64 {
		return 0, fmt.Errorf("%w: size %d", ErrInvalid, ino.Size)
	}
	return int64(ino.Size), nil
}

// copier streams file data and counts it.
type copier struct {
	src   Source
	ahead *ahead
	done  int64
}

// copy gives the chunks of ino to write, in order; at is the offset in the file.
func (c *copier) copy(ctx context.Context, ino *rafs.Inode, write func(p []byte, at int64) error) error {
	var at uint64
	for _, chunk := range ino.Chunks {
		p, err := c.ahead.read(ctx, chunk)
		if err != nil {
			return err
		}
		if uint64(len(p)) > ino.Size-at {
			return fmt.Errorf("%w: chunks hold more than the file's %d bytes", ErrInvalid, ino.Size)
		}
		if err := write(p, int64(at)); err != nil {
			return err
		}
		at += uint64(len(p))
		c.done += int64(len(p))
		if c.src.Progress != nil {
			c.src.Progress(c.done)
		}
	}
	if at != ino.Size {
		return fmt.Errorf("%w: chunks hold %d bytes, the file has %d", ErrInvalid, at, ino.Size)
	}
	return nil
}

func isZero(p []byte) bool { return !slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) }

func join(dir, name string) string {
	if dir == "/" {
		return "/" + name
	}
	return dir + "/" + name
}

// Entries yields every name of the tree with its inode, parents first, the root as "/". A file
// with several names comes once for each. What is deeper than any path can reach is left out.
func Entries(img *rafs.Image) iter.Seq2[string, *rafs.Inode] {
	return func(yield func(string, *rafs.Inode) bool) {
		walk("/", img.Root, 0, yield)
	}
}

func walk(path string, ino *rafs.Inode, depth int, yield func(string, *rafs.Inode) bool) bool {
	if !yield(path, ino) {
		return false
	}
	if depth == maxDepth {
		return true
	}
	for _, e := range ino.Children {
		if !walk(join(path, e.Name), e.Inode, depth+1, yield) {
			return false
		}
	}
	return true
}

// Bytes returns the sizes of all files of the tree; one with several names counts once.
func Bytes(img *rafs.Image) int64 {
	var n uint64
	seen := map[*rafs.Inode]bool{}
	for _, ino := range Entries(img) {
		if ino.Mode&typeMask == typeFile && !seen[ino] {
			seen[ino] = true
			n += min(ino.Size, 1<<62-min(n, 1<<62))
		}
	}
	return int64(n)
}
