package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// A build cache is an OCI artifact: its layers are records of layers (builder.Record), each
// followed by the layer's blob if it has data. The annotations on a record say what it is of.
const (
	artifactTypeCache  = "application/vnd.headstart.build-cache.v1"
	annotationKey      = "vnd.headstart.record.key"     // builder.RecordKey
	annotationDiffID   = "vnd.headstart.record.diff-id" // of the source layer
	annotationBlob     = "vnd.headstart.record.blob"    // digest of the blob; absent: no data
	defaultCacheLayers = 200                            // as nydusify keeps
)

// cached is one record of a build cache.
type cached struct {
	record ocispec.Descriptor
	blob   *ocispec.Descriptor
}

func (c cached) key() string { return c.record.Annotations[annotationKey] }

// cache is a build cache that is read before the images are built and written after.
type cache struct {
	ref    remote.Reference
	target remote.Reference
	src    remote.Source // nil: nothing is there yet
	to     remote.Target
	most   int

	found    map[string]cached // by key
	order    []string          // keys as the cache has them
	fresh    []cached          // made or used now
	warnings []string
}

// openCache reads the cache that o names; one that is not there is empty.
func openCache(ctx context.Context, o Options, source, target remote.Reference) (*cache, error) {
	ref, err := remote.Parse(o.BuildCache)
	if err != nil {
		return nil, err
	}
	if ref.Kind != remote.KindRegistry && ref.Kind != remote.KindLayout || ref.Digest != "" {
		return nil, fmt.Errorf("%s: want a registry reference with a tag or an oci: layout", ref)
	}
	if ref == target || ref == source {
		return nil, fmt.Errorf("%s: it is the source or the target, and would replace it", ref)
	}
	c := &cache{ref: ref, target: target, most: o.BuildCacheMax, found: map[string]cached{}}
	if c.most == 0 {
		c.most = defaultCacheLayers
	}
	if c.to, err = remote.OpenTarget(ctx, ref, o.TargetRemote); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(ref.Path, ocispec.ImageIndexFile)); ref.Kind == remote.KindLayout && errors.Is(err, fs.ErrNotExist) {
		return c, nil // a new layout
	}
	if c.src, err = remote.OpenSource(ctx, ref, o.TargetRemote); err != nil {
		return nil, errors.Join(err, c.to.Close())
	}
	if err := c.read(ctx); err != nil && !errors.Is(err, remote.ErrNotFound) {
		return nil, errors.Join(fmt.Errorf("%s: %w", ref, err), c.Close())
	}
	return c, nil
}

func (c *cache) Close() error {
	if c.src == nil {
		return c.to.Close()
	}
	return errors.Join(c.src.Close(), c.to.Close())
}

func (c *cache) warn(format string, args ...any) {
	c.warnings = append(c.warnings, fmt.Sprintf("build cache %s: %s", c.ref, fmt.Sprintf(format, args...)))
}

func (c *cache) read(ctx context.Context) error {
	root, err := c.src.Resolve(ctx)
	if err != nil {
		return err
	}
	data, err := remote.ReadAll(ctx, c.src, root, remote.MaxManifestSize)
	if err != nil {
		return err
	}
	m, err := remote.ParseManifest(data)
	if err != nil {
		return err
	}
	if m.ArtifactType != artifactTypeCache {
		return fmt.Errorf("it is of type %q, want %s: name something else", m.ArtifactType, artifactTypeCache)
	}
	blobs := map[string]ocispec.Descriptor{}
	for _, l := range m.Layers {
		blobs[l.Digest.String()] = l
	}
	for _, l := range m.Layers {
		e := cached{record: l}
		if l.MediaType != builder.MediaTypeRecord || e.key() == "" {
			continue
		}
		if d := l.Annotations[annotationBlob]; d != "" {
			b, ok := blobs[d]
			if !ok {
				continue
			}
			e.blob = &b
		}
		if _, ok := c.found[e.key()]; !ok {
			c.found[e.key()] = e
			c.order = append(c.order, e.key())
		}
	}
	return nil
}

// apply gives the layers of from that the cache has their records, and returns how many.
// A blob that is gone is noticed here and not when the image is half built.
func (c *cache) apply(ctx context.Context, from *builder.Source, o builder.Options, stored map[digest.Digest]remote.Blob) int {
	n := 0
	for i := range from.Layers {
		l := &from.Layers[i]
		e, ok := c.found[builder.RecordKey(l.DiffID, o)]
		if !ok || e.record.Annotations[annotationDiffID] != l.DiffID.String() {
			continue
		}
		if err := c.there(ctx, e); err != nil {
			c.warn("layer %s is built anew: %v", l.DiffID, err)
			delete(c.found, e.key())
			continue
		}
		c.fresh = append(c.fresh, e)
		l.Record = func(ctx context.Context) (io.ReadCloser, error) { return c.src.Fetch(ctx, e.record) }
		if b := e.blob; b != nil {
			l.Stored = &builder.StoredBlob{Descriptor: *b, Open: func(ctx context.Context) (io.ReaderAt, error) {
				return remote.NewReaderAt(ctx, c.src, *b), nil
			}}
			stored[b.Digest] = c.blob(*b)
		}
		n++
	}
	return n
}

// has reports whether a record that apply gave says that a layer's blob is d.
func (c *cache) has(d digest.Digest) bool {
	return slices.ContainsFunc(c.fresh, func(e cached) bool { return e.blob != nil && e.blob.Digest == d })
}

// forget drops the n records that apply gave last: something is wrong with one of them.
func (c *cache) forget(n int) {
	bad := c.fresh[len(c.fresh)-n:]
	c.fresh = c.fresh[:len(c.fresh)-n]
	for _, e := range bad {
		delete(c.found, e.key())
	}
}

func (c *cache) blob(b ocispec.Descriptor) remote.Blob {
	return remote.Blob{
		Descriptor: b, MountFrom: mountFrom(c.ref, c.target), Verify: c.ref.Kind == remote.KindLayout,
		Open: func(ctx context.Context) (io.ReadCloser, error) { return c.src.Fetch(ctx, b) },
	}
}

// there reads the last byte of a record and of its blob.
func (c *cache) there(ctx context.Context, e cached) error {
	for _, d := range []*ocispec.Descriptor{&e.record, e.blob} {
		if d == nil || d.Size == 0 {
			continue
		}
		rc, err := c.src.FetchRange(ctx, *d, d.Size-1, 1)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, rc)
		if err := errors.Join(err, rc.Close()); err != nil {
			return err
		}
	}
	return nil
}

// add pushes what res has made. A cache that cannot be written costs a warning.
func (c *cache) add(ctx context.Context, res *builder.Result) {
	for _, r := range res.Records {
		e := cached{record: r.File.Descriptor}
		e.record.Annotations = map[string]string{annotationKey: r.Key, annotationDiffID: r.DiffID.String()}
		files := []builder.File{r.File}
		if r.Blob != nil {
			e.record.Annotations[annotationBlob] = r.Blob.Descriptor.Digest.String()
			d := r.Blob.Descriptor
			d.Annotations = nil // a cache is no image
			e.blob, files = &d, append(files, *r.Blob)
		}
		for _, f := range files {
			_, err := c.to.Push(ctx, remote.Blob{
				Descriptor: f.Descriptor, MountFrom: mountFrom(c.target, c.ref), Verify: true,
				Open: func(context.Context) (io.ReadCloser, error) { return f.Open() },
			})
			if err != nil {
				c.warn("layer %s is not kept: %v", r.DiffID, err)
				return
			}
		}
		c.fresh = append(c.fresh, e)
	}
}

// write makes the cache's name point at the records of now and then those of before, as many
// as there may be.
func (c *cache) write(ctx context.Context) error {
	keys := map[string]bool{}
	var layers []ocispec.Descriptor
	blobs := map[digest.Digest]bool{}
	all := c.fresh
	for _, k := range c.order {
		if e, ok := c.found[k]; ok {
			all = append(all, e)
		}
	}
	for _, e := range all {
		if keys[e.key()] || len(keys) >= c.most {
			continue
		}
		keys[e.key()] = true
		layers = append(layers, e.record)
		if e.blob != nil && !blobs[e.blob.Digest] {
			blobs[e.blob.Digest] = true
			layers = append(layers, *e.blob)
		}
	}
	config := remote.Document{Descriptor: ocispec.DescriptorEmptyJSON, Data: ocispec.DescriptorEmptyJSON.Data}
	config.Descriptor.Data = nil
	data, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: artifactTypeCache, Config: config.Descriptor, Layers: layers,
	})
	if err != nil {
		return err
	}
	if _, err := c.to.Push(ctx, config.Blob()); err != nil {
		return err
	}
	m := remote.NewDocument(ocispec.MediaTypeImageManifest, data)
	m.Descriptor.ArtifactType = artifactTypeCache
	return c.to.Tag(ctx, m.Descriptor, m.Data)
}
