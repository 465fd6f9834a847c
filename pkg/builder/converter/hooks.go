package converter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
)

// LayerConvertFunc returns a function for containerd's converter that packs an image layer. What
// is no layer, or a Nydus layer already, is left as it is.
func LayerConvertFunc(opt PackOption) converter.ConvertFunc {
	return func(ctx context.Context, cs content.Store, desc ocispec.Descriptor) (*ocispec.Descriptor, error) {
		if !images.IsLayerType(desc.MediaType) || IsNydusBlob(desc) || IsNydusBootstrap(desc) {
			return nil, ctx.Err()
		}
		out, err := packContent(ctx, cs, desc, opt)
		if err != nil {
			return nil, fmt.Errorf("pack layer %s: %w", desc.Digest, err)
		}
		if err := push(ctx, opt.Backend, cs, *out); err != nil {
			return nil, err
		}
		return out, nil
	}
}

// push brings what was made to the backend, where there is one.
func push(ctx context.Context, to Backend, cs content.Store, desc ocispec.Descriptor) error {
	if to == nil {
		return nil
	}
	if err := to.Push(ctx, cs, desc); err != nil {
		return fmt.Errorf("push %s to the %s backend: %w", desc.Digest, to.Type(), err)
	}
	return nil
}

// packContent packs a layer of the store into the store, unless the store says that this was done.
func packContent(ctx context.Context, cs content.Store, desc ocispec.Descriptor, opt PackOption) (_ *ocispec.Descriptor, err error) {
	out, err := packedBefore(ctx, cs, desc)
	if out == nil && err == nil {
		out, err = packNew(ctx, cs, desc, opt)
	}
	if err == nil && opt.OCIRef {
		out.Annotations[LayerAnnotationNydusRefLayer] = desc.Digest.String()
	}
	return out, err
}

// packedBefore returns the blob that a layer's label names, as those who keep a cache of blobs set it; nil when there is none.
func packedBefore(ctx context.Context, cs content.Store, desc ocispec.Descriptor) (*ocispec.Descriptor, error) {
	info, err := cs.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	target := digest.Digest(info.Labels[LayerAnnotationNydusTargetDigest])
	if target.Validate() != nil {
		return nil, nil //nolint:nilerr // no label, or one that names nothing: the layer is packed
	}
	blob, err := cs.Info(ctx, target)
	if err != nil {
		return nil, fmt.Errorf("blob %s, which the label %s names: %w", target, LayerAnnotationNydusTargetDigest, err)
	}
	update := content.Info{Digest: target, Labels: map[string]string{labels.LabelUncompressed: target.String()}}
	if _, err := cs.Update(ctx, update, "labels."+labels.LabelUncompressed); err != nil {
		return nil, err
	}
	out := blobDescriptor(target, blob.Size)
	return &out, nil
}

// blobDescriptor describes a Nydus blob.
func blobDescriptor(id digest.Digest, size int64) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: MediaTypeNydusBlob, Digest: id, Size: size,
		Annotations: map[string]string{LayerAnnotationUncompressed: id.String(), LayerAnnotationNydusBlob: "true"},
	}
}

func packNew(ctx context.Context, cs content.Store, desc ocispec.Descriptor, opt PackOption) (_ *ocispec.Descriptor, err error) {
	ra, err := cs.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	src := content.NewReader(ra)
	if !opt.OCIRef {
		plain, err := compression.DecompressStream(src)
		if err != nil {
			return nil, err
		}
		defer plain.Close()
		src = plain
	}
	return writeContent(ctx, cs, "headstart-pack-"+desc.Digest.String(), func(w io.Writer) error {
		tw, err := Pack(ctx, w, opt)
		if err != nil {
			return err
		}
		_, err = io.Copy(tw, src)
		// The packer knows better than the pipe why it stopped.
		if cerr := tw.Close(); cerr != nil {
			return cerr
		}
		return err
	})
}

// writeContent writes a blob of the store, and describes it as a Nydus blob.
func writeContent(ctx context.Context, cs content.Store, ref string, write func(io.Writer) error) (_ *ocispec.Descriptor, err error) {
	w, err := content.OpenWriter(ctx, cs, content.WithRef(ref))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := w.Truncate(0); err != nil { // what a converter that died has left
		return nil, err
	}
	counted := &counter{w: w}
	sum := digest.SHA256.Digester()
	if err := write(io.MultiWriter(counted, sum.Hash())); err != nil {
		return nil, err
	}
	id := sum.Digest()
	// The label saves whoever computes diff IDs from reading the blob.
	label := content.WithLabels(map[string]string{labels.LabelUncompressed: id.String()})
	if err := w.Commit(ctx, counted.n, id, label); err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, err
	}
	out := blobDescriptor(id, counted.n)
	return &out, nil
}

// counter counts what it passes on.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// ConvertHookFunc returns a function for containerd's converter that, when the layers of a
// manifest are packed, adds the bootstrap and makes the config fit. An index of one manifest
// becomes the manifest.
func ConvertHookFunc(opt MergeOption) converter.ConvertHookFunc {
	return func(ctx context.Context, cs content.Store, source ocispec.Descriptor, desc *ocispec.Descriptor) (*ocispec.Descriptor, error) {
		switch {
		case desc == nil:
			return &source, nil
		case images.IsIndexType(desc.MediaType):
			var index ocispec.Index
			if _, err := readJSON(ctx, cs, *desc, &index); err != nil {
				return nil, fmt.Errorf("index %s: %w", desc.Digest, err)
			}
			if len(index.Manifests) == 1 {
				return &index.Manifests[0], nil
			}
		case images.IsManifestType(desc.MediaType):
			out, err := mergeManifest(ctx, cs, source, *desc, opt)
			if err != nil {
				return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
			}
			return out, nil
		}
		return desc, nil
	}
}

// mergeManifest returns the manifest of desc with a bootstrap.
func mergeManifest(ctx context.Context, cs content.Store, source, desc ocispec.Descriptor, opt MergeOption) (*ocispec.Descriptor, error) {
	var m ocispec.Manifest
	gc, err := readJSON(ctx, cs, desc, &m)
	if err != nil {
		return nil, err
	}
	if n := len(m.Layers); n > 0 && IsNydusBootstrap(m.Layers[n-1]) {
		return &desc, nil
	}
	opt.OCI = opt.OCI || source.MediaType == ocispec.MediaTypeImageManifest
	boot, blobs, err := MergeLayers(ctx, cs, m.Layers, opt)
	if err != nil {
		return nil, err
	}
	m.Layers = append(blobs, *boot)
	if opt.Backend != nil { // the blobs are there
		m.Layers = []ocispec.Descriptor{*boot}
	}
	var diffIDs []digest.Digest
	for i, l := range m.Layers {
		diffIDs = append(diffIDs, digest.Digest(l.Annotations[LayerAnnotationUncompressed]))
		m.Layers[i].Annotations = maps.Clone(l.Annotations)
		delete(m.Layers[i].Annotations, LayerAnnotationUncompressed)
	}
	if m.Config, err = rewriteConfig(ctx, cs, m.Config, diffIDs, opt); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if m.Annotations == nil {
		m.Annotations = map[string]string{}
	}
	m.Annotations[builder.AnnotationSourceDigest] = source.Digest.String()
	m.Annotations[builder.AnnotationFSVersion] = boot.Annotations[builder.AnnotationFSVersion]
	if opt.WithReferrer {
		subject := source
		subject.Platform = nil // some registries refuse it there
		m.Subject = &subject
	}
	gc["containerd.io/gc.ref.content.config"] = m.Config.Digest.String()
	for i, l := range m.Layers {
		gc[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
		if ref := l.Annotations[LayerAnnotationNydusRefLayer]; ref != "" { // the manifest does not list it
			gc[fmt.Sprintf("containerd.io/gc.ref.content.ref.%d", i)] = ref
		}
	}
	return writeJSON(ctx, cs, m, desc, gc)
}

// rewriteConfig gives a config other diff IDs and a history for the bootstrap. Fields that are
// not ours stay as they are.
func rewriteConfig(ctx context.Context, cs content.Store, desc ocispec.Descriptor, diffIDs []digest.Digest, opt MergeOption) (ocispec.Descriptor, error) {
	var all map[string]json.RawMessage
	gc, err := readJSON(ctx, cs, desc, &all)
	if err != nil {
		return desc, err
	}
	var history []ocispec.History
	if raw := all["history"]; raw != nil {
		if err := json.Unmarshal(raw, &history); err != nil {
			return desc, err
		}
	}
	if opt.Backend != nil {
		history = nil
	}
	full := len(slices.DeleteFunc(slices.Clone(history), func(h ocispec.History) bool { return h.EmptyLayer }))
	for ; len(history) > 0 && full < len(diffIDs)-1; full++ {
		history = append(history, ocispec.History{CreatedBy: "headstart", Comment: "blob of the chunk dictionary"})
	}
	history = append(history, ocispec.History{CreatedBy: "headstart", Comment: "bootstrap"})
	for key, v := range map[string]any{"rootfs": ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}, "history": history} {
		if all[key], err = json.Marshal(v); err != nil {
			return desc, err
		}
	}
	out, err := writeJSON(ctx, cs, all, desc, gc)
	if err != nil {
		return desc, err
	}
	if opt.MergeManifest {
		out.MediaType = ManifestConfigNydus
	}
	return *out, nil
}

// MergeLayers merges blobs of the store into a bootstrap layer (tar.gz) in the store. It returns
// the bootstrap layer and the layers before it: descs, and behind them the blobs of chunk dictionaries,
// which must be in the store too.
func MergeLayers(ctx context.Context, cs content.Store, descs []ocispec.Descriptor, opt MergeOption) (_ *ocispec.Descriptor, _ []ocispec.Descriptor, err error) {
	var layers []Layer
	for _, d := range descs {
		ra, err := cs.ReaderAt(ctx, d)
		if err != nil {
			return nil, nil, fmt.Errorf("blob %s: %w", d.Digest, err)
		}
		defer func() { _ = ra.Close() }() // only read
		l := Layer{Digest: d.Digest, ReaderAt: ra}
		if l.OriginalDigest, err = refOf(d, opt.OCIRef); err != nil {
			return nil, nil, err
		}
		layers = append(layers, l)
	}
	version, err := layersVersion(layers)
	if err != nil {
		return nil, nil, err
	}
	opt.WithTar = true
	var used []digest.Digest
	plain := digest.SHA256.Digester()
	boot, err := writeContent(ctx, cs, "headstart-merge-"+chain(descs), func(w io.Writer) error {
		z := gzip.NewWriter(w)
		var err error
		used, err = Merge(ctx, layers, io.MultiWriter(z, plain.Hash()), opt)
		return errors.Join(err, z.Close())
	})
	if err != nil {
		return nil, nil, err
	}
	boot.MediaType = images.MediaTypeDockerSchema2LayerGzip
	if opt.OCI {
		boot.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	boot.Annotations = map[string]string{
		LayerAnnotationUncompressed: plain.Digest().String(), builder.AnnotationBootstrap: "true", builder.AnnotationFSVersion: version,
	}
	update := content.Info{Digest: boot.Digest, Labels: map[string]string{labels.LabelUncompressed: plain.Digest().String()}}
	if _, err := cs.Update(ctx, update, "labels."+labels.LabelUncompressed); err != nil {
		return nil, nil, err
	}
	blobs, err := withDict(ctx, cs, descs, used, layers, opt.Backend)
	if err != nil {
		return nil, nil, err
	}
	return boot, blobs, nil
}

// refOf returns the layer that a blob refers to: nil for one with chunks of its own, which is an error when there must be none.
func refOf(d ocispec.Descriptor, must bool) (*digest.Digest, error) {
	text, ok := d.Annotations[LayerAnnotationNydusRefLayer]
	if !ok && !must {
		return nil, nil
	}
	id, err := digest.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: OCIRef: annotation %s of blob %s is %q: %w", builder.ErrInvalid, LayerAnnotationNydusRefLayer, d.Digest, text, err)
	}
	return &id, nil
}

// withDict returns descs and behind them what else is used, the blobs of the chunk dictionary, but for layers that are referred to.
func withDict(ctx context.Context, cs content.Store, descs []ocispec.Descriptor, used []digest.Digest, layers []Layer, backend Backend) ([]ocispec.Descriptor, error) {
	blobs := slices.Clone(descs)
	for _, id := range used {
		if slices.ContainsFunc(blobs, func(b ocispec.Descriptor) bool { return b.Digest == id }) ||
			slices.ContainsFunc(layers, func(l Layer) bool { return l.OriginalDigest != nil && *l.OriginalDigest == id }) {
			continue
		}
		size, err := sizeOf(ctx, cs, id, backend)
		if err != nil {
			return nil, fmt.Errorf("blob %s of the chunk dictionary: %w", id, err)
		}
		blobs = append(blobs, blobDescriptor(id, size))
	}
	return blobs, nil
}

func sizeOf(ctx context.Context, cs content.Store, id digest.Digest, backend Backend) (int64, error) {
	if b, ok := backend.(interface {
		Size(blobDigest digest.Digest) (int64, error)
	}); ok {
		return b.Size(id)
	}
	info, err := cs.Info(ctx, id)
	return info.Size, err
}

// chain names a list of layers.
func chain(descs []ocispec.Descriptor) string {
	sum := digest.SHA256.Digester()
	for _, d := range descs {
		_, _ = io.WriteString(sum.Hash(), d.Digest.String()) // never fails
	}
	return sum.Digest().Encoded()
}

// maxDocument bounds manifests and configs; registries take manifests of 4 MiB.
const maxDocument = 16 << 20

func readJSON(ctx context.Context, cs content.Store, desc ocispec.Descriptor, v any) (map[string]string, error) {
	info, err := cs.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	if info.Size > maxDocument { // the store's size: that of a descriptor is what somebody claims
		return nil, fmt.Errorf("%w: %s has %d bytes, at most %d", ErrUnsupported, desc.Digest, info.Size, maxDocument)
	}
	b, err := content.ReadBlob(ctx, cs, desc)
	if err != nil {
		return nil, err
	}
	gc := maps.Clone(info.Labels)
	if gc == nil {
		gc = map[string]string{}
	}
	return gc, json.Unmarshal(b, v)
}

// writeJSON writes v in place of what old describes.
func writeJSON(ctx context.Context, cs content.Store, v any, old ocispec.Descriptor, gc map[string]string) (*ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	desc := old
	desc.Digest, desc.Size = digest.FromBytes(b), int64(len(b))
	err = content.WriteBlob(ctx, cs, "headstart-json-"+desc.Digest.String(), bytes.NewReader(b), desc, content.WithLabels(gc))
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, err
	}
	return &desc, nil
}
