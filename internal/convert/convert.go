// Package convert joins a source, an access list, the builder and a target: it turns one
// container image into one Nydus image and publishes it.
//
// The order is what makes it fail closed. The image is built into temporary files and
// verified there by the builder; its documents are checked against each other once more;
// then the blobs are pushed, then the config, and the manifest last, under the target's
// name. An error or a cancelled context at any point leaves no temporary file and a target
// whose name points at what it pointed at before.
//
//	sum, err := convert.Run(ctx, convert.Options{
//		Source: "docker.io/library/nginx:latest", Target: "oci:out:optimized",
//		List: list, Build: builder.DefaultOptions(),
//	})
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

// ErrUnsupported is returned for a source that is no container image of plain layers: one
// that is a Nydus image already.
var ErrUnsupported = errors.New("unsupported source")

// Options says what to convert, how and where to.
type Options struct {
	// Source and Target are references as [remote.Parse] reads them. They must not name the
	// same thing.
	Source, Target string
	// Platform is "os/arch[/variant]"; empty: this machine's.
	Platform string
	// Platforms, when there are several, or AllPlatforms make the target an index of an image
	// for each; Platform is then ignored. A source that is no index stays one manifest.
	Platforms    []string
	AllPlatforms bool
	// MergePlatform makes the target an index that has, beside each Nydus image, the plain
	// image it was made of, byte for byte, with its attestations.
	MergePlatform bool
	// List is the access list that the prefetch blob is made from; nil: none.
	List *persist.List
	// Build says how the image is built; its List, Progress and WriteEarly are set by Run.
	Build builder.Options
	// ChunkDict is a reference to a Nydus image: chunks that it has are not stored again. Its blobs
	// that the result refers to are brought to the target with it, and listed in its manifest. [DictAuto]: the image that
	// Target names already, where it can be referred to, which else is a warning, and up to three others that are kept with it.
	ChunkDict string
	// BuildCache is a reference to the artifact that keeps what layers were built into, for later
	// conversions: a registry's or a layout's. It is made when it is not there, and believed. BuildCacheMax is the
	// number of layers it may have; 0: 200.
	BuildCache    string
	BuildCacheMax int
	// SourceRemote and TargetRemote configure how source and target are reached.
	SourceRemote, TargetRemote remote.Options
	// Progress, when set, is told how far the conversion is, from one goroutine at a time. It
	// must return quickly.
	Progress func(Event)
}

// Event is one report of progress.
type Event struct {
	// Task is what is being done: "layer 2/3", "prefetch blob", "push sha256:0123456789ab".
	Task string
	// Done and Total are bytes; Total is 0 where it is not known.
	Done, Total int64
	// Finished is true in a task's last event.
	Finished bool
}

// Summary tells what a conversion made.
type Summary struct {
	Source         string        `json:"source"`        // canonical source reference
	SourceDigest   digest.Digest `json:"source_digest"` // of the source's manifest
	Platform       string        `json:"platform"`
	Target         string        `json:"target"` // canonical target reference
	TargetDigest   digest.Digest `json:"target_digest"`
	SourceBytes    int64         `json:"source_bytes"`    // compressed layers read
	TargetBytes    int64         `json:"target_bytes"`    // layers of the result: blobs, prefetch blob, bootstrap layer
	BootstrapBytes int64         `json:"bootstrap_bytes"` // the bare bootstrap
	Prefetch       Prefetch      `json:"prefetch"`
	MissingPaths   []string      `json:"missing_paths,omitempty"` // the first of the listed paths that are not in the image
	Uploaded       int           `json:"uploaded"`                // blobs that were written to the target
	UploadedBytes  int64         `json:"uploaded_bytes"`          // their bytes
	Existed        int           `json:"existed"`                 // blobs that the target had, or took from another of its repositories
	Mounted        int           `json:"mounted"`                 // those of the latter kind
	LayersReused   int           `json:"layers_reused"`           // layers that the build cache had
	JoinedLayers   int           `json:"joined_layers"`           // layers that share a blob, because an image has room for 254
	DictChunks     int           `json:"dict_chunks"`             // chunks of layers that the dictionary had
	DictBlobs      int           `json:"dict_blobs"`              // its blobs that the image refers to
	Files          int           `json:"files"`                   // regular files of the image
	VerifiedChunks int           `json:"verified_chunks"`         // chunks of the result that were read back before it was published
	Referenced     int           `json:"referenced"`              // layers of the source that the image refers to and does not list (OCI-ref)
	ReferencedSize int64         `json:"referenced_bytes"`        // their bytes
	Elapsed        time.Duration `json:"elapsed_ns"`
	// Images has one summary for each platform when the target is an index; what is above are
	// then sums, the digests those of the indexes, and Platform the platforms with commas between.
	Images []Summary `json:"images,omitempty"`
	// Warnings are for a person: a list with loss, a list of another image.
	Warnings []string `json:"warnings,omitempty"`
}

// Prefetch describes the prefetch blob of a conversion; its zero value: there is none.
type Prefetch struct {
	Blob     string `json:"blob"`      // its id, 64 hex digits
	Bytes    int64  `json:"bytes"`     // size of the blob
	RawBytes int64  `json:"raw_bytes"` // uncompressed bytes in it
	Chunks   int    `json:"chunks"`
	Listed   int    `json:"listed"`  // accesses in the list
	Files    int    `json:"files"`   // files of the image that they name
	Missing  int    `json:"missing"` // accesses whose path is not in the image
}

// listUse says of a conversion with a list whether that was of use.
func listUse(p Prefetch) []string {
	if p.Chunks > 0 {
		return nil
	}
	return []string{"the list names no data of the image: the result has no prefetch blob"}
}

// Run converts o.Source into o.Target. The error names the step that failed and wraps the
// errors of [remote], [builder] and the system; ErrUnsupported is its own.
func Run(ctx context.Context, o Options) (Summary, error) {
	start := time.Now()
	source, target, err := parse(o)
	if err != nil {
		return Summary{}, err
	}
	if err := checkRef(o); err != nil {
		return Summary{}, err
	}
	if len(o.Platforms) == 1 {
		o.Platform = o.Platforms[0] // of the dictionary, too
	}
	o.Build.WriteEarly = target.Kind == remote.KindLayout // it keeps the files, synced
	src, err := remote.OpenSource(ctx, source, o.SourceRemote)
	if err != nil {
		return Summary{}, fmt.Errorf("open source %s: %w", source, err)
	}
	h, err := openHelpers(ctx, o, source, target)
	if err != nil {
		return Summary{}, errors.Join(err, src.Close())
	}
	sum, err := convert(ctx, o, source, target, src, h)
	if cerr := h.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if cerr := src.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close source %s: %w", source, cerr)
	}
	if err != nil {
		return Summary{}, err
	}
	sum.Elapsed = time.Since(start)
	return sum, nil
}

func parse(o Options) (source, target remote.Reference, err error) {
	if source, err = remote.Parse(o.Source); err != nil {
		return source, target, fmt.Errorf("source: %w", err)
	}
	if target, err = remote.Parse(o.Target); err != nil {
		return source, target, fmt.Errorf("target: %w", err)
	}
	if source == target {
		return source, target, fmt.Errorf("target %s: it is the source, and would replace it", target)
	}
	return source, target, nil
}

func convert(ctx context.Context, o Options, source, target remote.Reference, src remote.Source, h *helpers) (Summary, error) {
	if o.AllPlatforms || o.MergePlatform || len(o.Platforms) > 1 {
		return convertIndex(ctx, o, source, target, src, h)
	}
	img, err := remote.Select(ctx, src, o.Platform)
	if err != nil {
		return Summary{}, fmt.Errorf("source %s: %w", source, err)
	}
	return convertOne(ctx, o, source, target, src, img, h)
}

// convertOne makes target one manifest.
func convertOne(ctx context.Context, o Options, source, target remote.Reference, src remote.Source, img remote.Image, h *helpers) (Summary, error) {
	if err := checkPair(ctx, o, source, target, img); err != nil {
		return Summary{}, err
	}
	report := &reporter{to: o.Progress, layers: len(img.Layers)}
	res, err := h.build(ctx, o, src, img, report)
	if err != nil {
		return Summary{}, fmt.Errorf("build %s: %w", source, err)
	}
	sum, err := publish(ctx, o, origin{src, source, target}, target, img, res, report, h)
	if cerr := res.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("remove temporary files: %w", cerr)
	}
	if err != nil {
		return Summary{}, err
	}
	sum.Source, sum.Target = source.String(), target.String()
	h.keep(ctx)
	if o.List != nil {
		sum.Warnings = append(sum.Warnings, listUse(sum.Prefetch)...)
	}
	sum.Warnings = slices.Concat(sum.Warnings, warnings(o.List, img), h.warnings(), refWarnings(o, source, target, sum))
	return sum, nil
}

// checkPair finds out about what cannot work before the work and not after it.
func checkPair(ctx context.Context, o Options, source, target remote.Reference, img remote.Image) error {
	if nydusimage.Is(img.Manifest) {
		return fmt.Errorf("source %s: %w: it is a Nydus image already", source, ErrUnsupported)
	}
	if err := checkApart(o, source, target, img.Root); err != nil {
		return err
	}
	if target.Kind == remote.KindRegistry {
		if err := reach(ctx, target, o.TargetRemote, img.Descriptor); err != nil {
			return fmt.Errorf("target %s: %w", target, err)
		}
	}
	return nil
}

// reach asks a registry something, so that one that is not there or refuses us is found out
// about before the work and not after it.
func reach(ctx context.Context, ref remote.Reference, o remote.Options, desc ocispec.Descriptor) error {
	target, err := remote.OpenTarget(ctx, ref, o)
	if err != nil {
		return err
	}
	_, err = target.Exists(ctx, desc)
	return errors.Join(err, target.Close())
}

func builderSource(src remote.Source, img remote.Image, tempDir string) builder.Source {
	out := builder.Source{
		Manifest:    img.Descriptor,
		Config:      img.ConfigBytes,
		Annotations: img.Manifest.Annotations,
	}
	for _, l := range img.Layers {
		out.Layers = append(out.Layers, builder.Layer{
			Descriptor: l.Descriptor,
			DiffID:     l.DiffID,
			Open:       func(ctx context.Context) (io.ReadCloser, error) { return src.Fetch(ctx, l.Descriptor) },
			Verified:   true, // as every remote.Source does
			OpenAt:     func(ctx context.Context) (io.ReaderAt, error) { return openRanges(ctx, src, l.Descriptor, tempDir) },
		})
	}
	return out
}

// publish checks the documents of res and pushes everything, the manifest last.
func publish(ctx context.Context, o Options, from origin, ref remote.Reference, img remote.Image, res *builder.Result, report *reporter, h *helpers) (Summary, error) {
	target, err := remote.OpenTarget(ctx, ref, o.TargetRemote)
	if err != nil {
		return Summary{}, fmt.Errorf("open target %s: %w", ref, err)
	}
	sum, err := push(ctx, target, from, img, res, report, h, remote.Publish)
	if cerr := target.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		return Summary{}, fmt.Errorf("publish %s: %w", ref, err)
	}
	return sum, nil
}

// push pushes res with how, one of remote's ways to publish.
func push(ctx context.Context, target remote.Target, from origin, img remote.Image, res *builder.Result, report *reporter, h *helpers,
	how func(context.Context, remote.Target, []remote.Blob, remote.Document, remote.Document, remote.PublishOptions) (remote.Published, error),
) (Summary, error) {
	if err := checkResult(res); err != nil {
		return Summary{}, fmt.Errorf("the built image contradicts itself: %w", err)
	}
	files := append(append([]builder.File(nil), res.Blobs...), res.Bootstrap)
	blobs, err := h.blobs(files)
	if err != nil {
		return Summary{}, err
	}
	blobs = append(blobs, from.referenced(res)...)
	published, err := how(ctx, target, blobs,
		remote.Document{Descriptor: res.ConfigDescriptor, Data: res.Config},
		remote.Document{Descriptor: res.ManifestDescriptor, Data: res.Manifest},
		remote.PublishOptions{Progress: report.push})
	if err != nil {
		return Summary{}, err
	}
	if h.cache != nil {
		h.cache.add(ctx, res)
	}
	return summarize(img, res, files, published), nil
}

// checkResult is the last look before the result gets a name: what a client will see of
// the manifest and config must fit together, and the files must be as long as announced.
func checkResult(res *builder.Result) error {
	var ids []string
	for _, f := range res.Blobs {
		ids = append(ids, f.Descriptor.Digest.Encoded())
	}
	doc, err := nydusimage.Parse(res.Manifest, res.Config)
	if err != nil {
		return err
	}
	if err := doc.Check(ids); err != nil {
		return err
	}
	for what, pair := range map[string]struct {
		desc ocispec.Descriptor
		data []byte
	}{"manifest": {res.ManifestDescriptor, res.Manifest}, "config": {res.ConfigDescriptor, res.Config}} {
		if got := digest.FromBytes(pair.data); got != pair.desc.Digest || int64(len(pair.data)) != pair.desc.Size {
			return fmt.Errorf("%s: got %s of %d bytes, want %s of %d", what, got, len(pair.data), pair.desc.Digest, pair.desc.Size)
		}
	}
	for _, f := range append(append([]builder.File(nil), res.Blobs...), res.Bootstrap) {
		if f.Stored {
			continue
		}
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

func summarize(img remote.Image, res *builder.Result, files []builder.File, p remote.Published) Summary {
	s := Summary{
		SourceDigest:   img.Descriptor.Digest,
		TargetDigest:   p.Descriptor.Digest,
		Platform:       PlatformOf(img),
		SourceBytes:    res.Stats.SourceBytes,
		BootstrapBytes: res.Stats.BootstrapBytes,
		Uploaded:       p.Uploaded,
		UploadedBytes:  p.UploadedBytes,
		Existed:        p.Existed + p.Mounted,
		Mounted:        p.Mounted,
		LayersReused:   res.Stats.LayersReused,
		JoinedLayers:   res.Stats.JoinedLayers,
		DictChunks:     res.Stats.DictChunks,
		DictBlobs:      res.Stats.DictBlobs,
		Files:          res.Stats.Files,
		VerifiedChunks: res.Stats.VerifiedChunks,
	}
	for _, f := range files {
		s.TargetBytes += f.Descriptor.Size
	}
	for _, l := range res.Layers {
		s.Referenced++
		s.ReferencedSize += l.Size
	}
	if n := res.Stats.CutChunks; n > 0 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("%d chunks lie in two gzip members of their layer: nydusd 2.2.0 cannot read them, and what it reads with them", n))
	}
	pre := res.Stats.Prefetch
	s.Prefetch = Prefetch{
		Bytes: pre.BlobBytes, RawBytes: pre.RawBytes, Chunks: pre.Chunks,
		Listed: pre.Listed, Files: pre.Files, Missing: pre.Missing,
	}
	if last := len(res.Blobs) - 1; pre.Chunks > 0 && last >= 0 {
		s.Prefetch.Blob = res.Blobs[last].Descriptor.Digest.Encoded()
	}
	s.MissingPaths = res.Stats.MissingPaths
	return s
}

// PlatformOf returns the "os/arch[/variant]" of an image.
func PlatformOf(img remote.Image) string {
	s := img.Config.OS + "/" + img.Config.Architecture
	if img.Config.Variant != "" {
		s += "/" + img.Config.Variant
	}
	return s
}

func warnings(l *persist.List, img remote.Image) []string {
	if l == nil {
		return nil
	}
	var out []string
	for _, x := range l.Losses {
		out = append(out, fmt.Sprintf("the list is incomplete: %s (%d): %s", x.Reason, x.Count, x.Detail))
	}
	if l.Digest != "" && l.Digest != img.Descriptor.Digest.String() && l.Digest != img.Root.Digest.String() {
		out = append(out, fmt.Sprintf("the list was recorded of image %s, the source is %s", l.Digest, img.Descriptor.Digest))
	}
	return out
}
