package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// result is one cold start, or the median of several.
type result struct {
	Workload string `json:"workload"`
	Link     string `json:"link"`
	Mode     string `json:"mode"`
	Runs     int    `json:"runs"`

	Mounted time.Duration `json:"mounted_ns"` // until a container could be started
	Ready   time.Duration `json:"ready_ns"`   // until it said ready
	Warm    time.Duration `json:"warm_ns"`    // a second start on what the first one left

	// What passed the link until ready.
	Down        int64 `json:"down_bytes"`
	Up          int64 `json:"up_bytes"`
	Requests    int   `json:"requests"`
	Connections int   `json:"connections"`

	// Misses are chunks that were fetched on demand because the prefetch blob, or the list of an image without one, has them not; -1: the
	// mode cannot tell. MissBytes are those of the chunks, uncompressed. Overtakes are chunks that the list names and that were fetched by themselves, long
	// before their turn. Missed says of both what they were, and when, where there is a prefetch blob.
	Misses    int      `json:"misses"`
	MissBytes int64    `json:"miss_bytes"`
	Overtakes int      `json:"overtakes"`
	Missed    []string `json:"missed,omitempty"`
	// AfterReady says the same of what the program read from then on until it had been ended, which a recording that ends while
	// the program serves does not have.
	AfterReady []string `json:"after_ready,omitempty"`

	// What the lazy mount asked for until it was ready: on demand, for the prefetch blob, for the files of the prefetch table behind it, and ahead of
	// who reads front to back.
	Fetched *lazy.Stats `json:"fetched,omitempty"`

	Memory int64 `json:"memory_bytes"` // of the daemons together, the largest resident sets
}

// median returns the run with the median time to ready, with the median of the warm starts and the most memory.
func median(runs []result) result {
	sorted := slices.Clone(runs)
	slices.SortFunc(sorted, func(a, b result) int { return int(a.Ready - b.Ready) })
	r := sorted[len(sorted)/2]
	var warm []time.Duration
	for _, s := range runs {
		warm = append(warm, s.Warm)
		r.Memory = max(r.Memory, s.Memory)
	}
	slices.Sort(warm)
	r.Warm, r.Runs = warm[len(warm)/2], len(runs)
	return r
}

func (b *bench) printHead(img *image, p linksim.Profile) {
	var u unix.Utsname
	kernel := "unknown"
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	fmt.Fprintf(b.out, "\n%s over %s; %s pulled whole, prefetch blob %s; median of %d runs; %d CPUs, Linux %s\n",
		img.name, p, mb(img.source.Size()), mb(img.prefetch.Bytes), b.runs, runtime.NumCPU(), kernel)
	fmt.Fprintf(b.out, "%-34s %9s %9s %9s %10s %9s %7s %7s %10s\n", "", "mounted", "ready", "warm", "bytes", "requests", "conns", "misses", "memory")
}

func (b *bench) printRows(img *image, p linksim.Profile, rows []result) {
	ready := make(map[string]time.Duration)
	for _, r := range rows {
		ready[r.Mode] = r.Ready
		misses := "-"
		if r.Misses >= 0 {
			misses = fmt.Sprint(r.Misses)
		}
		fmt.Fprintf(b.out, "%-34s %8.2fs %8.2fs %8.2fs %10s %9d %7d %7s %10s\n", title(r.Mode), r.Mounted.Seconds(), r.Ready.Seconds(), r.Warm.Seconds(),
			mb(r.Down), r.Requests, r.Connections, misses, mb(r.Memory))
		if f := r.Fetched; f != nil {
			fmt.Fprintf(b.out, "    on demand %d requests, %s; prefetch blob %s; table %d, %s; ahead %d, %s; overtakes %d\n", f.Demand.Requests, mb(f.Demand.Bytes),
				mb(f.Prefetch.Bytes), f.Table.Requests, mb(f.Table.Bytes), f.ReadAhead.Requests, mb(f.ReadAhead.Bytes), r.Overtakes)
		}
		for _, m := range r.Missed {
			fmt.Fprintf(b.out, "    %s\n", m)
		}
		for _, m := range r.AfterReady {
			fmt.Fprintf(b.out, "    when it was ready, until it had ended: %s\n", m)
		}
		if r.Mode == "prefetch" {
			least := p.Transfer(img.bootstrap+img.prefetch.Bytes) + 6*p.RTT + r.Warm
			fmt.Fprintf(b.out, "    %.2f of (bootstrap + prefetch blob) / bandwidth + 6 round trips + warm start = %.2fs\n", r.Ready.Seconds()/least.Seconds(), least.Seconds())
		}
	}
	if ours, ok := ready["prefetch"]; ok {
		for _, peer := range []string{"pull", "nydusd", "nydusd-prefetch"} {
			if theirs, ok := ready[peer]; ok {
				fmt.Fprintf(b.out, "    %.2f times faster than %s\n", theirs.Seconds()/ours.Seconds(), title(peer))
			}
		}
	}
}

// title returns what a mode is called in tables.
func title(name string) string {
	for _, m := range modes {
		if m.name == name {
			return m.title
		}
	}
	return name
}

// mb renders bytes as megabytes of 10^6.
func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// save writes the files that were asked for.
func (b *bench) save(all []result) (err error) {
	if b.json != "" {
		text, merr := json.MarshalIndent(all, "", "  ")
		err = errors.Join(merr, os.WriteFile(b.json, append(text, '\n'), 0o644))
	}
	if b.svg != "" && len(all) > 0 {
		err = errors.Join(err, os.WriteFile(b.svg, plot(all), 0o644))
	}
	return err
}
