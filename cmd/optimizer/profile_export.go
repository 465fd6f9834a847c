package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/tarindex"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// exportFormats are what export writes, as they are named.
var exportFormats = []string{"list", "paths", "csv", "nydus", "stargz", "overlaybd-files", "overlaybd-trace", "soci"}

type profileExportOptions struct {
	*global
	remote   remoteFlags
	policy   policyFlag
	format   string
	output   string
	image    string
	platform string
	readable bool
}

func newProfileExport(g *global) *cobra.Command {
	o := &profileExportOptions{global: g}
	cmd := &cobra.Command{
		Use:   "export PROFILE --format FORMAT -o FILE",
		Short: "Write a profile for another builder",
		Long: `export writes a profile or list in the form that another tool reads:
  list             our access list, of the policy's bytes
  paths            a path per line: nydusify convert --prefetch-patterns
  csv              the table of upstream's optimizer
  nydus            Nydus' JSON with ranges: nydus-image optimize
  stargz           JSON lines: ctr-remote convert --estargz-record-in; with --image also layers
  overlaybd-files  a path per line, as overlaybd takes it: ctr record-trace --priority_list
  overlaybd-trace  binary frames (layer, offset, length) in the uncompressed tars; wants --image
  soci             a JSON array of paths: soci create --prefetch-files-json

With --image the image's layers are read once to find where its files lie; what the image
does not have is left out. What a format cannot hold is left out and counted in a warning.
Where nothing is left of paths, there is no file: nydusify would prefetch everything.`,
		Example: `  optimizer profile export app.profile --format soci -o prefetch.json
  optimizer profile export app.profile --format nydus --policy 50% -o app.json
  optimizer profile export app.profile --format overlaybd-trace --image registry.example/app:v1 -o trace`,
		Args: exactly(1, "one profile or list"),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := o.policy.parse(cmd)
			switch {
			case err != nil:
				return err
			case !slices.Contains(exportFormats, o.format):
				return usagef(cmd, "--format: got %q, want one of %s", o.format, strings.Join(exportFormats, ", "))
			case o.output == "":
				return usagef(cmd, "want --output FILE, or --output - for standard output")
			case o.format == "overlaybd-trace" && o.image == "":
				return usagef(cmd, "--format overlaybd-trace: want --image, whose layers say where the bytes are")
			case o.format == "overlaybd-trace" && o.output == "-" && isTerminal(o.out):
				return usagef(cmd, "the trace is binary, and standard output is a terminal: name a file by --output")
			case o.image != "" && o.format != "overlaybd-trace" && o.format != "stargz":
				return usagef(cmd, "--image goes with --format stargz and overlaybd-trace")
			case o.readable && o.format != "csv":
				return usagef(cmd, "--readable goes with --format csv")
			}
			p, err := o.readProfile(cmd, args[0])
			if err != nil {
				return err
			}
			return o.run(cmd.Context(), p.List(policy))
		},
	}
	o.remote.addFlags(cmd)
	o.policy.addFlags(cmd)
	f := cmd.Flags()
	f.StringVarP(&o.format, "format", "f", "", "what to write: "+strings.Join(exportFormats, ", "))
	f.StringVarP(&o.output, "output", "o", "", "where to write it, - for standard output")
	f.StringVar(&o.image, "image", "", "the container image whose layers say where the bytes are")
	f.StringVar(&o.platform, "platform", "", "OS/ARCH[/VARIANT] of an image for several (default the profile's, else this machine's)")
	f.BoolVar(&o.readable, "readable", false, "csv: sizes and times with units")
	return cmd
}

func (o *profileExportOptions) run(ctx context.Context, l *persist.List) error {
	var x *tarindex.Index
	if o.image != "" {
		img, index, err := o.index(ctx, o.remote, o.image, o.platform, l)
		if err != nil {
			return err
		}
		x = index
		c := *l
		c.Digest = img.Descriptor.Digest.String()
		l = &c
	}
	write := o.writer(l, x)
	var omitted int
	err := o.writeOutput(o.output, func(w io.Writer) (err error) {
		omitted, err = write(w)
		return err
	})
	if err != nil {
		return fmt.Errorf("export as %s: %w", o.format, err)
	}
	if omitted > 0 {
		o.warn("%d of %d files were left out: %s", omitted, len(l.Accesses), o.why())
	}
	if !l.Complete() {
		o.warn("no run of the profile is complete, and %s cannot say so", o.format)
	}
	return nil
}

// writer returns what writes l; it returns how many files the format cannot hold.
func (o *profileExportOptions) writer(l *persist.List, x *tarindex.Index) func(w io.Writer) (int, error) {
	switch o.format {
	case "list":
		return func(w io.Writer) (int, error) { _, err := l.Fit().WriteTo(w); return 0, err }
	case "csv":
		return func(w io.Writer) (int, error) { return l.WriteCSV(w, o.readable) }
	case "nydus":
		return l.WriteJSON
	case "stargz":
		return func(w io.Writer) (int, error) { return l.WriteStargz(w, placeIn(x)) }
	case "overlaybd-files":
		return l.WriteOverlayBDFiles
	case "overlaybd-trace":
		return func(w io.Writer) (int, error) {
			frames, missing := traceFrames(l, x)
			return missing, persist.WriteOverlayBDTrace(w, frames)
		}
	case "soci":
		return l.WriteSOCI
	}
	return l.WritePatterns
}

// why says what the files that were left out have in common.
func (o *profileExportOptions) why() string {
	switch o.format {
	case "paths":
		return "nydusify takes UTF-8 without newlines, and cuts off white space at the end; / would be every file"
	case "overlaybd-files":
		return "overlaybd takes ASCII letters, digits, '_', '-' and '.', and 64 KiB of paths"
	case "overlaybd-trace":
		return "the image does not have them"
	case "stargz":
		if o.image != "" {
			return "the image does not have them, or their names are not UTF-8"
		}
	}
	return "the format cannot hold their names"
}

// index reads the layers of an image, and warns when the list is of another one.
func (g *global) index(ctx context.Context, r remoteFlags, name, platform string, l *persist.List) (_ remote.Image, _ *tarindex.Index, err error) {
	ref, err := remote.Parse(name)
	if err != nil {
		return remote.Image{}, nil, err
	}
	src, err := remote.OpenSource(ctx, ref, r.options())
	if err != nil {
		return remote.Image{}, nil, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if platform == "" {
		platform = l.Platform
	}
	img, err := remote.Select(ctx, src, platform)
	if err != nil {
		return remote.Image{}, nil, err
	}
	if got := img.Descriptor.Digest.String(); l.Digest != "" && l.Digest != got && l.Digest != img.Root.Digest.String() {
		g.warn("the profile is of image %s, and %s is %s", l.Digest, name, got)
	}
	x, err := tarindex.Read(ctx, src, img)
	if err != nil {
		return remote.Image{}, nil, fmt.Errorf("%s: %w", name, err)
	}
	return img, x, nil
}

func placeIn(x *tarindex.Index) func(path string) (persist.Place, bool) {
	if x == nil {
		return nil
	}
	return func(path string) (persist.Place, bool) {
		f, ok := x.Find(path)
		return persist.Place{Path: f.Path, Layer: f.Entry}, ok
	}
}

// traceFrames returns the reads of the layers that l asks for, by their times, each byte
// range once, and how many files the image does not have.
func traceFrames(l *persist.List, x *tarindex.Index) (frames []persist.TraceFrame, missing int) {
	seen, absent := map[persist.TraceFrame]bool{}, map[string]bool{}
	for _, t := range l.Touches() {
		f, ok := x.Find(t.Access.Path)
		if !ok {
			absent[t.Access.Path] = true
			continue
		}
		extents := f.Extents(nil)
		if !t.Whole {
			extents = f.Extents([]trace.Range{t.Range})
		}
		for _, e := range extents {
			frame := persist.TraceFrame{Layer: uint32(e.Layer), Offset: e.Offset, Length: e.Length} //nolint:gosec // an index of layers
			if !seen[frame] {
				seen[frame] = true
				frames = append(frames, frame)
			}
		}
	}
	return frames, len(absent)
}
