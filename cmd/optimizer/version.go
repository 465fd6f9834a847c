package main

import (
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func newVersion(g *global) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version",
		Example: "  optimizer version",
		Args:    atMost(0, "none"),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(g.out, version(debug.ReadBuildInfo()))
			return err
		},
	}
}

// version describes a build: its module version, revision and compiler.
func version(info *debug.BuildInfo, ok bool) string {
	if !ok {
		return "optimizer (unknown)"
	}
	v, dirty := info.Main.Version, ""
	if v == "" {
		v = "(devel)"
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v += " " + s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = " modified"
		}
	}
	return "optimizer " + v + dirty + " " + info.GoVersion
}
