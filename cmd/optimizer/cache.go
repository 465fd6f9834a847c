package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// newCache holds the commands about what mounts have fetched.
func newCache(g *global) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Look after what mounts have fetched",
		Long: `cache shows, bounds and checks what mounts have fetched: one cache file for each blob of an image, in the state
directory. With a daemon (see mount) its commands work beside the mounts, else by themselves.

A cache file that a mount has is never removed, nor one that is pinned.`,
		Example: `  optimizer cache ls
  optimizer cache gc --limit 20GiB --age 720h
  optimizer cache verify`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q: want one of %s", args[0], strings.Join(commandNames(cmd), ", "))
			}
			return usagef(cmd, "no command: want one of %s", strings.Join(commandNames(cmd), ", "))
		},
	}
	cmd.AddCommand(newCacheLs(g), newCacheDf(g), newCacheGC(g), newCacheVerify(g), newCachePin(g), newCacheUnpin(g))
	return cmd
}

// cacheOptions are those of commands that show what is in the cache.
type cacheOptions struct {
	*global
	lazy   lazyFlags
	output string
}

// command makes cmd one that runs f, with the flags of o and no arguments.
func (o *cacheOptions) command(cmd *cobra.Command, f func(context.Context) error) *cobra.Command {
	cmd.Args = atMost(0, "none")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkOutput(cmd, o.output); err != nil {
			return err
		}
		return f(cmd.Context())
	}
	o.lazy.addFlags(cmd)
	outputFlag(cmd, &o.output)
	return cmd
}

// cacheNames finds the cache files that args name: by name or the beginning of one, or those of a mount, by its directory or image.
func cacheNames(c lazy.Cache, mounts []lazy.Mount, args []string) (names []string, err error) {
	seen := map[string]bool{}
	add := func(name string) {
		if !seen[name] {
			seen[name] = true
			names = append(names, name)
		}
	}
	var errs []error
	for _, arg := range args {
		found := findCache(c, mounts, arg)
		switch {
		case len(found.exact) > 0:
			for _, name := range found.exact {
				add(name)
			}
		case len(found.begins) == 1:
			add(found.begins[0])
		case len(found.begins) > 1:
			errs = append(errs, fmt.Errorf("%s: %d cache files begin so, such as %s and %s: say more of the name", arg, len(found.begins), found.begins[0], found.begins[1]))
		default:
			errs = append(errs, fmt.Errorf("%s: no cache file, and no mounted image or directory, in %s", arg, c.StateDir))
		}
	}
	return names, errors.Join(errs...)
}

// foundCache is what an argument may mean.
type foundCache struct{ exact, begins []string }

func findCache(c lazy.Cache, mounts []lazy.Mount, arg string) (f foundCache) {
	dirs := map[string]bool{}
	for _, m := range mounts {
		if m.Reference == arg || m.Digest != "" && m.Digest == arg || m.Dir == strings.TrimSuffix(arg, "/") {
			dirs[m.Dir] = true
		}
	}
	for _, e := range c.Entries {
		if e.Aside {
			continue
		}
		if e.Name == arg {
			f.exact = append(f.exact, e.Name)
		} else if arg != "" && strings.HasPrefix(e.Name, arg) {
			f.begins = append(f.begins, e.Name)
		}
		for _, dir := range e.Mounts {
			if dirs[dir] {
				f.exact = append(f.exact, e.Name)
			}
		}
	}
	return f
}

// outputFlag adds -o; check refuses what it cannot be.
func outputFlag(cmd *cobra.Command, output *string) {
	cmd.Flags().StringVarP(output, "output", "o", "text", "what standard output gets: text or json")
}

func checkOutput(cmd *cobra.Command, output string) error {
	if output != "text" && output != "json" {
		return usagef(cmd, "--output: got %q, want text or json", output)
	}
	return nil
}
