package builder

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// packRef is [PackLayer] for a layer that stays where it is.
func packRef(ctx context.Context, w io.Writer, r io.Reader, o Options) (_ rafs.Blob, err error) {
	scratch, err := scratchFile(o.TempDir)
	if err != nil {
		return rafs.Blob{}, fmt.Errorf("make a temporary file: %w", err)
	}
	defer func() { err = errors.Join(err, scratch.Close()) }()
	ref, err := rafs.NewRefBuilder(r, rafs.RefOptions{Digester: o.Digester, ChunkSize: o.ChunkSize, TOC: true, Scratch: scratch})
	if err != nil {
		return rafs.Blob{}, classRef(err)
	}
	workers, ctx := errgroup.WithContext(ctx)
	p, err := startPool(ctx, workers, o.Workers, rafs.CompressorNone, rafs.LevelDefault)
	if err != nil {
		return rafs.Blob{}, err
	}
	ck := newChunker(p, newBatches(o.Workers, 1), o, nil, 0, nil)
	ck.ref, ck.together = ref, math.MaxUint32
	reader := layerReader{tree: newTree(), sink: ck, chunkSize: int64(o.ChunkSize)}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ck.commit(gctx) })
	g.Go(func() error {
		if err := reader.read(gctx, ref); err != nil {
			return brokenRef(err)
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
	img.Version, img.ChunkSize, img.Compressor, img.Digester = o.FSVersion, o.ChunkSize, o.imageCompressor(), o.Digester
	blob, err := ref.CloseInline(w, func(w io.Writer, own *rafs.Blob) error {
		return writeLayerBootstrap(w, img, own, nil)
	})
	if err != nil {
		return rafs.Blob{}, brokenRef(err)
	}
	return blob, nil
}

// brokenRef gives errors about the bytes of a stored layer their class.
func brokenRef(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrInvalid) {
		return fmt.Errorf("%w: the layer is cut off: %w", ErrInvalid, err)
	}
	return classRef(err)
}

// nameRef gives the blob of img that refers to a layer the names that it could not say: its file is l's. refers is false for
// images without such a blob.
func nameRef(img *rafs.Image, l PackedLayer) (refers bool, err error) {
	for i := range img.Blobs {
		b := &img.Blobs[i]
		if _, separate := b.MetaBlob(); !separate || b.Features&inlinedMeta == 0 {
			continue
		}
		if refers {
			return false, fmt.Errorf("%w: the bootstrap of blob %s refers to two layers", ErrInvalid, l.Digest)
		}
		refers = true
		switch id := l.Layer.Encoded; {
		case l.Layer == "" && b.ID != rafs.PlaceholderID:
		case l.Layer == "":
			return false, fmt.Errorf("%w: blob %s does not say which layer it refers to, and no one else does", ErrInvalid, l.Digest)
		case l.Layer.Validate() != nil || l.Layer.Algorithm() != digest.SHA256:
			return false, fmt.Errorf("%w: digest %q of the layer that blob %s refers to, want sha256", ErrInvalid, l.Layer, l.Digest)
		case b.ID != rafs.PlaceholderID && b.ID != id():
			return false, fmt.Errorf("%w: blob %s refers to layer sha256:%s, not %s", ErrInvalid, l.Digest, b.ID, l.Layer)
		default:
			b.ID = id()
		}
		file, err := hex.DecodeString(l.Digest.Encoded())
		if err != nil {
			return false, err
		}
		b.MetaBlobDigest, b.MetaBlobSize = rafs.Digest(file), uint64(max(l.Size, 0))
		if l.Blob == nil {
			continue
		}
		if err := b.SetTOC(l.Blob, l.Size); err != nil {
			return false, err
		}
	}
	return refers, nil
}

// CachedTable returns how the table of blob b, whose file is table, is written as nydusd keeps it in its cache, and how many
// bytes that is: see [rafs.BlobReader.CopyTable]. Images over layers have such files beside their bootstrap.
func CachedTable(b rafs.Blob, table io.ReaderAt) (write func(io.Writer) error, size int64, err error) {
	r, err := rafs.OpenSeparateBlob(unreadLayer{}, table, b)
	if err != nil {
		return nil, 0, err
	}
	const block = 4096
	size = int64((b.MetaUncompressed+block-1)/block*block) + block //nolint:gosec // rafs bounds it
	return func(w io.Writer) error {
		n, err := r.CopyTable(w)
		if err == nil && n != size {
			err = fmt.Errorf("the table of blob %s has %d bytes in a cache, want %d", b.ID, n, size)
		}
		return err
	}, size, nil
}
