// Command bench measures Headstart against its peers in one run and prints tables:
// conversion against the real nydus-image, memory against image size, the tracer's
// cost and completeness on a burst of files, the latency that the plugin adds to a
// container's start, what is recorded of a start against what it needs, and what lazy mounts share.
//
//	go run ./internal/bench [-rows convert,optimize,check,memory,burst,start,ready,ranges,lazy,cas,disk,gc,fuse] [-runs 7] [-check]
//
// It ends with the aims that were set for what was measured, and whether they were met; with -check a miss is an error.
//
// Walls are medians of interleaved runs, so that a slow minute of the machine falls on
// both sides; ratios, not times, are what the tables are for.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/tools"
)

func main() {
	if runroot.IsChild() {
		os.Exit(runroot.Child())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is what every row needs.
type bench struct {
	out, log io.Writer
	runs     int
	dir      string // scratch, removed at the end
	bin      string // our commands
	tools    *tools.Store
	aims     []aim
}

type row struct {
	name string
	run  func(context.Context, *bench) error
}

func rows() []row {
	return []row{
		{"convert", benchConvert},
		{"optimize", benchOptimize},
		{"check", benchCheck},
		{"memory", benchMemory},
		{"burst", benchBurst},
		{"start", benchStart},
		{"ready", benchReady},
		{"ranges", benchRanges},
		{"lazy", benchLazy},
		{"cas", benchCAS},
		{"disk", benchDisk},
		{"gc", benchGC},
		{"fuse", benchFUSE},
	}
}

// choose returns the rows of these comma-separated names in the order of [rows], all for none.
func choose(names string) ([]row, error) {
	if names == "" {
		return rows(), nil
	}
	want := strings.Split(names, ",")
	var chosen []row
	for _, r := range rows() {
		if i := slices.Index(want, r.name); i >= 0 {
			chosen, want = append(chosen, r), slices.Delete(want, i, i+1)
		}
	}
	if len(want) > 0 {
		return nil, fmt.Errorf("no row %q", want[0])
	}
	return chosen, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	want := fs.String("rows", "", "comma-separated rows to run; empty: all")
	runs := fs.Int("runs", 7, "timed runs of each side")
	check := fs.Bool("check", false, "fail when an aim is missed")
	if err := fs.Parse(args); err != nil {
		return flag.ErrHelp
	}
	if *runs < 1 {
		return fmt.Errorf("-runs %d: want at least 1", *runs)
	}
	wanted, err := choose(*want)
	if err != nil {
		return err
	}
	b := &bench{out: stdout, log: stderr, runs: *runs}
	if b.dir, err = os.MkdirTemp("", "headstart-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.tools, err = tools.NewStore(tools.Options{Out: stderr}); err != nil {
		return err
	}
	if err := b.build(ctx); err != nil {
		return err
	}
	b.machine()
	for _, r := range wanted {
		if err := r.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	if err := b.verdict(); *check {
		return err
	}
	return nil
}

// build compiles our commands as they are shipped.
func (b *bench) build(ctx context.Context) error {
	b.bin = filepath.Join(b.dir, "bin") + string(filepath.Separator)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", b.bin, "./cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/...: %w: %s", err, out)
	}
	return nil
}

// machine says what the figures were measured on.
func (b *bench) machine() {
	kernel, model := "unknown", "unknown"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	fmt.Fprintf(b.out, "machine: %d × %s, Linux %s, %s\n", runtime.NumCPU(), model, kernel, runtime.Version())
}

// sample is one timed run of a command.
type sample struct {
	wall time.Duration
	cpu  time.Duration
	rss  int64  // bytes, the largest of its processes
	out  []byte // the end of what the last one said
}

// timed runs the command lines one after the other and adds their times up.
func timed(ctx context.Context, lines ...[]string) (sample, error) {
	var s sample
	start := time.Now()
	for _, line := range lines {
		cmd := exec.CommandContext(ctx, line[0], line[1:]...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return sample{}, fmt.Errorf("%s: %w: %s", strings.Join(line, " "), err, tail(out))
		}
		s.out = tail(out)
		s.cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			s.rss = max(s.rss, ru.Maxrss<<10) // getrusage(2): kilobytes
		}
	}
	s.wall = time.Since(start)
	return s, nil
}

// tail returns the last 2,000 bytes of a command's output, enough for its error.
func tail(b []byte) []byte { return b[max(0, len(b)-2000):] }

// side is one contestant of [compare].
type side struct {
	prepare func() error // before each run, not timed; may be nil
	lines   [][]string
}

// compare runs both sides in turn, n times each after one warm-up, and returns their samples.
func compare(ctx context.Context, n int, a, b side) (as, bs []sample, err error) {
	for i := range n + 1 {
		for j, s := range []side{a, b} {
			if s.prepare != nil {
				if err := s.prepare(); err != nil {
					return nil, nil, err
				}
			}
			one, err := timed(ctx, s.lines...)
			if err != nil {
				return nil, nil, err
			}
			switch {
			case i == 0: // warm-up
			case j == 0:
				as = append(as, one)
			default:
				bs = append(bs, one)
			}
		}
	}
	return as, bs, nil
}

func medianWall(s []sample) time.Duration {
	walls := make([]time.Duration, len(s))
	for i := range s {
		walls[i] = s[i].wall
	}
	slices.Sort(walls)
	return walls[len(walls)/2]
}

func medianCPU(s []sample) time.Duration {
	cpus := make([]time.Duration, len(s))
	for i := range s {
		cpus[i] = s[i].cpu
	}
	slices.Sort(cpus)
	return cpus[len(cpus)/2]
}

func maxRSS(s []sample) int64 {
	var most int64
	for i := range s {
		most = max(most, s[i].rss)
	}
	return most
}

// mb renders bytes as megabytes of 10^6.
func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

// mib renders bytes as 2^20.
func mib(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }
