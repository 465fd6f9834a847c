package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// indexRun is the state of a conversion whose target is an index.
type indexRun struct {
	o              Options
	source, target remote.Reference
	src            remote.Source
	index          remote.Index
	to             remote.Target
	helpers        *helpers
	sum            Summary
}

// convertIndex makes target an index: the images of the platforms that o asks for, and
// beside them, with MergePlatform, what they were made of. Each image is pushed when it is
// built; the index comes last.
func convertIndex(ctx context.Context, o Options, source, target remote.Reference, src remote.Source, h *helpers) (Summary, error) {
	index, err := remote.ReadIndex(ctx, src)
	if err != nil {
		return Summary{}, fmt.Errorf("source %s: %w", source, err)
	}
	r := &indexRun{o: o, source: source, target: target, src: src, index: index, helpers: h}
	imgs, err := r.choose(ctx)
	if err != nil {
		return Summary{}, fmt.Errorf("source %s: %w", source, err)
	}
	if index.Plain && !o.MergePlatform {
		return convertOne(ctx, o, source, target, src, imgs[0], h)
	}
	for _, img := range imgs {
		if err := checkPair(ctx, o, source, target, img); err != nil {
			return Summary{}, err
		}
	}
	if r.to, err = remote.OpenTarget(ctx, target, o.TargetRemote); err != nil {
		return Summary{}, fmt.Errorf("open target %s: %w", target, err)
	}
	err = r.run(ctx, imgs)
	if cerr := r.to.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("publish %s: %w", target, cerr)
	}
	if err != nil {
		return Summary{}, err
	}
	h.keep(ctx)
	r.sum.Warnings = slices.Concat(r.sum.Warnings, h.warnings(), refWarnings(o, source, target, r.sum))
	return r.sum, nil
}

// choose returns the images to convert, each once.
func (r *indexRun) choose(ctx context.Context) ([]remote.Image, error) {
	if r.o.AllPlatforms {
		return r.all(ctx)
	}
	wanted := r.o.Platforms
	if len(wanted) == 0 {
		wanted = []string{r.o.Platform}
	}
	var out []remote.Image
	for _, p := range wanted {
		img, err := remote.Select(ctx, r.src, p)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(out, func(i remote.Image) bool { return i.Descriptor.Digest == img.Descriptor.Digest }) {
			out = append(out, img)
		}
	}
	return out, nil
}

// all returns every image of the index that has a Linux file system.
func (r *indexRun) all(ctx context.Context) ([]remote.Image, error) {
	var out []remote.Image
	for _, d := range r.index.Images() {
		if slices.ContainsFunc(out, func(i remote.Image) bool { return i.Descriptor.Digest == d.Digest }) {
			continue
		}
		if d.Platform != nil && d.Platform.OS != "linux" && d.Platform.OS != "" {
			r.warn("%s is not converted: Nydus serves Linux images", platforms.FormatAll(*d.Platform))
			continue
		}
		img, err := r.index.Load(ctx, r.src, d)
		if err != nil {
			return nil, err
		}
		if nydusimage.Is(img.Manifest) && !r.index.Plain {
			r.warn("%s (%s) is not converted: it is a Nydus image already", d.Digest, PlatformOf(img))
			continue
		}
		out = append(out, img)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: there is no image to convert among its %d entries", ErrUnsupported, len(r.index.Entries))
	}
	return out, nil
}

func (r *indexRun) warn(format string, args ...any) {
	r.sum.Warnings = append(r.sum.Warnings, fmt.Sprintf(format, args...))
}

// run builds and pushes the images, then the index.
func (r *indexRun) run(ctx context.Context, imgs []remote.Image) error {
	var converted []ocispec.Descriptor
	for _, img := range imgs {
		d, err := r.image(ctx, img)
		if err != nil {
			return err
		}
		converted = append(converted, d)
	}
	var entries []ocispec.Descriptor
	if r.o.MergePlatform {
		for _, d := range r.plain(imgs) {
			if err := r.copy(ctx, d); err != nil {
				return fmt.Errorf("copy %s of %s to %s: %w", d.Digest, r.source, r.target, err)
			}
			entries = append(entries, d)
		}
	} else if n := r.attestations(imgs); n > 0 {
		r.warn("%d attestations are left behind: they are about the plain images (--merge-platform keeps both)", n)
	}
	if err := r.tag(ctx, append(entries, converted...)); err != nil {
		return fmt.Errorf("publish %s: %w", r.target, err)
	}
	return nil
}

// image builds and pushes one image and returns its entry in the index.
func (r *indexRun) image(ctx context.Context, img remote.Image) (_ ocispec.Descriptor, err error) {
	name := platforms.FormatAll(*img.Descriptor.Platform)
	report := &reporter{to: r.o.Progress, layers: len(img.Layers), prefix: name + ": "}
	o := r.o
	o.List = listFor(o.List, *img.Descriptor.Platform)
	res, err := r.helpers.build(ctx, o, r.src, img, report)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("build %s (%s): %w", r.source, name, err)
	}
	defer func() {
		if cerr := res.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("remove temporary files: %w", cerr)
		}
	}()
	sum, err := push(ctx, r.to, origin{r.src, r.source, r.target}, img, res, report, r.helpers, remote.PublishUnnamed)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("publish %s (%s): %w", r.target, name, err)
	}
	sum.Platform, sum.Source, sum.Target = name, r.source.String(), r.target.String()
	if o.List != nil {
		sum.Warnings = slices.Concat(sum.Warnings, listUse(sum.Prefetch), warnings(o.List, img))
	} else if r.o.List != nil {
		sum.Warnings = append(sum.Warnings, fmt.Sprintf("the list is of %s and is not used for %s", r.o.List.Platform, name))
	}
	r.sum.add(sum)
	d := res.ManifestDescriptor
	d.Annotations = maps.Clone(img.Descriptor.Annotations)
	delete(d.Annotations, ocispec.AnnotationRefName)
	if r.o.MergePlatform {
		d = remote.MarkNydus(d)
	}
	return d, nil
}

// add counts one image of an index.
func (s *Summary) add(i Summary) {
	s.SourceBytes += i.SourceBytes
	s.TargetBytes += i.TargetBytes
	s.BootstrapBytes += i.BootstrapBytes
	s.Uploaded += i.Uploaded
	s.UploadedBytes += i.UploadedBytes
	s.Existed += i.Existed
	s.Mounted += i.Mounted
	s.LayersReused += i.LayersReused
	s.JoinedLayers += i.JoinedLayers
	s.DictChunks += i.DictChunks
	s.DictBlobs += i.DictBlobs
	s.Files += i.Files
	s.VerifiedChunks += i.VerifiedChunks
	s.Referenced += i.Referenced
	s.ReferencedSize += i.ReferencedSize
	p := &s.Prefetch
	p.Bytes += i.Prefetch.Bytes
	p.RawBytes += i.Prefetch.RawBytes
	p.Chunks += i.Prefetch.Chunks
	p.Listed += i.Prefetch.Listed
	p.Files += i.Prefetch.Files
	p.Missing += i.Prefetch.Missing
	s.Images = append(s.Images, i)
}

// listFor returns l for images of its own platform and nil for others: their files have
// other names and other content.
func listFor(l *persist.List, p ocispec.Platform) *persist.List {
	if l == nil || l.Platform == "" {
		return l
	}
	of, err := platforms.Parse(l.Platform)
	if err == nil && !platforms.Only(of).Match(p) {
		return nil
	}
	return l
}

// plain returns the entries of the source that stay: of all platforms all that is no Nydus
// image, else the converted images and what is about them.
func (r *indexRun) plain(imgs []remote.Image) []ocispec.Descriptor {
	var out []ocispec.Descriptor
	if r.o.AllPlatforms && !r.index.Plain {
		replaced := map[digest.Digest]bool{}
		for _, d := range r.index.NydusImages() {
			replaced[d.Digest] = true
		}
		if len(replaced) > 0 {
			r.warn("%d Nydus images of the source's index are replaced", len(replaced))
		}
		return slices.DeleteFunc(slices.Clone(r.index.Entries), func(d ocispec.Descriptor) bool { return replaced[d.Digest] })
	}
	for _, img := range imgs {
		d := img.Descriptor
		d.Annotations = maps.Clone(d.Annotations)
		delete(d.Annotations, ocispec.AnnotationRefName)
		out = append(out, d)
	}
	for _, img := range imgs {
		out = append(out, r.index.About(img.Descriptor.Digest)...)
	}
	return out
}

func (r *indexRun) attestations(imgs []remote.Image) int {
	n := 0
	for _, img := range imgs {
		n += len(r.index.About(img.Descriptor.Digest))
	}
	return n
}

// copy brings a manifest of the source, and all it refers to, to the target as it is.
func (r *indexRun) copy(ctx context.Context, d ocispec.Descriptor) error {
	data, err := remote.ReadAll(ctx, r.src, d, remote.MaxManifestSize)
	if err != nil {
		return err
	}
	m, err := remote.ParseManifest(data)
	if err != nil {
		return err
	}
	config, err := remote.ReadAll(ctx, r.src, m.Config, remote.MaxConfigSize)
	if err != nil {
		return err
	}
	from := mountFrom(r.source, r.target)
	var blobs []remote.Blob
	for _, l := range m.Layers {
		if images.IsNonDistributable(l.MediaType) {
			continue // clients fetch it from its URLs
		}
		blobs = append(blobs, remote.Blob{
			Descriptor: l, MountFrom: from, Verify: apart(r.source, r.target),
			Open: func(ctx context.Context) (io.ReadCloser, error) { return r.src.Fetch(ctx, l) },
		})
	}
	report := &reporter{to: r.o.Progress}
	p, err := remote.PublishUnnamed(ctx, r.to, blobs, remote.Document{Descriptor: m.Config, Data: config},
		remote.Document{Descriptor: d, Data: data}, remote.PublishOptions{Progress: report.push})
	r.sum.Uploaded += p.Uploaded
	r.sum.UploadedBytes += p.UploadedBytes
	r.sum.Existed += p.Existed + p.Mounted
	r.sum.Mounted += p.Mounted
	return err
}

// mountFrom is the repository that target's registry may take blobs of source from, empty
// when it cannot.
func mountFrom(source, target remote.Reference) string {
	if source.Kind == remote.KindRegistry && target.Kind == remote.KindRegistry && source.Host == target.Host && source.Repository != target.Repository {
		return source.Repository
	}
	return ""
}

// apart tells whether what target has already may be other bytes than those of source: they are not the same files.
func apart(source, target remote.Reference) bool {
	return source.Kind != target.Kind || source.Path != target.Path
}

// tag writes the index under the target's name.
func (r *indexRun) tag(ctx context.Context, entries []ocispec.Descriptor) error {
	data, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: entries, Annotations: r.index.Annotations,
	})
	if err != nil {
		return err
	}
	doc := remote.NewDocument(ocispec.MediaTypeImageIndex, data)
	if len(data) > remote.MaxManifestSize {
		return errors.New("the index of " + fmt.Sprint(len(entries)) + " entries is larger than registries take")
	}
	if err := r.to.Tag(ctx, doc.Descriptor, doc.Data); err != nil {
		return err
	}
	var names []string
	for _, i := range r.sum.Images {
		names = append(names, i.Platform)
	}
	r.sum.Source, r.sum.Target = r.source.String(), r.target.String()
	r.sum.SourceDigest, r.sum.TargetDigest = r.index.Root.Digest, doc.Descriptor.Digest
	r.sum.Platform = strings.Join(names, ",")
	return nil
}
