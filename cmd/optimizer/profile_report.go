package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/report"
	"github.com/headstart-oci/headstart/pkg/persist"
)

type profileReportOptions struct {
	*global
	remote   remoteFlags
	policy   policyFlag
	image    string
	platform string
}

func newProfileReport(g *global) *cobra.Command {
	o := &profileReportOptions{global: g}
	cmd := &cobra.Command{
		Use:   "report PROFILE FILE.html",
		Short: "Draw a workload's start as a page",
		Long: `report writes one HTML file that needs nothing else, neither a network nor a script: bytes
over time, by file and by layer, the largest and the earliest files, what share of the image
the start needs, and what was lost. Layers and share need the image: --image. Long
tables are cut off, and say so.`,
		Example: `  optimizer profile report app.profile app.html
  optimizer profile report app.profile app.html --image registry.example/app:v1 --policy 50%`,
		Args: exactly(2, "a profile or list, and the file to write (- for standard output)"),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := o.policy.parse(cmd)
			if err != nil {
				return err
			}
			p, err := o.readProfile(cmd, args[0])
			if err != nil {
				return err
			}
			r := report.Options{Policy: policy, PolicyName: o.policyName()}
			if o.image != "" {
				if r.Image, err = o.readImage(cmd.Context(), p.List(policy)); err != nil {
					return err
				}
			}
			return o.writeOutput(args[1], func(w io.Writer) error { return report.Write(w, p, r) })
		},
	}
	o.remote.addFlags(cmd)
	o.policy.addFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.image, "image", "", "the container image, for its layers and size")
	f.StringVar(&o.platform, "platform", "", "OS/ARCH[/VARIANT] of an image for several (default the profile's, else this machine's)")
	return cmd
}

func (o *profileReportOptions) policyName() string {
	switch o.policy.text {
	case "union":
		return "any run (union)"
	case "intersection":
		return "every complete run (intersection)"
	}
	return "a share of at least " + o.policy.text + " of the complete runs"
}

func (o *profileReportOptions) readImage(ctx context.Context, l *persist.List) (*report.Image, error) {
	img, x, err := o.index(ctx, o.remote, o.image, o.platform, l)
	if err != nil {
		return nil, err
	}
	out := &report.Image{Name: o.image, Bytes: x.Size(), Layer: func(path string) (int, bool) {
		f, ok := x.Find(path)
		return f.Layer, ok
	}}
	for _, layer := range img.Layers {
		out.Layers = append(out.Layers, report.Layer{Digest: layer.Descriptor.Digest.String(), Stored: layer.Descriptor.Size})
	}
	return out, nil
}
