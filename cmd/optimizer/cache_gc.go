package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// policyFlags say what is removed of the cache.
type policyFlags struct {
	limit, low string
	age        time.Duration
}

func (f *policyFlags) addFlags(cmd *cobra.Command, prefix string) {
	fl := cmd.Flags()
	fl.StringVar(&f.limit, prefix+"limit", "0", "what the cache may take on disk, such as 20GiB; 0: no limit")
	fl.StringVar(&f.low, prefix+"low", "0", "what is left of it when it took more (default 9/10 of the limit)")
	fl.DurationVar(&f.age, prefix+"age", 0, "how long a cache file stays that nobody uses, such as 720h; 0: for ever")
}

// policy reads the flags.
func (f *policyFlags) policy(cmd *cobra.Command, prefix string) (p lazy.CachePolicy, err error) {
	limit, err := parseSize(f.limit)
	if err != nil {
		return p, usagef(cmd, "--%slimit: %w", prefix, err)
	}
	low, err := parseSize(f.low)
	if err != nil {
		return p, usagef(cmd, "--%slow: %w", prefix, err)
	}
	switch {
	case low > limit:
		return p, usagef(cmd, "--%slow: got %s, want at most --%slimit, which is %s", prefix, f.low, prefix, f.limit)
	case f.age < 0:
		return p, usagef(cmd, "--%sage: got %s, want 0 for no bound, or more", prefix, f.age)
	}
	return lazy.CachePolicy{Limit: int64(limit), Low: int64(low), Age: f.age}, nil //nolint:gosec // parseSize bounds them
}

// args are the flags as a daemon takes them.
func (f *policyFlags) args(cmd *cobra.Command, prefix string) (args []string) {
	for _, name := range []string{"limit", "low", "age"} {
		if fl := cmd.Flags().Lookup(prefix + name); fl.Changed {
			args = append(args, "--"+prefix+name, fl.Value.String())
		}
	}
	return args
}

type cacheGCOptions struct {
	*global
	lazy   lazyFlags
	policy policyFlags
	all    bool
	output string
}

func newCacheGC(g *global) *cobra.Command {
	o := &cacheGCOptions{global: g}
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove cache files that nobody uses",
		Long: `gc removes cache files that no mount has and that are not pinned: those that were not used for --age, and, when the
cache takes more than --limit, what was not used for longest, until --low is left. With none of these it does what the
daemon does by itself (its --cache-limit, --cache-low and --cache-age), and removes what ended daemons left.

It may be killed at any time, and mounts may begin meanwhile. It fails when --limit cannot be reached,
because the rest is in use or pinned.`,
		Example: `  optimizer cache gc --limit 20GiB --low 15GiB
  optimizer cache gc --age 720h
  optimizer cache gc --all         # all that is not in use or pinned`,
		Args: atMost(0, "none"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkOutput(cmd, o.output); err != nil {
				return err
			}
			p, err := o.policy.policy(cmd, "")
			if err != nil {
				return err
			}
			set := len(o.policy.args(cmd, "")) > 0
			switch {
			case o.all && set:
				return usagef(cmd, "--all stands alone: it removes all that --limit, --low and --age could")
			case o.all:
				return o.run(cmd.Context(), &lazy.CachePolicy{Age: time.Nanosecond})
			case set:
				return o.run(cmd.Context(), &p)
			}
			return o.run(cmd.Context(), nil)
		},
	}
	o.lazy.addFlags(cmd)
	o.policy.addFlags(cmd, "")
	cmd.Flags().BoolVar(&o.all, "all", false, "remove all that is not in use or pinned")
	outputFlag(cmd, &o.output)
	return cmd
}

func (o *cacheGCOptions) run(ctx context.Context, p *lazy.CachePolicy) error {
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	done, err := c.CollectCache(ctx, p)
	if o.output == "json" {
		err = errors.Join(err, printJSON(o.out, done))
	} else {
		for _, name := range done.Removed {
			fmt.Fprintln(o.out, name)
		}
	}
	o.note("removed %d cache files, %.1f MB; %.1f MB are left", len(done.Removed), mb(done.Freed), mb(done.After))
	if err == nil && done.Wanted > 0 {
		err = fmt.Errorf("the cache still takes %.1f MB more than wanted: the rest is in use or pinned", mb(done.Wanted))
	}
	return err
}
