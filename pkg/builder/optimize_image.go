package builder

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// AnnotationOptimizedFrom is on the manifest of an optimized image: the digest of the
// manifest that it was made from, to find what belongs to that, such as its access lists.
const AnnotationOptimizedFrom = "io.headstart.optimized-from"

const (
	annotationRef          = "containerd.io/snapshot/nydus-ref" // on a blob layer: the layer that its chunks are in
	annotationUncompressed = "containerd.io/uncompressed"       // on a layer: its diff ID
	dockerLayerGzip        = "application/vnd.docker.image.rootfs.diff.tar.gzip"

	maxBootstrap  = 8 << 30 // bytes; ten million files take about 2 GiB
	maxExtras     = 1024    // files beside the bootstrap: one for each blob, and a few
	maxExtraBytes = 1 << 30 // all together; the tables of 254 blobs take less
)

// nydusDocument is a Nydus image's manifest and config, with every field they have.
type nydusDocument struct {
	all      map[string]json.RawMessage
	manifest ocispec.Manifest
	config   sourceConfig
}

func parseNydusDocument(manifest, config []byte) (*nydusDocument, error) {
	var d nydusDocument
	if err := json.Unmarshal(manifest, &d.all); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	if err := json.Unmarshal(manifest, &d.manifest); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	var err error
	if d.config, err = parseConfig(config); err != nil {
		return nil, err
	}
	n := len(d.manifest.Layers)
	switch {
	case n == 0:
		return nil, fmt.Errorf("%w: the manifest has no layers", ErrInvalid)
	case len(d.config.diffIDs) != n:
		return nil, fmt.Errorf("%w: the manifest has %d layers, the config %d diff IDs", ErrInvalid, n, len(d.config.diffIDs))
	}
	return &d, nil
}

// extraFile is a file of a bootstrap layer that is neither the bootstrap nor the list.
type extraFile struct {
	name, path string // in the tar, in the temporary directory
	mode       int64
	size       int64
}

func (c *optimization) path(name string) string { return filepath.Join(c.dir, name) }

// unpackBootstrap reads the bootstrap layer, verified, and keeps what is in it.
func (c *optimization) unpackBootstrap(ctx context.Context) (_ *os.File, size int64, err error) {
	stream, err := openLayer(ctx, c.src.BootstrapLayer, nil)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	var boot *os.File
	defer func() {
		if err != nil && boot != nil {
			_ = boot.Close() // its content does not matter
		}
	}()
	t := tar.NewReader(stream)
	var total int64
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, 0, stream.explain(fmt.Errorf("%w: tar: %w", ErrInvalid, err))
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		switch {
		case h.Typeflag != tar.TypeReg || name == prefetchEntry:
		case name == bootstrapEntry && boot != nil:
			return nil, 0, fmt.Errorf("%w: two entries %s", ErrInvalid, bootstrapEntry)
		case name == bootstrapEntry && h.Size > maxBootstrap:
			return nil, 0, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrUnsupported, bootstrapEntry, h.Size, int64(maxBootstrap))
		case name == bootstrapEntry:
			size = h.Size
			if boot, err = spoolEntry(c.path("source.boot"), t, size); err != nil {
				return nil, 0, stream.explain(err)
			}
		default:
			if total += h.Size; total > maxExtraBytes || len(c.extras) == maxExtras {
				return nil, 0, fmt.Errorf("%w: more than %d files or %d bytes beside the bootstrap", ErrUnsupported, maxExtras, maxExtraBytes)
			}
			e := extraFile{name: name, path: c.path(fmt.Sprintf("extra-%d", len(c.extras))), mode: h.Mode & 0o7777, size: h.Size}
			f, err := spoolEntry(e.path, t, e.size)
			if err != nil {
				return nil, 0, stream.explain(err)
			}
			if err := f.Close(); err != nil {
				return nil, 0, err
			}
			c.extras = append(c.extras, e)
		}
	}
	if err := stream.finish(); err != nil {
		return nil, 0, err
	}
	if boot == nil {
		return nil, 0, fmt.Errorf("%w: no entry %s", ErrInvalid, bootstrapEntry)
	}
	return boot, size, nil
}

// explain returns the damage of the stream, if there is any, as the reason of err.
func (s *layerStream) explain(err error) error {
	if deeper := s.finish(); deeper != nil {
		return fmt.Errorf("%w (%w)", deeper, err)
	}
	return err
}

func spoolEntry(name string, r io.Reader, size int64) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := io.CopyN(f, r, size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (c *optimization) writeBootstrap() error {
	c.res.BootstrapPath = c.path("image.boot")
	f, err := os.OpenFile(c.res.BootstrapPath, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, blobBuffer)
	info, err := rafs.WriteBootstrap(w, c.img)
	if err := errors.Join(err, w.Flush(), f.Close()); err != nil {
		return err
	}
	c.res.Stats.BootstrapBytes = info.Size
	return nil
}

// verify reads the bootstrap and the prefetch blob back; the former must be what want says. Chunks that are stored as in the source, where they
// were verified, are compared as they are stored.
func (c *optimization) verify(ctx context.Context, want summary) (err error) {
	f, err := os.Open(c.res.BootstrapPath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	open := func(b rafs.Blob) (io.ReaderAt, error) {
		if c.blob == nil || b.ID != c.blob.ID {
			return nil, nil // a blob of the source, unchanged
		}
		return os.Open(c.blob.path)
	}
	img, err := readBack(ctx, f, c.res.Stats.BootstrapBytes, open, c.o.Workers, want)
	if err != nil {
		return err
	}
	if c.blob == nil {
		return nil
	}
	return c.verifyBlob(ctx, img)
}

// verifyBlob reads the prefetch blob back, which is the last of img.
func (c *optimization) verifyBlob(ctx context.Context, img *rafs.Image) error {
	chunks := img.BlobChunks(len(img.Blobs) - 1)
	var size int64
	for i := range chunks {
		size += int64(chunks[i].UncompressedSize)
	}
	if want := c.res.Stats.Prefetch; size != want.RawBytes {
		return fmt.Errorf("the prefetch blob reads back with %d bytes, was written with %d", size, want.RawBytes)
	}
	f, err := os.Open(c.blob.path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	r, err := rafs.OpenBlob(f, img.Blobs[len(img.Blobs)-1])
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return verifyID(gctx, c.blob) })
	g.Go(func() error { return verifyChunks(gctx, r, chunks, c.copies, c.o.Workers) })
	if err := g.Wait(); err != nil {
		return err
	}
	c.res.Stats.VerifiedChunks = c.res.Stats.Prefetch.Chunks
	return nil
}

// describe packs the bootstrap layer and writes config and manifest.
func (c *optimization) describe(ctx context.Context) error {
	kept := c.keptLayers()
	diffID, err := c.packLayer(ctx)
	if err != nil {
		return err
	}
	var layers []ocispec.Descriptor
	var diffIDs []digest.Digest
	for i, l := range c.doc.manifest.Layers {
		if kept[i] {
			layers, diffIDs = append(layers, l), append(diffIDs, c.doc.config.diffIDs[i])
		}
	}
	c.res.Kept = slices.Clone(layers)
	if c.res.Prefetch != nil {
		layers, diffIDs = append(layers, c.res.Prefetch.Descriptor), append(diffIDs, c.res.Prefetch.Descriptor.Digest)
	}
	layers, diffIDs = append(layers, c.res.Bootstrap.Descriptor), append(diffIDs, diffID)
	if c.res.Config, err = c.doc.config.encode(diffIDs, c.doc.history(kept, c.res.Prefetch != nil)); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	config := c.doc.manifest.Config
	config.Digest, config.Size, config.Data = digest.FromBytes(c.res.Config), int64(len(c.res.Config)), nil
	c.res.ConfigDescriptor = config
	return c.encodeManifest(config, layers)
}

// keptLayers tells which layers of the source remain: all but the bootstrap and those whose
// blob the bootstrap had and has no more. A layer without chunks of its own remains.
func (c *optimization) keptLayers() []bool {
	layers := c.doc.manifest.Layers
	kept := make([]bool, len(layers))
	for i, l := range layers[:len(layers)-1] {
		kept[i] = !c.isDropped(encodedPart(l.Digest.String())) && !c.isDropped(encodedPart(l.Annotations[annotationRef]))
		if c.res.Prefetch != nil && l.Digest == c.res.Prefetch.Descriptor.Digest {
			kept[i] = false // the same blob, which comes last
		}
	}
	return kept
}

// encodedPart returns what follows the algorithm in a digest that may be anything.
func encodedPart(d string) string {
	_, encoded, _ := strings.Cut(d, ":")
	return encoded
}

// isDropped reports whether id is a file of a blob that the source's bootstrap had and the new
// one has not.
func (c *optimization) isDropped(id string) bool {
	return hasFile(c.before, id) && !hasFile(c.res.Blobs, id)
}

// hasFile reports whether id names a blob, or the table of one that is in two files.
func hasFile(blobs []rafs.Blob, id string) bool {
	return slices.ContainsFunc(blobs, func(b rafs.Blob) bool {
		meta, _ := b.MetaBlob()
		return b.ID == id || meta.ID == id
	})
}

// encodeManifest writes the manifest: every field of the source's but for what changed.
func (c *optimization) encodeManifest(config ocispec.Descriptor, layers []ocispec.Descriptor) (err error) {
	all := maps.Clone(c.doc.all)
	annotations := maps.Clone(c.doc.manifest.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	if c.src.ManifestDescriptor.Digest != "" {
		annotations[AnnotationOptimizedFrom] = c.src.ManifestDescriptor.Digest.String()
	}
	for name, v := range map[string]any{"config": config, "layers": layers, "annotations": annotations} {
		if all[name], err = marshal(v); err != nil {
			return fmt.Errorf("manifest: %w", err)
		}
	}
	if c.res.Manifest, err = marshal(all); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	desc := c.src.ManifestDescriptor
	desc.Digest, desc.Size, desc.Data = digest.FromBytes(c.res.Manifest), int64(len(c.res.Manifest)), nil
	c.res.ManifestDescriptor = desc
	return nil
}

// history returns the config's history for the new layers; nil when it had none. One that does
// not tell which item made which layer stays as it is.
func (d *nydusDocument) history(kept []bool, prefetch bool) []map[string]json.RawMessage {
	h := d.config.history
	var at []int // the items that made the layers
	for i, item := range h {
		if string(bytes.TrimSpace(item["empty_layer"])) != "true" {
			at = append(at, i)
		}
	}
	if h == nil || len(at) != len(kept) {
		return h
	}
	out := slices.Clone(h)
	last := len(at) - 1
	for n, i := range at[:last] {
		if !kept[n] {
			out[i] = maps.Clone(out[i])
			out[i]["empty_layer"] = json.RawMessage("true")
		}
	}
	if prefetch {
		out = slices.Insert(out, at[last], historyNote("prefetch blob"))
	}
	return out
}

// packLayer writes the layer that holds the bootstrap, the list as Nydus' JSON, and what else
// the source's layer held of the blobs that remain. It returns the digest of the tar.
func (c *optimization) packLayer(ctx context.Context) (_ digest.Digest, err error) {
	old := c.src.BootstrapLayer.Descriptor
	annotations := maps.Clone(old.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	delete(annotations, annotationUncompressed)
	delete(annotations, AnnotationPrefetchBlob)
	entries := []tarFile{{name: bootstrapEntry, mode: 0o444, path: c.res.BootstrapPath, size: c.res.Stats.BootstrapBytes}}
	if c.res.Prefetch != nil {
		annotations[AnnotationPrefetchBlob] = c.blob.ID
		var list bytes.Buffer
		if _, err := c.o.List.WriteJSON(&list); err != nil {
			return "", fmt.Errorf("write %s: %w", prefetchEntry, err)
		}
		entries = append(entries, tarFile{name: prefetchEntry, mode: 0o444, data: list.Bytes(), size: int64(list.Len())})
	}
	for _, e := range c.extras {
		id, isMeta := strings.CutSuffix(path.Base(e.name), ".blob.meta")
		if !isMeta || !c.isDropped(id) {
			entries = append(entries, tarFile{name: e.name, mode: e.mode, path: e.path, size: e.size})
		}
	}
	layer, diffID, err := writeLayer(ctx, c.path("bootstrap.tar.gz"), entries)
	if err != nil {
		return "", err
	}
	layer.Annotations = annotations
	if old.MediaType == dockerLayerGzip {
		layer.MediaType = dockerLayerGzip
	}
	c.res.Bootstrap = File{Path: c.path("bootstrap.tar.gz"), SourceLayer: -1, Descriptor: layer}
	return diffID, nil
}

// tarFile is one file of a tar: data, or the content of path.
type tarFile struct {
	name, path string
	mode       int64
	data       []byte
	size       int64
}

// writeTar writes the directory image and then files; times are 0 and owners root.
func writeTar(ctx context.Context, w io.Writer, files []tarFile) error {
	tw := tar.NewWriter(w)
	epoch := time.Unix(0, 0)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: bootstrapDir, Mode: 0o755, ModTime: epoch}); err != nil {
		return err
	}
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: f.size, ModTime: epoch}); err != nil {
			return err
		}
		if err := f.copyTo(tw); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return tw.Close()
}

func (f tarFile) copyTo(w io.Writer) (err error) {
	if f.path == "" {
		_, err := w.Write(f.data)
		return err
	}
	in, err := os.Open(f.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	_, err = io.CopyN(w, in, f.size)
	return err
}
