package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/headstart-oci/headstart/internal/runroot"
	"github.com/headstart-oci/headstart/internal/tracer"
	"github.com/headstart-oci/headstart/internal/workload"
	"github.com/headstart-oci/headstart/pkg/trace/tracefs"
)

// readyPairs is how many pairs of starts benchReady times.
const readyPairs = 100

// settleTime passes before each start.
const settleTime = 200 * time.Millisecond

// benchReady starts python with numpy and flask from its first instruction to its first answered
// request, with and without a tracer, in turn, and prints the ratio with its 95 % interval. As a
// measure of the machine it does the same for pairs that are both without.
func benchReady(ctx context.Context, b *bench) (err error) {
	img, err := workload.Build(ctx, workload.Python, workload.Options{Log: b.log})
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(b.dir, "ready-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root := filepath.Join(dir, "root")
	if err := unpackLayers(ctx, img, root); err != nil {
		return err
	}
	fs, err := tracefs.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fs.Close()) }()
	pool, err := tracefs.NewPool(fs, tracefs.PoolOptions{Announced: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pool.Close()) }()
	r := readyRun{server: b.bin + "optimizer-server", pool: pool, reserve: tracer.NewReserve(b.bin+"optimizer-server", nil), o: runroot.Options{Root: root, Args: img.Command()}}
	defer r.reserve.Close()
	if _, err := r.once(ctx, true); err != nil { // a warm-up
		return err
	}
	var traced, same []float64
	for i := range readyPairs {
		// Which one is first changes from pair to pair.
		var took [3]time.Duration // without, with, without again
		for j := range took {
			k := (i + j) % len(took)
			if took[k], err = r.once(ctx, k == 1); err != nil {
				return err
			}
		}
		traced = append(traced, math.Log(took[1].Seconds()/took[0].Seconds()))
		same = append(same, math.Log(took[2].Seconds()/took[0].Seconds()))
	}
	slices.Sort(r.arming)
	fmt.Fprintf(b.out, "\npython with numpy and flask, first instruction to end; %d interleaved pairs, ratio and its 95 %% interval\n", readyPairs)
	for _, row := range []struct {
		name string
		logs []float64
	}{{"with the tracer over without", traced}, {"without over without", same}} {
		mean, half := interval(row.logs)
		fmt.Fprintf(b.out, "%-44s %10.3f  %.3f to %.3f\n", row.name, math.Exp(mean), math.Exp(mean-half), math.Exp(mean+half))
	}
	mean, half := interval(traced)
	b.aim("ready: with the tracer over without, upper end", math.Exp(mean+half), 1.05)
	b.aim("ready: armed after, median, ms", r.arming[len(r.arming)/2].Seconds()*1000, 5)
	fmt.Fprintf(b.out, "%-44s %7.1f ms median, by a tracer that stands by since the creation\n", "armed after", r.arming[len(r.arming)/2].Seconds()*1000)
	return nil
}

// interval returns the mean and half the width of its 95 % interval.
func interval(v []float64) (mean, half float64) {
	for _, x := range v {
		mean += x / float64(len(v))
	}
	sum := 0.0
	for _, x := range v {
		sum += (x - mean) * (x - mean)
	}
	return mean, student(float64(len(v)-1)) * math.Sqrt(sum/float64(len(v)-1)/float64(len(v)))
}

// student returns the two-sided 95 % quantile of Student's distribution of so many degrees of freedom, from the
// normal one (Abramowitz and Stegun, 26.7.5): within 0.2 % of tables from five on.
func student(free float64) float64 {
	const z = 1.959964
	const z3, z5, z7 = z * z * z, z * z * z * z * z, z * z * z * z * z * z * z
	return z + (z3+z)/(4*free) + (5*z5+16*z3+3*z)/(96*free*free) + (3*z7+19*z5+17*z3-15*z)/(384*free*free*free)
}

// readyRun starts one program again and again.
type readyRun struct {
	server  string
	pool    *tracefs.Pool
	reserve *tracer.Reserve
	o       runroot.Options
	arming  []time.Duration
}

// once returns how long the program took from its release to its end.
func (r *readyRun) once(ctx context.Context, traced bool) (took time.Duration, err error) {
	if traced { // as the plugin does when the container is created
		r.reserve.Expect()
		r.pool.Expect()
	}
	p, err := runroot.Start(ctx, r.o)
	if err != nil {
		return 0, err
	}
	defer p.End(time.Second)
	var s *tracer.Session
	if traced {
		began := time.Now()
		if s, err = tracer.Start(ctx, tracer.Options{Server: r.server, Reserve: r.reserve, Pages: r.pool, PID: p.PID()}); err != nil {
			return 0, err
		}
		select {
		case <-s.Ready():
		case <-s.Done():
			return 0, fmt.Errorf("tracer: %w", s.Result().Err)
		}
		r.arming = append(r.arming, time.Since(began))
	}
	// What the run before left to be cleaned up, and what arming took, is nobody's advantage.
	settle := time.NewTimer(settleTime)
	defer settle.Stop()
	select {
	case <-settle.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	began := time.Now()
	if err := p.Release(); err != nil {
		return 0, err
	}
	if err := p.Wait(); err != nil {
		return 0, err
	}
	took = time.Since(began)
	if s == nil {
		return took, nil
	}
	<-s.Done()
	if res := s.Result(); res.Err != nil || !res.Trace.Complete() {
		return 0, errors.Join(fmt.Errorf("trace with losses %+v", res.Trace.Losses), res.Err)
	}
	return took, nil
}
