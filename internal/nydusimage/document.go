// Package nydusimage reads a published Nydus image: its manifest and config, the bootstrap
// in its last layer, and the blobs that the bootstrap refers to, from a registry, a layout,
// an archive, containerd or loose files.
package nydusimage

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types and annotations of Nydus images; rafs-format.md, 5.1 and 5.2.
const (
	MediaTypeBlob = "application/vnd.oci.image.layer.nydus.blob.v1"

	AnnotationBlob      = "containerd.io/snapshot/nydus-blob"
	AnnotationBootstrap = "containerd.io/snapshot/nydus-bootstrap"
	AnnotationFSVersion = "containerd.io/snapshot/nydus-fs-version"
	AnnotationPrefetch  = "containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"
	annotationRef       = "containerd.io/snapshot/nydus-ref"
)

// ErrInvalid is returned when an image's documents contradict each other.
var ErrInvalid = errors.New("invalid nydus image")

// Document is the manifest and config of a Nydus image.
type Document struct {
	Manifest ocispec.Manifest
	Config   ocispec.Image
}

// Is reports whether a manifest is that of a Nydus image: one of its layers says that it
// is a bootstrap or a blob.
func Is(m ocispec.Manifest) bool {
	return slices.ContainsFunc(m.Layers, func(l ocispec.Descriptor) bool {
		_, bootstrap := l.Annotations[AnnotationBootstrap]
		_, blob := l.Annotations[AnnotationBlob]
		return bootstrap || blob || l.MediaType == MediaTypeBlob
	})
}

// Parse decodes the two documents.
func Parse(manifest, config []byte) (*Document, error) {
	var d Document
	if err := json.Unmarshal(manifest, &d.Manifest); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	if err := json.Unmarshal(config, &d.Config); err != nil {
		return nil, fmt.Errorf("%w: config: %w", ErrInvalid, err)
	}
	return &d, nil
}

// Bootstrap returns the layer that holds the bootstrap, the last one.
func (d *Document) Bootstrap() (ocispec.Descriptor, error) {
	layers := d.Manifest.Layers
	if len(layers) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%w: no layers", ErrInvalid)
	}
	last := layers[len(layers)-1]
	if got := last.Annotations[AnnotationBootstrap]; got != "true" {
		return ocispec.Descriptor{}, fmt.Errorf("%w: last layer %s: annotation %s is %q, want \"true\"", ErrInvalid, last.Digest, AnnotationBootstrap, got)
	}
	return last, nil
}

// Blobs returns the layers before the bootstrap.
func (d *Document) Blobs() []ocispec.Descriptor {
	return d.Manifest.Layers[:max(0, len(d.Manifest.Layers)-1)]
}

// Check compares the documents with each other and with ids, the blob ids of the bootstrap's
// table: the rules of nydusify's check (rafs-format.md, 5.4), and that the annotation about
// the prefetch blob names a blob of the image. It returns every fault, joined; each is ErrInvalid.
func (d *Document) Check(ids []string) error {
	var errs []error
	fault := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...)))
	}
	last, err := d.Bootstrap()
	if err != nil {
		return err
	}
	diffIDs := d.Config.RootFS.DiffIDs
	if len(diffIDs) != len(d.Manifest.Layers) {
		fault("config has %d diff IDs, manifest has %d layers", len(diffIDs), len(d.Manifest.Layers))
	}
	layers := map[string]bool{}
	reference := false // the chunks are in the layers of another image
	for i, l := range d.Blobs() {
		layers[l.Digest.Encoded()] = true
		if l.MediaType != MediaTypeBlob {
			fault("layer %d (%s): media type is %q, want %q", i, l.Digest, l.MediaType, MediaTypeBlob)
		}
		if got := l.Annotations[AnnotationBlob]; got != "true" {
			fault("layer %d (%s): annotation %s is %q, want \"true\"", i, l.Digest, AnnotationBlob, got)
		}
		_, isRef := l.Annotations[annotationRef]
		reference = reference || isRef
		if len(diffIDs) == len(d.Manifest.Layers) && diffIDs[i] != l.Digest {
			fault("layer %d: diff ID is %s, want the blob's digest %s", i, diffIDs[i], l.Digest)
		}
	}
	if !reference && len(layers) > 0 {
		for _, id := range ids {
			if !layers[id] {
				fault("the bootstrap refers to blob %s, which is no layer of the image", id)
			}
		}
	}
	if id, ok := last.Annotations[AnnotationPrefetch]; ok && !slices.Contains(ids, id) {
		fault("annotation %s names blob %q, which the bootstrap does not refer to", AnnotationPrefetch, id)
	}
	return errors.Join(errs...)
}

// checkDiffID compares the bootstrap layer's uncompressed digest with the config.
func (d *Document) checkDiffID(got digest.Digest) error {
	ids := d.Config.RootFS.DiffIDs
	if len(ids) == 0 || ids[len(ids)-1] != got {
		want := digest.Digest("none")
		if len(ids) > 0 {
			want = ids[len(ids)-1]
		}
		return fmt.Errorf("%w: the bootstrap layer unpacks to %s, the config says %s", ErrInvalid, got, want)
	}
	return nil
}
