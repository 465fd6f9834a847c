package main

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

type cacheLsOptions struct{ cacheOptions }

func newCacheLs(g *global) *cobra.Command {
	o := &cacheLsOptions{cacheOptions{global: g}}
	return o.command(&cobra.Command{
		Use:   "ls",
		Short: "List the cache files",
		Long: `ls lists a line for each blob that mounts have fetched: what it takes on disk, how much of the blob is there, when it
was used last, and who has it now. A state of aside is of a mount that lost its daemon; it goes with that mount.`,
		Example: `  optimizer cache ls
  optimizer cache ls -o json | jq -r '.entries[] | select(.pinned) | .name'`,
	}, o.run)
}

func (o *cacheLsOptions) run(ctx context.Context) error {
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	cache, err := c.Cache(ctx, true)
	if err != nil {
		return err
	}
	if o.output == "json" {
		return printJSON(o.out, cache)
	}
	w := tabwriter.NewWriter(o.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tON DISK\tLOCAL\tUSED\tSTATE\tMOUNTS")
	for _, e := range cache.Entries {
		fmt.Fprintf(w, "%s\t%.1f MB\t%.1f/%.1f MB\t%s\t%s\t%s\n", e.Name, mb(e.Bytes), mb(e.Local), mb(e.Total),
			e.Used.Format(time.DateTime), cacheState(&e), strings.Join(e.Mounts, " "))
	}
	return w.Flush()
}

// cacheState says in a few words what keeps a cache file.
func cacheState(e *lazy.CacheEntry) string {
	var words []string
	for _, s := range []struct {
		is   bool
		word string
	}{{e.Aside, "aside"}, {e.Damaged != "" && !e.Aside, "damaged"}, {e.InUse, "in use"}, {e.Pinned, "pinned"}} {
		if s.is {
			words = append(words, s.word)
		}
	}
	if len(words) == 0 {
		return "free"
	}
	return strings.Join(words, ", ")
}
