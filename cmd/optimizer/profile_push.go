package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/profiles"
)

type profilePushOptions struct {
	*global
	remote   remoteFlags
	platform string
	foreign  bool
	output   string
}

func newProfilePush(g *global) *cobra.Command {
	o := &profilePushOptions{global: g}
	cmd := &cobra.Command{
		Use:   "push PROFILE IMAGE",
		Short: "Keep a profile beside its image",
		Long: `push puts a profile, or a list in any format, beside the image that it is of: an OCI artifact
whose subject is the image's manifest, in the same repository, layout or containerd. From there
'profile pull', 'convert --profile auto' and 'optimize --profile auto' take it. The same profile
pushed twice is there once. The artifact's digest goes to standard output.`,
		Example: `  optimizer profile push app.profile registry.example/app:v1
  optimizer profile push run1.list oci:images:app --platform linux/arm64`,
		Args: exactly(2, "a profile and an image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.output != "text" && o.output != "json" {
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			}
			p, err := o.readRuns(cmd, args[0])
			if err != nil {
				return err
			}
			done, err := profiles.Push(cmd.Context(), args[1], p, profiles.Options{
				Platform: o.platform, Remote: o.remote.options(), Foreign: o.foreign,
			})
			if err != nil {
				return err
			}
			o.note("%d runs are kept beside %s (%s, manifest %s)", done.Runs, done.Image, done.Platform, done.Subject)
			if o.output == "json" {
				return printJSON(o.out, done)
			}
			_, err = fmt.Fprintln(o.out, done.Digest)
			return err
		},
	}
	o.remote.addFlags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.platform, "platform", "", "OS/ARCH[/VARIANT] of an image for several (default this machine's)")
	f.BoolVar(&o.foreign, "foreign", false, "push a profile that says it is of another image or platform all the same")
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text (the digest) or json")
	return cmd
}
