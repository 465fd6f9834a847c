package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// How Nydus manifests are marked in an index.
// Source: nydus docs/nydusify.md and contrib/nydusify pkg/utils/constant.go.
const (
	artifactTypeNydus = "application/vnd.nydus.image.manifest.v1+json"
	osFeatureNydus    = "nydus.remoteimage.v1"
	annotationNydus   = "containerd.io/snapshot/nydus-bootstrap" // on the layer that is the bootstrap
)

// annotationReference marks an index entry that is about another, as BuildKit's attestations
// are; its value is the kind.
// Source: moby/buildkit docs/attestations/attestation-storage.md.
const annotationReference = "vnd.docker.reference.type"

// Layer is one layer of an image.
type Layer struct {
	Descriptor ocispec.Descriptor // of the stored bytes
	DiffID     digest.Digest      // of the uncompressed tar
}

// Image is one platform's image, as [Select] found it. Its slices are shared with nobody.
type Image struct {
	Root          ocispec.Descriptor // what the reference resolved to: an index, or the manifest
	Descriptor    ocispec.Descriptor // the manifest; Platform is set
	Manifest      ocispec.Manifest
	ManifestBytes []byte // as stored
	Config        ocispec.Image
	ConfigBytes   []byte  // as stored
	Layers        []Layer // lowest first
}

// Nydus reports whether the image is a Nydus image: it has a bootstrap layer.
func (i Image) Nydus() bool { return isNydusManifest(i.Manifest) }

// Select finds the image for platform ("linux/amd64", "linux/arm/v7"; empty: this machine's)
// in src, reads its manifest and config and checks that they agree. In an index the best
// match wins, a variant that the platform can run included; attestations and Nydus images
// are passed over. A manifest without an index is taken when its config says the platform.
// Errors are [ErrPlatform] with what there is, [ErrInvalid], [ErrUnsupported] (schema 1, what
// is no container image), [ErrTooLarge], and those of the source.
func Select(ctx context.Context, src Source, platform string) (Image, error) {
	return selectImage(ctx, src, platform, selection{})
}

// SelectNydus is [Select] for readers of Nydus images: where an index has a Nydus image and a
// plain one for the platform, it takes the Nydus image. Whether a manifest that is marked in
// no index is one is left to the caller ([Image].Nydus).
func SelectNydus(ctx context.Context, src Source, platform string) (Image, error) {
	return SelectNydusEarly(ctx, src, platform, func(ocispec.Manifest) {})
}

// SelectNydusEarly is [SelectNydus] in as few round trips as there can be. early is told the manifest while its config, which
// may say that it is the wrong one, is still on its way: what it names can be asked for at the same time.
func SelectNydusEarly(ctx context.Context, src Source, platform string, early func(m ocispec.Manifest)) (Image, error) {
	return selectImage(ctx, src, platform, selection{nydus: true, early: early})
}

// selection says how an image is selected.
type selection struct {
	nydus bool                     // where there is a Nydus image and a plain one, the Nydus image
	early func(m ocispec.Manifest) // nil: nobody asks
}

// resolved is a source of which the document that the reference resolves to has been read.
type resolved struct {
	Source
	root ocispec.Descriptor
	data []byte
}

// resolveDocument resolves src's reference, with the document itself where that comes at the same price.
func resolveDocument(ctx context.Context, src Source) (Source, ocispec.Descriptor, error) {
	s, ok := src.(interface {
		resolveDocument(ctx context.Context) (ocispec.Descriptor, []byte, error)
	})
	if !ok {
		root, err := src.Resolve(ctx)
		return src, root, err
	}
	root, data, err := s.resolveDocument(ctx)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		root, err = src.Resolve(ctx) // what breaks in the middle goes on, once its size is known
		return src, root, err
	}
	return resolved{src, root, data}, root, err
}

// Fetch implements Source.
func (r resolved) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if desc.Digest != r.root.Digest {
		return r.Source.Fetch(ctx, desc)
	}
	return verify(io.NopCloser(bytes.NewReader(r.data)), desc, ""), nil
}

func selectImage(ctx context.Context, src Source, platform string, how selection) (Image, error) {
	want, err := parsePlatform(platform)
	if err != nil {
		return Image{}, err
	}
	var root ocispec.Descriptor
	if how.nydus {
		src, root, err = resolveDocument(ctx, src)
	} else {
		root, err = src.Resolve(ctx)
	}
	if err != nil {
		return Image{}, err
	}
	entries, err := walk(ctx, src, root)
	if err != nil {
		return Image{}, err
	}
	if how.nydus {
		entries = preferNydus(entries, want)
	}
	desc, err := choose(entries, root, want)
	if err != nil {
		return Image{}, err
	}
	img, err := load(ctx, src, desc, how.early)
	if err != nil {
		return Image{}, err
	}
	img.Root = root
	got := img.Config.Platform
	if got.OS == "" && got.Architecture == "" && desc.Platform != nil {
		got = *desc.Platform
	}
	if desc.Platform == nil && !platforms.Only(want).Match(got) {
		return Image{}, fmt.Errorf("%w: want %s, the image is for %s", ErrPlatform, platforms.FormatAll(want), platforms.FormatAll(got))
	}
	if img.Descriptor.Platform == nil {
		img.Descriptor.Platform = &got
	}
	return img, nil
}

// List returns the manifests that src's reference leads to, in order: the entries of its
// index and of indexes in it, or the manifest itself. Attestations are left out; Nydus images
// are not. Errors are those of [Select].
func List(ctx context.Context, src Source) ([]ocispec.Descriptor, error) {
	root, err := src.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	entries, err := walk(ctx, src, root)
	if err != nil {
		return nil, err
	}
	return filter(entries, func(d ocispec.Descriptor) bool { return !isAttestation(d) }), nil
}

func parsePlatform(s string) (ocispec.Platform, error) {
	if s == "" {
		return platforms.DefaultSpec(), nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return ocispec.Platform{}, fmt.Errorf("%w: platform %.100q: %w", ErrInvalid, s, err)
	}
	return p, nil
}

// walk returns the manifests below root, nested indexes unfolded in place.
func walk(ctx context.Context, src Source, root ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	seen := make(map[digest.Digest]bool)
	var entries []ocispec.Descriptor
	var visit func(desc ocispec.Descriptor, depth int) error
	visit = func(desc ocispec.Descriptor, depth int) error {
		if !images.IsIndexType(desc.MediaType) {
			if entries = append(entries, desc); len(entries) > MaxIndexEntries {
				return fmt.Errorf("%w: index %s: more than %d entries", ErrTooLarge, root.Digest, MaxIndexEntries)
			}
			return nil
		}
		if depth >= MaxIndexDepth {
			return fmt.Errorf("%w: index %s: more than %d indexes inside each other", ErrTooLarge, root.Digest, MaxIndexDepth)
		}
		if seen[desc.Digest] {
			return nil
		}
		if seen[desc.Digest] = true; len(seen) > 256 {
			return fmt.Errorf("%w: index %s: more than 256 indexes in it", ErrTooLarge, root.Digest)
		}
		data, err := ReadAll(ctx, src, desc, MaxManifestSize)
		if err != nil {
			return err
		}
		index, err := parseIndex(data)
		if err != nil {
			return fmt.Errorf("index %s: %w", desc.Digest, err)
		}
		for _, d := range index.Manifests {
			if err := visit(d, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	return entries, visit(root, 0)
}

// unknown has the fields by which manifests, indexes and schema 1 differ.
type unknown struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	Manifests     json.RawMessage `json:"manifests"`
	Config        json.RawMessage `json:"config"`
	Layers        json.RawMessage `json:"layers"`
	FSLayers      json.RawMessage `json:"fsLayers"`
}

// parseIndex reads an index or docker manifest list and refuses what could be taken for a
// manifest too. Source: image-spec CVE-2021-41190.
func parseIndex(data []byte) (ocispec.Index, error) {
	var u unknown
	if err := json.Unmarshal(data, &u); err != nil {
		return ocispec.Index{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if u.Config != nil || u.Layers != nil || u.FSLayers != nil || images.IsManifestType(u.MediaType) {
		return ocispec.Index{}, fmt.Errorf("%w: a manifest where an index should be", ErrInvalid)
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return ocispec.Index{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if index.SchemaVersion != 2 {
		return ocispec.Index{}, fmt.Errorf("%w: index: schema version %d, want 2", ErrInvalid, index.SchemaVersion)
	}
	if len(index.Manifests) > MaxIndexEntries {
		return ocispec.Index{}, fmt.Errorf("%w: index of %d entries, at most %d", ErrTooLarge, len(index.Manifests), MaxIndexEntries)
	}
	return index, nil
}

// ParseManifest reads an OCI or docker schema 2 manifest of an image and checks its
// descriptors. It returns [ErrUnsupported] for schema 1 and [ErrInvalid] for anything else.
func ParseManifest(data []byte) (ocispec.Manifest, error) {
	if len(data) > MaxManifestSize {
		return ocispec.Manifest{}, fmt.Errorf("%w: manifest of %d bytes, at most %d", ErrTooLarge, len(data), MaxManifestSize)
	}
	var u unknown
	if err := json.Unmarshal(data, &u); err != nil {
		return ocispec.Manifest{}, fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	switch {
	case u.SchemaVersion == 1 || u.FSLayers != nil:
		return ocispec.Manifest{}, schema1("manifest")
	case u.SchemaVersion != 2:
		return ocispec.Manifest{}, fmt.Errorf("%w: manifest: schema version %d, want 2", ErrInvalid, u.SchemaVersion)
	case u.Manifests != nil || images.IsIndexType(u.MediaType):
		return ocispec.Manifest{}, fmt.Errorf("%w: an index where a manifest should be", ErrInvalid)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return ocispec.Manifest{}, fmt.Errorf("%w: manifest: %w", ErrInvalid, err)
	}
	if len(m.Layers) > MaxLayers {
		return ocispec.Manifest{}, fmt.Errorf("%w: manifest: %d layers, at most %d", ErrTooLarge, len(m.Layers), MaxLayers)
	}
	if err := checkDescriptor(m.Config); err != nil {
		return ocispec.Manifest{}, fmt.Errorf("manifest: config: %w", err)
	}
	for i, l := range m.Layers {
		if err := checkDescriptor(l); err != nil {
			return ocispec.Manifest{}, fmt.Errorf("manifest: layer %d: %w", i, err)
		}
	}
	return m, nil
}

func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations[annotationReference] != "" ||
		(d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown")
}

func isNydusEntry(d ocispec.Descriptor) bool {
	return d.ArtifactType == artifactTypeNydus || (d.Platform != nil && slices.Contains(d.Platform.OSFeatures, osFeatureNydus))
}

func isNydusManifest(m ocispec.Manifest) bool {
	n := len(m.Layers)
	return m.ArtifactType == artifactTypeNydus || (n > 0 && m.Layers[n-1].Annotations[annotationNydus] != "")
}

// choose picks the entry that fits want best; the first of equals.
func choose(entries []ocispec.Descriptor, root ocispec.Descriptor, want ocispec.Platform) (ocispec.Descriptor, error) {
	if len(entries) == 1 && entries[0].Digest == root.Digest { // no index
		d := entries[0]
		if !images.IsManifestType(d.MediaType) {
			return ocispec.Descriptor{}, notImage(d)
		}
		d.Platform = nil // of a layout's entry: its config says it with authority
		return d, nil
	}
	match := platforms.Only(want)
	var best *ocispec.Descriptor
	nydus := false
	for i := range entries {
		d := &entries[i]
		if isAttestation(*d) || !images.IsManifestType(d.MediaType) || d.Platform == nil {
			continue
		}
		if isNydusEntry(*d) {
			plain := *d.Platform
			plain.OSFeatures = nil
			nydus = nydus || match.Match(plain)
			continue
		}
		if !match.Match(*d.Platform) {
			continue
		}
		if best == nil || match.Less(*d.Platform, *best.Platform) {
			best = d
		}
	}
	if best == nil {
		if d, ok := only(entries); ok { // an index may leave the platform to the config
			return d, nil
		}
		text := "the index has " + platformNames(entries)
		if nydus {
			text += "; for this one a Nydus image only, which is no source"
		}
		return ocispec.Descriptor{}, fmt.Errorf("%w: want %s, %s", ErrPlatform, platforms.FormatAll(want), text)
	}
	if err := checkDescriptor(*best); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("index %s: %w", root.Digest, err)
	}
	return *best, nil
}

// only returns the image of an index that has no other and does not say its platform.
func only(entries []ocispec.Descriptor) (ocispec.Descriptor, bool) {
	rest := filter(entries, func(d ocispec.Descriptor) bool {
		return images.IsManifestType(d.MediaType) && !isAttestation(d) && !isNydusEntry(d)
	})
	if len(rest) != 1 || rest[0].Platform != nil {
		return ocispec.Descriptor{}, false
	}
	return rest[0], true
}

func notImage(d ocispec.Descriptor) error {
	if d.MediaType == images.MediaTypeDockerSchema1Manifest {
		return schema1("manifest " + short(d.Digest))
	}
	return fmt.Errorf("%w: %s: media type %.100q is no image manifest or index", ErrUnsupported, short(d.Digest), d.MediaType)
}

// platformNames lists the platforms of images for a message, shortened.
func platformNames(entries []ocispec.Descriptor) string {
	const most = 16
	var names []string
	for _, d := range entries {
		if isAttestation(d) || isNydusEntry(d) {
			continue
		}
		name := "an entry without platform"
		if d.Platform != nil {
			name = fmt.Sprintf("%.100s", platforms.FormatAll(*d.Platform))
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
		if len(names) > most {
			names = append(names[:most], "and more")
			break
		}
	}
	if len(names) == 0 {
		return "no images"
	}
	return strings.Join(names, ", ")
}

// load reads desc's manifest and config and checks that they belong together. early, if not nil, is told the manifest first.
func load(ctx context.Context, src Source, desc ocispec.Descriptor, early func(ocispec.Manifest)) (Image, error) {
	data, err := ReadAll(ctx, src, desc, MaxManifestSize)
	if err != nil {
		return Image{}, err
	}
	m, err := ParseManifest(data)
	if err != nil {
		return Image{}, fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if !images.IsConfigType(m.Config.MediaType) {
		return Image{}, fmt.Errorf("%w: manifest %s: config of media type %.100q: no container image", ErrUnsupported, desc.Digest, m.Config.MediaType)
	}
	if early != nil {
		early(m)
	}
	config, err := ReadAll(ctx, src, m.Config, MaxConfigSize)
	if err != nil {
		return Image{}, fmt.Errorf("config of %s: %w", desc.Digest, err)
	}
	img := Image{Descriptor: desc, Manifest: m, ManifestBytes: data, ConfigBytes: config}
	if err := json.Unmarshal(config, &img.Config); err != nil {
		return Image{}, fmt.Errorf("%w: config %s: %w", ErrInvalid, m.Config.Digest, err)
	}
	diffs := img.Config.RootFS.DiffIDs
	if len(diffs) != len(m.Layers) {
		return Image{}, fmt.Errorf("%w: manifest %s has %d layers, its config %d diff IDs", ErrInvalid, desc.Digest, len(m.Layers), len(diffs))
	}
	for i, l := range m.Layers {
		if err := diffs[i].Validate(); err != nil {
			return Image{}, fmt.Errorf("%w: config %s: diff ID %d %q: %w", ErrInvalid, m.Config.Digest, i, short(diffs[i]), err)
		}
		img.Layers = append(img.Layers, Layer{Descriptor: l, DiffID: diffs[i]})
	}
	return img, nil
}
