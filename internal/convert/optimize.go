package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// OptimizeOptions says which Nydus image to optimize, how and where to.
type OptimizeOptions struct {
	// Source and Target are references as [remote.Parse] reads them. They must not name the
	// same thing. Where Source is an index, Target becomes one: the image of Platform is
	// replaced in it, all else stays.
	Source, Target string
	// Platform is "os/arch[/variant]"; empty: this machine's.
	Platform string
	// Build says how the image is optimized and has the list; its Progress is set by Optimize.
	Build builder.OptimizeOptions
	// SourceRemote and TargetRemote configure how source and target are reached.
	SourceRemote, TargetRemote remote.Options
	// Progress, when set, is told how far the work is, from one goroutine at a time.
	Progress func(Event)
}

// OptimizeSummary tells what an optimization made.
type OptimizeSummary struct {
	Source       string        `json:"source"`        // canonical source reference
	SourceDigest digest.Digest `json:"source_digest"` // of the source's manifest
	Platform     string        `json:"platform"`
	Target       string        `json:"target"` // canonical target reference
	// TargetDigest is that of what the target names; ManifestDigest is the image's, another one
	// when the target is an index.
	TargetDigest   digest.Digest `json:"target_digest"`
	ManifestDigest digest.Digest `json:"manifest_digest"`
	Prefetch       Prefetch      `json:"prefetch"`
	Repeated       int           `json:"repeated"`                // listed files that were listed before
	NotRegular     int           `json:"not_regular"`             // listed devices and the like, and directories of recorded lists
	Patterns       int           `json:"patterns"`                // listed paths that are patterns and match
	Directories    int           `json:"directories"`             // listed paths that are directories with files
	MissingPaths   []string      `json:"missing_paths,omitempty"` // the first of those that are not in the image
	Requests       int           `json:"requests"`                // ranges of blobs that were read
	FetchedBytes   int64         `json:"fetched_bytes"`           // their bytes
	BootstrapBytes int64         `json:"bootstrap_bytes"`         // the bare bootstrap
	Dropped        int           `json:"dropped_blobs"`           // blobs of the source that the result does not need
	Uploaded       int           `json:"uploaded"`                // blobs that were written to the target
	UploadedBytes  int64         `json:"uploaded_bytes"`
	Existed        int           `json:"existed"` // blobs that the target had, or took from another of its repositories
	Mounted        int           `json:"mounted"` // those of the latter kind
	VerifiedChunks int           `json:"verified_chunks"`
	Elapsed        time.Duration `json:"elapsed_ns"`
	Warnings       []string      `json:"warnings,omitempty"`
}

// Optimize gives the Nydus image o.Source a prefetch blob and publishes the result as
// o.Target. Only the chunks needed are fetched, by ranges; blobs that the target has, or can
// mount from another repository of its registry, are not moved. As with [Run] nothing half done is left.
func Optimize(ctx context.Context, o OptimizeOptions) (OptimizeSummary, error) {
	start := time.Now()
	source, target, err := parse(Options{Source: o.Source, Target: o.Target})
	if err != nil {
		return OptimizeSummary{}, err
	}
	src, err := remote.OpenSource(ctx, source, o.SourceRemote)
	if err != nil {
		return OptimizeSummary{}, fmt.Errorf("open source %s: %w", source, err)
	}
	r := &optimizeRun{o: o, source: source, target: target, src: src}
	err = r.run(ctx)
	if cerr := src.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close source %s: %w", source, cerr)
	}
	if err != nil {
		return OptimizeSummary{}, err
	}
	r.sum.Elapsed = time.Since(start)
	return r.sum, nil
}

// optimizeRun is the state of one call of Optimize.
type optimizeRun struct {
	o              OptimizeOptions
	source, target remote.Reference
	src            remote.Source
	img            remote.Image
	sum            OptimizeSummary
}

func (r *optimizeRun) run(ctx context.Context) (err error) {
	if r.img, err = remote.SelectNydus(ctx, r.src, r.o.Platform); err != nil {
		return fmt.Errorf("source %s: %w", r.source, err)
	}
	if !nydusimage.Is(r.img.Manifest) {
		return fmt.Errorf("source %s: %w: it is a plain container image, which convert makes a Nydus image of", r.source, ErrUnsupported)
	}
	if err := checkApart(Options{SourceRemote: r.o.SourceRemote, TargetRemote: r.o.TargetRemote}, r.source, r.target, r.img.Root); err != nil {
		return err
	}
	if r.target.Kind == remote.KindRegistry {
		if err := reach(ctx, r.target, r.o.TargetRemote, r.img.Descriptor); err != nil {
			return fmt.Errorf("target %s: %w", r.target, err)
		}
	}
	report := &reporter{to: r.o.Progress}
	res, err := r.build(ctx, report)
	report.finish()
	if err != nil {
		return fmt.Errorf("optimize %s: %w", r.source, err)
	}
	r.summarize(res)
	err = r.publish(ctx, res, report)
	if cerr := res.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("remove temporary files: %w", cerr)
	}
	return err
}

// build optimizes the image into temporary files.
func (r *optimizeRun) build(ctx context.Context, report *reporter) (_ *builder.Optimized, err error) {
	layers := r.img.Layers
	last := layers[len(layers)-1]
	doc := nydusimage.Document{Manifest: r.img.Manifest, Config: r.img.Config}
	if _, err := doc.Bootstrap(); err != nil {
		return nil, err
	}
	blobs := &sourceBlobs{run: r, caches: map[string]*remote.RangeCache{}}
	defer func() { err = errors.Join(err, blobs.Close()) }()
	o := r.o.Build
	o.Progress = report.build
	return builder.Optimize(ctx, builder.NydusSource{
		Manifest: r.img.ManifestBytes, Config: r.img.ConfigBytes, ManifestDescriptor: r.img.Descriptor,
		BootstrapLayer: builder.Layer{
			Descriptor: last.Descriptor, DiffID: last.DiffID, Verified: true, // as every remote.Source does
			Open: func(ctx context.Context) (io.ReadCloser, error) { return r.src.Fetch(ctx, last.Descriptor) },
		},
		OpenBlob: blobs.open, Fetch: blobs.fetch,
	}, o)
}

// summarize takes what is known before the result is published.
func (r *optimizeRun) summarize(res *builder.Optimized) {
	st, pre := res.Stats, res.Stats.Prefetch
	s := &r.sum
	s.Source, s.Target, s.Platform = r.source.String(), r.target.String(), PlatformOf(r.img)
	s.SourceDigest, s.ManifestDigest = r.img.Descriptor.Digest, res.ManifestDescriptor.Digest
	s.Prefetch = Prefetch{
		Bytes: pre.BlobBytes, RawBytes: pre.RawBytes, Chunks: pre.Chunks,
		Listed: pre.Listed, Files: pre.Files, Missing: pre.Missing,
	}
	if res.Prefetch != nil {
		s.Prefetch.Blob = res.Prefetch.Descriptor.Digest.Encoded()
	} else {
		s.Warnings = append(s.Warnings, "the list names no data of the image: the result has no new prefetch blob")
	}
	s.Repeated, s.NotRegular, s.Patterns, s.Directories, s.MissingPaths = pre.Repeated, pre.NotRegular, pre.Patterns, pre.Directories, st.MissingPaths
	s.BootstrapBytes, s.Dropped, s.VerifiedChunks = st.BootstrapBytes, st.Dropped, st.VerifiedChunks
	s.Warnings = append(s.Warnings, r.listWarnings(r.o.Build.List)...)
}

// listWarnings says what a person should know of the list.
func (r *optimizeRun) listWarnings(l *persist.List) []string {
	if l == nil {
		return nil
	}
	if slices.Contains(Identities(r.img), digest.Digest(l.Digest)) {
		l = &persist.List{Trace: l.Trace} // of this image, or of the one it was made from
	}
	return warnings(l, r.img)
}

// Identities returns the digests that lists of img may name: its own, that of the index it is
// in, and those of the images that it was made from, as its annotations say.
func Identities(img remote.Image) []digest.Digest {
	out := []digest.Digest{img.Descriptor.Digest, img.Root.Digest}
	for _, key := range []string{builder.AnnotationOptimizedFrom, builder.AnnotationSourceDigest} {
		d := digest.Digest(img.Manifest.Annotations[key])
		if d.Validate() == nil && !slices.Contains(out, d) {
			out = append(out, d)
		}
	}
	return slices.Compact(out)
}

// checkOptimized is the last look before the result gets a name.
func checkOptimized(res *builder.Optimized) error {
	doc, err := nydusimage.Parse(res.Manifest, res.Config)
	if err != nil {
		return err
	}
	var ids []string
	for _, b := range res.Blobs {
		listed, _ := b.MetaBlob()
		ids = append(ids, listed.ID)
	}
	if err := doc.Check(ids); err != nil {
		return err
	}
	files := []builder.File{res.Bootstrap}
	if res.Prefetch != nil {
		files = append(files, *res.Prefetch)
	}
	for _, f := range files {
		info, err := os.Stat(f.Path)
		if err != nil {
			return err
		}
		if info.Size() != f.Descriptor.Size {
			return fmt.Errorf("file of %s: got %d bytes, want %d", f.Descriptor.Digest, info.Size(), f.Descriptor.Size)
		}
	}
	return nil
}

// blobs returns everything that the result's manifest refers to but for the config.
func (r *optimizeRun) blobs(res *builder.Optimized) []remote.Blob {
	var out []remote.Blob
	from := mountFrom(r.source, r.target)
	stored := func(d ocispec.Descriptor) {
		out = append(out, remote.Blob{
			Descriptor: d, MountFrom: from, Verify: apart(r.source, r.target),
			Open: func(ctx context.Context) (io.ReadCloser, error) { return r.src.Fetch(ctx, d) },
		})
	}
	for _, l := range res.Kept {
		stored(l)
	}
	for _, b := range res.Blobs {
		// The layers of another image that a blob's table refers to (OCI-ref) must be at hand too.
		if _, separate := b.MetaBlob(); separate && !r.samePlace() {
			stored(ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageLayerGzip,
				Digest:    digest.NewDigestFromEncoded(digest.SHA256, b.ID), Size: clampSize(b.CompressedSize),
			})
		}
	}
	for _, f := range []*builder.File{res.Prefetch, &res.Bootstrap} {
		if f != nil {
			out = append(out, remote.Blob{
				Descriptor: f.Descriptor, File: f.Path,
				Open: func(context.Context) (io.ReadCloser, error) { return f.Open() },
			})
		}
	}
	return out
}

// samePlace tells whether source and target are one repository of a registry.
func (r *optimizeRun) samePlace() bool {
	return r.source.Kind == remote.KindRegistry && r.target.Kind == remote.KindRegistry &&
		r.source.Host == r.target.Host && r.source.Repository == r.target.Repository
}

func clampSize(n uint64) int64 { return int64(min(n, remote.MaxBlobSize)) }
