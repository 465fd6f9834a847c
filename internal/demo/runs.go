package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/headstart-oci/headstart/internal/testcri"
)

// figures are what runs of the workload took.
type figures struct {
	start, total []time.Duration // of StartContainer; from its call to the end; sorted
	first        string          // container of the first run
}

// mode says what a run has to do with the plugin.
type mode uint8

const (
	bare       mode = iota // there is no plugin yet
	recorded               // it records the run
	unrecorded             // its pod asks not to be recorded
)

// runs runs the workload a few times in each mode, in turn: what the machine has to do besides, and what
// earlier runs left it to do, is shared alike.
func (d *demo) runs(ctx context.Context, times int, how string, modes ...mode) ([]figures, error) {
	d.say("run it %s %s", count(times), how)
	f := make([]figures, len(modes))
	for i := range times {
		for j := range modes {
			// Which one is first changes from round to round.
			k := (i + j) % len(modes)
			id, start, total, err := d.once(ctx, modes[k])
			if err != nil {
				return nil, fmt.Errorf("run %d %s: %w", i+1, how, err)
			}
			if i == 0 {
				f[k].first = id
			}
			f[k].start, f[k].total = append(f[k].start, start), append(f[k].total, total)
		}
		if d.endless && i >= 1 {
			break // a server says nothing by its time; two runs are enough
		}
	}
	for _, f := range f {
		slices.Sort(f.start)
		slices.Sort(f.total)
	}
	return f, nil
}

// once runs one container to its end, or stops it, and waits for its list. The pod is stopped and not removed: ext4 looks
// for a free inode past all those that were freed in the last minute or so (fs/ext4/ialloc.c recently_deleted),
// so that a workload that makes a thousand files would pay, more with each run, for the removal of the earlier ones' files.
func (d *demo) once(ctx context.Context, m mode) (id string, start, total time.Duration, err error) {
	var o testcri.PodOptions
	if m == unrecorded {
		o.Annotations = map[string]string{"headstart.dev/trace": "false"}
	}
	pod, err := d.env.RunPod(ctx, o)
	if err != nil {
		return "", 0, 0, err
	}
	defer func() { err = errors.Join(err, pod.Stop(context.WithoutCancel(ctx))) }()
	c, err := pod.Create(ctx, testcri.ContainerOptions{Image: d.ref, Command: d.cmd})
	if err != nil {
		return "", 0, 0, err
	}
	began := time.Now()
	if start, err = c.Start(ctx); err != nil {
		return "", 0, 0, err
	}
	if err := d.toEnd(ctx, c); err != nil {
		return "", 0, 0, err
	}
	total = time.Since(began)
	if m == recorded {
		if _, err := d.listOf(ctx, c.ID); err != nil {
			return "", 0, 0, err
		}
	}
	return c.ID, start, total, nil
}

// toEnd waits until the container has ended, or stops it.
func (d *demo) toEnd(ctx context.Context, c *testcri.Container) error {
	limit := cmp.Or(d.limit, runLimit)
	if d.endless {
		limit = min(limit, serverLimit)
	}
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	exit, err := c.Wait(limited)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded:
		d.say("it still runs after %v: stop it", limit)
		d.endless = true
		return c.Stop(ctx, 10*time.Second)
	case err != nil:
		return err
	case exit != 0:
		_, stderr, _ := c.Logs()
		return fmt.Errorf("exit code %d: %s", exit, strings.TrimSpace(string(stderr)))
	}
	return nil
}

// listOf waits for the list of a container and returns its path: until then its tracer and the plugin are
// busy, at the cost of whatever runs.
func (d *demo) listOf(ctx context.Context, container string) (path string, err error) {
	ctx, cancel := context.WithTimeout(ctx, listLimit)
	defer cancel()
	err = d.wait(ctx, func() error {
		paths, err := filepath.Glob(filepath.Join(d.dir, "lists", "*", "*", container+".list"))
		if err != nil || len(paths) == 0 {
			return errors.Join(err, errPending)
		}
		path = paths[0]
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("access list of container %.12s: %w", container, err)
	}
	return path, nil
}
