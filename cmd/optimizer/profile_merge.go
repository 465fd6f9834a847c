package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/persist"
)

type profileMergeOptions struct {
	*global
	output string
	mixed  bool
	keep   int
}

func newProfileMerge(g *global) *cobra.Command {
	o := &profileMergeOptions{global: g}
	cmd := &cobra.Command{
		Use:   "merge LIST... -o FILE",
		Short: "Merge lists and profiles of one workload into a profile",
		Long: fmt.Sprintf(`merge writes the profile of all runs that the arguments hold, lists or profiles, each run
once, in whatever order they come. Of more than %d runs, or --keep, the complete and then
the latest ones are kept. A run with losses is kept too: it adds what it saw, and counts for nothing
it did not see. An empty file is no run: one that touched nothing has a list that says so.`, persist.MaxRuns),
		Example: `  optimizer profile merge run1.list run2.list -o app.profile
  optimizer profile merge app.profile run3.list -o app.profile`,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return usagef(cmd, "want at least one list or profile")
			case o.output == "":
				return usagef(cmd, "want --output FILE, or --output - for standard output")
			case onStandardInput(args) > 1:
				return usagef(cmd, "standard input can be read once only")
			case o.keep < 1 || o.keep > persist.MaxRuns:
				return usagef(cmd, "--keep: got %d, want 1 to %d", o.keep, persist.MaxRuns)
			}
			return o.run(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.output, "output", "o", "", "the profile to write, - for standard output; may be one of the arguments")
	f.BoolVar(&o.mixed, "mixed", false, "merge runs of different images, platforms or commands too")
	f.IntVar(&o.keep, "keep", persist.MaxRuns, "keep so many runs: complete ones first, then the latest")
	return cmd
}

// onStandardInput returns how many of the files that are named are standard input.
func onStandardInput(names []string) (n int) {
	for _, name := range names {
		if name == "-" {
			n++
		}
	}
	return n
}

func (o *profileMergeOptions) run(cmd *cobra.Command, args []string) error {
	var first, all *persist.Profile
	seen, ids := 0, map[string]bool{}
	for _, name := range args {
		p, err := o.readRuns(cmd, name)
		if err != nil {
			return err
		}
		seen += len(p.Runs)
		for _, r := range p.Runs {
			ids[r.ID] = true
		}
		if all == nil {
			first, all = p, p
		}
		options := persist.MergeOptions{Mixed: o.mixed}
		if _, err := persist.Merge(options, first, p); err != nil {
			return o.refused(err, args[0], name)
		}
		if all, err = persist.Merge(options, all, p); err != nil {
			return o.refused(err, args[0], name)
		}
	}
	all = all.Keep(o.keep)
	if err := o.writeOutput(o.output, func(w io.Writer) error { _, err := all.WriteTo(w); return err }); err != nil {
		if errors.Is(err, persist.ErrInvalid) {
			return fmt.Errorf("%w; --keep leaves fewer runs", err)
		}
		return err
	}
	o.note("%d runs, %d of them complete, from %d in %d files", len(all.Runs), all.Complete(), seen, len(args))
	if gone := len(ids) - len(all.Runs); gone > 0 {
		o.note("%d runs were left out: the profile keeps %d, complete ones first, then the latest", gone, o.keep)
	}
	return nil
}

// refused names the files that do not go together.
func (o *profileMergeOptions) refused(err error, first, name string) error {
	if !errors.Is(err, persist.ErrMixed) {
		return err
	}
	if first == name {
		return fmt.Errorf("%s: %w; --mixed merges them all the same", name, err)
	}
	return fmt.Errorf("%s and %s: %w; --mixed merges them all the same", first, name, err)
}
