package main

import (
	"bufio"
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// counted is a node whose metrics are looked at after each run.
type counted struct {
	*node
	socket string
	slow   string // while this file exists tracers take longer to start than containers wait
	pod    *testcri.Pod
	lists  []*persist.List
}

func newCounted(ctx context.Context, t *testing.T) *counted {
	t.Helper()
	dir := t.TempDir()
	c := &counted{socket: filepath.Join(dir, "metrics.sock"), slow: filepath.Join(dir, "slow")}
	server := filepath.Join(dir, "server")
	must(t, os.WriteFile(server, fmt.Appendf(nil, "#!/bin/sh\n[ ! -e '%s' ] || sleep 3\nexec '%s' \"$@\"\n", c.slow, testenv.Binary(t, "optimizer-server")), 0o755))
	c.node = newNodeWith(t, server, fmt.Sprintf("overwrite = true\nmetrics_address = %q\nidle_timeout = \"0s\"\n", "unix:"+c.socket))
	c.pod = c.node.pod(ctx, testcri.PodOptions{})
	return c
}

// value is what a scrape has for a series; NaN: nothing.
func (c *counted) value(series string) float64 {
	c.t.Helper()
	lines := bufio.NewScanner(strings.NewReader(scrape(c.t, c.socket)))
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), series+" "); ok {
			v, err := strconv.ParseFloat(rest, 64)
			must(c.t, err)
			return v
		}
	}
	return math.NaN()
}

// want waits until a series has a value.
func (c *counted) want(series string, v float64) {
	c.t.Helper()
	eventually(c.t, fmt.Sprint(series, " ", v), func() bool { return c.value(series) == v })
}

// run starts a container, does something to it, and waits for its end and its list.
func (c *counted) run(ctx context.Context, ref string, do func(*testcri.Container), args ...string) *persist.List {
	c.t.Helper()
	ctr := c.start(ctx, c.pod, testcri.ContainerOptions{Image: ref, Name: fmt.Sprint("c", len(c.lists)), Args: args})
	if do != nil {
		do(ctr)
	}
	_, err := ctr.Wait(ctx)
	must(c.t, err)
	l := c.list(ctr.ID)
	c.lists = append(c.lists, l)
	return l
}

// TestCounts holds what the metrics say after runs that end in each way against what the lists say.
func TestCounts(t *testing.T) {
	if testing.Short() {
		t.Skip("one containerd more")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	n := newCounted(ctx, t)
	const rebuilds = `headstart_rebuilds_total{result="%s"}`
	const good, bad = "docker.io/library/good:v1", "docker.io/library/bad:v1"
	n.importHello(good, map[string][]byte{"/etc/one": []byte("1"), "/etc/two": []byte("2")}, nil)

	if l := n.run(ctx, good, nil, "/etc/one", "/etc/two"); !l.Complete() {
		t.Fatalf("losses %v", l.Losses)
	}
	n.want(fmt.Sprintf(rebuilds, "built"), 1)
	if l := n.run(ctx, good, nil, "/etc/one"); !l.Complete() {
		t.Fatalf("losses %v", l.Losses)
	}
	n.want(fmt.Sprintf(rebuilds, "unchanged"), 1)

	// containerd keeps a name that leads out of the root inside; the builder takes no such image.
	hello, err := testcri.StaticImage(testenv.Command(t, "./internal/testcri/internal/hello"), nil)
	must(t, err)
	hello, err = mutate.AppendLayers(hello, layer(t, map[string]string{"../outside": "x"}))
	must(t, err)
	must(t, n.Import(ctx, bad, hello))
	n.run(ctx, bad, nil, "word")
	n.want(fmt.Sprintf(rebuilds, "failed"), 1)

	late := n.value("headstart_armed_late_total")
	must(t, os.WriteFile(n.slow, nil, 0o600))
	l := n.run(ctx, good, func(c *testcri.Container) {
		time.Sleep(4 * time.Second) // it is late, and comes
		must(t, c.Stop(ctx, 10*time.Second))
	}, "sleep")
	must(t, os.Remove(n.slow))
	if l.Complete() || l.Losses[0].Reason != "late" {
		t.Errorf("losses of a run whose tracer came late: %v", l.Losses)
	}
	n.want("headstart_armed_late_total", late+1)
	n.want(`headstart_losses_total{reason="late"}`, 1)
	n.want(fmt.Sprintf(rebuilds, "not_queued"), 1)

	n.loses(ctx)
	n.sums()
}

// loses runs a container whose tracer does not get to read what the kernel tells, and looks that the loss is counted.
func (c *counted) loses(ctx context.Context) {
	c.t.Helper()
	fs, err := tracefs.Open()
	testenv.Kernel(c.t, "tracefs", err)
	must(c.t, fs.Close())
	const ref = "docker.io/library/flood:v1"
	img, err := testcri.StaticImage(testenv.Command(c.t, "./internal/tracer/testdata/workload"),
		map[string][]byte{"/s/own/0": []byte("0"), "/s/shared": make([]byte, 3000*os.Getpagesize()), "/tmp/x": nil})
	must(c.t, err)
	must(c.t, c.Import(ctx, ref, img))
	l := c.run(ctx, ref, func(ctr *testcri.Container) {
		server := c.tracer()
		must(c.t, unix.Kill(server, unix.SIGSTOP))
		pid, err := ctr.PID(ctx)
		must(c.t, err)
		must(c.t, os.WriteFile(fmt.Sprintf("/proc/%d/root/tmp/go", pid), nil, 0o644))
		_, err = ctr.Wait(ctx)
		must(c.t, err)
		must(c.t, unix.Kill(server, unix.SIGCONT))
	}, "mixed", "await:/tmp/go", "pages:0:500000")
	var lost int64
	for _, loss := range l.Losses {
		lost += max(loss.Count, 0)
		c.want(fmt.Sprintf("headstart_losses_total{reason=%q}", loss.Reason), 1)
	}
	if lost == 0 {
		c.t.Errorf("losses %v, want a number of events", l.Losses)
	}
	c.want("headstart_lost_events_total", float64(lost))
	c.t.Logf("%d events were lost, %d seen", lost, l.Events)
}

// tracer returns the process of the only tracer that runs.
func (c *counted) tracer() (pid int) {
	c.t.Helper()
	plugin := c.plugin()
	eventually(c.t, "a tracer", func() bool {
		names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", plugin))
		must(c.t, err)
		var found []int
		for _, name := range names {
			text, _ := os.ReadFile(name) // the thread may be gone
			for field := range strings.FieldsSeq(string(text)) {
				if comm, err := os.ReadFile(filepath.Join("/proc", field, "comm")); err != nil || !strings.HasPrefix(string(comm), "optimizer-serv") {
					continue
				}
				pid, err = strconv.Atoi(field)
				must(c.t, err)
				found = append(found, pid)
			}
		}
		return len(slices.Compact(found)) == 1
	})
	return pid
}

// sums holds what is counted of all runs against their lists.
func (c *counted) sums() {
	c.t.Helper()
	var bytes, events, complete float64
	files, err := filepath.Glob(filepath.Join(c.dir, "lists/*/*/*.list"))
	must(c.t, err)
	for _, name := range files {
		info, err := os.Stat(name)
		must(c.t, err)
		bytes += float64(info.Size())
	}
	for _, l := range c.lists {
		events += float64(l.Events)
		if l.Complete() {
			complete++
		}
	}
	if len(files) != len(c.lists) || bytes == 0 || events == 0 {
		c.t.Fatalf("%d lists of %d runs, %v bytes, %v events", len(files), len(c.lists), bytes, events)
	}
	c.want("headstart_list_bytes_total", bytes)
	c.want("headstart_events_total", events)
	c.want(`headstart_runs_total{verdict="complete"}`, complete)
	c.want(`headstart_runs_total{verdict="incomplete"}`, float64(len(c.lists))-complete)
	c.want("headstart_recordings", 0)
}
