package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// PackedLayer is a blob that [PackLayer] or `nydus-image create --blob-inline-meta` has made.
type PackedLayer struct {
	Digest digest.Digest // of the blob file: the blob's id in the merged bootstrap
	Blob   io.ReaderAt
	Size   int64
	// Layer is the digest of the layer that a blob of [PackLayer] with OCIRef, or of nydus-image's targz-ref, refers to; empty: what its
	// bootstrap says.
	Layer digest.Digest
	// Bootstrap, when set, is the layer's bootstrap; Blob is not read then, and Digest may be empty if the
	// bootstrap says the id of its blob itself.
	Bootstrap *rafs.Image
}

// MergeOptions says how layers are merged. The zero value is the default.
type MergeOptions struct {
	// Parent is the merged image below the layers; nil: none.
	Parent *rafs.Image
	// Dict is the chunk dictionary that the layers were packed with: of a layer's blobs, those of the dictionary stay
	// what they are, and the one that is left is the layer's own. nil: layers tell their own blob by its
	// placeholder, as those of [PackLayer] and nydus-image do.
	Dict *rafs.Image
	// Prefetch are the paths of the prefetch table; those that are not in the image are left
	// out. A directory stands for all below it. nil: what the tables of parent and layers name, in that order.
	Prefetch []string
	// DefaultPrefetch takes Prefetch's place where that is nil and no layer has a table, whether the parent has one or not.
	DefaultPrefetch []string
}

// MergeLayers merges the bootstraps that layers' blobs hold, lowest first, writes the
// bootstrap of the image to w and returns the digests of the blobs that it refers to, in its order.
// Whiteouts are applied; those of the lowest layer hide nothing and are gone too. The
// bootstrap is a function of the layers' bootstraps; no chunk is read.
//
// It returns ErrUnsupported for layers that do not fit together (chunk size, digester, version) or
// need more than [rafs.MaxBlobs] blobs, and the errors of [rafs.ReadInline] and [rafs.Open].
func MergeLayers(ctx context.Context, w io.Writer, layers []PackedLayer, o MergeOptions) ([]digest.Digest, error) {
	m := merger{tree: newTree(), byID: map[string]uint16{}, dict: o.Dict}
	if o.Parent != nil {
		if err := m.add(o.Parent, ""); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
	}
	above := len(m.tables) // those of the parent
	for i, l := range layers {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := m.addLayer(l); err != nil {
			return nil, fmt.Errorf("layer %d (%s): %w", i, l.Digest, err)
		}
	}
	if m.first == nil {
		return nil, fmt.Errorf("%w: no layers to merge", ErrInvalid)
	}
	switch {
	case o.Prefetch == nil && o.DefaultPrefetch != nil && len(m.tables) == above:
		o.Prefetch = o.DefaultPrefetch
	case o.Prefetch == nil:
		o.Prefetch = m.tables
	}
	prefetch := m.tree.find(o.Prefetch)
	img := &rafs.Image{
		Version: m.first.Version, ChunkSize: m.first.ChunkSize, Compressor: m.first.Compressor, Digester: m.first.Digester,
		Root: m.tree.finalize().root, Prefetch: prefetch,
	}
	keepUsed(img, m.blobs, false)
	if len(img.Blobs) > rafs.MaxBlobs {
		return nil, fmt.Errorf("%w: the image needs %d blobs, the format counts %d; squash layers", ErrUnsupported, len(img.Blobs), rafs.MaxBlobs)
	}
	if len(img.Blobs) == 0 {
		img.Prefetch = nil
	}
	if err := writeMerged(w, img); err != nil {
		return nil, err
	}
	var out []digest.Digest
	for _, b := range img.Blobs {
		out = append(out, digest.NewDigestFromEncoded(digest.SHA256, b.ID))
	}
	return out, nil
}

// writeMerged reads the bootstrap back before w sees a byte of it.
func writeMerged(w io.Writer, img *rafs.Image) error {
	var b bytes.Buffer
	if _, err := rafs.WriteBootstrap(&b, img); err != nil {
		return err
	}
	back, err := rafs.Open(bytes.NewReader(b.Bytes()), int64(b.Len()))
	if err != nil {
		return fmt.Errorf("verify the bootstrap: %w", err)
	}
	if got, want := summarize(back), summarize(img); got != want {
		return fmt.Errorf("the bootstrap reads back with %d entries (%s), was written with %d (%s)", got.entries, got.sum, want.entries, want.sum)
	}
	_, err = w.Write(b.Bytes())
	return err
}

// merger collects layers.
type merger struct {
	tree   *tree
	dict   *rafs.Image // nil: none
	blobs  []rafs.Blob
	byID   map[string]uint16
	first  *rafs.Image // whose sizes and algorithms count
	tables []string    // paths that prefetch tables name
}

func (m *merger) addLayer(l PackedLayer) error {
	if l.Bootstrap != nil && l.Digest == "" {
		for _, b := range l.Bootstrap.Blobs {
			if b.ID == rafs.PlaceholderID {
				return fmt.Errorf("%w: the bootstrap has a placeholder for the id of its blob, and no digest is given", ErrInvalid)
			}
		}
		return m.add(l.Bootstrap, "")
	}
	if err := l.Digest.Validate(); err != nil || l.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%w: digest %q, want sha256", ErrInvalid, l.Digest)
	}
	if l.Bootstrap != nil {
		return m.addNamed(l.Bootstrap, l)
	}
	boot, err := rafs.ReadInline(l.Blob, l.Size)
	if err != nil {
		return err
	}
	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		return fmt.Errorf("bootstrap of the blob: %w", err)
	}
	return m.addNamed(img, l)
}

// addNamed adds the bootstrap of a blob that has l's digest.
func (m *merger) addNamed(img *rafs.Image, l PackedLayer) error {
	switch refers, err := nameRef(img, l); {
	case err != nil:
		return err
	case refers:
		return m.add(img, "")
	case l.Layer != "" && len(img.Blobs) > 0:
		return fmt.Errorf("%w: blob %s has its chunks itself, and is said to refer to layer %s", ErrInvalid, l.Digest, l.Layer)
	}
	return m.add(img, l.Digest.Encoded())
}

// inlinedMeta marks the blob that holds its bootstrap; rafs-format.md, 0.3.
const inlinedMeta = rafs.FeatureInlinedBootstrap

// add lays img over what is there; id is that of the blob that img was in.
func (m *merger) add(img *rafs.Image, id string) error {
	switch f := m.first; {
	case f == nil:
		m.first = img
	case f.Version.String() != img.Version.String(), f.ChunkSize != img.ChunkSize, f.Digester != img.Digester:
		return fmt.Errorf("%w: RAFS v%v, chunks of %d bytes, %v; the layers below: v%v, %d, %v",
			ErrUnsupported, img.Version, img.ChunkSize, img.Digester, f.Version, f.ChunkSize, f.Digester)
	}
	own := -1
	if id != "" {
		var err error
		if own, err = m.ownBlob(img); err != nil {
			return err
		}
	}
	m.tables = append(m.tables, prefetchPaths(img)...)
	index := make([]uint16, len(img.Blobs))
	for i, b := range img.Blobs {
		if i == own {
			b.ID = id
		}
		b.Features &^= inlinedMeta // readers take it for a bootstrap that is named after its blob
		n, ok := m.byID[b.ID]
		if !ok {
			if len(m.blobs) > 0xffff {
				return fmt.Errorf("%w: more than %d blobs", ErrUnsupported, len(m.blobs))
			}
			n = uint16(len(m.blobs)) //nolint:gosec // checked
			m.byID[b.ID] = n
			m.blobs = append(m.blobs, b)
		}
		index[i] = n
	}
	upper, err := treeOf(img.Root)
	if err != nil {
		return err
	}
	for _, f := range filesOf(img.Root) {
		for i := range f.Chunks {
			f.Chunks[i].Blob = index[f.Chunks[i].Blob]
		}
	}
	return m.tree.merge(upper)
}

// ownBlob returns the index of the blob that a layer's bootstrap was in, -1 when it has no chunks of its own.
func (m *merger) ownBlob(img *rafs.Image) (int, error) {
	own := -1
	for i, b := range img.Blobs {
		switch {
		case m.dict == nil:
			if b.ID == rafs.PlaceholderID || b.Features&inlinedMeta != 0 && len(img.Blobs) == 1 {
				own = i
			}
		case !slices.ContainsFunc(m.dict.Blobs, func(d rafs.Blob) bool { return d.ID == b.ID }):
			if own >= 0 {
				return 0, fmt.Errorf("%w: blobs %s and %s are not of the chunk dictionary, want one of the layer's own", ErrInvalid, img.Blobs[own].ID, b.ID)
			}
			own = i
		}
	}
	return own, nil
}

// prefetchPaths returns the paths that the prefetch table of img names: of each file its first name.
func prefetchPaths(img *rafs.Image) []string {
	if len(img.Prefetch) == 0 {
		return nil
	}
	rank := map[*rafs.Inode]int{}
	for i, ino := range img.Prefetch {
		rank[ino] = i
	}
	out := make([]string, len(img.Prefetch))
	_ = img.Walk(func(p string, ino *rafs.Inode) error { // returns what this does
		if i, ok := rank[ino]; ok && out[i] == "" {
			out[i] = p
		}
		return nil
	})
	return slices.DeleteFunc(out, func(p string) bool { return p == "" })
}

// find returns the inodes of absolute paths, in that order, each once; others, and paths that t has not, are left out.
func (t *tree) find(paths []string) []*rafs.Inode {
	var out []*rafs.Inode
	seen := map[*rafs.Inode]bool{}
	for _, p := range paths {
		if !path.IsAbs(p) {
			continue
		}
		_, e, err := t.locate(path.Clean(p)[1:], false)
		if err == nil && e.ino != nil && !seen[e.ino] {
			seen[e.ino] = true
			out = append(out, e.ino)
		}
	}
	return out
}

var errDeep = fmt.Errorf("%w: directories inside each other", ErrInvalid)

// treeOf returns the tree of a layer's bootstrap: files that mark whiteouts become such.
func treeOf(root *rafs.Inode) (*tree, error) {
	t := newTree()
	seen := map[*rafs.Inode]bool{}
	var walk func(ino *rafs.Inode, depth int) (entry, error)
	// nydus-image writes attributes in the order of a hash map.
	order := func(ino *rafs.Inode) {
		slices.SortFunc(ino.Xattrs, func(a, b rafs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	}
	walk = func(ino *rafs.Inode, depth int) (entry, error) {
		order(ino)
		if depth > maxRecordDepth {
			return entry{}, errDeep
		}
		e := newDir(ino)
		e.dir.explicit = ino.Mtime != 0 || ino.MtimeNsec != inventedNsec
		if !e.dir.explicit {
			ino.MtimeNsec = 0
		}
		for _, d := range ino.Children {
			if name, ok := strings.CutPrefix(d.Name, whiteoutPrefix); ok && d.Inode.Mode&unix.S_IFMT == unix.S_IFREG {
				if err := addMarker(e.dir, d.Name, name); err != nil {
					return entry{}, err
				}
				continue
			}
			if d.Inode.Mode&unix.S_IFMT == unix.S_IFDIR {
				sub, err := walk(d.Inode, depth+1)
				if err != nil {
					return entry{}, err
				}
				e.dir.put(d.Name, sub)
				continue
			}
			if seen[d.Inode] {
				t.shared[d.Inode] = struct{}{}
			}
			seen[d.Inode] = true
			order(d.Inode)
			e.dir.put(d.Name, entry{ino: d.Inode})
		}
		return e, nil
	}
	var err error
	t.root, err = walk(root, 0)
	return t, err
}

// OpenLayer returns the tree of a packed layer, whiteouts being files in it, and what reads its
// chunks, verified, safe for concurrent use. ErrUnsupported for a layer whose chunks are in another
// blob too, a dictionary's.
func OpenLayer(blob io.ReaderAt, size int64) (*rafs.Image, func(context.Context, rafs.Chunk, *rafs.ChunkBuffer) error, error) {
	boot, err := rafs.ReadInline(blob, size)
	if err != nil {
		return nil, nil, err
	}
	img, err := rafs.OpenStrict(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		return nil, nil, fmt.Errorf("bootstrap of the blob: %w", err)
	}
	switch len(img.Blobs) {
	case 0:
		return img, func(context.Context, rafs.Chunk, *rafs.ChunkBuffer) error { return errors.New("a chunk of no blob") }, nil
	case 1:
		if _, separate := img.Blobs[0].MetaBlob(); separate {
			return nil, nil, fmt.Errorf("%w: the blob refers to layer sha256:%s and has no chunks itself; that layer is what it was packed from", ErrUnsupported, img.Blobs[0].ID)
		}
		r, err := rafs.OpenBlob(blob, img.Blobs[0])
		if err != nil {
			return nil, nil, err
		}
		return img, r.ReadInto, nil
	}
	return nil, nil, fmt.Errorf("%w: chunks in %d blobs, this is one", ErrUnsupported, len(img.Blobs))
}
