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
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// DefaultIndexConvertFunc returns containerd's converter, set up to make plain images of Nydus images: with what [LayerReconvertFunc]
// returns as layers, and [ReconvertHookFunc].
func DefaultIndexConvertFunc(layers converter.ConvertFunc, docker2oci bool, platform platforms.MatchComparer) converter.ConvertFunc {
	convert := converter.IndexConvertFuncWithHook(layers, docker2oci, platform, converter.ConvertHooks{PostConvertHook: ReconvertHookFunc()})
	return func(ctx context.Context, cs content.Store, desc ocispec.Descriptor) (*ocispec.Descriptor, error) {
		return convert(ctx, labelled{cs}, desc)
	}
}

// labelled is a store that has a diff ID for what is no tar, which containerd's converter would decompress to find one:
// the content's own digest, where the store knows no other.
type labelled struct{ content.Store }

// Info is the store's.
func (s labelled) Info(ctx context.Context, id digest.Digest) (content.Info, error) {
	info, err := s.Store.Info(ctx, id)
	if err != nil || info.Labels[labels.LabelUncompressed] != "" {
		return info, err
	}
	ra, err := s.ReaderAt(ctx, ocispec.Descriptor{Digest: id, Size: info.Size})
	if err != nil {
		return info, err
	}
	defer func() { _ = ra.Close() }() // only read
	if isBlob(ra) {
		set := map[string]string{labels.LabelUncompressed: id.String()}
		maps.Copy(set, info.Labels)
		info.Labels = set
	}
	return info, nil
}

// isBlob tells whether the content ends with the header of a section, as the blobs of Nydus images do.
func isBlob(ra content.ReaderAt) bool {
	const header, magic = 512, 257
	p := make([]byte, header)
	if ra.Size() < header {
		return false
	}
	if _, err := ra.ReadAt(p, ra.Size()-header); err != nil && !errors.Is(err, io.EOF) {
		return false
	}
	name, _, _ := bytes.Cut(p[:100], []byte{0})
	return string(p[magic:magic+5]) == "ustar" && slices.Contains([]string{"rafs.blob.toc", "image.boot", "blob.meta", "image.blob"}, string(name))
}

// LayerReconvertFunc returns a function for containerd's converter that unpacks the blob of a Nydus image into a layer, compressed as opt
// says. What is no such blob, the bootstrap among it, is left as it is: see [ReconvertHookFunc]. Blobs with chunks of others, and those packed
// with OCIRef, are ErrUnsupported.
func LayerReconvertFunc(opt UnpackOption) converter.ConvertFunc {
	return func(ctx context.Context, cs content.Store, desc ocispec.Descriptor) (*ocispec.Descriptor, error) {
		if !images.IsLayerType(desc.MediaType) || !IsNydusBlob(desc) {
			return nil, ctx.Err()
		}
		out, err := unpackContent(ctx, cs, desc, opt)
		if err != nil {
			return nil, fmt.Errorf("unpack blob %s: %w", desc.Digest, err)
		}
		if err := push(ctx, opt.Backend, cs, *out); err != nil {
			return nil, err
		}
		return out, nil
	}
}

// compressed returns what compresses into w as name says, and the media type of layers that are.
func compressed(w io.Writer, name string) (io.WriteCloser, string, error) {
	switch name {
	case "", "gzip":
		return gzip.NewWriter(w), ocispec.MediaTypeImageLayerGzip, nil
	case "zstd":
		z, err := zstd.NewWriter(w)
		return z, ocispec.MediaTypeImageLayerZstd, err
	case "uncompressed":
		return plainWriter{w}, ocispec.MediaTypeImageLayer, nil
	}
	return nil, "", fmt.Errorf("%w: Compressor %q, want gzip, zstd or uncompressed", ErrUnsupported, name)
}

type plainWriter struct{ io.Writer }

func (plainWriter) Close() error { return nil }

// unpackContent unpacks a blob of the store into the store.
func unpackContent(ctx context.Context, cs content.Store, desc ocispec.Descriptor, opt UnpackOption) (_ *ocispec.Descriptor, err error) {
	_, mediaType, err := compressed(io.Discard, opt.Compressor)
	if err != nil {
		return nil, err
	}
	ra, err := cs.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	plain := digest.SHA256.Digester()
	out, err := writeContent(ctx, cs, "headstart-unpack-"+desc.Digest.String(), func(w io.Writer) error {
		z, _, err := compressed(w, opt.Compressor)
		if err != nil {
			return err
		}
		return errors.Join(Unpack(ctx, ra, io.MultiWriter(z, plain.Hash()), opt), z.Close())
	})
	if err != nil {
		return nil, err
	}
	id := plain.Digest().String()
	update := content.Info{Digest: out.Digest, Labels: map[string]string{labels.LabelUncompressed: id}}
	if _, err := cs.Update(ctx, update, "labels."+labels.LabelUncompressed); err != nil {
		return nil, err
	}
	out.MediaType, out.Annotations = mediaType, map[string]string{LayerAnnotationUncompressed: id}
	return out, nil
}

// ReconvertHookFunc returns a function for containerd's converter that, when the blobs of a manifest are unpacked, takes the
// bootstrap out of manifest and config, with its diff ID and its history.
func ReconvertHookFunc() converter.ConvertHookFunc {
	return func(ctx context.Context, cs content.Store, _ ocispec.Descriptor, desc *ocispec.Descriptor) (*ocispec.Descriptor, error) {
		if desc == nil || !images.IsManifestType(desc.MediaType) {
			return desc, nil
		}
		out, err := dropBootstrap(ctx, cs, *desc)
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", desc.Digest, err)
		}
		return out, nil
	}
}

// dropBootstrap returns the manifest of desc without a bootstrap; desc when it has none.
func dropBootstrap(ctx context.Context, cs content.Store, desc ocispec.Descriptor) (*ocispec.Descriptor, error) {
	var m ocispec.Manifest
	gc, err := readJSON(ctx, cs, desc, &m)
	if err != nil {
		return nil, err
	}
	n := len(m.Layers) - 1
	if n < 0 || !IsNydusBootstrap(m.Layers[n]) {
		return &desc, nil
	}
	var config map[string]json.RawMessage
	configGC, err := readJSON(ctx, cs, m.Config, &config)
	if err != nil {
		return nil, err
	}
	if err := dropDiffID(config, m.Layers[:n]); err != nil {
		return nil, err
	}
	newConfig, err := writeJSON(ctx, cs, config, m.Config, configGC)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if newConfig.MediaType == ManifestConfigNydus {
		newConfig.MediaType = ocispec.MediaTypeImageConfig
	}
	converter.ClearGCLabels(gc, m.Layers[n].Digest)
	m.Config, m.Layers = *newConfig, m.Layers[:n]
	for i := range m.Layers {
		delete(m.Layers[i].Annotations, LayerAnnotationUncompressed)
	}
	gc["containerd.io/gc.ref.content.config"] = m.Config.Digest.String()
	return writeJSON(ctx, cs, m, desc, gc)
}

// dropDiffID takes the bootstrap behind layers, its diff ID and its history, out of a config.
func dropDiffID(config map[string]json.RawMessage, layers []ocispec.Descriptor) error {
	n := len(layers)
	var rootfs ocispec.RootFS
	if err := json.Unmarshal(config["rootfs"], &rootfs); err != nil {
		return fmt.Errorf("config: rootfs: %w", err)
	}
	if len(rootfs.DiffIDs) != n+1 {
		return fmt.Errorf("%w: %d layers, and %d diff IDs in the config", ErrUnsupported, n+1, len(rootfs.DiffIDs))
	}
	rootfs.DiffIDs = rootfs.DiffIDs[:n]
	for i, l := range layers {
		// containerd's converter has changed them, but not in configs of Nydus' own type.
		if id := digest.Digest(l.Annotations[LayerAnnotationUncompressed]); id != "" {
			rootfs.DiffIDs[i] = id
		}
	}
	var history []ocispec.History
	if raw := config["history"]; raw != nil {
		if err := json.Unmarshal(raw, &history); err != nil {
			return fmt.Errorf("config: history: %w", err)
		}
	}
	// The last entry with a layer is the bootstrap's.
	for i, h := range slices.Backward(history) {
		if !h.EmptyLayer {
			history = slices.Delete(history, i, i+1)
			break
		}
	}
	for key, v := range map[string]any{"rootfs": rootfs, "history": history} {
		raw, err := json.Marshal(v)
		if err != nil {
			return err
		}
		config[key] = raw
	}
	return nil
}
