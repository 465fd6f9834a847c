package main

import (
	"fmt"
	"io"
	"sort"
	"strings"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

type profileDiffOptions struct {
	*global
	policy policyFlag
	output string
}

func newProfileDiff(g *global) *cobra.Command {
	o := &profileDiffOptions{global: g}
	cmd := &cobra.Command{
		Use:   "diff A B",
		Short: "Compare what two profiles or lists say",
		Long: `diff prints how B differs from A, a line per file:
  - PATH   only in A, with the bytes that A says were touched
  + PATH   only in B, with the bytes that B says were touched
  ~ PATH   in both, with the bytes that only A and only B say were touched
  > PATH   in both, and in another order: its places among the files of both
Exit status 0 means that the comparison was made, whether or not there are differences.`,
		Example: `  optimizer profile diff before.profile after.profile
  optimizer profile diff run1.list run2.list -o json`,
		Args: exactly(2, "two profiles or lists"),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := o.policy.parse(cmd)
			switch {
			case err != nil:
				return err
			case o.output != "text" && o.output != "json":
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			case args[0] == "-" && args[1] == "-":
				return usagef(cmd, "standard input can be read once only")
			}
			var lists [2]*persist.List
			for i, name := range args {
				p, err := o.readProfile(cmd, name)
				if err != nil {
					return err
				}
				lists[i] = p.List(policy)
			}
			d := compareLists(lists[0], lists[1])
			if o.output == "json" {
				return printJSON(o.out, d)
			}
			return d.print(o.out)
		},
	}
	o.policy.addFlags(cmd)
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "what standard output gets: text or json")
	return cmd
}

// difference is what diff says.
type difference struct {
	OnlyA   []diffFile `json:"only_a"`
	OnlyB   []diffFile `json:"only_b"`
	Changed []diffFile `json:"changed"`
	Moved   []diffMove `json:"moved"`
	Common  int        `json:"common_files"`
	BytesA  int64      `json:"only_a_bytes"` // in all files
	BytesB  int64      `json:"only_b_bytes"`
}

type diffFile struct {
	jsonPath
	BytesA int64       `json:"only_a_bytes"`
	BytesB int64       `json:"only_b_bytes"`
	A      []diffRange `json:"only_a_ranges,omitempty"`
	B      []diffRange `json:"only_b_ranges,omitempty"`
}

type diffRange [2]int64 // offset and length

// diffMove has the places among the files that both know, from 1.
type diffMove struct {
	jsonPath
	A int `json:"place_a"`
	B int `json:"place_b"`
}

func compareLists(a, b *persist.List) difference {
	d := difference{OnlyA: []diffFile{}, OnlyB: []diffFile{}, Changed: []diffFile{}, Moved: []diffMove{}}
	inB := map[string]*trace.Access{}
	for i := range b.Accesses {
		inB[b.Accesses[i].Path] = &b.Accesses[i]
	}
	placeA := map[string]int{}
	for i := range a.Accesses {
		x := &a.Accesses[i]
		y := inB[x.Path]
		if y == nil {
			n := persist.Upper(x)
			d.OnlyA = append(d.OnlyA, diffFile{jsonPath: newJSONPath(x.Path), BytesA: n})
			d.BytesA = addBytes(d.BytesA, n)
			continue
		}
		placeA[x.Path] = len(placeA) + 1
		size := max(x.Size, y.Size)
		f := diffFile{jsonPath: newJSONPath(x.Path)}
		f.A, f.BytesA = diffRanges(persist.Missing(x.Ranges, y.Ranges, size))
		f.B, f.BytesB = diffRanges(persist.Missing(y.Ranges, x.Ranges, size))
		d.BytesA = addBytes(d.BytesA, f.BytesA)
		d.BytesB = addBytes(d.BytesB, f.BytesB)
		if f.BytesA > 0 || f.BytesB > 0 {
			d.Changed = append(d.Changed, f)
		}
	}
	d.Common = len(placeA)
	var common []string
	for i := range b.Accesses {
		y := &b.Accesses[i]
		if _, ok := placeA[y.Path]; ok {
			common = append(common, y.Path)
			continue
		}
		n := persist.Upper(y)
		d.OnlyB = append(d.OnlyB, diffFile{jsonPath: newJSONPath(y.Path), BytesB: n})
		d.BytesB = addBytes(d.BytesB, n)
	}
	places := make([]int, len(common))
	for i, p := range common {
		places[i] = placeA[p]
	}
	stay := longestRise(places)
	for i, p := range common {
		if !stay[i] {
			d.Moved = append(d.Moved, diffMove{newJSONPath(p), places[i], i + 1})
		}
	}
	return d
}

func diffRanges(in []trace.Range) (out []diffRange, bytes int64) {
	for _, r := range in {
		out = append(out, diffRange{r.Offset, r.Length})
		bytes += r.Length
	}
	return out, bytes
}

// longestRise marks a longest subsequence of s that rises: what is outside was moved, and
// moving less cannot explain the new order. Time is n log n.
func longestRise(s []int) []bool {
	var tails []int // index of the smallest last value of a rise of each length
	before := make([]int, len(s))
	for i, v := range s {
		n := sort.Search(len(tails), func(k int) bool { return s[tails[k]] >= v })
		before[i] = -1
		if n > 0 {
			before[i] = tails[n-1]
		}
		if n == len(tails) {
			tails = append(tails, i)
		} else {
			tails[n] = i
		}
	}
	in := make([]bool, len(s))
	if len(tails) > 0 {
		for i := tails[len(tails)-1]; i >= 0; i = before[i] {
			in[i] = true
		}
	}
	return in
}

func (d *difference) print(to io.Writer) error {
	var b strings.Builder
	name := func(p jsonPath) string {
		if p.Bytes != nil {
			return printable(string(p.Bytes))
		}
		return printable(p.Path)
	}
	for _, f := range d.OnlyA {
		fmt.Fprintf(&b, "- %s  %s\n", name(f.jsonPath), progress.Bytes(f.BytesA))
	}
	for _, f := range d.OnlyB {
		fmt.Fprintf(&b, "+ %s  %s\n", name(f.jsonPath), progress.Bytes(f.BytesB))
	}
	for _, f := range d.Changed {
		fmt.Fprintf(&b, "~ %s  -%s +%s\n", name(f.jsonPath), progress.Bytes(f.BytesA), progress.Bytes(f.BytesB))
	}
	for _, m := range d.Moved {
		fmt.Fprintf(&b, "> %s  %d -> %d\n", name(m.jsonPath), m.A, m.B)
	}
	fmt.Fprintf(&b, "%d files in both, %d only in A, %d only in B, %d with other bytes, %d in another order; %s only in A, %s only in B\n",
		d.Common, len(d.OnlyA), len(d.OnlyB), len(d.Changed), len(d.Moved), progress.Bytes(d.BytesA), progress.Bytes(d.BytesB))
	_, err := io.WriteString(to, b.String())
	return err
}
