package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

type statusOptions struct {
	*global
	lazy   lazyFlags
	output string
}

func newStatus(g *global) *cobra.Command {
	o := &statusOptions{global: g}
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what is mounted, and how much of it is local",
		Long: `status shows the mounts of a daemon: lazy (some of it is fetched when it is read), complete (all is local, and
with the driver erofs nothing is in the way of a read) or failed (it lost its daemon: what was not local cannot be read).

FETCHED is all that came, REQUESTS in how many requests. DEMAND is what readers waited for, with what came in the same requests;
PREFETCH the prefetch blob; TABLE the files of the prefetch table, which come after it; AHEAD what follows in a blob that is read front to back.
MISSES are chunks that were fetched for a reader because no list names them, or the list had gone past them; OVERTAKES those that a list
names and that were wanted long before their turn. -o json says which they were. WAITS are reads that found something missing. What was
REUSED was copied from what other images have on this machine, not fetched.`,
		Example: `  optimizer status
  optimizer status -o json`,
		Args: atMost(0, "none"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.output != "text" && o.output != "json" {
				return usagef(cmd, "--output: got %q, want text or json", o.output)
			}
			return o.run(cmd.Context())
		},
	}
	o.lazy.addFlags(cmd)
	cmd.Flags().StringVarP(&o.output, "output", "o", "text", "what standard output gets: text or json")
	return cmd
}

func (o *statusOptions) run(ctx context.Context) error {
	c, err := o.lazy.client()
	if err != nil {
		return err
	}
	s, err := c.Status(ctx, o.output == "json")
	if errors.Is(err, lazy.ErrNoDaemon) {
		s, err = lazy.Status{StateDir: o.lazy.stateDir, Mounts: []lazy.Mount{}}, nil
	}
	if err != nil {
		return err
	}
	if o.output == "json" {
		return printJSON(o.out, s)
	}
	if s.PID == 0 {
		o.note("no daemon runs for %s: nothing is mounted", s.StateDir)
		return nil
	}
	o.note("daemon %d, holder %s, state in %s", s.PID, holders(s), s.StateDir)
	w := tabwriter.NewWriter(o.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DIR\tIMAGE\tDRIVER\tSTATE\tLOCAL\tFETCHED\tREUSED\tREQUESTS\tDEMAND\tPREFETCH\tTABLE\tAHEAD\tMISSES\tOVERTAKES\tWAITS\tWAITED")
	for _, m := range s.Mounts {
		st := &m.Stats
		all := st.Fetched()
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%.1f/%.1f MB\t%.1f MB\t%.1f MB\t%d\t%d, %.1f MB\t%.1f MB\t%.1f MB\t%.1f MB\t%d\t%d\t%d\t%s\n", m.Dir, m.Reference, m.Driver, m.State,
			mb(m.Local), mb(m.Total), mb(all.Bytes), mb(st.ReusedBytes), all.Requests, st.Demand.Requests, mb(st.Demand.Bytes),
			mb(st.Prefetch.Bytes), mb(st.Table.Bytes), mb(st.ReadAhead.Bytes), st.Misses, st.Overtakes, st.Waits, st.Waited.Round(time.Millisecond))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, m := range s.Mounts {
		if m.DriverReason != "" {
			o.note("%s: driver %s: %s", m.Dir, m.Driver, m.DriverReason)
		}
		if m.Error != "" {
			o.warn("%s: %s", m.Dir, m.Error)
		}
	}
	return nil
}

// holders names the processes that start a daemon again.
func holders(s lazy.Status) string {
	if s.Spare == 0 {
		return strconv.Itoa(s.Holder)
	}
	return fmt.Sprintf("%d and %d", s.Holder, s.Spare)
}

func mb(n int64) float64 { return float64(n) / 1e6 }
