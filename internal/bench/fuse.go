package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/workload"
)

const (
	fusePairs = 6        // of runs of each side
	fuseBytes = 60 << 20 // of files that are read
)

// fuseSide is one FUSE mount of the image: ours or nydusd's.
type fuseSide struct {
	dir  string
	pid  int
	done func() error
}

// fuseWays are what is timed, in this order, on one mount.
var fuseWays = []struct {
	name string
	drop bool // the kernel's cache of the files first
	read func(dir string, names []string) error
}{
	{"cold: sequential, from the blobs", true, readWhole},
	{"local, not in the page cache: sequential", true, readWhole},
	{"local, not in the page cache: random, 4 KiB", true, readRandom},
	{"", false, readWhole}, // fills the page cache
	{"page cache: sequential", false, readWhole},
	{"page cache: random, 4 KiB", false, readRandom},
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
	blobs := filepath.Join(layout, "blobs", "sha256")
	times, cpus := make([][]float64, len(fuseWays)), make([][]float64, len(fuseWays))
	for i := range fusePairs {
		var took, cpu [2][]float64
		for j := range 2 {
			side := (i + j) % 2 // who is first changes
			if took[side], cpu[side], err = b.fuseRun(ctx, dir, boot, blobs, names, side == 1); err != nil {
				return err
			}
		}
		for w := range fuseWays {
			times[w] = append(times[w], math.Log(took[0][w]/took[1][w]))
			cpus[w] = append(cpus[w], math.Log(max(cpu[0][w], 0.005)/max(cpu[1][w], 0.005))) // half a tick is the least that is counted
		}
	}
	fmt.Fprintf(b.out, "\nreads through the FUSE driver against nydusd 2.2.0; %d interleaved pairs, ratio of times, its 95 %% interval, ratio of the daemons' CPU time\n", fusePairs)
	for w, way := range fuseWays {
		if way.name == "" {
			continue
		}
		mean, half := interval(times[w])
		cpu, _ := interval(cpus[w])
		fmt.Fprintf(b.out, "%-44s %10.3f  %.3f to %.3f  %10.3f\n", way.name, math.Exp(mean), math.Exp(mean-half), math.Exp(mean+half), math.Exp(cpu))
	}
	return nil
}

// fuseRun mounts the image once, reads it in all ways, and returns the seconds of each and those of the daemon's CPU.
func (b *bench) fuseRun(ctx context.Context, top, boot, blobs string, names []string, peer bool) (took, cpu []float64, err error) {
	dir, err := os.MkdirTemp(top, "run-")
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	start := b.fuseOurs
	if peer {
		start = b.fuseNydusd
	}
	s, err := start(ctx, dir, boot, blobs)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, s.done()) }()
	for _, way := range fuseWays {
		if way.drop {
			if err := dropCached(s.dir, names); err != nil {
				return nil, nil, err
			}
		}
		before, err := cpuSeconds(s.pid)
		if err != nil {
			return nil, nil, err
		}
		began := time.Now()
		if err := way.read(s.dir, names); err != nil {
			return nil, nil, err
		}
		took = append(took, time.Since(began).Seconds())
		after, err := cpuSeconds(s.pid)
		if err != nil {
			return nil, nil, err
		}
		cpu = append(cpu, after-before)
	}
	return took, cpu, nil
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
	return &fuseSide{mnt, st.PID, done}, nil
}

func (b *bench) fuseNydusd(ctx context.Context, dir, boot, blobs string) (_ *fuseSide, err error) {
	program, err := b.tools.Ensure(ctx, "nydusd")
	if err != nil {
		return nil, err
	}
	mnt, work, config := filepath.Join(dir, "mnt"), filepath.Join(dir, "work"), filepath.Join(dir, "config.json")
	text, err := json.Marshal(map[string]any{
		"device": map[string]any{
			"backend": map[string]any{"type": "localfs", "config": map[string]any{"dir": blobs}},
			"cache":   map[string]any{"type": "blobcache", "config": map[string]any{"work_dir": work}},
		},
		"mode": "direct", "enable_xattr": true, "fs_prefetch": map[string]any{"enable": false},
	})
	if err := errors.Join(err, os.Mkdir(mnt, 0o700), os.Mkdir(work, 0o700), os.WriteFile(config, text, 0o600)); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), program, "fuse", "--log-level", "error", "--mountpoint", mnt, "--bootstrap", boot, "--config", config, "--rlimit-nofile", "0")
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := func() error {
		err := unix.Unmount(mnt, unix.MNT_DETACH)
		_ = cmd.Process.Kill() // on SIGTERM it may hang
		_ = cmd.Wait()         // how it ended does not matter
		return err
	}
	for range 1000 {
		var st unix.Statfs_t
		if err := unix.Statfs(mnt, &st); err == nil && st.Type == unix.FUSE_SUPER_MAGIC {
			return &fuseSide{mnt, cmd.Process.Pid, done}, nil
		}
		time.Sleep(10 * time.Millisecond) //nolint:forbidigo // nothing says when it is there
	}
	return nil, errors.Join(errors.New("nydusd does not mount"), done())
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
