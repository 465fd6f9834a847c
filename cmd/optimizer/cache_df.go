package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

type cacheDfOptions struct{ cacheOptions }

func newCacheDf(g *global) *cobra.Command {
	o := &cacheDfOptions{cacheOptions{global: g}}
	return o.command(&cobra.Command{
		Use:   "df",
		Short: "Show what the cache takes on disk",
		Long: `df shows what the state directory takes on disk: what mounts have, what is pinned, what the collector may remove,
the rest (bootstraps, index, records), and the limits of the daemon that runs.`,
		Example: `  optimizer cache df
  optimizer cache df -o json`,
	}, o.run)
}

// cacheDf is what df shows, in bytes.
type cacheDf struct {
	StateDir string            `json:"state_dir"`
	Policy   *lazy.CachePolicy `json:"policy,omitempty"`
	lazy.CacheUsage
	Removable int64 `json:"removable_bytes"`
	Total     int64 `json:"total_bytes"`
	Free      int64 `json:"free_bytes"` // of the file system, for everybody
}

func (o *cacheDfOptions) run(ctx context.Context) error {
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	cache, err := c.Cache(ctx, false)
	if err != nil {
		return err
	}
	u := cache.Usage
	df := cacheDf{StateDir: cache.StateDir, Policy: cache.Policy, CacheUsage: u, Removable: u.Blobs - u.InUse - u.Pins - u.Aside, Total: u.Total()}
	var st unix.Statfs_t
	if err := unix.Statfs(cache.StateDir, &st); err == nil {
		df.Free = int64(st.Bavail) * st.Bsize //nolint:gosec // of a file system
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory %s: %w", cache.StateDir, err)
	}
	if o.output == "json" {
		return printJSON(o.out, df)
	}
	w := tabwriter.NewWriter(o.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, line := range []struct {
		name  string
		bytes int64
	}{{"in use", df.InUse}, {"pinned", df.Pins}, {"aside", df.Aside}, {"removable", df.Removable}, {"rest", df.Rest}, {"total", df.Total}, {"free on disk", df.Free}} {
		fmt.Fprintf(w, "%s\t%.1f MB\t\n", line.name, mb(line.bytes))
	}
	if p := cache.Policy; p != nil && p.Limit > 0 {
		fmt.Fprintf(w, "limit\t%.1f MB\t\n", mb(p.Limit))
	}
	return w.Flush()
}
