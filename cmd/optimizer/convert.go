package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/bits"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/profiles"
	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type convertOptions struct {
	*global
	remote remoteFlags

	source, target string
	profile        string
	patterns       bool
	platforms      []string
	allPlatforms   bool
	mergePlatform  bool
	fsVersion      string
	compressor     string
	digester       string
	chunkSize      string
	markPrefetch   bool
	batchSize      string
	prefetchBatch  string
	chunkDict      string
	buildCache     string
	cacheMax       int
	ociRef         bool
	workers        int
	tempDir        string
	output         string
}

func newConvert(g *global) *cobra.Command {
	o := &convertOptions{global: g}
	cmd := &cobra.Command{
		Use:   "convert SOURCE TARGET",
		Short: "Convert an image into a Nydus image, around an access list",
		Long: `convert reads the container image SOURCE and writes it as the Nydus image TARGET: a blob
for each layer, a bootstrap that holds all metadata and, when there is an access list,
a prefetch blob that holds what the list names in the order it was read.

The list may be in any format that is known here: the native one, a path per line, the
table of paths, sizes and times, or Nydus' JSON. The image has been read back and
verified before TARGET names it. The digest of its manifest goes to standard output.`,
		Example: `  optimizer convert nginx registry.example/nginx:optimized --profile nginx.list
  optimizer convert registry.example/app:1 registry.example/app:1-fast --profile auto
  optimizer convert oci:images:app oci:images:app-optimized --chunk-size 256KiB --compressor lz4
  optimizer convert nginx registry.example/nginx:both --all-platforms --merge-platform
  optimizer convert app:2 registry.example/app:2-nydus --build-cache registry.example/app:cache
  optimizer convert registry.example/app:1 registry.example/app:1-ref --oci-ref
  optimizer convert --source nginx --target me/nginx:v6 --fs-version 6 --prefetch-patterns < paths`,
		Args: atMost(2, "SOURCE and TARGET"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.arguments(cmd, args); err != nil {
				return err
			}
			opts, err := o.options(cmd)
			if err != nil {
				return err
			}
			if opts.List, err = o.list(cmd); err != nil {
				return err
			}
			return o.run(cmd.Context(), opts)
		},
	}
	o.addFlags(cmd)
	return cmd
}

func (o *convertOptions) addFlags(cmd *cobra.Command) {
	o.remote.addFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.source, "source", "", "the source image, instead of the first argument")
	f.StringVar(&o.target, "target", "", "the target image, instead of the second argument")
	f.StringVarP(&o.profile, "profile", "p", "", "access list to build around, - for standard input, auto for the profiles kept beside SOURCE")
	f.BoolVar(&o.patterns, "prefetch-patterns", false, "read the access list from standard input")
	f.StringSliceVar(&o.platforms, "platform", nil, "OS/ARCH[/VARIANT] of an image for several (default this machine's); several make an index")
	f.BoolVar(&o.allPlatforms, "all-platforms", false, "convert the image of every Linux platform; the target is an index where the source is one")
	f.BoolVar(&o.mergePlatform, "merge-platform", false, "make the target an index of the Nydus images and the plain images they are made of")
	f.StringVar(&o.fsVersion, "fs-version", "6", "RAFS version: 5 or 6; the kernel mounts 6")
	f.StringVar(&o.compressor, "compressor", "zstd", "compression of chunks: zstd, lz4, gzip or none; with --oci-ref of those in the prefetch blob")
	f.StringVar(&o.digester, "digester", "", "digest of chunks: blake3 or sha256 (default blake3, with --oci-ref sha256 as nydusify has it)")
	f.StringVar(&o.chunkSize, "chunk-size", "1MiB", "bytes of a chunk, a power of two from 4KiB to 16MiB")
	f.BoolVar(&o.markPrefetch, "mark-prefetch-blob", false, "set the feature flag of prefetch blobs (Nydus before 2.4 refuses such an image)")
	f.StringVar(&o.batchSize, "batch-size", "0", "bytes of small chunks that are compressed together, a power of two from 4KiB to 16MiB (nydusd before 2.3 refuses such an image)")
	f.StringVar(&o.prefetchBatch, "prefetch-batch-size", "0", "the same for the prefetch blob")
	f.StringVar(&o.chunkDict, "chunk-dict", "", "Nydus image whose chunks are referred to and not stored again; auto: the one that the target names already, and others kept beside it")
	f.StringVar(&o.buildCache, "build-cache", "", "reference of the artifact that keeps built layers for later conversions; made if it is missing")
	f.IntVar(&o.cacheMax, "build-cache-max-records", 200, "layers that the build cache keeps at most")
	f.BoolVar(&o.ociRef, "oci-ref", false, "leave the data in the source's gzip or tar layers and refer to them; only tables that say where chunks are, and the bootstrap, are made")
	f.IntVar(&o.workers, "workers", 0, "goroutines that compress (default one per CPU)")
	f.StringVar(&o.tempDir, "temp-dir", "", "where the image is built before it is published (default $TMPDIR or /tmp)")
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text (the digest) or json (a summary)")
}

// arguments takes source and target from the arguments or from the flags.
func (o *convertOptions) arguments(cmd *cobra.Command, args []string) error {
	for _, to := range []*string{&o.source, &o.target} {
		if *to == "" && len(args) > 0 {
			*to, args = args[0], args[1:]
		}
	}
	switch {
	case o.source == "" || o.target == "":
		return usagef(cmd, "want SOURCE and TARGET")
	case len(args) > 0:
		return usagef(cmd, "source and target are given by flags, and there is one more argument %q", args[0])
	}
	return nil
}

func (o *convertOptions) options(cmd *cobra.Command) (convert.Options, error) {
	b := builder.DefaultOptions()
	fail := func(flag string, err error) (convert.Options, error) {
		return convert.Options{}, usagef(cmd, "--%s: %w", flag, err)
	}
	var err error
	if b.FSVersion, err = rafs.ParseVersion(o.fsVersion); err != nil {
		return fail("fs-version", err)
	}
	if b.Compressor, err = rafs.ParseCompressor(o.compressor); err != nil {
		return fail("compressor", err)
	}
	if o.digester == "" && o.ociRef {
		b.Digester = rafs.DigesterSHA256
	} else if o.digester != "" {
		if b.Digester, err = rafs.ParseDigester(o.digester); err != nil {
			return fail("digester", err)
		}
	}
	if flag, err := o.sizes(cmd, &b); err != nil {
		return fail(flag, err)
	}
	if err := checkWorkers(o.workers); err != nil {
		return fail("workers", err)
	}
	if o.output != "text" && o.output != "json" {
		return fail("output", fmt.Errorf("got %q, want text or json", o.output))
	}
	if o.patterns && o.profile != "" {
		return fail("prefetch-patterns", fmt.Errorf("--profile names a list already"))
	}
	b.Workers, b.TempDir, b.MarkPrefetchBlob, b.OCIRef = o.workers, o.tempDir, o.markPrefetch, o.ociRef
	if err := o.checkRef(b); err != nil {
		return fail("oci-ref", err)
	}
	if o.cacheMax < 1 {
		return fail("build-cache-max-records", fmt.Errorf("got %d, want at least 1", o.cacheMax))
	}
	if o.allPlatforms && len(o.platforms) > 0 {
		return fail("all-platforms", fmt.Errorf("--platform chooses some"))
	}
	r := o.remote.options()
	return convert.Options{
		Source: o.source, Target: o.target, Build: b, SourceRemote: r, TargetRemote: r,
		Platforms: o.platforms, AllPlatforms: o.allPlatforms, MergePlatform: o.mergePlatform,
		ChunkDict: o.chunkDict, BuildCache: o.buildCache, BuildCacheMax: o.cacheMax,
	}, nil
}

// sizes puts the sizes that the command line names into b; with an error it says of which flag that is.
func (o *convertOptions) sizes(cmd *cobra.Command, b *builder.Options) (flag string, err error) {
	size, err := parseSize(o.chunkSize)
	switch {
	case err != nil:
		return "chunk-size", err
	case size < rafs.MinChunkSize || size > rafs.MaxChunkSize || bits.OnesCount64(size) != 1:
		return "chunk-size", fmt.Errorf("got %s (%d bytes), want a power of two from 4KiB to 16MiB", o.chunkSize, size)
	case b.Compressor == rafs.CompressorGzip && b.FSVersion == rafs.V6 && size == rafs.MaxChunkSize:
		return "chunk-size", fmt.Errorf("with --compressor gzip got %s, want at most 8MiB", o.chunkSize)
	}
	b.ChunkSize = uint32(size)
	for flag, to := range map[string]*uint32{"batch-size": &b.BatchSize, "prefetch-batch-size": &b.PrefetchBatchSize} {
		text := cmd.Flag(flag).Value.String()
		if size, err = parseSize(text); text == "0" {
			continue
		}
		if err != nil || size < rafs.MinChunkSize || size > rafs.MaxChunkSize || bits.OnesCount64(size) != 1 {
			return flag, fmt.Errorf("got %q, want 0 or a power of two from 4KiB to 16MiB", text)
		}
		*to = uint32(size)
	}
	return "", nil
}

// checkRef says what does not go with --oci-ref.
func (o *convertOptions) checkRef(b builder.Options) error {
	switch {
	case !o.ociRef:
		return nil
	case b.FSVersion != rafs.V6:
		return fmt.Errorf("it wants --fs-version 6, got %s", o.fsVersion)
	case b.BatchSize != 0:
		return fmt.Errorf("the layers stay as they are: --batch-size is for blobs that are made")
	case o.chunkDict != "":
		return fmt.Errorf("it does not go with --chunk-dict")
	case o.buildCache != "":
		return fmt.Errorf("it does not go with --build-cache: there are no built layers to keep")
	}
	return nil
}

// list reads the access list, if one is asked for.
func (o *convertOptions) list(cmd *cobra.Command) (*persist.List, error) {
	switch {
	case o.profile == autoProfile:
		var platform string
		if len(o.platforms) == 1 {
			platform = o.platforms[0]
		}
		if len(o.platforms) > 1 || o.allPlatforms {
			return nil, usagef(cmd, "--profile auto: profiles are of one platform, and several are wanted")
		}
		return o.autoList(cmd.Context(), o.source, profiles.Options{Platform: platform, Remote: o.remote.options()}, true)
	case o.patterns, o.profile == "-":
		if isTerminal(o.in) {
			return nil, usagef(cmd, "the access list comes from standard input, which is a terminal: add '< LIST'")
		}
		return readList("standard input", o.in)
	case o.profile != "":
		f, err := os.Open(o.profile)
		if err != nil {
			return nil, err
		}
		l, err := readList(o.profile, f)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return l, err
	}
	return nil, nil
}

func readList(name string, r io.Reader) (*persist.List, error) {
	l, err := persist.ReadAny(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return l, nil
}

func (o *convertOptions) run(ctx context.Context, opts convert.Options) error {
	d := o.display()
	defer d.Close()
	opts.Progress = func(e convert.Event) { d.Update(e.Task, e.Done, e.Total, e.Finished) }
	sum, err := convert.Run(ctx, opts)
	d.Close()
	if err != nil {
		return err
	}
	for _, w := range sum.Warnings {
		o.warn("%s", w)
	}
	o.describe(sum)
	if o.output == "json" {
		e := json.NewEncoder(o.out)
		e.SetIndent("", "  ")
		return e.Encode(sum)
	}
	_, err = fmt.Fprintln(o.out, sum.TargetDigest)
	return err
}

func (o *convertOptions) describe(s convert.Summary) {
	for _, i := range s.Images {
		for _, w := range i.Warnings {
			o.warn("%s: %s", i.Platform, w)
		}
		o.note("%s: manifest %s, prefetch blob %s of %d files", i.Platform, i.TargetDigest, progress.Bytes(i.Prefetch.Bytes), i.Prefetch.Files)
		o.warnMissing(i.Platform+": ", i.Prefetch.Missing, i.Prefetch.Listed, i.MissingPaths)
	}
	o.note("%s (%s) is now %s", s.Source, s.Platform, s.Target)
	o.note("layers: %s in, %s out, of which bootstrap %s unpacked; %d blobs uploaded, %d were there",
		progress.Bytes(s.SourceBytes), progress.Bytes(s.TargetBytes), progress.Bytes(s.BootstrapBytes), s.Uploaded, s.Existed)
	if s.Referenced > 0 {
		o.note("%d layers of the source (%s) are referred to and must stay where the image is", s.Referenced, progress.Bytes(s.ReferencedSize))
	}
	if s.JoinedLayers > 0 {
		o.note("the data of the %d smallest layers are in one blob: an image has room for %d", s.JoinedLayers, rafs.MaxBlobs)
	}
	if s.LayersReused > 0 {
		o.note("%d layers were taken from the build cache as they were", s.LayersReused)
	}
	switch {
	case s.DictChunks > 0 && s.DictBlobs > 0:
		o.note("%d chunks are in %d blobs of the chunk dictionary", s.DictChunks, s.DictBlobs)
	case s.DictChunks > 0:
		o.note("%d chunks of the layers are in the chunk dictionary, and the image needs none of its blobs", s.DictChunks)
	}
	if p := s.Prefetch; p.Listed > 0 {
		o.note("prefetch blob: %s, %d chunks (%s) of %d files", progress.Bytes(p.Bytes), p.Chunks, progress.Bytes(p.RawBytes), p.Files)
		if len(s.Images) == 0 {
			o.warnMissing("", p.Missing, p.Listed, s.MissingPaths)
		}
	}
	o.note("%d chunks were read back; took %s", s.VerifiedChunks, s.Elapsed.Round(10*time.Millisecond))
}
