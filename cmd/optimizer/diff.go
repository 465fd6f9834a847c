package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/imagediff"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/progress"
)

type diffOptions struct {
	*global
	a, b   imageFlags
	output string
}

func newDiff(g *global) *cobra.Command {
	o := &diffOptions{global: g}
	cmd := &cobra.Command{
		Use:   "diff IMAGE IMAGE",
		Short: "Compare the trees of two Nydus images",
		Long: `diff compares what containers would see of two Nydus images: types, modes, owners, times,
extended attributes, links and content. Compressors, digesters, chunk sizes and the order
of blobs may differ: only the trees count. Each entry that differs is a line on standard
output: + only in the second image, - only in the first, M in both with what differs.
The exit status is 0 when the trees are equal, and 1 when they are not.`,
		Example: `  optimizer diff oci:images:nginx oci:images:nginx-optimized
  optimizer diff registry.example/app:1 registry.example/app:2 -o json
  optimizer diff --bootstrap old.boot --blob-dir blobs --with new.boot`,
		Args: atMost(2, "two images"),
		RunE: func(cmd *cobra.Command, args []string) error {
			first, rest, err := o.a.image(cmd, args)
			if err != nil {
				return err
			}
			o.b.remote, o.b.platform, o.b.tempDir = o.a.remote, o.a.platform, o.a.tempDir
			if o.b.bootstrap != "" && o.b.blobDir == "" {
				o.b.blobDir = o.a.blobDir
			}
			second, rest, err := o.b.image(cmd, rest)
			switch {
			case err != nil:
				return err
			case len(rest) > 0:
				return usagef(cmd, "want two images, got one more: %q", rest[0])
			case o.output != "text" && o.output != "json":
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			}
			return o.run(cmd.Context(), first, second)
		},
	}
	o.a.addFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.b.bootstrap, "with", "", "read this bare bootstrap file as the second image")
	f.StringVar(&o.b.blobDir, "with-blob-dir", "", "directory of its blobs (default --blob-dir)")
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text or json")
	return cmd
}

func (o *diffOptions) run(ctx context.Context, first, second string) (err error) {
	a, err := o.a.open(ctx, first)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.Close()) }()
	b, err := o.b.open(ctx, second)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	ac, bc := a.Chunks(), b.Chunks()
	defer func() { err = errors.Join(err, ac.Close(), bc.Close()) }()
	changes := []imagediff.Change{}
	sum, err := imagediff.Compare(ctx, side(a, ac), side(b, bc), func(c imagediff.Change) error {
		if o.output == "json" {
			changes = append(changes, c)
			return nil
		}
		return o.line(c)
	})
	if err != nil {
		return err
	}
	if o.output == "json" {
		err = printJSON(o.out, struct {
			A       string             `json:"a"`
			B       string             `json:"b"`
			Summary imagediff.Summary  `json:"summary"`
			Changes []imagediff.Change `json:"changes"`
		}{a.Reference, b.Reference, sum, changes})
	}
	if err == nil && !sum.Equal() {
		err = fmt.Errorf("the trees differ: %d entries added, %d removed, %d changed, %d the same; %s of %s are in chunks of both",
			sum.Added, sum.Removed, sum.Changed, sum.Same, progress.Bytes(sum.SharedBytes), progress.Bytes(sum.BBytes))
	}
	return err
}

func side(img *nydusimage.Image, c *nydusimage.Chunks) imagediff.Side {
	return imagediff.Side{Image: img.RAFS, Read: c.Read}
}

// line prints one change. Control bytes of a path are escaped, so that it stays one line.
func (o *diffOptions) line(c imagediff.Change) error {
	mark := map[imagediff.Kind]string{imagediff.Added: "+", imagediff.Removed: "-", imagediff.Changed: "M"}[c.Kind]
	path := c.Path
	if strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		path = fmt.Sprintf("%q", path)
	}
	if len(c.Fields) > 0 {
		path += "\t" + strings.Join(c.Fields, ",")
	}
	_, err := fmt.Fprintf(o.out, "%s %s\n", mark, path)
	return err
}
