package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

func newCachePin(g *global) *cobra.Command {
	return pinCommand(g, &cobra.Command{
		Use:   "pin NAME|IMAGE|DIR…",
		Short: "Keep cache files from being removed",
		Long: `pin keeps cache files, or those of a mounted image or directory, from being removed by age or size, until unpin. The
beginning of a name is enough where no other begins so.`,
		Example: `  optimizer cache pin 4f2a
  optimizer cache pin registry.example/app:v1   # while it is mounted`,
	}, (*lazy.Client).PinCache)
}

func newCacheUnpin(g *global) *cobra.Command {
	return pinCommand(g, &cobra.Command{
		Use:     "unpin NAME|IMAGE|DIR…",
		Short:   "End pin",
		Long:    `unpin lets cache files that were pinned be removed again. It is no error when one was not pinned.`,
		Example: `  optimizer cache unpin 4f2a`,
	}, (*lazy.Client).UnpinCache)
}

func pinCommand(g *global, cmd *cobra.Command, f func(*lazy.Client, context.Context, ...string) error) *cobra.Command {
	var flags lazyFlags
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef(cmd, "want a cache file, a mounted image or a directory")
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := flags.client()
		if err != nil {
			return err
		}
		names, err := flags.cacheNames(cmd.Context(), c, args)
		if err != nil {
			return err
		}
		if err := f(c, cmd.Context(), names...); err != nil {
			return err
		}
		g.note("%sned %d cache files", cmd.Name(), len(names))
		return nil
	}
	flags.addFlags(cmd)
	return cmd
}
