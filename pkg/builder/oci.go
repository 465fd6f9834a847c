package builder

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MediaTypeBlob is the media type of the layers of a Nydus image that hold chunks.
const MediaTypeBlob = "application/vnd.oci.image.layer.nydus.blob.v1"

// The annotations of a Nydus image that are written here. Source: nydus-snapshotter
// pkg/converter/constant.go and pkg/label.
const (
	AnnotationBlob         = "containerd.io/snapshot/nydus-blob"
	AnnotationBootstrap    = "containerd.io/snapshot/nydus-bootstrap"
	AnnotationFSVersion    = "containerd.io/snapshot/nydus-fs-version"
	AnnotationPrefetchBlob = "containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"
	AnnotationSourceDigest = "containerd.io/snapshot/nydus-source-digest"
)

// sourceConfig is an image config: what is needed of it, and all of it.
type sourceConfig struct {
	all     map[string]json.RawMessage
	diffIDs []digest.Digest
	history []map[string]json.RawMessage
}

func parseConfig(b []byte) (sourceConfig, error) {
	var c sourceConfig
	if err := json.Unmarshal(b, &c.all); err != nil {
		return sourceConfig{}, fmt.Errorf("%w: config: %w", ErrInvalid, err)
	}
	var rootfs struct {
		Type    string          `json:"type"`
		DiffIDs []digest.Digest `json:"diff_ids"`
	}
	raw, ok := c.all["rootfs"]
	if !ok {
		return sourceConfig{}, fmt.Errorf("%w: config has no rootfs", ErrInvalid)
	}
	if err := json.Unmarshal(raw, &rootfs); err != nil {
		return sourceConfig{}, fmt.Errorf("%w: config: rootfs: %w", ErrInvalid, err)
	}
	if rootfs.Type != "layers" {
		return sourceConfig{}, fmt.Errorf("%w: config: rootfs type %q, want layers", ErrUnsupported, rootfs.Type)
	}
	c.diffIDs = rootfs.DiffIDs
	if raw, ok := c.all["history"]; ok {
		if err := json.Unmarshal(raw, &c.history); err != nil {
			return sourceConfig{}, fmt.Errorf("%w: config: history: %w", ErrInvalid, err)
		}
	}
	return c, nil
}

// historyNote is an item of a config's history that this package adds.
func historyNote(comment string) map[string]json.RawMessage {
	text, _ := json.Marshal(comment) // a plain string
	return map[string]json.RawMessage{"created_by": json.RawMessage(`"headstart"`), "comment": text}
}

// newHistory returns the history of the result: as many items that are no empty layer as
// the result has layers. kept tells which source layers have a blob in the result.
func (c sourceConfig) newHistory(kept []bool, blobs []File) []map[string]json.RawMessage {
	if c.history == nil {
		return nil
	}
	layer, fits := 0, true
	var out []map[string]json.RawMessage
	for _, item := range c.history {
		if item == nil {
			item = map[string]json.RawMessage{}
		}
		item = maps.Clone(item)
		if string(bytes.TrimSpace(item["empty_layer"])) != "true" {
			if layer >= len(kept) {
				fits = false
			} else if !kept[layer] {
				item["empty_layer"] = json.RawMessage("true")
			}
			layer++
		}
		out = append(out, item)
	}
	if !fits || layer != len(kept) {
		// The source's history does not tell which item made which layer.
		for _, item := range out {
			item["empty_layer"] = json.RawMessage("true")
		}
		for _, b := range blobs {
			if b.SourceLayer >= 0 {
				out = append(out, historyNote("layer"))
			}
		}
	}
	for _, b := range blobs {
		switch {
		case b.SourceLayer >= 0:
		case b.Stored:
			out = append(out, historyNote("blob of the chunk dictionary"))
		default:
			out = append(out, historyNote("prefetch blob"))
		}
	}
	return append(out, historyNote("bootstrap"))
}

// encode returns the config with other diff IDs and history, all else as it was.
func (c sourceConfig) encode(diffIDs []digest.Digest, history []map[string]json.RawMessage) ([]byte, error) {
	all := maps.Clone(c.all)
	var rootfs map[string]json.RawMessage
	if err := json.Unmarshal(c.all["rootfs"], &rootfs); err != nil {
		return nil, fmt.Errorf("%w: config: rootfs: %w", ErrInvalid, err)
	}
	var err error
	if rootfs["diff_ids"], err = marshal(diffIDs); err != nil {
		return nil, err
	}
	if all["rootfs"], err = marshal(rootfs); err != nil {
		return nil, err
	}
	if history != nil {
		if all["history"], err = marshal(history); err != nil {
			return nil, err
		}
	}
	return marshal(all)
}

// marshal encodes v without escaping what only HTML cares about.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// describe fills in the config and the manifest of r; bootstrapDiffID is the digest of the
// bootstrap layer's tar.
func (r *Result) describe(src Source, cfg sourceConfig, bootstrapDiffID digest.Digest) error {
	kept := make([]bool, len(src.Layers))
	var diffIDs []digest.Digest
	var layers []ocispec.Descriptor
	for _, b := range r.Blobs {
		if b.SourceLayer >= 0 {
			kept[b.SourceLayer] = true
		}
		diffIDs = append(diffIDs, b.Descriptor.Digest)
		layers = append(layers, b.Descriptor)
	}
	diffIDs = append(diffIDs, bootstrapDiffID)
	layers = append(layers, r.Bootstrap.Descriptor)

	var err error
	if r.Config, err = cfg.encode(diffIDs, cfg.newHistory(kept, r.Blobs)); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	r.ConfigDescriptor = descriptorOf(ocispec.MediaTypeImageConfig, r.Config)

	annotations := maps.Clone(src.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[AnnotationFSVersion] = r.Bootstrap.Descriptor.Annotations[AnnotationFSVersion]
	if src.Manifest.Digest != "" {
		annotations[AnnotationSourceDigest] = src.Manifest.Digest.String()
	}
	r.Manifest, err = marshal(ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      r.ConfigDescriptor,
		Layers:      layers,
		Annotations: annotations,
	})
	if err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	r.ManifestDescriptor = descriptorOf(ocispec.MediaTypeImageManifest, r.Manifest)
	if p := src.Manifest.Platform; p != nil {
		platform := *p
		r.ManifestDescriptor.Platform = &platform
	}
	return nil
}

func descriptorOf(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}
