// Command optimizer is what a person types: it records what a workload reads, converts an
// image around it, and checks, inspects and unpacks the result.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"syscall"

	"github.com/headstart-oci/headstart/internal/runroot"
)

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	if runroot.IsChild() {
		os.Exit(runroot.Child())
	}
	if os.Getenv("GOGC") == "" {
		collectFrugally()
	}
	os.Exit(mainCode())
}

// The percentages of garbage that the collector keeps: of most heaps, and at most of those that are below leastHeap.
const (
	frugal   = 50
	generous = 100
)

// leastHeap, where a command sets it, is how many bytes the heap may have before the collector begins, as far as generous allows. A
// command with a small heap that makes garbage fast, 1 MB a millisecond, would collect every few milliseconds.
var leastHeap atomic.Uint64

// collectFrugally has the garbage collector keep half of its usual garbage, so that a conversion of 100,000 files
// stays under 150 MiB, but begin only when the heap has 16 MiB: a short command ends before it collects anything.
func collectFrugally() {
	debug.SetGCPercent(400) // of the 4 MiB from which the runtime counts; runtime/mgcpacer.go heapMinimum
	afterCollection()
}

// afterCollection has the percentage set when the collector has run, and each time again where there is a leastHeap.
func afterCollection() {
	first := new([16]byte) // too large for the tiny allocator, which would keep it with others
	runtime.AddCleanup(first, func(int) {
		least := leastHeap.Load()
		if least == 0 {
			debug.SetGCPercent(frugal)
			return
		}
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(live)
		debug.SetGCPercent(garbagePercent(live[0].Value.Uint64(), least))
		afterCollection()
	}, 0)
}

// garbagePercent returns the percentage of garbage for a heap of which live bytes are in use, that has the collector begin at about least
// bytes. It is never much: on a busy machine the heap may have grown long since when it is set anew.
func garbagePercent(live, least uint64) int {
	if live == 0 || live >= least {
		return frugal
	}
	return int(min(max(frugal, (least-live)*100/live), generous))
}

// mainCode runs the command line of this process and returns its exit code.
func mainCode() int {
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as under nohup
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	defer stop()
	// A second signal ends the process at once.
	defer context.AfterFunc(ctx, stop)()
	return exitCode(os.Stderr, run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run executes one command line.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	err := newRoot(streams{in: stdin, out: stdout, err: stderr}, args).ExecuteContext(ctx)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("interrupted: %w", err)
	}
	return err
}

// exitCode says what went wrong, with a hint where there is one, and returns the exit code.
func exitCode(stderr io.Writer, err error) int {
	if err == nil {
		return exitDone
	}
	fmt.Fprintf(stderr, "optimizer: %v\n", err)
	if h := hint(err); h != "" {
		fmt.Fprintf(stderr, "optimizer: %s\n", h)
	}
	if u, ok := errors.AsType[*usageError](err); ok {
		fmt.Fprintf(stderr, "optimizer: run '%s --help' for what it takes\n", u.command)
		return exitUsage
	}
	return exitFailed
}
