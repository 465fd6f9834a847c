package lazy

import (
	"fmt"
	"path"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// Labels that containerd's CRI plugin gives to the snapshots that it asks for while it pulls an image.
// Source: containerd pkg/snapshotters/annotations.go TargetRefLabel, TargetManifestDigestLabel.
const (
	LabelReference = "containerd.io/snapshot/cri.image-ref"
	LabelManifest  = "containerd.io/snapshot/cri.manifest-digest"
)

// RequestOf returns a request for the image whose manifest, or index of several, a caller has already: a snapshotter, which was given
// descriptors in place of a name. repository is where the blobs are, as in "registry.example/app", or a layout; a tag or a digest in it is
// left out. Credentials and the rest are the caller's to add. An error says what is wrong with the descriptor; nothing is asked of the registry.
func RequestOf(repository string, manifest ocispec.Descriptor) (Request, error) {
	if err := manifest.Digest.Validate(); err != nil {
		return Request{}, fmt.Errorf("manifest of %s: digest %q: %w", repository, manifest.Digest, err)
	}
	switch manifest.MediaType {
	case "", ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
		"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json":
	default:
		return Request{}, fmt.Errorf("manifest of %s: media type %q, want that of a manifest or an index", repository, manifest.MediaType)
	}
	ref, err := remote.Parse(repository)
	if err != nil {
		return Request{}, fmt.Errorf("repository %s: %w", repository, err)
	}
	ref.Tag, ref.Digest = "", manifest.Digest
	r := Request{Reference: ref.String()}
	if p := manifest.Platform; p != nil && p.OS != "" && p.Architecture != "" {
		r.Platform = path.Join(p.OS, p.Architecture, p.Variant)
	}
	return r, nil
}

// RequestFromLabels is [RequestOf] for the labels of a snapshot: [LabelReference], and [LabelManifest] when the manifest is to be the one that
// was resolved and not what the tag names by now. Other labels are not looked at.
func RequestFromLabels(labels map[string]string) (Request, error) {
	name := labels[LabelReference]
	if name == "" {
		return Request{}, fmt.Errorf("no label %s: which image is it?", LabelReference)
	}
	if sum := labels[LabelManifest]; sum != "" {
		return RequestOf(name, ocispec.Descriptor{Digest: digest.Digest(sum)})
	}
	ref, err := remote.Parse(name)
	if err != nil {
		return Request{}, fmt.Errorf("label %s: %w", LabelReference, err)
	}
	return Request{Reference: ref.String()}, nil
}
