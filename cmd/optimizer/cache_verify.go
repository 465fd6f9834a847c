package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

type cacheVerifyOptions struct {
	*global
	lazy   lazyFlags
	output string
}

func newCacheVerify(g *global) *cobra.Command {
	o := &cacheVerifyOptions{global: g}
	cmd := &cobra.Command{
		Use:   "verify [NAME|IMAGE|DIR…]",
		Short: "Compare cache files with their digests, and drop what is wrong",
		Long: `verify reads every chunk of the named cache files (all, if none is named; those of a mounted image or directory) from the
disk and compares it with its digest. What is wrong is dropped: it is fetched again when somebody reads it, and at once
where a mount has it. A mount that had all becomes lazy again until it is there.

What a mount has read before is in the kernel's page cache, which nobody can take back: unmount what has read a chunk
that is reported. verify fails when something is wrong and stays, or could not be read.`,
		Example: `  optimizer cache verify
  optimizer cache verify /mnt -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(cmd, o.output); err != nil {
				return err
			}
			return o.run(cmd.Context(), args)
		},
	}
	o.lazy.addFlags(cmd)
	outputFlag(cmd, &o.output)
	return cmd
}

func (o *cacheVerifyOptions) run(ctx context.Context, args []string) error {
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	var names []string
	if len(args) > 0 {
		if names, err = o.lazy.cacheNames(ctx, c, args); err != nil {
			return err
		}
	}
	v, err := c.VerifyCache(ctx, names, nil)
	if o.output == "json" {
		err = errors.Join(err, printJSON(o.out, v))
	} else {
		for _, bad := range v.Bad {
			fmt.Fprintf(o.out, "%s\t%d\t%d\t%s\n", bad.Name, bad.Offset, bad.Size, bad.Digest)
		}
	}
	for _, name := range v.Removed {
		o.warn("%s: nothing of it could be used; it was removed", name)
	}
	o.note("read %d chunks of %d cache files, %.1f MB: %d were wrong, %d of them are fetched again", v.Chunks, v.Blobs, mb(v.Bytes), len(v.Bad), v.Refetched)
	for _, why := range v.Failed {
		err = errors.Join(err, errors.New(why))
	}
	return err
}

// cacheNames finds the cache files that args name.
func (f *lazyFlags) cacheNames(ctx context.Context, c *lazy.Client, args []string) ([]string, error) {
	cache, err := c.Cache(ctx, false)
	if err != nil {
		return nil, err
	}
	s, err := c.Status(ctx, false)
	if err != nil && !errors.Is(err, lazy.ErrNoDaemon) {
		return nil, err
	}
	return cacheNames(cache, s.Mounts, args)
}
