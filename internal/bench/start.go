package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/workload"
)

// startRuns is the number of containers on each side; p99 of fewer would be the maximum.
const startRuns = 200

// benchStart starts containers through the CRI of one private containerd without the
// plugin and of one with it, in turn, and prints what StartContainer took.
func benchStart(ctx context.Context, b *bench) (err error) {
	img, err := workload.Build(ctx, workload.Static, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	config := fmt.Sprintf("server_path = %q\npersist_dir = %q\n[rebuild]\nenabled = false\n", b.bin+"optimizer-server", filepath.Join(b.dir, "results"))
	sides := []testcri.Options{
		{Dir: b.dir, Out: b.log},
		{
			Dir: b.dir, Out: b.log,
			Plugins:       map[string]string{"02-optimizer-nri-plugin": b.bin + "optimizer-nri-plugin"},
			PluginConfigs: map[string]string{"02-optimizer-nri-plugin.conf": config},
		},
	}
	names := []string{"without the plugin", "with the plugin"}
	pods := make([]*testcri.Pod, len(sides))
	for i, o := range sides {
		env, failure := testcri.Start(ctx, o)
		if failure != nil {
			return fmt.Errorf("%s: %w", names[i], failure)
		}
		defer func() { err = errors.Join(err, env.Close()) }()
		if err := env.ImportOCI(ctx, img.Dir, img.Reference); err != nil {
			return err
		}
		if pods[i], err = env.RunPod(ctx, testcri.PodOptions{}); err != nil {
			return err
		}
	}
	took := make([][]time.Duration, len(sides))
	for n := range startRuns + 1 {
		for i, pod := range pods {
			d, err := startOnce(ctx, pod, img, n)
			if err != nil {
				return fmt.Errorf("%s: %w", names[i], err)
			}
			if n > 0 { // the first is a warm-up
				took[i] = append(took[i], d)
			}
		}
	}
	fmt.Fprintf(b.out, "\nStartContainer through the CRI, %d interleaved containers on each side\n%-44s %10s %10s %10s\n", startRuns, "", "p50", "p90", "p99")
	for i, name := range names {
		slices.Sort(took[i])
		at := func(q int) float64 { return float64(took[i][len(took[i])*q/100].Microseconds()) / 1000 }
		fmt.Fprintf(b.out, "%-44s %7.1f ms %7.1f ms %7.1f ms\n", name, at(50), at(90), at(99))
	}
	return nil
}

func startOnce(ctx context.Context, pod *testcri.Pod, img *workload.Image, n int) (took time.Duration, err error) {
	c, err := pod.Create(ctx, testcri.ContainerOptions{Image: img.Reference, Name: fmt.Sprint("bench", n)})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Remove(ctx)) }()
	if took, err = c.Start(ctx); err != nil {
		return 0, err
	}
	_, err = c.Wait(ctx)
	return took, err
}
