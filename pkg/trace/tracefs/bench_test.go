package tracefs_test

import (
	"context"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// median returns the median of times in milliseconds.
func median(times []time.Duration) float64 {
	slices.Sort(times)
	return float64(times[len(times)/2]) / float64(time.Millisecond)
}

// BenchmarkArm measures what a container's start waits for.
func BenchmarkArm(b *testing.B) {
	fs := open(b)
	in := create(b, fs, tracefs.Options{})
	threads, err := tracefs.Threads(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	var arm, reset []time.Duration
	for b.Loop() {
		begin := time.Now()
		if err := in.Arm(threads...); err != nil {
			b.Fatal(err)
		}
		armed := time.Now()
		if err := in.Reset(); err != nil {
			b.Fatal(err)
		}
		arm, reset = append(arm, armed.Sub(begin)), append(reset, time.Since(armed))
	}
	b.ReportMetric(median(arm), "arm-ms")
	b.ReportMetric(median(reset), "reset-ms")
}

// BenchmarkCreate measures what a pool spares.
func BenchmarkCreate(b *testing.B) {
	fs := open(b)
	var made, removed []time.Duration
	for b.Loop() {
		begin := time.Now()
		in, err := fs.Create(tracefs.Options{})
		if err != nil {
			b.Fatal(err)
		}
		created := time.Now()
		if err := in.Close(); err != nil {
			b.Fatal(err)
		}
		made, removed = append(made, created.Sub(begin)), append(removed, time.Since(created))
	}
	b.ReportMetric(median(made), "create-ms")
	b.ReportMetric(median(removed), "remove-ms")
}

// BenchmarkEvent measures the CPU time of a read of one page without and with its event being
// recorded, while somebody else is, and that of reading an event, in turns: the machine's other
// work is in all of them.
func BenchmarkEvent(b *testing.B) {
	const reads = 40_000 // fit one CPU's ring
	f, _ := subject(b, true)
	in := create(b, open(b), tracefs.Options{Events: 1 << tracefs.Read, Ring: 8 << 20})
	r, err := in.Reader()
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	buf := make([]byte, 1)
	work := func() {
		for i := range int64(reads) {
			if _, err := unix.Pread(int(f.Fd()), buf, i%filePages*int64(os.Getpagesize())); err != nil {
				b.Fatal(err)
			}
		}
	}
	events := make([]tracefs.Event, 4096)
	consume := func() {
		for left := reads; left > 0; {
			n, err := r.Read(events)
			if err != nil {
				b.Fatal(err)
			}
			left -= n
		}
	}
	var bare, bystander, recorded, read []float64
	for b.Loop() {
		bare = append(bare, threadTime(b, work))
		if err := in.Arm(os.Getppid()); err != nil { // go test, which waits
			b.Fatal(err)
		}
		bystander = append(bystander, threadTime(b, work))
		if err := in.Arm(unix.Gettid()); err != nil {
			b.Fatal(err)
		}
		recorded = append(recorded, threadTime(b, work))
		read = append(read, threadTime(b, consume))
		if err := in.Disarm(); err != nil {
			b.Fatal(err)
		}
	}
	for name, times := range map[string][]float64{"bare": bare, "bystander": bystander, "recorded": recorded, "consume": read} {
		slices.Sort(times)
		b.ReportMetric(times[len(times)/2]/reads, name+"-ns/event")
	}
}

// threadTime returns the CPU time of f on this thread, in nanoseconds.
func threadTime(b *testing.B, f func()) float64 {
	b.Helper()
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		b.Fatal(err)
	}
	f()
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		b.Fatal(err)
	}
	return float64(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
}

func BenchmarkPoolGet(b *testing.B) {
	fs := open(b)
	p, err := tracefs.NewPool(fs, tracefs.PoolOptions{Log: func(err error) { b.Error(err) }})
	if err != nil {
		b.Fatal(err)
	}
	var times []time.Duration
	for b.Loop() {
		begin := time.Now()
		in, err := p.Get(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(begin))
		p.Put(in)
	}
	b.ReportMetric(median(times), "get-ms")
	if err := p.Close(); err != nil {
		b.Fatal(err)
	}
}
