package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusd"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

const (
	fusePairs  = 6        // of mounts of each side
	fuseRounds = 8        // of reads of each kind on a pair of mounts, after the cold ones
	fuseBytes  = 60 << 20 // of files that are read
)

// fuseSide is one FUSE mount of the image: ours or nydusd's.
type fuseSide struct {
	dir      string
	pid      int
	complete func(ctx context.Context) error // has all of the image in its cache
	done     func() error
}

// fuseWay is a way to read. What it leaves in the kernel's cache is what the next one finds.
type fuseWay struct {
	name string
	drop bool // the kernel's cache of the files first
	read func(dir string, names []string) error
}

// fuseWays are timed in this order: the first once on each mount, the others in rounds.
var fuseWays = []fuseWay{
	{"cold: sequential, from the blobs", true, readWhole},
	{"complete, not in the page cache: random, 4 KiB", true, readRandom},
	{"complete, not in the page cache: sequential", true, readWhole},
	{"page cache: sequential", false, readWhole},
	{"page cache: random, 4 KiB", false, readRandom},
}

// fuseTimes is what was measured of one way: the logarithms of the ratios of times, and the CPU seconds of both daemons.
type fuseTimes struct {
	logs []float64
	cpu  [2]float64
}

// benchFUSE reads an image through the FUSE driver and through the real nydusd, from blobs on the same disk, with caches that
// are empty at first, in turn.
func benchFUSE(ctx context.Context, b *bench) (err error) {
	dir, err := os.MkdirTemp(b.dir, "fuse-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	img, err := workload.Build(ctx, workload.Python, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	layout := filepath.Join(dir, "layout")
	if _, err := timed(ctx, []string{b.bin + "optimizer", "convert", "--quiet", "--temp-dir", dir, "oci:" + img.Dir, "oci:" + layout + ":bench"}); err != nil {
		return err
	}
	boot := filepath.Join(dir, "boot")
	if err := saveBootstrap(ctx, "oci:"+layout+":bench", boot); err != nil {
		return err
	}
	root := filepath.Join(dir, "root")
	if err := unpackLayers(ctx, img, root); err != nil {
		return err
	}
	names, err := largest(root, fuseBytes)
	if err != nil {
		return err
	}
	times := make([]fuseTimes, len(fuseWays))
	for i := range fusePairs {
		if err := b.fusePair(ctx, i, dir, boot, filepath.Join(layout, "blobs", "sha256"), names, times); err != nil {
			return err
		}
	}
	fmt.Fprintf(b.out, "\nreads through the FUSE driver against nydusd 2.2.0; %d pairs of mounts, cold once, else %d rounds each, interleaved: ratio of times, its 95 %% interval, ratio of the daemons' CPU time\n", fusePairs, fuseRounds)
	for w, way := range fuseWays {
		mean, half := interval(times[w].logs)
		cpu := fmt.Sprintf("%10.3f", times[w].cpu[0]/times[w].cpu[1])
		if min(times[w].cpu[0], times[w].cpu[1]) < fuseLeastCPU {
			cpu = fmt.Sprintf("%10s", "-") // neither has much to do
		}
		fmt.Fprintf(b.out, "%-44s %10.3f  %.3f to %.3f  %s\n", way.name, math.Exp(mean), math.Exp(mean-half), math.Exp(mean+half), cpu)
		b.aim("fuse: "+way.name+", of nydusd", math.Exp(mean), 1)
	}
	return nil
}

// fuseLeastCPU is the least CPU time whose ratio is printed, in seconds: ten ticks.
const fuseLeastCPU = 0.1

// fusePair mounts the image once for each side, reads it in all ways, and adds what that took. Who is first alternates.
func (b *bench) fusePair(ctx context.Context, pair int, top, boot, blobs string, names []string, times []fuseTimes) (err error) {
	var sides [2]*fuseSide
	for j := range sides {
		side := (pair + j) % 2
		start := b.fuseOurs
		if side == 1 {
			start = b.fuseNydusd
		}
		var dir string
		if dir, err = os.MkdirTemp(top, "run-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		if sides[side], err = start(ctx, dir, boot, blobs); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, sides[side].done()) }()
	}
	if err := fuseRound(sides, pair, fuseWays[0], names, &times[0]); err != nil {
		return err
	}
	for _, s := range sides {
		if err := s.complete(ctx); err != nil {
			return err
		}
	}
	for round := range fuseRounds {
		for w := 1; w < len(fuseWays); w++ {
			if err := fuseRound(sides, pair+round, fuseWays[w], names, &times[w]); err != nil {
				return err
			}
		}
	}
	return nil
}

// fuseRound reads both mounts in one way, one after the other.
func fuseRound(sides [2]*fuseSide, first int, way fuseWay, names []string, t *fuseTimes) error {
	var took [2]float64
	for j := range sides {
		side := (first + j) % 2
		s := sides[side]
		if way.drop {
			if err := dropCached(s.dir, names); err != nil {
				return err
			}
		}
		before, err := cpuSeconds(s.pid)
		if err != nil {
			return err
		}
		began := time.Now()
		if err := way.read(s.dir, names); err != nil {
			return err
		}
		took[side] = time.Since(began).Seconds()
		after, err := cpuSeconds(s.pid)
		if err != nil {
			return err
		}
		t.cpu[side] += after - before
	}
	t.logs = append(t.logs, math.Log(took[0]/took[1]))
	return nil
}

func (b *bench) fuseOurs(ctx context.Context, dir, boot, blobs string) (*fuseSide, error) {
	r := &lazyRig{b: b, dir: dir}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "state"), 0o700), os.Mkdir(filepath.Join(dir, "run"), 0o700)); err != nil {
		return nil, err
	}
	done := func() error { return r.end(context.WithoutCancel(ctx)) }
	mnt, err := r.mount(ctx, "mnt", "--driver", "fuse", "--background", "none", "--bootstrap", boot, "--blob-dir", blobs)
	if err != nil {
		return nil, errors.Join(err, done())
	}
	st, err := r.status(ctx)
	if err != nil {
		return nil, errors.Join(err, done())
	}
	complete := func(ctx context.Context) error {
		if _, _, err := readTree(mnt); err != nil {
			return err
		}
		return r.completed(ctx)
	}
	return &fuseSide{mnt, st.PID, complete, done}, nil
}

func (b *bench) fuseNydusd(ctx context.Context, dir, boot, blobs string) (*fuseSide, error) {
	program, err := b.tools.Ensure(ctx, "nydusd")
	if err != nil {
		return nil, err
	}
	d, err := nydusd.Start(ctx, nydusd.Options{Program: program, Bootstrap: boot, Dir: dir, Backend: nydusd.Files(blobs)})
	if err != nil {
		return nil, err
	}
	complete := func(context.Context) error {
		_, _, err := readTree(d.Mount)
		return err
	}
	return &fuseSide{d.Mount, d.PID, complete, d.Close}, nil
}

// completed returns when all mounts say that all is local, or do not for half a minute.
func (r *lazyRig) completed(ctx context.Context) error {
	limit, tick := time.NewTimer(30*time.Second), time.NewTicker(100*time.Millisecond)
	defer limit.Stop()
	defer tick.Stop()
	for {
		s, err := r.status(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(s.Mounts, func(m lazy.Mount) bool { return m.State != lazy.StateComplete }) {
			return nil
		}
		select {
		case <-tick.C:
		case <-limit.C:
			return errors.New("all of the image was read, and its mount does not say that it is complete")
		}
	}
}

// saveBootstrap writes the bootstrap of an image to a file.
func saveBootstrap(ctx context.Context, ref, name string) (err error) {
	img, err := nydusimage.Open(ctx, ref, nydusimage.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	r, size := img.Bootstrap()
	p, err := io.ReadAll(io.NewSectionReader(r, 0, size))
	return errors.Join(err, os.WriteFile(name, p, 0o600))
}

// dropCached has the kernel forget the pages of files.
func dropCached(dir string, names []string) error {
	for _, name := range names {
		f, err := os.Open(dir + name)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// cpuSeconds returns the CPU time that a process has used (proc(5): utime and stime in ticks of 10 ms).
func cpuSeconds(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("stat of process %d has %d fields", pid, len(fields))
	}
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	return float64(user+system) / 100, errors.Join(err1, err2)
}
