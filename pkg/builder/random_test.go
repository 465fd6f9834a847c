package builder_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/builder"
)

// randomNode is a file, directory or other thing of a random image.
type randomNode struct {
	header tar.Header
	data   string
	id     int // equal for the names of one file
}

func (n *randomNode) isDir() bool { return n.header.Typeflag == tar.TypeDir }

// randomImage makes random layers, and knows the tree that they mean: it applies each change to that tree and writes
// the tar entry that says so. What an OCI image means is thus said twice, here and in the builder.
type randomImage struct {
	*rand.Rand
	chunk  int // bytes of a chunk of the image to be
	blocks []string
	tree   map[string]*randomNode // by path, without a slash in front
	nodes  int

	layers [][]byte
	// Of the layer that is being made:
	entries []file
	new     map[string]bool // paths that this layer has an entry for, or has invented
	removed map[string]bool // paths that this layer has removed from below

	lowerLinks bool // there are hard links to lower layers
}

func newRandomImage(r *rand.Rand, chunk int) *randomImage {
	g := &randomImage{Rand: r, chunk: chunk, tree: map[string]*randomNode{}}
	for range 3 + g.IntN(4) {
		g.blocks = append(g.blocks, g.block(chunk))
	}
	return g
}

// block returns n bytes of a random kind.
func (g *randomImage) block(n int) string {
	switch g.IntN(6) {
	case 0:
		return strings.Repeat("\x00", n)
	case 1:
		return strings.Repeat(fmt.Sprintf("text %d. ", g.IntN(50)), n/8+2)[:n]
	case 2: // half of it compresses
		return string(noise(g.Uint64(), n/2)) + strings.Repeat("ab", n/4+1)[:n-n/2]
	default:
		return string(noise(g.Uint64(), n))
	}
}

// content returns the bytes of a file: at the edges of chunks, sharing chunks with other files, or small.
func (g *randomImage) content() string {
	most := 5
	if g.chunk >= 1<<20 {
		most = 2
	}
	switch g.IntN(8) {
	case 0:
		return ""
	case 1, 2:
		return g.block(1 + g.IntN(300))
	case 3:
		return g.block(min(g.chunk, []int{1, 511, 512, 4095, 4096, 4097, g.chunk - 1, g.chunk, g.chunk + 1}[g.IntN(9)]))
	case 4:
		return g.block(g.chunk + []int{-1, 0, 1}[g.IntN(3)])
	default:
		var b strings.Builder
		for range 1 + g.IntN(most) {
			b.WriteString(g.blocks[g.IntN(len(g.blocks))])
		}
		b.WriteString(g.block(g.IntN(2) * g.IntN(min(g.chunk, 5000))))
		return b.String()
	}
}

// oddNames are names that formats trip over: their order among "." and "..", their length, their bytes.
var oddNames = []string{"!", "-x", "+", " ", "a b", "\"q\"", "[p", "*", "~", "\xff\xfe", "…", "\u00e9", strings.Repeat("n", 255), strings.Repeat("m", 101), "x.pyc", "new\nline", "..."}

func (g *randomImage) name() string {
	if g.IntN(12) == 0 {
		return oddNames[g.IntN(len(oddNames))]
	}
	return string(rune('a'+g.IntN(9))) + []string{"", "", "1", "-long-name"}[g.IntN(4)]
}

// place returns a new path in a directory of the tree, or below one that does not exist yet.
func (g *randomImage) place() string {
	dirs := []string{""}
	for p, n := range g.tree {
		if n.isDir() && strings.Count(p, "/") < 4 {
			dirs = append(dirs, p)
		}
	}
	slices.Sort(dirs)
	p := path.Join(dirs[g.IntN(len(dirs))], g.name())
	if g.IntN(10) == 0 {
		p = path.Join(p, g.name())
	}
	return p
}

func (g *randomImage) header(typ byte) tar.Header {
	h := tar.Header{
		Typeflag: typ, Mode: int64(g.IntN(0o10000)), Uid: []int{0, 1, 1000, 65534, 65536, 3_000_000}[g.IntN(6)], Gid: []int{0, 5, 70_000}[g.IntN(3)],
		ModTime: time.Unix([]int64{0, 1, 1_700_000_000, 1 << 33}[g.IntN(4)], 0), Format: tar.FormatPAX,
	}
	if g.IntN(3) == 0 {
		h.ModTime = h.ModTime.Add(time.Duration(g.IntN(1e9)))
	}
	if g.IntN(4) == 0 {
		h.PAXRecords = map[string]string{}
		for range 1 + g.IntN(3) {
			h.PAXRecords[[]string{"SCHILY.xattr.user.", "SCHILY.xattr.security.", "SCHILY.xattr.user.long."}[g.IntN(3)]+string(rune('a'+g.IntN(4)))] = strings.Repeat("v", g.IntN(40)*g.IntN(40)) + "="
		}
	}
	return h
}

// emit puts n at p, and writes its entry.
func (g *randomImage) emit(p string, n *randomNode, typ byte, target string) {
	old := g.tree[p]
	if old != nil && (!n.isDir() || !old.isDir()) {
		g.drop(p)
	}
	g.tree[p], g.new[p] = n, true
	h := n.header
	h.Name, h.Typeflag, h.Linkname = p, typ, target
	data := n.data
	if typ == tar.TypeLink {
		data = ""
	}
	g.entries = append(g.entries, file{h, data})
}

// drop removes p and what is below it from the tree.
func (g *randomImage) drop(p string) {
	for q := range g.tree {
		if q == p || strings.HasPrefix(q, p+"/") {
			delete(g.tree, q)
		}
	}
}

// parents makes sure that p's parents are directories; false when one of them is something else.
func (g *randomImage) parents(p string) bool {
	for i, c := range p {
		if c != '/' {
			continue
		}
		d := p[:i]
		switch n := g.tree[d]; {
		case n != nil && !n.isDir():
			return false
		case n != nil:
		case g.IntN(3) == 0 && !g.removedAbove(d):
			// Invented: no entry says what it is.
			g.tree[d], g.new[d] = &randomNode{header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)}}, true
		default:
			g.emit(d, &randomNode{header: g.header(tar.TypeDir)}, tar.TypeDir, "")
		}
	}
	return true
}

// removedAbove reports whether this layer has removed p or a directory that it is in.
func (g *randomImage) removedAbove(p string) bool {
	for ; p != "."; p = path.Dir(p) {
		if g.removed[p] {
			return true
		}
	}
	return false
}

// add makes one new entry.
func (g *randomImage) add() {
	p := g.place()
	if len(p) > 900 || g.new[p] || g.tree[p] != nil && (g.tree[p].isDir() && g.IntN(4) > 0 || g.hasNew(p)) || !g.parents(p) {
		return
	}
	g.nodes++
	n := &randomNode{id: g.nodes}
	typ := byte(tar.TypeReg)
	switch k := g.IntN(24); {
	case k < 12:
		n.header, n.data = g.header(typ), g.content()
	case k < 16:
		typ = tar.TypeDir
		n.header = g.header(typ)
	case k < 18:
		typ = tar.TypeSymlink
		n.header, n.data = g.header(typ), ""
		n.header.PAXRecords = nil // user attributes of a symlink: no file system has them
		n.header.Linkname = []string{"a", "../b/c", "/d/e1", "/", "nowhere", "/a/./b/../c", strings.Repeat("t/", 300)}[g.IntN(7)]
	case k < 19:
		typ = tar.TypeFifo
		n.header = g.header(typ)
	case k < 21:
		typ = []byte{tar.TypeChar, tar.TypeBlock}[g.IntN(2)]
		n.header = g.header(typ)
		n.header.Devmajor, n.header.Devminor = int64(1+g.IntN(4000)), int64(g.IntN(1<<20))
	default:
		g.link(p)
		return
	}
	if typ != tar.TypeReg && typ != tar.TypeDir && n.header.PAXRecords != nil {
		n.header.PAXRecords = nil
	}
	g.emit(p, n, typ, n.header.Linkname)
}

// hasNew reports whether this layer has something below p, be it a whiteout.
func (g *randomImage) hasNew(p string) bool {
	for _, set := range []map[string]bool{g.new, g.removed} {
		for q := range set {
			if strings.HasPrefix(q, p+"/") {
				return true
			}
		}
	}
	return false
}

// link makes p another name of a file, of this layer or, when allowed, of a lower one.
func (g *randomImage) link(p string) {
	var targets []string
	for q, n := range g.tree {
		if n.header.Typeflag == tar.TypeReg && (g.lowerLinks || g.new[q]) && q != p && !strings.HasPrefix(q, p+"/") {
			targets = append(targets, q)
		}
	}
	if len(targets) == 0 { // its parents may count on an entry
		g.emit(p, &randomNode{header: g.header(tar.TypeReg), id: g.nodes}, tar.TypeReg, "")
		return
	}
	slices.Sort(targets)
	q := targets[g.IntN(len(targets))]
	g.emit(p, g.tree[q], tar.TypeLink, q)
}

// remove writes a whiteout, or makes a directory opaque.
func (g *randomImage) remove() {
	var all []string
	for p := range g.tree {
		if !g.new[p] && !g.hasNew(p) {
			all = append(all, p)
		}
	}
	if len(all) == 0 {
		return
	}
	slices.Sort(all)
	p := all[g.IntN(len(all))]
	if n := g.tree[p]; n.isDir() && g.IntN(3) == 0 {
		for q := range g.tree {
			if strings.HasPrefix(q, p+"/") {
				delete(g.tree, q)
				g.removed[q] = true
			}
		}
		// An opaque directory has an entry, as those that make one write it.
		g.emit(p, &randomNode{header: g.header(tar.TypeDir)}, tar.TypeDir, "")
		g.entries = append(g.entries, file{tar.Header{Typeflag: tar.TypeReg, Name: p + "/.wh..wh..opq", Mode: 0o644}, ""})
		return
	}
	g.drop(p)
	g.removed[p] = true
	dir, base := path.Split(p)
	g.entries = append(g.entries, file{tar.Header{Typeflag: tar.TypeReg, Name: dir + ".wh." + base, Mode: 0o644, Format: tar.FormatPAX}, ""})
}

// layer makes one more layer: what it removes comes first, as in the layers of image builders.
func (g *randomImage) layer(t testing.TB) {
	g.entries, g.new, g.removed = nil, map[string]bool{}, map[string]bool{}
	if len(g.layers) > 0 {
		for range g.IntN(5) {
			g.remove()
		}
	}
	for range g.IntN(30) {
		g.add()
	}
	g.layers = append(g.layers, makeTar(t, g.entries...))
}

// source returns the layers as a registry has them, compressed in different ways.
func (g *randomImage) source(t testing.TB) builder.Source {
	t.Helper()
	var ls []builder.Layer
	for _, b := range g.layers {
		switch g.IntN(3) {
		case 0:
			ls = append(ls, tarLayer(b))
		case 1:
			ls = append(ls, stored(ocispec.MediaTypeImageLayerGzip, b, gz(t, b)))
		default:
			ls = append(ls, stored(ocispec.MediaTypeImageLayerZstd, b, zst(t, b)))
		}
	}
	src := source(t, ls...)
	platform := platforms.DefaultSpec()
	src.Manifest = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("source"), Size: 6, Platform: &platform}
	return src
}

// paths returns the names of the tree in the order of a walk.
func (g *randomImage) paths() []string {
	return slices.SortedFunc(maps.Keys(g.tree), func(a, b string) int { return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) })
}

// want returns the tree, the root left out.
func (g *randomImage) want() map[string]item {
	first := map[int]string{}
	out := map[string]item{}
	for _, p := range g.paths() {
		n := g.tree[p]
		h := n.header
		it := item{Mode: uint32(h.Mode), UID: uint32(h.Uid), GID: uint32(h.Gid), Mtime: h.ModTime.UnixNano(), Xattrs: map[string]string{}}
		for k, v := range h.PAXRecords {
			it.Xattrs[strings.TrimPrefix(k, "SCHILY.xattr.")] = hex.EncodeToString([]byte(v))
		}
		switch h.Typeflag {
		case tar.TypeReg:
			it.Mode |= unix.S_IFREG
			it.Size, it.Data = int64(len(n.data)), fmt.Sprintf("%x", sha256.Sum256([]byte(n.data)))
			if first[n.id] == "" {
				first[n.id] = p
			}
			it.Link = first[n.id]
		case tar.TypeDir:
			it.Mode |= unix.S_IFDIR
		case tar.TypeSymlink:
			it.Mode, it.Size, it.Data = unix.S_IFLNK|0o777, int64(len(h.Linkname)), h.Linkname
		case tar.TypeFifo:
			it.Mode |= unix.S_IFIFO
		case tar.TypeChar, tar.TypeBlock:
			it.Mode |= map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK}[h.Typeflag]
			it.Rdev = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		}
		out["/"+p] = it
	}
	return out
}

// files returns the paths of regular files with data, each file once.
func (g *randomImage) files() []string {
	var out []string
	seen := map[int]bool{}
	for _, p := range g.paths() {
		if n := g.tree[p]; n.data != "" && !seen[n.id] {
			seen[n.id] = true
			out = append(out, p)
		}
	}
	return out
}

// sameBytes reports whether the bytes at off of p's content are b.
func (g *randomImage) sameBytes(p string, off int, b []byte) bool {
	return bytes.Equal([]byte(g.tree[p].data[off:off+len(b)]), b)
}
