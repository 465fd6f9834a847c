package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/persist"
)

func newProfile(g *global) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "Merge, look at and hand on what runs of an image read",
		Long: `profile works on access lists, and on profiles: the lists of several runs of one workload in
one file. Wherever a profile is wanted, a list in any format that is known here is the
profile of one run.`,
		Example: `  optimizer profile merge run1.list run2.list -o app.profile
  optimizer profile show app.profile
  optimizer profile export app.profile --format nydus -o app.json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q, want one of %s", args[0], strings.Join(commandNames(cmd), ", "))
			}
			return usagef(cmd, "no command: want one of %s", strings.Join(commandNames(cmd), ", "))
		},
	}
	cmd.AddCommand(newProfileMerge(g), newProfileShow(g), newProfileDiff(g), newProfileExport(g), newProfileReport(g),
		newProfilePush(g), newProfilePull(g))
	return cmd
}

// exactly returns a check that there are n arguments, called what.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef(cmd, "got %d arguments %q, want %s", len(args), args, what)
		}
		return nil
	}
}

// policyFlag is the option about which runs count.
type policyFlag struct{ text string }

func (p *policyFlag) addFlags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.text, "policy", "union", "bytes of a profile that count: union (of one run), intersection (of all complete runs), or the least share of them, like 0.5 or 50%")
}

func (p *policyFlag) parse(cmd *cobra.Command) (persist.Policy, error) {
	switch p.text {
	case "union":
		return persist.Union, nil
	case "intersection":
		return persist.Intersection, nil
	}
	number, factor := p.text, 1.
	if rest, ok := strings.CutSuffix(number, "%"); ok {
		number, factor = rest, 0.01
	}
	v, err := strconv.ParseFloat(number, 64)
	if v *= factor; err != nil || !(v > 0 && v <= 1) {
		return 0, usagef(cmd, "--policy: got %q, want union, intersection, or a share above 0 and at most 1 or 100%%", p.text)
	}
	return persist.Policy(v), nil
}

// readProfile reads the profile or list that an argument names, - for standard input.
func (g *global) readProfile(cmd *cobra.Command, name string) (*persist.Profile, error) {
	return g.readInput(cmd, name, persist.ReadAnyProfile)
}

// readRuns is [global.readProfile] for what keeps the runs: a list that no more than says nothing is none.
func (g *global) readRuns(cmd *cobra.Command, name string) (*persist.Profile, error) {
	return g.readInput(cmd, name, func(r io.Reader) (*persist.Profile, error) {
		b := bufio.NewReader(r)
		head, err := b.Peek(len(ownFormats))
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		own := string(head) == ownFormats
		p, err := persist.ReadAnyProfile(b)
		if err == nil && !own && len(p.Runs[0].List.Accesses) == 0 {
			return nil, errors.New("no file is named, and nothing says that a run touched none: want a list or profile")
		}
		return p, err
	})
}

// ownFormats is what native lists and profiles begin with.
const ownFormats = "headstart-"

func (g *global) readInput(cmd *cobra.Command, name string, parse func(io.Reader) (*persist.Profile, error)) (*persist.Profile, error) {
	r := g.in
	if name == "-" {
		if isTerminal(g.in) {
			return nil, usagef(cmd, "- is standard input, which is a terminal: add '< LIST'")
		}
		name = "standard input"
	} else {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // only read from
		r = f
	}
	p, err := parse(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

// writeOutput writes to a file, whole or not at all, or to standard output.
func (g *global) writeOutput(name string, fill func(w io.Writer) error) error {
	if name == "-" {
		return fill(g.out)
	}
	return writeFile(name, fill)
}

// printable returns a name as it is, or quoted where it would disturb a terminal or the next line.
func printable(name string) string {
	if q := strconv.Quote(name); q != `"`+name+`"` {
		return q
	}
	return name
}

// jsonPath is a path in JSON, which holds Unicode text only: what is no UTF-8 comes as its
// bytes too.
type jsonPath struct {
	Path  string `json:"path"`
	Bytes []byte `json:"path_base64,omitempty"`
}

func newJSONPath(p string) jsonPath {
	if clean := strings.ToValidUTF8(p, "\uFFFD"); clean != p {
		return jsonPath{clean, []byte(p)}
	}
	return jsonPath{Path: p}
}
