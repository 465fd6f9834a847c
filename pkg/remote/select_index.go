package remote

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationSubject is the digest of the manifest that an attestation is about.
// Source: moby/buildkit docs/attestations/attestation-storage.md.
const annotationSubject = "vnd.docker.reference.digest"

// Index is what a reference leads to as a whole.
type Index struct {
	Root ocispec.Descriptor // what the reference resolved to
	// Plain is true when Root is a manifest and no index; Entries then holds it alone.
	Plain bool
	// Annotations are those of the index that Root is.
	Annotations map[string]string
	// Entries are its manifests in order, indexes inside it unfolded in place.
	Entries []ocispec.Descriptor
}

// ReadIndex reads everything that src's reference leads to. Errors are those of [Select].
func ReadIndex(ctx context.Context, src Source) (Index, error) {
	root, err := src.Resolve(ctx)
	if err != nil {
		return Index{}, err
	}
	entries, err := walk(ctx, src, root)
	if err != nil {
		return Index{}, err
	}
	out := Index{Root: root, Entries: entries, Plain: !images.IsIndexType(root.MediaType)}
	if out.Plain {
		return out, nil
	}
	data, err := ReadAll(ctx, src, root, MaxManifestSize)
	if err != nil {
		return Index{}, err
	}
	index, err := parseIndex(data)
	if err != nil {
		return Index{}, fmt.Errorf("index %s: %w", root.Digest, err)
	}
	out.Annotations = index.Annotations
	return out, nil
}

// Images returns the entries that are container images: neither attestations nor Nydus images
// nor artifacts of another kind that say so.
func (i Index) Images() []ocispec.Descriptor {
	return filter(i.Entries, func(d ocispec.Descriptor) bool {
		// Some name the config's media type there, as the image-spec has it.
		image := d.ArtifactType == "" || images.IsConfigType(d.ArtifactType)
		return images.IsManifestType(d.MediaType) && image && !isAttestation(d) && !isNydusEntry(d)
	})
}

// NydusImages returns the entries that are marked as Nydus images.
func (i Index) NydusImages() []ocispec.Descriptor { return filter(i.Entries, isNydusEntry) }

// About returns the entries that are about the manifest with digest d, as attestations are.
func (i Index) About(d digest.Digest) []ocispec.Descriptor {
	return filter(i.Entries, func(e ocispec.Descriptor) bool {
		return isAttestation(e) && e.Annotations[annotationSubject] == d.String()
	})
}

// Load reads the image of an entry of i, with the checks of [Select]. Its platform is the
// entry's, else the one that its config says.
func (i Index) Load(ctx context.Context, src Source, entry ocispec.Descriptor) (Image, error) {
	if err := checkDescriptor(entry); err != nil {
		return Image{}, fmt.Errorf("index %s: %w", i.Root.Digest, err)
	}
	if !images.IsManifestType(entry.MediaType) {
		return Image{}, notImage(entry)
	}
	img, err := load(ctx, src, entry, nil)
	if err != nil {
		return Image{}, err
	}
	img.Root = i.Root
	if i.Plain || entry.Platform == nil {
		got := img.Config.Platform
		img.Descriptor.Platform = &got
	}
	return img, nil
}

// MarkNydus returns d as the entry of a Nydus image in an index that has a plain image for the
// same platform too: clients that do not know the mark take the other one.
func MarkNydus(d ocispec.Descriptor) ocispec.Descriptor {
	d.ArtifactType = artifactTypeNydus
	p := ocispec.Platform{}
	if d.Platform != nil {
		p = *d.Platform
	}
	if !slices.Contains(p.OSFeatures, osFeatureNydus) {
		p.OSFeatures = append(slices.Clone(p.OSFeatures), osFeatureNydus)
	}
	d.Platform = &p
	return d
}

// preferNydus drops the mark of the Nydus images for platform want, and what they stand
// beside; without such images entries stay as they are.
func preferNydus(entries []ocispec.Descriptor, want ocispec.Platform) []ocispec.Descriptor {
	match := platforms.Only(want)
	var out []ocispec.Descriptor
	for _, d := range entries {
		if !isNydusEntry(d) || d.Platform == nil {
			continue
		}
		p := *d.Platform
		p.OSFeatures = slices.DeleteFunc(slices.Clone(p.OSFeatures), func(f string) bool { return f == osFeatureNydus })
		if match.Match(p) {
			d.Platform, d.ArtifactType = &p, ""
			out = append(out, d)
		}
	}
	if len(out) == 0 {
		return entries
	}
	return out
}
