// Package imagediff compares the trees of two RAFS images, entry by entry: what a container would
// see of one and not of the other.
package imagediff

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Side is one of the two images.
type Side struct {
	Image *rafs.Image
	// Read returns the uncompressed, verified bytes of a chunk. It is called only where digests
	// cannot tell whether files are equal: in images of other chunk sizes or digesters, and of files with chunks
	// that have none (tarfs).
	Read func(ctx context.Context, c rafs.Chunk) ([]byte, error)
}

// Kind says what became of an entry between the first and the second image.
type Kind string

// The kinds.
const (
	Added   Kind = "added"
	Removed Kind = "removed"
	Changed Kind = "changed"
)

// Change is one entry that differs. Everything below an entry that was added or removed is
// a change of its own.
type Change struct {
	Kind Kind   `json:"kind"`
	Path string `json:"path"` // absolute; bytes that are no UTF-8 are replaced in JSON
	// Fields are what differs of a changed entry: type, mode, uid, gid, mtime, device, target, xattrs, size, content,
	// links (which other names the file has).
	Fields []string `json:"fields,omitempty"`
	// Bytes is the size of the file in the second image, or in the first when it was removed.
	Bytes uint64 `json:"bytes,omitempty"`
}

// Summary counts what Compare saw.
type Summary struct {
	Added   int `json:"added"`
	Removed int `json:"removed"`
	Changed int `json:"changed"`
	Same    int `json:"same"`
	// SharedBytes of ABytes and BBytes are in chunks that both images have; bytes are uncompressed and each chunk
	// counts once. With other digesters, and of chunks without digests (tarfs), nothing is known to be shared.
	ABytes      uint64 `json:"a_bytes"`
	BBytes      uint64 `json:"b_bytes"`
	SharedBytes uint64 `json:"shared_bytes"`
}

// Equal reports whether the trees are the same.
func (s Summary) Equal() bool { return s.Added+s.Removed+s.Changed == 0 }

// pair is an entry of both trees; one of them may be nil.
type pair struct {
	path string
	a, b *rafs.Inode
}

// comparer holds what one comparison needs.
type comparer struct {
	a, b           Side
	namesA, namesB map[*rafs.Inode]string // first names of files with several
	digests        bool                   // equal digests are equal bytes, and the other way round
}

// Compare calls report for every entry that differs, parents first and in the order of names. An error of
// report or of a Side's Read ends it.
func Compare(ctx context.Context, a, b Side, report func(Change) error) (Summary, error) {
	c := comparer{
		a: a, b: b, namesA: names(a.Image), namesB: names(b.Image),
		digests: a.Image.ChunkSize == b.Image.ChunkSize && a.Image.Digester == b.Image.Digester,
	}
	var sum Summary
	for stack := []pair{{"/", a.Image.Root, b.Image.Root}}; len(stack) > 0; {
		p := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if err := ctx.Err(); err != nil {
			return Summary{}, err
		}
		change, err := c.compare(ctx, p)
		if err != nil {
			return Summary{}, fmt.Errorf("compare %q: %w", p.path, err)
		}
		if sum.count(change); change.Kind != "" {
			if err := report(change); err != nil {
				return Summary{}, err
			}
		}
		below := children(p)
		slices.Reverse(below)
		stack = append(stack, below...)
	}
	sum.measure(a.Image, b.Image)
	return sum, nil
}

func (s *Summary) count(c Change) {
	switch c.Kind {
	case Added:
		s.Added++
	case Removed:
		s.Removed++
	case Changed:
		s.Changed++
	default:
		s.Same++
	}
}

// children pairs the entries of two directories by name.
func children(p pair) []pair {
	var as, bs []rafs.Dirent
	if p.a != nil {
		as = p.a.Children
	}
	if p.b != nil {
		bs = p.b.Children
	}
	prefix := strings.TrimSuffix(p.path, "/") + "/"
	out := make([]pair, 0, max(len(as), len(bs)))
	for len(as) > 0 || len(bs) > 0 {
		order := 0
		switch {
		case len(bs) == 0:
			order = -1
		case len(as) == 0:
			order = 1
		default:
			order = cmp.Compare(as[0].Name, bs[0].Name)
		}
		var next pair
		if order <= 0 {
			next.a, next.path, as = as[0].Inode, prefix+as[0].Name, as[1:]
		}
		if order >= 0 {
			next.b, next.path, bs = bs[0].Inode, prefix+bs[0].Name, bs[1:]
		}
		out = append(out, next)
	}
	return out
}

// names returns the first name of every file that has more than one.
func names(img *rafs.Image) map[*rafs.Inode]string {
	seen, several := map[*rafs.Inode]string{}, map[*rafs.Inode]string{}
	_ = img.Walk(func(path string, ino *rafs.Inode) error { // the function returns no error
		if ino.IsDir() {
			return nil
		}
		if first, ok := seen[ino]; ok {
			several[ino] = first
		} else {
			seen[ino] = path
		}
		return nil
	})
	return several
}

// compare returns what differs of one entry; a Change without Kind says nothing does.
func (c *comparer) compare(ctx context.Context, p pair) (Change, error) {
	switch {
	case p.a == nil:
		return Change{Kind: Added, Path: p.path, Bytes: p.b.Size}, nil
	case p.b == nil:
		return Change{Kind: Removed, Path: p.path, Bytes: p.a.Size}, nil
	}
	fields := attributes(p.a, p.b)
	if c.namesA[p.a] != c.namesB[p.b] {
		fields = append(fields, "links")
	}
	if p.a.IsRegular() && p.b.IsRegular() && p.a.Size == p.b.Size {
		same, err := c.sameContent(ctx, p.a, p.b)
		if err != nil {
			return Change{}, err
		}
		if !same {
			fields = append(fields, "content")
		}
	}
	if len(fields) == 0 {
		return Change{}, nil
	}
	return Change{Kind: Changed, Path: p.path, Fields: fields, Bytes: p.b.Size}, nil
}

// attributes names what differs of two inodes, but for content and links.
func attributes(a, b *rafs.Inode) (fields []string) {
	const typeMask = 0o170000 // S_IFMT
	for _, f := range []struct {
		name string
		same bool
	}{
		{"type", a.Mode&typeMask == b.Mode&typeMask},
		{"mode", a.Mode&^typeMask == b.Mode&^typeMask},
		{"uid", a.UID == b.UID},
		{"gid", a.GID == b.GID},
		{"mtime", a.Mtime == b.Mtime && a.MtimeNsec == b.MtimeNsec},
		{"device", a.Rdev == b.Rdev},
		{"target", a.Target == b.Target},
		{"xattrs", sameXattrs(a.Xattrs, b.Xattrs)},
		{"size", a.Size == b.Size || !a.IsRegular() || !b.IsRegular()},
	} {
		if !f.same {
			fields = append(fields, f.name)
		}
	}
	return fields
}

// sameXattrs compares sets: images keep attributes in any order.
func sameXattrs(a, b []rafs.Xattr) bool {
	byName := func(x, y rafs.Xattr) int { return cmp.Compare(x.Name, y.Name) }
	return slices.EqualFunc(slices.SortedFunc(slices.Values(a), byName), slices.SortedFunc(slices.Values(b), byName),
		func(x, y rafs.Xattr) bool { return x.Name == y.Name && bytes.Equal(x.Value, y.Value) })
}

// noDigest reports whether nothing is known of the bytes of c: chunks of tarfs images have zeros for a digest.
func noDigest(c rafs.Chunk) bool { return c.Digest == rafs.Digest{} }

// sameContent compares two files of one size.
func (c *comparer) sameContent(ctx context.Context, a, b *rafs.Inode) (bool, error) {
	if c.digests && !slices.ContainsFunc(a.Chunks, noDigest) && !slices.ContainsFunc(b.Chunks, noDigest) {
		return slices.EqualFunc(a.Chunks, b.Chunks, func(x, y rafs.Chunk) bool {
			return x.Digest == y.Digest && x.UncompressedSize == y.UncompressedSize
		}), nil
	}
	ra, rb := reader{side: c.a, chunks: a.Chunks}, reader{side: c.b, chunks: b.Chunks}
	for {
		pa, err := ra.peek(ctx)
		if err != nil {
			return false, err
		}
		pb, err := rb.peek(ctx)
		if err != nil {
			return false, err
		}
		n := min(len(pa), len(pb))
		if !bytes.Equal(pa[:n], pb[:n]) || n == 0 && len(pa)+len(pb) > 0 {
			return false, nil
		}
		if n == 0 {
			return true, nil
		}
		ra.data, rb.data = pa[n:], pb[n:]
	}
}

// reader gives the bytes of a file chunk by chunk.
type reader struct {
	side   Side
	chunks []rafs.Chunk
	data   []byte // of the current chunk, not compared yet
}

// peek returns bytes that are not compared yet, none at the end of the file.
func (r *reader) peek(ctx context.Context) ([]byte, error) {
	for len(r.data) == 0 && len(r.chunks) > 0 {
		data, err := r.side.Read(ctx, r.chunks[0])
		if err != nil {
			return nil, err
		}
		r.data, r.chunks = data, r.chunks[1:]
	}
	return r.data, nil
}

// measure fills in what the images' chunks have in common.
func (s *Summary) measure(a, b *rafs.Image) {
	type key struct {
		digest rafs.Digest
		size   uint32
	}
	// unique returns the chunks with digests, and the bytes of all chunks.
	unique := func(img *rafs.Image) (map[key]struct{}, uint64) {
		set, size := map[key]struct{}{}, uint64(0)
		for n := range img.Blobs {
			for _, c := range img.BlobChunks(n) {
				k := key{c.Digest, c.UncompressedSize}
				if _, ok := set[k]; ok {
					continue
				}
				if size += uint64(c.UncompressedSize); !noDigest(c) {
					set[k] = struct{}{}
				}
			}
		}
		return set, size
	}
	var inA, inB map[key]struct{}
	inA, s.ABytes = unique(a)
	inB, s.BBytes = unique(b)
	for k := range inA {
		if _, ok := inB[k]; ok && a.Digester == b.Digester {
			s.SharedBytes += uint64(k.size)
		}
	}
}
