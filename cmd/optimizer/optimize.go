package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/profiles"
	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// prefetchPolicy is the only one there is: nydus-image's name for a prefetch blob.
const prefetchPolicy = "separated-prefetch-blob"

type optimizeOptions struct {
	*global
	image imageFlags

	source, target string
	policy         string
	files          string
	profile        string
	outBootstrap   string
	outBlobDir     string
	recompress     bool
	batchSize      string
	markPrefetch   bool
	workers        int
	output         string
}

func newOptimize(g *global) *cobra.Command {
	o := &optimizeOptions{global: g}
	cmd := &cobra.Command{
		Use:   "optimize SOURCE TARGET --prefetch-files FILE",
		Short: "Give an existing Nydus image a prefetch blob",
		Long: `optimize copies what an access list names of the Nydus image SOURCE into a prefetch blob, in
the order of the list, and writes the image TARGET that refers to it. Only the chunks
needed are fetched; the other blobs stay as they are, and are not moved where the target
has them. Where SOURCE is an index, TARGET becomes that index with this image replaced.

FILE may be a profile or a list in any format that is known here: the native one, Nydus'
JSON with ranges, a path per line. In a list that was not recorded a directory stands for all
files below it, and a path may be a pattern: * ? [ ] match in one name, ** any directories.
Links stand for their files; a chunk is stored once, however often it is listed. What became
of the list is said in the end. The digest of the target goes to standard output.`,
		Example: `  optimizer optimize registry.example/app:nydus registry.example/app:fast --prefetch-files app.list
  optimizer optimize --source oci:images:app --target oci:images:fast --policy separated-prefetch-blob --prefetch-files app.json
  optimizer optimize registry.example/app:nydus registry.example/app:fast --profile auto
  optimizer optimize --bootstrap image.boot --blob-dir blobs --output-bootstrap fast.boot --output-blob-dir blobs --prefetch-files paths`,
		Args: atMost(2, "SOURCE and TARGET"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.check(cmd, args); err != nil {
				return err
			}
			batch, err := parseBatchSize(o.batchSize)
			if err != nil {
				return usagef(cmd, "--batch-size: %w", err)
			}
			list, err := o.list(cmd)
			if err != nil {
				return err
			}
			build := builder.OptimizeOptions{
				List: list, Workers: o.workers, Recompress: o.recompress, BatchSize: batch, MarkPrefetchBlob: o.markPrefetch, TempDir: o.image.tempDir,
			}
			leastHeap.Store(8 << 20)
			if o.image.bootstrap != "" {
				return o.runFiles(cmd.Context(), build)
			}
			return o.run(cmd.Context(), build)
		},
	}
	o.addFlags(cmd)
	return cmd
}

func (o *optimizeOptions) addFlags(cmd *cobra.Command) {
	o.image.addFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.source, "source", "", "the source image, instead of the first argument")
	f.StringVar(&o.target, "target", "", "the target image, instead of the second argument")
	f.StringVar(&o.policy, "policy", prefetchPolicy, "what is made: "+prefetchPolicy)
	f.StringVar(&o.files, "prefetch-files", "", "the access list or profile, - for standard input, auto for the profiles kept beside SOURCE")
	f.StringVarP(&o.profile, "profile", "p", "", "the same")
	f.StringVar(&o.outBootstrap, "output-bootstrap", "", "with --bootstrap: the bootstrap file to write")
	f.StringVar(&o.outBlobDir, "output-blob-dir", "", "with --bootstrap: the directory that gets the prefetch blob, named by its id")
	f.BoolVar(&o.recompress, "recompress", false, "compress the prefetch blob anew with the strongest level; slower, and smaller")
	f.StringVar(&o.batchSize, "batch-size", "0", "bytes of small chunks of the prefetch blob that are compressed together, a power of two from 4KiB to 16MiB (RAFS v6; nydusd before 2.3 refuses such an image)")
	f.BoolVar(&o.markPrefetch, "mark-prefetch-blob", false, "set the feature flag of prefetch blobs (Nydus before 2.4 refuses such an image)")
	f.IntVar(&o.workers, "workers", 0, "goroutines that read and compress (default one per CPU)")
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text (the digest, or the blob's id) or json (a summary)")
}

// parseBatchSize reads the size of batches; 0 is none.
func parseBatchSize(text string) (uint32, error) {
	if text == "0" {
		return 0, nil
	}
	size, err := parseSize(text)
	if err != nil || size < rafs.MinChunkSize || size > rafs.MaxChunkSize || bits.OnesCount64(size) != 1 {
		return 0, fmt.Errorf("got %q, want 0 or a power of two from 4KiB to 16MiB", text)
	}
	return uint32(size), nil
}

// check finds out what is to be optimized.
func (o *optimizeOptions) check(cmd *cobra.Command, args []string) error {
	for _, to := range []*string{&o.source, &o.target} {
		if *to == "" && len(args) > 0 {
			*to, args = args[0], args[1:]
		}
	}
	if o.files == "" {
		o.files = o.profile
	} else if o.profile != "" {
		return usagef(cmd, "--profile and --prefetch-files are the same: want one")
	}
	loose := o.image.bootstrap != ""
	switch {
	case len(args) > 0:
		return usagef(cmd, "there is one more argument %q", args[0])
	case loose && (o.source != "" || o.target != ""):
		return usagef(cmd, "--bootstrap stands for an image, and there is one more: %q", o.source+o.target)
	case loose && (o.image.blobDir == "" || o.outBootstrap == "" || o.outBlobDir == ""):
		return usagef(cmd, "--bootstrap wants --blob-dir, --output-bootstrap and --output-blob-dir too")
	case !loose && (o.source == "" || o.target == ""):
		return usagef(cmd, "want SOURCE and TARGET, or --bootstrap FILE")
	case !loose && (o.image.blobDir != "" || o.outBootstrap != "" || o.outBlobDir != ""):
		return usagef(cmd, "--blob-dir, --output-bootstrap and --output-blob-dir go with --bootstrap")
	case o.policy != prefetchPolicy:
		return usagef(cmd, "--policy: got %q, want %s", o.policy, prefetchPolicy)
	case loose && o.files == autoProfile:
		return usagef(cmd, "--prefetch-files auto: profiles are kept beside images, not beside files")
	case o.files == "":
		return usagef(cmd, "want --prefetch-files FILE")
	case checkWorkers(o.workers) != nil:
		return usagef(cmd, "--workers: %w", checkWorkers(o.workers))
	case o.output != "text" && o.output != "json":
		return usagef(cmd, "--output: got %q, want text or json", o.output)
	}
	return nil
}

// list reads the access list.
func (o *optimizeOptions) list(cmd *cobra.Command) (*persist.List, error) {
	if o.files == autoProfile {
		return o.autoList(cmd.Context(), o.source, profiles.Options{Platform: o.image.platform, Remote: o.image.remote.options()}, false)
	}
	if o.files == "-" {
		if isTerminal(o.in) {
			return nil, usagef(cmd, "the access list comes from standard input, which is a terminal: add '< LIST'")
		}
		return readList("standard input", o.in)
	}
	f, err := os.Open(o.files)
	if err != nil {
		return nil, err
	}
	l, err := readList(o.files, f)
	return l, errors.Join(err, f.Close())
}

func (o *optimizeOptions) run(ctx context.Context, build builder.OptimizeOptions) error {
	d := o.display()
	defer d.Close()
	r := o.image.remote.options()
	sum, err := convert.Optimize(ctx, convert.OptimizeOptions{
		Source: o.source, Target: o.target, Platform: o.image.platform, Build: build, SourceRemote: r, TargetRemote: r,
		Progress: func(e convert.Event) { d.Update(e.Task, e.Done, e.Total, e.Finished) },
	})
	d.Close()
	if err != nil {
		return err
	}
	for _, w := range sum.Warnings {
		o.warn("%s", w)
	}
	o.note("%s (%s) is now %s", sum.Source, sum.Platform, sum.Target)
	o.describe(sum)
	o.note("%d ranges (%s) were read; %d blobs uploaded (%s), %d were there; took %s", sum.Requests, progress.Bytes(sum.FetchedBytes),
		sum.Uploaded, progress.Bytes(sum.UploadedBytes), sum.Existed, sum.Elapsed.Round(10*time.Millisecond))
	if o.output == "json" {
		return printJSON(o.out, sum)
	}
	_, err = fmt.Fprintln(o.out, sum.TargetDigest)
	return err
}

// describe says what became of the list.
func (o *optimizeOptions) describe(s convert.OptimizeSummary) {
	p := s.Prefetch
	o.note("prefetch blob: %s, %d chunks (%s) of %d files; %d paths listed, %d repeated, %d without data, %d patterns, %d directories",
		progress.Bytes(p.Bytes), p.Chunks, progress.Bytes(p.RawBytes), p.Files, p.Listed, s.Repeated, s.NotRegular, s.Patterns, s.Directories)
	o.warnMissing("", p.Missing, p.Listed, s.MissingPaths)
	if s.Dropped > 0 {
		o.note("%d blobs of the source are not needed any more", s.Dropped)
	}
}

// warnMissing says that missing of listed paths are not in the image, with the names that are known; nothing for none.
func (g *global) warnMissing(of string, missing, listed int, paths []string) {
	if missing == 0 {
		return
	}
	names := make([]string, 0, len(paths))
	for _, m := range paths {
		names = append(names, printable(m))
	}
	more := ""
	if missing > len(names) {
		more = ", …"
	}
	g.warn("%s%d of %d listed paths are not in the image: %s%s", of, missing, listed, strings.Join(names, ", "), more)
}

// runFiles optimizes a bare bootstrap.
func (o *optimizeOptions) runFiles(ctx context.Context, build builder.OptimizeOptions) (err error) {
	if a, aerr := os.Stat(o.image.bootstrap); aerr == nil {
		if b, berr := os.Stat(o.outBootstrap); berr == nil && os.SameFile(a, b) {
			return fmt.Errorf("--output-bootstrap %s: it is the source, and would replace it", o.outBootstrap)
		}
	}
	start := time.Now()
	img, err := nydusimage.OpenFiles(o.image.bootstrap, o.image.blobDir)
	if err != nil {
		return err
	}
	var files []io.Closer
	defer func() {
		for _, f := range append(files, img) {
			err = errors.Join(err, f.Close())
		}
	}()
	boot, size := img.Bootstrap()
	res, err := builder.Optimize(ctx, builder.NydusSource{
		Bootstrap: boot, BootstrapSize: size,
		OpenBlob: func(ctx context.Context, b rafs.Blob) (*rafs.BlobReader, error) {
			return rafs.OpenBlobFrom(func(b rafs.Blob) (io.ReaderAt, error) {
				f, err := img.OpenBlob(ctx, b)
				if err != nil {
					return nil, err
				}
				files = append(files, f)
				return f, nil
			}, b)
		},
	}, build)
	if err != nil {
		return fmt.Errorf("optimize %s: %w", o.image.bootstrap, err)
	}
	err = o.writeFiles(res)
	if err = errors.Join(err, res.Close()); err != nil {
		return err
	}
	return o.describeFiles(res, time.Since(start))
}

// writeFiles puts the results in place, the bootstrap last.
func (o *optimizeOptions) writeFiles(res *builder.Optimized) error {
	if res.Prefetch != nil {
		if err := os.MkdirAll(o.outBlobDir, 0o755); err != nil {
			return err
		}
		if err := copyTo(filepath.Join(o.outBlobDir, res.Prefetch.Descriptor.Digest.Encoded()), res.Prefetch.Path); err != nil {
			return err
		}
	}
	return copyTo(o.outBootstrap, res.BootstrapPath)
}

func copyTo(name, from string) (err error) {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return writeFile(name, func(w io.Writer) error {
		_, err := io.Copy(w, f)
		return err
	})
}

func (o *optimizeOptions) describeFiles(res *builder.Optimized, took time.Duration) error {
	st, pre := res.Stats, res.Stats.Prefetch
	sum := convert.OptimizeSummary{
		Source: o.image.bootstrap, Target: o.outBootstrap,
		Prefetch: convert.Prefetch{
			Bytes: pre.BlobBytes, RawBytes: pre.RawBytes, Chunks: pre.Chunks,
			Listed: pre.Listed, Files: pre.Files, Missing: pre.Missing,
		},
		Repeated: pre.Repeated, NotRegular: pre.NotRegular, Patterns: pre.Patterns, Directories: pre.Directories, MissingPaths: st.MissingPaths,
		BootstrapBytes: st.BootstrapBytes, Dropped: st.Dropped, VerifiedChunks: st.VerifiedChunks, Elapsed: took,
	}
	if res.Prefetch != nil {
		sum.Prefetch.Blob = res.Prefetch.Descriptor.Digest.Encoded()
	} else {
		o.warn("the list names no data of the image: there is no new prefetch blob")
	}
	o.note("%s is now %s; took %s", sum.Source, sum.Target, took.Round(10*time.Millisecond))
	o.describe(sum)
	if o.output == "json" {
		return printJSON(o.out, sum)
	}
	if sum.Prefetch.Blob == "" {
		return nil
	}
	_, err := fmt.Fprintln(o.out, sum.Prefetch.Blob)
	return err
}
