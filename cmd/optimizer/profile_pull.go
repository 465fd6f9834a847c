package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/profiles"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// autoProfile, where a file is wanted, is the profiles that are kept beside the image.
const autoProfile = "auto"

type profilePullOptions struct {
	*global
	remote   remoteFlags
	platform string
	output   string
}

func newProfilePull(g *global) *cobra.Command {
	o := &profilePullOptions{global: g}
	cmd := &cobra.Command{
		Use:   "pull IMAGE [-o FILE]",
		Short: "Get the profiles that are kept beside an image",
		Long: `pull finds the profiles that 'profile push' has put beside IMAGE, merges them and writes the
result. Of an image that convert or optimize has made it finds those of the image it was made
from too, where they are in the same repository, layout or containerd. What is there and is
damaged, or of another image or platform, is skipped with a line.`,
		Example: `  optimizer profile pull registry.example/app:v1 -o app.profile
  optimizer profile pull registry.example/app:v1-optimized | optimizer profile show -`,
		Args: exactly(1, "an image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := o.pullProfile(cmd.Context(), args[0], profiles.Options{Platform: o.platform, Remote: o.remote.options()})
			if err != nil {
				return err
			}
			return o.writeOutput(o.output, func(w io.Writer) error { _, err := p.WriteTo(w); return err })
		},
	}
	o.remote.addFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.platform, "platform", "", "OS/ARCH[/VARIANT] of an image for several (default this machine's)")
	f.StringVarP(&o.output, "output", "o", "-", "the profile to write, - for standard output")
	return cmd
}

// pullProfile gets the profiles that are kept beside an image, and says what was found.
func (g *global) pullProfile(ctx context.Context, image string, o profiles.Options) (*persist.Profile, error) {
	f, err := profiles.Pull(ctx, image, o)
	if err != nil {
		return nil, err
	}
	for _, s := range f.Skipped {
		g.warn("skipped: %s", s)
	}
	g.note("%d profiles of %s, %d runs, %d of them complete", f.Artifacts, f.Image, len(f.Profile.Runs), f.Profile.Complete())
	if f.Mixed != nil {
		g.note("the runs differ, and all count: %v", f.Mixed)
	}
	return f.Profile, nil
}

// autoList is the list that --profile auto stands for; nil, with a warning, when there is none and
// that may be.
func (g *global) autoList(ctx context.Context, image string, o profiles.Options, may bool) (*persist.List, error) {
	p, err := g.pullProfile(ctx, image, o)
	if may && errors.Is(err, profiles.ErrNone) {
		g.warn("%v: converted without a prefetch blob", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return p.List(persist.Union), nil
}
