package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/internal/progress"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

type profileShowOptions struct {
	*global
	policy policyFlag
	limit  int
	output string
}

func newProfileShow(g *global) *cobra.Command {
	o := &profileShowOptions{global: g}
	cmd := &cobra.Command{
		Use:   "show PROFILE",
		Short: "Show what a workload's start reads",
		Long: `show prints the files of a profile or list in the order of their median first touch: its
time, the share of the complete runs that touched the file, and the bytes that were
certainly and at most touched; then the runs, and what they lost. Bytes that are at most
touched are those that the kernel mapped around a page fault, and whole files where no
ranges were recorded.`,
		Example: `  optimizer profile show app.profile
  optimizer profile show app.profile --policy 50% -o json
  optimizer profile show nginx.list --limit 20`,
		Args: exactly(1, "one profile or list"),
		RunE: func(cmd *cobra.Command, args []string) error {
			policy, err := o.policy.parse(cmd)
			switch {
			case err != nil:
				return err
			case o.output != "text" && o.output != "json":
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			case o.limit < 0:
				return usagef(cmd, "--limit: got %d, want at least 1, or 0 for all", o.limit)
			}
			p, err := o.readProfile(cmd, args[0])
			if err != nil {
				return err
			}
			s := newShown(p, policy, o.policy.text, o.limit)
			if o.output == "json" {
				return printJSON(o.out, s)
			}
			return s.print(o.out)
		},
	}
	o.policy.addFlags(cmd)
	f := cmd.Flags()
	f.IntVar(&o.limit, "limit", 0, "show only so many files (0: all)")
	f.StringVarP(&o.output, "output", "o", "text", "what standard output gets: text or json")
	return cmd
}

// shown is what show says. Times are nanoseconds from the arming of the tracer.
type shown struct {
	Reference string      `json:"reference,omitempty"`
	Digest    string      `json:"digest,omitempty"`
	Platform  string      `json:"platform,omitempty"`
	Command   []string    `json:"command,omitempty"`
	Policy    string      `json:"policy"`
	Grade     string      `json:"grade,omitempty"`
	Verdict   string      `json:"verdict"`
	Runs      []shownRun  `json:"runs"`
	Total     shownTotal  `json:"total"`
	Files     []shownFile `json:"files"`
}

type shownRun struct {
	ID        string      `json:"id"`
	Container string      `json:"container,omitempty"`
	Started   time.Time   `json:"started,omitzero"`
	Duration  int64       `json:"duration_ns"`
	End       string      `json:"ended,omitempty"`
	Engine    string      `json:"engine,omitempty"`
	Grade     string      `json:"grade,omitempty"`
	Verdict   string      `json:"verdict"`
	Files     int         `json:"files"`
	Skipped   int64       `json:"skipped"`
	Losses    []shownLoss `json:"losses,omitempty"`
}

type shownLoss struct {
	Reason string `json:"reason"`
	Count  int64  `json:"count"` // -1 when nobody knows
	Detail string `json:"detail,omitempty"`
}

type shownTotal struct {
	Files int   `json:"files"`
	Lower int64 `json:"lower_bytes"`
	Upper int64 `json:"upper_bytes"`
	Size  int64 `json:"size_bytes"`
	Whole int   `json:"files_without_ranges"`
}

type shownFile struct {
	jsonPath
	Elapsed int64        `json:"elapsed_ns"`
	Weight  float64      `json:"weight"`
	Runs    int          `json:"runs"`
	Lossy   int          `json:"lossy_runs,omitempty"`
	Lower   int64        `json:"lower_bytes"`
	Upper   int64        `json:"upper_bytes"`
	Size    int64        `json:"size"`
	Runtime bool         `json:"runtime,omitempty"`
	Ranges  []shownRange `json:"ranges"` // null: the whole file
}

type shownRange struct {
	Offset  int64 `json:"offset"`
	Length  int64 `json:"length"`
	Elapsed int64 `json:"elapsed_ns"`
	Certain bool  `json:"certain"`
}

func newShown(p *persist.Profile, policy persist.Policy, policyText string, limit int) shown {
	l := p.List(policy)
	s := shown{
		Reference: l.Reference, Digest: l.Digest, Platform: l.Platform, Command: l.Command,
		Policy: policyText, Grade: l.Grade, Verdict: l.Verdict(), Runs: []shownRun{}, Files: []shownFile{},
	}
	for _, r := range p.Runs {
		var losses []shownLoss
		for _, x := range r.List.Losses {
			losses = append(losses, shownLoss(x))
		}
		s.Runs = append(s.Runs, shownRun{
			ID: r.ID, Container: r.List.Container, Started: r.List.Started, Duration: int64(r.List.Duration), End: r.List.End,
			Engine: r.List.Engine, Grade: r.List.Grade, Verdict: r.List.Verdict(),
			Files: len(r.List.Accesses), Skipped: r.List.Skipped, Losses: losses,
		})
	}
	for i, f := range p.Files(policy) {
		lower, upper := persist.Lower(&f.Access), persist.Upper(&f.Access)
		s.Total.Files++
		s.Total.Lower = addBytes(s.Total.Lower, lower)
		s.Total.Upper = addBytes(s.Total.Upper, upper)
		s.Total.Size = addBytes(s.Total.Size, f.Size)
		if f.Ranges == nil {
			s.Total.Whole++
		}
		if limit > 0 && i >= limit {
			continue
		}
		one := shownFile{
			jsonPath: newJSONPath(f.Path), Elapsed: int64(f.Elapsed), Weight: f.Weight, Runs: f.Runs, Lossy: f.Lossy,
			Lower: lower, Upper: upper, Size: f.Size, Runtime: f.How&trace.Runtime != 0,
		}
		if f.Ranges != nil {
			one.Ranges = make([]shownRange, 0, len(f.Ranges))
		}
		for _, r := range f.Ranges {
			one.Ranges = append(one.Ranges, shownRange{r.Offset, r.Length, int64(r.Elapsed), r.Certain})
		}
		s.Files = append(s.Files, one)
	}
	return s
}

func (s *shown) print(to io.Writer) error {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("image       %s", printable(cmp.Or(s.Reference, "unknown")))
	line("digest      %s", printable(cmp.Or(s.Digest, "unknown")))
	line("platform    %s", printable(cmp.Or(s.Platform, "unknown")))
	line("command     %s", printable(cmp.Or(strings.Join(s.Command, " "), "unknown")))
	line("grade       %s", printable(cmp.Or(s.Grade, "unknown")))
	line("verdict     %s", s.Verdict)
	line("policy      %s", s.Policy)
	line("files       %d, of which %d without ranges, %s in all", s.Total.Files, s.Total.Whole, progress.Bytes(s.Total.Size))
	line("touched     at least %s, at most %s", progress.Bytes(s.Total.Lower), progress.Bytes(s.Total.Upper))
	line("")
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "RUN\tSTARTED\tTOOK\tENDED\tGRADE\tFILES\tVERDICT")
	for _, r := range s.Runs {
		started := "unknown"
		if !r.Started.IsZero() {
			started = r.Started.Format("2006-01-02 15:04:05")
		}
		fmt.Fprintf(w, "%.19s\t%s\t%s\t%s\t%s\t%d\t%s\n", r.ID, started, milliseconds(r.Duration),
			printable(cmp.Or(r.End, "-")), printable(cmp.Or(r.Grade, "-")), r.Files, r.Verdict)
		for _, x := range r.Losses {
			fmt.Fprintf(w, "  lost: %s (%s) %s\n", printable(x.Reason), lost(x.Count), printable(x.Detail))
		}
	}
	fmt.Fprintln(w, "\nORDER\tFIRST TOUCH\tWEIGHT\tAT LEAST\tAT MOST\tSIZE\tPATH")
	for i, f := range s.Files {
		path := f.Path
		if f.Bytes != nil {
			path = string(f.Bytes)
		}
		fmt.Fprintf(w, "%d\t%s\t%.0f%%\t%s\t%s\t%s\t%s\n", i+1, milliseconds(f.Elapsed), f.Weight*100,
			progress.Bytes(f.Lower), progress.Bytes(f.Upper), progress.Bytes(f.Size), printable(path))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if more := s.Total.Files - len(s.Files); more > 0 {
		line("and %d files more", more)
	}
	_, err := io.WriteString(to, b.String())
	return err
}

// addBytes adds two numbers of at least 0; a list may claim files of 2^63-1 bytes.
func addBytes(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

func milliseconds(ns int64) string { return fmt.Sprintf("%.3f ms", float64(ns)/1e6) }

func lost(n int64) string {
	if n < 0 {
		return "an unknown number"
	}
	return fmt.Sprint(n)
}
