// Package tarindex finds where the bytes of an image's files lie in the uncompressed tars
// of its layers.
package tarindex

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"

	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// Errors of this package, for errors.Is.
var (
	// ErrUnsupported is returned for an image or a layer that has no tars to read.
	ErrUnsupported = errors.New("no layers of tar")
	// ErrInvalid is returned for a layer that is no tar, or an image beyond the bounds.
	ErrInvalid = errors.New("invalid layer")
)

const (
	maxEntries = 1 << 23 // of an image; an entry takes some 200 bytes of memory
	maxLinks   = 40      // symbolic links on the way to one file, as the kernel has it
	maxWindow  = 128 << 20

	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// Extent is a run of bytes of a layer's uncompressed tar.
type Extent struct {
	Layer  int   // 0 is the lowest
	Offset int64 // bytes from the start of the tar
	Length int64 // bytes, greater than 0
}

// File is where a regular file's data lies.
type File struct {
	Path   string // in the image, symbolic links resolved
	Entry  int    // layer with the tar entry of this path: another one than Layer for some hard links
	Layer  int    // 0 is the lowest
	Offset int64  // bytes from the start of the layer's uncompressed tar
	Stored int64  // bytes there: less than Size for a sparse file
	Size   int64  // bytes of the file
	// Sparse tells that the tar holds the file without its holes, so that no byte of it can
	// be told from another's place.
	Sparse bool
}

// Extents returns where ranges of the file lie, in their order, cut off at its end; nil ranges
// are the whole file. Of a sparse file it is everything that is stored, once.
func (f File) Extents(ranges []trace.Range) []Extent {
	whole := Extent{f.Layer, f.Offset, f.Stored}
	if ranges == nil || f.Sparse && len(ranges) > 0 {
		if whole.Length == 0 {
			return nil
		}
		return []Extent{whole}
	}
	var out []Extent
	for _, r := range ranges {
		if r.Offset < 0 || r.Length <= 0 || r.Offset >= f.Stored {
			continue
		}
		out = append(out, Extent{f.Layer, f.Offset + r.Offset, min(r.Length, f.Stored-r.Offset)})
	}
	return out
}

// node is one name of the merged tree. Memory counts: one for each file of the image.
type node struct {
	children map[string]*node // not nil: a directory
	target   string           // not empty: a symbolic link
	file     *File            // not nil: a regular file; hard links share it
	layer    int              // that wrote it; an upper layer's whiteout takes lower ones' away
}

// Index is the tree of an image with the place of every file. It does not change and is safe for
// concurrent use.
type Index struct {
	root    *node
	entries int
}

// Read reads all layers of img from src, the lowest first, each once and as a stream; nothing
// is written. Stored bytes are verified against their digests. Memory grows with the
// number of the image's files, of which there may be 8,388,608. Errors are [ErrUnsupported], [ErrInvalid]
// with layer and entry, and those of src.
func Read(ctx context.Context, src remote.Source, img remote.Image) (*Index, error) {
	if img.Nydus() {
		return nil, fmt.Errorf("%w: it is a Nydus image", ErrUnsupported)
	}
	x := New()
	for i, l := range img.Layers {
		rc, err := src.Fetch(ctx, l.Descriptor)
		if err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, l.Descriptor.Digest, err)
		}
		err = x.AddLayer(ctx, i, rc)
		if err = errors.Join(err, rc.Close()); err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, l.Descriptor.Digest, err)
		}
	}
	return x, nil
}

// New returns an index of no layer.
func New() *Index { return &Index{root: &node{children: map[string]*node{}}} }

// AddLayer reads a layer, a tar that may be compressed by gzip or zstd, to its end and puts
// it over those before it. After an error the index is of no use.
func (x *Index) AddLayer(ctx context.Context, layer int, r io.Reader) error {
	stored := bufio.NewReaderSize(&contextReader{ctx, r}, 1<<16)
	plain, free, err := decompress(stored)
	if err != nil {
		return err
	}
	defer free()
	count := &counter{r: plain}
	if err := x.addTar(layer, count); err != nil {
		return err
	}
	// What follows the tar's end is part of what the digest covers.
	if _, err := io.Copy(io.Discard, count); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, stored)
	return err
}

type contextReader struct {
	ctx context.Context //nolint:containedctx // of one call
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// counter knows the place of its reader. It is no io.Seeker, so that package tar reads on.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// decompress looks at the first bytes: registries hold layers whose media type lies.
func decompress(r *bufio.Reader) (plain io.Reader, free func(), err error) {
	head, err := r.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	none := func() {}
	switch {
	case bytes.HasPrefix(head, []byte("\x1f\x8b")):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: gzip: %w", ErrInvalid, err)
		}
		return z, none, nil
	case bytes.Equal(head, []byte("\x28\xb5\x2f\xfd")), len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], []byte("\x2a\x4d\x18")):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, fmt.Errorf("%w: zstd: %w", ErrInvalid, err)
		}
		return z, z.Close, nil
	}
	return r, none, nil
}

func (x *Index) addTar(layer int, r *counter) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%w: at byte %d of its tar: %w", ErrInvalid, r.n, err)
		}
		if err != nil {
			return err
		}
		if x.entries++; x.entries > maxEntries {
			return fmt.Errorf("%w: more than %d entries in the image", ErrInvalid, maxEntries)
		}
		f := File{Layer: layer, Offset: r.n, Stored: h.Size, Size: h.Size, Sparse: isSparse(h)}
		if f.Sparse {
			// The size that is stored is where reading it leaves us.
			if _, err := io.Copy(io.Discard, t); err != nil {
				return fmt.Errorf("%w: %q: %w", ErrInvalid, h.Name, err)
			}
			f.Stored = r.n - f.Offset
		}
		if err := x.add(layer, h, f); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func (x *Index) add(layer int, h *tar.Header, f File) error {
	name := path.Clean("/" + h.Name)
	dir, base := path.Split(name)
	if base == "" {
		return nil // the root
	}
	parent := x.mkdirs(dir, layer)
	if base == opaqueName {
		for n, c := range parent.children {
			parent.take(n, c, layer)
		}
		return nil
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		if c := parent.children[hidden]; c != nil {
			parent.take(hidden, c, layer)
		}
		return nil
	}
	n := &node{layer: layer}
	switch h.Typeflag {
	case tar.TypeDir:
		if old := parent.children[base]; old != nil && old.children != nil {
			old.layer = layer
			return nil
		}
		n.children = map[string]*node{}
	case tar.TypeSymlink:
		n.target = h.Linkname
	case tar.TypeLink:
		// The other name is one of the tree as it is now; its links are not followed.
		to, _ := x.lookup(path.Clean("/"+h.Linkname), false)
		if to == nil {
			return fmt.Errorf("%w: hard link to %q, which is not there", ErrInvalid, h.Linkname)
		}
		n.file, n.target = to.file, to.target
	case tar.TypeReg, '\x00', tar.TypeGNUSparse, tar.TypeCont:
		n.file = &f
	}
	parent.children[base] = n
	return nil
}

// take removes what lower layers put at name; what the layer itself put there stays.
func (n *node) take(name string, c *node, layer int) {
	for k, below := range c.children {
		c.take(k, below, layer)
	}
	if c.layer < layer && len(c.children) == 0 {
		delete(n.children, name)
	}
}

// mkdirs returns the directory at name and makes what is missing; something else in its
// way is replaced.
func (x *Index) mkdirs(name string, layer int) *node {
	n, _ := x.walk(name, true, true, func(parent *node, part string) *node {
		x.entries++
		made := &node{children: map[string]*node{}, layer: layer}
		parent.children[part] = made
		return made
	})
	if n == nil {
		n = x.root // a circle of links: such a path is nobody's
	}
	return n
}

func (x *Index) lookup(name string, follow bool) (n *node, real []string) {
	return x.walk(name, follow, false, func(*node, string) *node { return nil })
}

// walk returns what is at a cleaned absolute path. Symbolic links on the way are followed inside
// the root, the last one with follow. For a name that is not there, or is no directory and is to be
// gone through (the last one with through), missing says what to take.
func (x *Index) walk(name string, follow, through bool, missing func(parent *node, part string) *node) (at *node, real []string) {
	todo, links := split(name), 0
	at = x.root
	for len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		next := at.children[part]
		if next != nil && next.target != "" && (len(todo) > 0 || follow) {
			if links++; links > maxLinks {
				return nil, nil
			}
			target := next.target
			if !path.IsAbs(target) {
				target = strings.Join(real, "/") + "/" + target
			}
			// Cleaning below "/" keeps ".." inside the root.
			todo = append(split(path.Clean("/"+target)), todo...)
			at, real = x.root, nil
			continue
		}
		if next == nil || next.children == nil && (len(todo) > 0 || through) {
			if next = missing(at, part); next == nil {
				return nil, nil
			}
		}
		at, real = next, append(real, part)
	}
	return at, real
}

func split(name string) []string {
	name = strings.Trim(name, "/")
	if name == "" {
		return nil
	}
	return strings.Split(name, "/")
}

// Find returns the regular file at an absolute path, symbolic links resolved inside the
// image's root; false when there is none.
func (x *Index) Find(name string) (File, bool) {
	n, real := x.lookup(path.Clean("/"+name), true)
	if n == nil || n.file == nil {
		return File{}, false
	}
	f := *n.file
	f.Path, f.Entry = "/"+strings.Join(real, "/"), n.layer
	return f, true
}

// Size returns the bytes of all regular files of the image, each once, hard links and
// whatever a layer hides left out.
func (x *Index) Size() int64 {
	seen := map[*File]struct{}{}
	var total int64
	var add func(n *node)
	add = func(n *node) {
		if n.file != nil {
			if _, ok := seen[n.file]; !ok {
				seen[n.file] = struct{}{}
				total += n.file.Size
			}
		}
		for _, c := range n.children {
			add(c)
		}
	}
	add(x.root)
	return total
}
