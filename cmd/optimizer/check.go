package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/internal/replay"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type checkOptions struct {
	*global
	image   imageFlags
	noData  bool
	replay  string
	workers int
	output  string
}

func newCheck(g *global) *cobra.Command {
	o := &checkOptions{global: g}
	cmd := &cobra.Command{
		Use:   "check IMAGE",
		Short: "Verify a Nydus image down to every chunk",
		Long: `check verifies that manifest, config and bootstrap of a Nydus image agree, that the
bootstrap keeps every rule of the format, and that every chunk of every blob has its
digest. Each fault is a line on standard error, and the exit status is 1 then.

--replay LIST reads what an access list names besides, as a start would, and says how much
of it the prefetch blob serves. Directories and patterns of a list that was not recorded
stand for files, as for convert.`,
		Example: `  optimizer check oci:images:nginx-optimized
  optimizer check registry.example/nginx:optimized --no-data
  optimizer check oci:images:nginx-optimized --replay nginx.list
  optimizer check --bootstrap image.boot --blob-dir blobs`,
		Args: atMost(1, "one image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, rest, err := o.image.image(cmd, args)
			switch {
			case err != nil:
				return err
			case len(rest) > 0:
				return usagef(cmd, "--bootstrap stands for an image, and there is one more: %q", rest[0])
			case o.output != "text" && o.output != "json":
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			case o.replay != "" && o.noData:
				return usagef(cmd, "--replay reads data, and --no-data does not")
			case checkWorkers(o.workers) != nil:
				return usagef(cmd, "--workers: %w", checkWorkers(o.workers))
			case o.image.bootstrap != "" && o.image.blobDir == "" && !o.noData:
				return usagef(cmd, "--bootstrap needs --blob-dir, or --no-data to leave the blobs out")
			}
			return o.run(cmd.Context(), ref)
		},
	}
	o.image.addFlags(cmd)
	f := cmd.Flags()
	f.BoolVar(&o.noData, "no-data", false, "verify the metadata only, not the chunks")
	f.StringVar(&o.replay, "replay", "", "read what this access list names: a list, a profile, Nydus' JSON or paths")
	f.IntVar(&o.workers, "workers", 0, "goroutines that verify chunks (default one per CPU)")
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text or json")
	return cmd
}

// checked is what check says about an image without faults.
type checked struct {
	Image  string         `json:"image"`
	Digest digest.Digest  `json:"digest,omitempty"`
	Data   bool           `json:"data"` // the chunks were verified
	Report rafs.Report    `json:"report"`
	Replay *replay.Report `json:"replay,omitempty"`
}

func (o *checkOptions) run(ctx context.Context, ref string) (err error) {
	if o.replay == "" {
		o.image.read = rafs.OpenTables // the tree is read once, by Check
	}
	img, err := o.image.open(ctx, ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	boot, size := img.Bootstrap()
	var open func(rafs.Blob) (io.ReaderAt, error)
	if !o.noData {
		open = func(b rafs.Blob) (io.ReaderAt, error) {
			o.note("reading blob %s (%s)", b.ID, progress.Bytes(b.CompressedSize))
			return openBlob(ctx, img, b)
		}
	}
	report, err := rafs.Check(ctx, boot, size, open, rafs.CheckOptions{
		Data: !o.noData, Workers: o.workers,
		Scratch: func() (rafs.Scratch, error) {
			f, err := img.Scratch()
			if err != nil {
				return nil, err // not f: a nil file in an interface is not nil
			}
			return f, nil
		},
	})
	err = errors.Join(err, img.CheckLayers(ctx, !o.noData))
	if err != nil {
		return fmt.Errorf("check %s: %w", img.Reference, err)
	}
	c := checked{Image: img.Reference, Digest: img.Digest(), Data: !o.noData, Report: report}
	if o.replay != "" {
		if c.Replay, err = o.replayList(ctx, img); err != nil {
			return fmt.Errorf("check %s: %w", img.Reference, err)
		}
	}
	return o.print(c)
}

// replayList reads what the list names.
func (o *checkOptions) replayList(ctx context.Context, img *nydusimage.Image) (_ *replay.Report, err error) {
	f, err := os.Open(o.replay)
	if err != nil {
		return nil, err
	}
	list, err := readList(o.replay, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	chunks := img.Chunks()
	defer func() { err = errors.Join(err, chunks.Close()) }()
	prefetch, ok := img.PrefetchBlob()
	if !ok {
		prefetch = -1
	}
	r, err := replay.Run(ctx, img.RAFS, list, prefetch, chunks.Read)
	if err != nil {
		return nil, err
	}
	return &r, nil
}

func openBlob(ctx context.Context, img *nydusimage.Image, b rafs.Blob) (readAtCloser, error) {
	f, err := img.OpenBlob(ctx, b)
	if err != nil {
		return nil, err // not f: a nil file in an interface is not nil
	}
	return f, nil
}

func (o *checkOptions) print(c checked) error {
	if o.output == "json" {
		return printJSON(o.out, c)
	}
	r := c.Report
	data := "the chunks were not read"
	if c.Data {
		data = fmt.Sprintf("%d chunks hold what their digests say (%s)", r.Chunks, progress.Bytes(r.CheckedBytes))
	}
	_, err := fmt.Fprintf(o.out, "%s: ok: %d inodes (%d files, %d directories, %d symbolic links), %d blobs, %s\n",
		c.Image, r.Inodes, r.Files, r.Dirs, r.Symlinks, r.Blobs, data)
	if err != nil || c.Replay == nil {
		return err
	}
	return o.printReplay(*c.Replay)
}

func (o *checkOptions) printReplay(r replay.Report) error {
	o.warnMissing("", r.Missing, r.Listed, r.MissingPaths)
	if r.Chunks == 0 {
		o.warn("the list names no data of the image: nothing was replayed")
	}
	_, err := fmt.Fprintf(o.out, "replay: %d files of %d listed paths, %d of which without data, %d chunks with %s of data, %s stored; %s from other blobs than the prefetch blob\n",
		r.Files, r.Listed, r.NotRegular, r.Chunks, progress.Bytes(r.Bytes), progress.Bytes(r.StoredBytes), progress.Bytes(r.Outside()))
	for _, b := range r.Blobs {
		if err != nil {
			return err
		}
		kind := "blob"
		if b.Prefetch {
			kind = "prefetch blob"
		}
		_, err = fmt.Fprintf(o.out, "replay: %s %s: %d chunks, %s, %s stored\n", kind, b.ID, b.Chunks, progress.Bytes(b.Bytes), progress.Bytes(b.StoredBytes))
	}
	return err
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
