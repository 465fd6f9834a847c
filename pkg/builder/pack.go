package builder

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// inventedNsec is the nanosecond that marks a directory of a layer's bootstrap that the layer
// has no entry for: [MergeLayers] then keeps what lower layers say of it. Other readers see
// a directory of the year 1970.
const inventedNsec = 1

// PackLayer reads the uncompressed tar of one layer from r and writes the blob to w, front to
// back: chunks, their tables, the bootstrap of this layer alone, and a table of contents; of RAFS v5, chunks and
// bootstrap. Whiteouts
// are in that bootstrap as the files that the tar has. The blob depends on the tar and o only;
// of o, List and what concerns a [Result] do not apply, and PrefetchPaths do. The description that is returned is that of
// the blob file; a layer without data has a blob too, with a bootstrap and no chunks.
//
// With o.OCIRef r is the layer as it is stored, gzip or plain tar, and stays where it is: the blob holds tables and bootstrap, as that of
// `nydus-image create --type targz-ref` does, and what is returned is the layer's description, whose
// [rafs.Blob.MetaBlob] is the blob. o.TempDir then takes an unnamed file of 32 KiB for every 512 KiB of layer.
//
// It returns ErrInvalid for bytes that are no layer, ErrUnsupported for hard links to files of
// lower layers, which no layer can express alone, and the errors of r and w.
func PackLayer(ctx context.Context, w io.Writer, r io.Reader, o Options) (rafs.Blob, error) {
	o, err := o.complete()
	if err != nil {
		return rafs.Blob{}, err
	}
	if o.OCIRef {
		return packRef(ctx, w, r, o)
	}
	dict, err := o.Dict.index(o, 1)
	if err != nil {
		return rafs.Blob{}, err
	}
	blob, err := rafs.NewBlobWriter(w, rafs.BlobOptions{
		Version: o.FSVersion, Compressor: o.Compressor, Digester: o.Digester, ChunkSize: o.ChunkSize, BatchSize: o.BatchSize,
		TOC: o.FSVersion == rafs.V6, // Nydus has none in v5
	})
	if err != nil {
		return rafs.Blob{}, err
	}
	workers, ctx := errgroup.WithContext(ctx)
	p, err := startPool(ctx, workers, o.Workers, o.Compressor, rafs.LevelDefault)
	if err != nil {
		return rafs.Blob{}, err
	}
	counted := &countingReader{r: r}
	r = counted
	ck := newChunker(p, newBatches(o.Workers, 1), o, dict, 0, blob)
	ck.place = func() int64 { return counted.n }
	reader := layerReader{tree: newTree(), sink: ck, chunkSize: int64(o.ChunkSize)}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ck.commit(gctx) })
	g.Go(func() error {
		if err := reader.read(gctx, r); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, r); err != nil { // what follows the archive
			return err
		}
		return ck.close(gctx)
	})
	err = g.Wait()
	p.close()
	if err := errors.Join(err, workers.Wait()); err != nil {
		return rafs.Blob{}, err
	}
	img, err := reader.tree.layerImage(o.PrefetchPaths)
	if err != nil {
		return rafs.Blob{}, err
	}
	img.Version, img.ChunkSize, img.Compressor, img.Digester = o.FSVersion, o.ChunkSize, o.Compressor, o.Digester
	return blob.CloseInline(func(w io.Writer, own *rafs.Blob) error {
		return writeLayerBootstrap(w, img, own, dict)
	})
}

// writeLayerBootstrap writes img, whose chunks are in blob 0, the layer's own, or above that in
// the dictionary's.
func writeLayerBootstrap(w io.Writer, img *rafs.Image, own *rafs.Blob, dict *dict) error {
	var all []rafs.Blob
	if own != nil {
		all = append(all, *own)
	} else {
		all = append(all, rafs.Blob{}) // no chunk is in it
	}
	if dict != nil {
		for i := range dict.blobs {
			all = append(all, dict.blobs[i].Blob)
		}
	}
	keepUsed(img, all, own != nil)
	if len(img.Blobs) == 0 {
		img.Prefetch = nil
	}
	_, err := rafs.WriteBootstrap(w, img)
	return err
}

// keepUsed makes img.Blobs the blobs of all that its chunks are in, in their order, and the
// first one in any case when first is true.
func keepUsed(img *rafs.Image, all []rafs.Blob, first bool) {
	used := make([]bool, len(all))
	if first {
		used[0] = true
	}
	files := filesOf(img.Root)
	for _, f := range files {
		for i := range f.Chunks {
			used[f.Chunks[i].Blob] = true
		}
	}
	index := make([]uint16, len(all))
	img.Blobs = nil
	for i, b := range all {
		if used[i] {
			index[i] = uint16(len(img.Blobs)) //nolint:gosec // as many as there were
			img.Blobs = append(img.Blobs, b)
		}
	}
	for _, f := range files {
		for i := range f.Chunks {
			f.Chunks[i].Blob = index[f.Chunks[i].Blob]
		}
	}
}

// filesOf returns the inodes with chunks below root, each once.
func filesOf(root *rafs.Inode) []*rafs.Inode {
	var out []*rafs.Inode
	seen := map[*rafs.Inode]bool{}
	var walk func(ino *rafs.Inode)
	walk = func(ino *rafs.Inode) {
		for _, d := range ino.Children {
			if len(d.Inode.Chunks) > 0 && !seen[d.Inode] {
				seen[d.Inode] = true
				out = append(out, d.Inode)
			}
			walk(d.Inode)
		}
	}
	walk(root)
	return out
}

// layerImage returns the tree of a layer as an image: whiteouts become files, and directories
// without an entry are marked. prefetch are the paths of its prefetch table. t is used up.
func (t *tree) layerImage(prefetch []string) (*rafs.Image, error) {
	if len(t.links) > 0 {
		l := t.links[0]
		return nil, fmt.Errorf("%w: entry %q is a hard link to %q of a lower layer", ErrUnsupported, l.name, l.target)
	}
	marker := func() entry { return entry{ino: &rafs.Inode{Mode: unix.S_IFREG | 0o644}} }
	var walk func(e entry)
	walk = func(e entry) {
		if !e.dir.explicit {
			e.ino.MtimeNsec = inventedNsec
		}
		for _, c := range e.dir.all() {
			if c.dir != nil {
				walk(c)
			}
		}
		for name := range e.dir.whiteouts {
			e.dir.put(whiteoutPrefix+name, marker())
		}
		if e.dir.opaque {
			e.dir.put(whiteoutOpaque, marker())
		}
	}
	walk(t.root)
	table := t.find(prefetch)
	return &rafs.Image{Root: t.finalize().root, Prefetch: table}, nil
}
