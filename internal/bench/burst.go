package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/persist"
)

// tracerPeak runs a recording and returns the largest resident set of its tracer, in bytes. The kernel's own count of
// a child's begins with that of its parent, so the process is asked while it runs.
func tracerPeak(ctx context.Context, line []string) (peak int64, err error) {
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	tracer := ""
	for {
		select {
		case err := <-ended:
			if err == nil && peak == 0 {
				err = errors.New("the recording had no optimizer-server")
			}
			return peak, err
		case <-tick.C:
		}
		if tracer == "" {
			tracer = tracerOf(cmd.Process.Pid)
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", tracer, "status"))
		_, rest, ok := strings.Cut(string(b), "\nVmHWM:")
		if err != nil || !ok {
			continue // it has ended
		}
		var kib int64
		if _, err := fmt.Sscan(rest, &kib); err == nil {
			peak = max(peak, kib<<10)
		}
	}
}

// tracerOf returns the number of the tracer that is a child of process pid, "" when there is none.
func tracerOf(pid int) string {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is one
	for _, file := range threads {
		children, _ := os.ReadFile(file) // the thread may be gone
		for child := range strings.FieldsSeq(string(children)) {
			name, err := os.ReadFile(filepath.Join("/proc", child, "comm"))
			const truncated = "optimizer-serve" // proc(5): 15 bytes; before it executes a child has its parent's
			if err == nil && strings.TrimSpace(string(name)) == truncated {
				return child
			}
		}
	}
	return ""
}

// benchBurst runs a static program that reads 60,000 small files as fast as it can, with
// and without a tracer on its root, and counts what the list holds.
func benchBurst(ctx context.Context, b *bench) (err error) {
	img, err := workload.Build(ctx, workload.Burst, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "burst-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := extract(ctx, img, root); err != nil {
		return err
	}
	list := filepath.Join(dir, "burst.list")
	command := img.Command()
	// The recorder runs the command on an overlay; so does the other side.
	over := filepath.Join(dir, "over")
	bare := side{prepare: emptied(over), lines: [][]string{append([]string{"unshare", "--mount", "sh", "-c", `
		mkdir "$0/upper" "$0/work" "$0/merged"
		mount -t overlay overlay -o "lowerdir=$1,upperdir=$0/upper,workdir=$0/work" "$0/merged"
		shift; exec chroot "$0/merged" "$@"`, over, root}, command...)}}
	traced := side{lines: [][]string{append([]string{
		b.bin + "optimizer", "record", "--quiet", "--server-path", b.bin + "optimizer-server", "--root", root, "-o", list, "--",
	}, command...)}}
	without, with, err := compare(ctx, b.runs, bare, traced)
	if err != nil {
		return err
	}
	peak, err := tracerPeak(ctx, traced.lines[0])
	if err != nil {
		return err
	}
	f, err := os.Open(list)
	if err != nil {
		return err
	}
	l, err := persist.Read(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	fmt.Fprintf(b.out, "\nburst of %d files by a static program; median of %d interleaved runs\n", workload.BurstFiles, b.runs)
	fmt.Fprintf(b.out, "%-44s %9.2fs\n", "without a tracer", medianWall(without).Seconds())
	fmt.Fprintf(b.out, "%-44s %9.2fs  (the recorder's own start and end included)\n", "optimizer record", medianWall(with).Seconds())
	fmt.Fprintf(b.out, "%-44s %10.2f\n", "ratio", ratio(medianWall(with), medianWall(without)))
	own, slowed, err := programTimes(without, with)
	if err != nil {
		return err
	}
	fmt.Fprintf(b.out, "%-44s %10.2f  (%.2f s, %.2f s: from its first file to its last, as it says itself)\n",
		"ratio of the program's own time", ratio(slowed, own), own.Seconds(), slowed.Seconds())
	fmt.Fprintf(b.out, "%-44s %10.2f\n", "ratio of user and system time, all processes", ratio(medianCPU(with), medianCPU(without)))
	fmt.Fprintf(b.out, "%-44s %10s  (largest resident set of one more run)\n", "memory of optimizer-server", mib(peak))
	fmt.Fprintf(b.out, "%-44s %10d of %d, losses %v\n", "files listed", len(l.Accesses), workload.BurstFiles+1, l.Losses)
	b.aim("burst: the program's own time, of that without a tracer", ratio(slowed, own), 1.5)
	b.aim("burst: memory of the tracer, MiB", float64(peak)/(1<<20), 20)
	b.aim("burst: files that are not listed", float64(workload.BurstFiles+1-len(l.Accesses)), 0)
	return nil
}

// extract unpacks the layers of an image into a directory.
func extract(ctx context.Context, img *workload.Image, dir string) error {
	for _, l := range img.Manifest.Layers {
		blob := filepath.Join(img.Dir, "blobs", l.Digest.Algorithm().String(), l.Digest.Encoded())
		if _, err := timed(ctx, []string{"tar", "-C", dir, "-xzf", blob}); err != nil {
			return err
		}
	}
	return nil
}

// programTimes returns the medians of what the program says that its reading took, with both sides.
func programTimes(without, with []sample) (a, b time.Duration, err error) {
	median := func(samples []sample) (time.Duration, error) {
		var took []time.Duration
		for _, s := range samples {
			_, seconds, _ := strings.Cut(strings.TrimSpace(string(s.out)), " seconds ")
			d, err := time.ParseDuration(seconds + "s")
			if err != nil {
				return 0, fmt.Errorf("time of the program in %q: %w", s.out, err)
			}
			took = append(took, d)
		}
		slices.Sort(took)
		return took[len(took)/2], nil
	}
	a, err = median(without)
	if err != nil {
		return 0, 0, err
	}
	b, err = median(with)
	return a, b, err
}
