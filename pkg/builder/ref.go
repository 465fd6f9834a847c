package builder

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// completeRef checks what an image over the source's own layers cannot be combined with.
func (o *Options) completeRef() error {
	switch {
	case !o.OCIRef:
		return nil
	case o.FSVersion != rafs.V6:
		return fmt.Errorf("%w: references to OCI layers in RAFS v%v, want v6: a v5 bootstrap cannot say where a layer's table is", ErrUnsupported, o.FSVersion)
	case o.BatchSize != 0:
		return fmt.Errorf("%w: references to OCI layers with batches of %d bytes: the layers stay as they are", ErrUnsupported, o.BatchSize)
	case o.Dict != nil:
		return fmt.Errorf("%w: references to OCI layers with a chunk dictionary", ErrUnsupported)
	case o.Records:
		return fmt.Errorf("%w: references to OCI layers with records of layers", ErrUnsupported)
	}
	return nil
}

// imageCompressor is the one that the bootstrap's superblock names.
func (o *Options) imageCompressor() rafs.Compressor {
	if o.OCIRef {
		return rafs.CompressorGzip
	}
	return o.Compressor
}

// buildRef reads layer i and writes the table that says where in it the chunks are.
func (c *conversion) buildRef(ctx context.Context, p *pool, free chan *batch, i int) (_ builtLayer, err error) {
	src := &c.src.Layers[i]
	if src.Descriptor.Digest.Algorithm() != digest.SHA256 {
		return builtLayer{}, fmt.Errorf("%w: a layer that is referred to must be named by its sha256, this one is by %s", ErrUnsupported, src.Descriptor.Digest.Algorithm())
	}
	scratch, err := scratchFile(c.dir)
	if err != nil {
		return builtLayer{}, err
	}
	defer func() { err = errors.Join(err, scratch.Close()) }()
	stream, err := openLayer(ctx, *src, &rafs.RefOptions{Digester: c.o.Digester, ChunkSize: c.o.ChunkSize, TOC: true, Scratch: scratch})
	if err != nil {
		return builtLayer{}, err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	ck := newChunker(p, free, c.o, nil, uint16(i), nil) //nolint:gosec // completeLayers bounds it
	ck.ref, ck.together = stream.ref, math.MaxUint32
	reader, err := c.readLayer(ctx, stream, ck, i)
	if err != nil {
		return builtLayer{}, err
	}
	blob, err := c.writeTable(stream.ref, i)
	if err != nil {
		return builtLayer{}, fmt.Errorf("write the layer's table: %w", err)
	}
	if blob != nil && blob.ID != src.Descriptor.Digest.Encoded() {
		return builtLayer{}, fmt.Errorf("%w: the layer's bytes have sha256 %s, its descriptor says %s", ErrDigest, blob.ID, src.Descriptor.Digest)
	}
	return builtLayer{tree: reader.tree, blob: blob, tarBytes: stream.size, xattrsIgnored: reader.xattrsIgnored, cut: stream.ref.Cut()}, nil
}

// scratchFile makes a file in dir that has no name and is gone when it is closed.
func scratchFile(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, "scratch-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// writeTable writes the file of a layer's table; the result is nil, and the file gone, when no chunk is in the layer.
func (c *conversion) writeTable(ref *rafs.RefBuilder, i int) (*builtBlob, error) {
	f, err := os.OpenFile(c.path(fmt.Sprintf("layer-%d.table", i)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	w := bufio.NewWriterSize(f, blobBuffer)
	blob, err := ref.Close(w)
	if errors.Is(err, rafs.ErrNoChunks) {
		return nil, errors.Join(f.Close(), os.Remove(f.Name()))
	}
	if err := errors.Join(err, w.Flush(), f.Close()); err != nil {
		return nil, err
	}
	return &builtBlob{Blob: blob, path: f.Name(), layer: &c.src.Layers[i]}, nil
}

// startRef makes s read through a [rafs.RefBuilder].
func (s *layerStream) startRef(r io.Reader, o *rafs.RefOptions) error {
	var err error
	if s.ref, err = rafs.NewRefBuilder(r, *o); err != nil {
		return classRef(err)
	}
	buf := make([]byte, storedBuffer)
	s.next = func() ([]byte, error) {
		n, err := s.ref.Read(buf)
		if n > 0 {
			err = nil // it comes again
		}
		return buf[:n], err
	}
	return nil
}

// readRef returns bytes of the tar, none of which was read ahead: the place of a chunk is where it is read.
func (s *layerStream) readRef(p []byte) (int, error) {
	if s.done {
		return 0, io.EOF
	}
	n, err := s.ref.Read(p)
	s.diffHash.Write(p[:n]) // never fails
	s.size += int64(n)
	switch {
	case n > 0 || err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		s.done = true
		return 0, io.EOF
	}
	return 0, s.blame(err)
}

// classRef gives errors about a layer the classes of this package.
func classRef(err error) error {
	switch {
	case errors.Is(err, rafs.ErrUnsupported):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case errors.Is(err, rafs.ErrInvalid):
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return err
}

// readRefPiece reads the n bytes of p as one chunk.
func (c *chunker) readRefPiece(r io.Reader, p []byte) (*rafs.RefPlace, error) {
	if err := c.ref.Begin(uint32(len(p))); err != nil { //nolint:gosec // at most the chunk size
		return nil, classRef(err)
	}
	if _, err := io.ReadFull(r, p); err != nil {
		return nil, err
	}
	place, err := c.ref.End()
	if err != nil {
		return nil, classRef(err)
	}
	return &place, nil
}

// tableFile describes the file of a layer's table for a manifest.
func (b *builtBlob) tableFile(sourceLayer int) File {
	meta, _ := b.MetaBlob()
	return File{
		Path: b.path, SourceLayer: sourceLayer,
		Descriptor: ocispec.Descriptor{
			MediaType:   MediaTypeBlob,
			Digest:      digest.NewDigestFromEncoded(digest.SHA256, meta.ID),
			Size:        int64(meta.CompressedSize), //nolint:gosec // a file's size
			Annotations: map[string]string{AnnotationBlob: "true", annotationRef: b.layer.Descriptor.Digest.String()},
		},
	}
}

// files opens the blob, and the file of its table where that is another one, for [rafs.OpenBlobFrom].
func (b *builtBlob) files(ctx context.Context) func(rafs.Blob) (io.ReaderAt, error) {
	return func(f rafs.Blob) (io.ReaderAt, error) {
		if b.layer == nil || f.ID != b.ID {
			return b.open(ctx)
		}
		if b.layer.OpenAt == nil {
			return nil, fmt.Errorf("%w: layer %s cannot be read at random", ErrInvalid, b.layer.Descriptor.Digest)
		}
		r, err := b.layer.OpenAt(ctx)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", b.layer.Descriptor.Digest, err)
		}
		return r, nil
	}
}

// rangeFetcher is what [Layer].OpenAt may return: it is told what will be read.
type rangeFetcher interface {
	// Fetch is as NydusSource.Fetch.
	Fetch(ctx context.Context, ranges []StoredRange) error
}

// announce has what is going to be read of chunks, all of one blob, fetched with few requests.
func (r *blobReaders) announce(ctx context.Context, b *builtBlob, chunks []rafs.Chunk) error {
	if b.layer == nil {
		return nil
	}
	reader, err := r.get(ctx, b)
	if err != nil {
		return err
	}
	f, ok := r.data[b.ID].(rangeFetcher)
	if !ok {
		return nil
	}
	ranges, err := storedRanges(ctx, reader, chunks)
	if err != nil {
		return err
	}
	if err := f.Fetch(ctx, ranges); err != nil {
		return fmt.Errorf("fetch chunks of layer %s: %w", b.layer.Descriptor.Digest, err)
	}
	return nil
}

// announcePlan announces the chunks of the prefetch blob.
func (c *conversion) announcePlan(ctx context.Context, r *blobReaders, plan *prefetchPlan) error {
	if !c.o.OCIRef {
		return nil
	}
	byBlob := make([][]rafs.Chunk, len(c.layers))
	for _, ch := range plan.chunks {
		byBlob[ch.Blob] = append(byBlob[ch.Blob], ch)
	}
	for i, chunks := range byBlob {
		if len(chunks) == 0 {
			continue
		}
		if err := r.announce(ctx, c.layers[i].blob, chunks); err != nil {
			return err
		}
	}
	return nil
}

// unreadLayer stands for a layer when the bootstrap is verified, for which no byte of it is needed.
type unreadLayer struct{}

func (unreadLayer) ReadAt([]byte, int64) (int, error) {
	return 0, errors.New("builder: the layer is not at hand")
}

// openForCheck opens what the bootstrap is verified against.
func (c *conversion) openForCheck(ctx context.Context, f rafs.Blob) (io.ReaderAt, error) {
	b := c.blobByID(f.ID)
	if b.layer != nil && b.ID == f.ID {
		return unreadLayer{}, nil
	}
	return b.open(ctx)
}

// cachedTables writes the tables of the layers as readers keep them, to be packed with the bootstrap: what
// nydus-snapshotter finds there it puts into nydusd's cache, which has one request less to make.
// Source: nydus-snapshotter pkg/converter/convert_unix.go Merge, pkg/filesystem/fs.go copyBlobMetaFiles.
func (c *conversion) cachedTables(ctx context.Context) ([]tarFile, error) {
	if !c.o.OCIRef {
		return nil, nil
	}
	var out []tarFile
	for i, f := range c.res.Blobs {
		if f.SourceLayer < 0 || c.layers[f.SourceLayer].blob.layer == nil {
			continue // a blob with its own table
		}
		file, err := c.cachedTable(ctx, c.layers[f.SourceLayer].blob, i)
		if err != nil {
			return nil, err
		}
		file.name = bootstrapDir + "/" + f.Descriptor.Digest.Encoded() + ".blob.meta"
		out = append(out, file)
	}
	return out, nil
}

func (c *conversion) cachedTable(ctx context.Context, b *builtBlob, i int) (_ tarFile, err error) {
	table, err := b.open(ctx)
	if err != nil {
		return tarFile{}, err
	}
	defer func() { err = errors.Join(err, closeReader(table)) }()
	r, err := rafs.OpenSeparateBlob(unreadLayer{}, table, b.Blob)
	if err != nil {
		return tarFile{}, err
	}
	f, err := os.OpenFile(c.path(fmt.Sprintf("cached-%d", i)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return tarFile{}, err
	}
	n, err := r.CopyTable(f)
	return tarFile{path: f.Name(), mode: 0o444, size: n}, errors.Join(err, f.Close())
}
