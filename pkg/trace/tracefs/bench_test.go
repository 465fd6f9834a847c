package tracefs_test

import (
	"context"
	"os"
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

// BenchmarkRead measures the cost of an event: to whom it happens, with and without being
// recorded, and to who reads it.
func BenchmarkRead(b *testing.B) {
	f, _ := subject(b, true)
	page := int64(os.Getpagesize())
	buf := make([]byte, 1)
	work := func(b *testing.B) {
		for i := int64(0); b.Loop(); i++ {
			if _, err := unix.Pread(int(f.Fd()), buf, i%filePages*page); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("bare", work)
	b.Run("recorded", func(b *testing.B) {
		fs := open(b)
		in := create(b, fs, tracefs.Options{})
		threads, err := tracefs.Threads(os.Getpid())
		if err != nil {
			b.Fatal(err)
		}
		if err := in.Arm(threads...); err != nil {
			b.Fatal(err)
		}
		work(b) // the ring fills and drops
	})
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
