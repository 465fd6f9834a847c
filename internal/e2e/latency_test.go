package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/workload"
)

const (
	// tooSlow fails a test; the figure to hold is 100 ms on an idle machine, which a
	// loaded one cannot be asked for. The log has the figures.
	tooSlow = time.Second
	// startDeadline is the default of start_deadline.
	startDeadline = 200 * time.Millisecond
)

// durations are start latencies, sorted.
type durations []time.Duration

func (d durations) quantile(q float64) time.Duration { return d[min(len(d)-1, int(q*float64(len(d))))] }

func (d durations) String() string {
	ms := func(q float64) string { return fmt.Sprintf("%.1f", float64(d.quantile(q).Microseconds())/1000) }
	return fmt.Sprintf("n=%d p50=%s p90=%s p99=%s max=%s ms", len(d), ms(0.5), ms(0.9), ms(0.99), ms(1))
}

// latency measures StartContainer.
func (h *host) latency(t *testing.T, img *workload.Image) durations {
	t.Helper()
	pod := h.pod(t)
	var all durations
	for i := range latencyRuns {
		r := h.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: fmt.Sprint("latency", i), Args: []string{"read", "/data/b"}})
		if r.exit != 0 {
			t.Errorf("exit code %d", r.exit)
		}
		all = append(all, r.start)
	}
	slices.Sort(all)
	return all
}

func testLatency(t *testing.T, h *host, img *workload.Image, before durations) {
	after := h.latency(t, img)
	t.Logf("StartContainer without the plugin: %v", before)
	t.Logf("StartContainer with the plugin:    %v", after)
	if p99 := after.quantile(0.99); p99 > before.quantile(0.99)+tooSlow {
		t.Errorf("p99 with the plugin = %v, without %v", p99, before.quantile(0.99))
	}
}

// testBadServer has tracers that hang, end at once, or are not there: containers start
// and run all the same, after the deadline at most.
func testBadServer(t *testing.T, h *host, img *workload.Image, before durations) {
	dir := t.TempDir()
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755))
		return path
	}
	for name, server := range map[string]string{
		"hangs":        script("hangs", "exec sleep 60"),
		"deaf":         script("deaf", `trap "" TERM INT HUP; n=0; while [ $n -lt 30 ]; do sleep 1; n=$((n+1)); done`),
		"ends":         script("ends", "exit 1"),
		"says nothing": script("nothing", "exit 0"),
		"babbles":      script("babbles", "exec cat /dev/urandom"),
		"is missing":   filepath.Join(dir, "nonesuch"),
	} {
		ends := name != "hangs" && name != "deaf"
		t.Run(name, func(t *testing.T) {
			u := h.newSetup(t, settings{"server_path": fmt.Sprintf("%q", server)})
			p := u.start(t)
			pod := h.pod(t)
			for i := range 3 {
				r := h.runIn(t, pod, testcri.ContainerOptions{Image: img.Reference, Name: fmt.Sprint("c", i), Args: []string{"read", "/data/b"}})
				if r.exit != 0 {
					t.Errorf("exit code %d: %s", r.exit, r.errOut)
				}
				if limit := before.quantile(1) + startDeadline + tooSlow; r.start > limit {
					t.Errorf("StartContainer took %v, want at most %v", r.start, limit)
				}
				t.Logf("StartContainer took %v", r.start.Round(time.Millisecond))
			}
			if len(u.results(t)) > 0 {
				t.Error("an image was built from a run that was not traced")
			}
			if !ends {
				// Asked to end, it would wait ten seconds for its tracers. They die with it:
				// the check for leaks at the end of the package sees to that.
				p.kill9(t)
				return
			}
			p.quit(t)
		})
	}
}
