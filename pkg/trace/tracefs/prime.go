package tracefs

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// primeTime is how long after the last announced call of Get the kernel stays prepared for an arming: a container
// starts less than a second after its creation, unless somebody creates many before he starts any.
const primeTime = 10 * time.Second

// minBuffer is the size of the rings that record nothing, in KiB for each CPU; the kernel rounds it up to two pages.
const minBuffer = "4"

// primer is an instance that records nothing, of which the kernel keeps the work that the arming of another then
// need not do: the first user of a tracepoint makes the kernel change its own code, and the first filter by
// thread does so for seven tracepoints, each time with a message to all CPUs (kernel/tracepoint.c
// tracepoint_add_func, kernel/trace/trace_events.c event_pid_write). Where idle CPUs wake slowly that is two thirds of
// an arming's 3 to 5 ms: docs/design.md has the figures.
type primer struct {
	in    *Instance // nil: not made yet
	on    bool
	until time.Time // when it is turned off; zero: nothing was announced
	// failed says that the last attempt did not work; it is made again when something is announced.
	failed bool
}

// due reports whether the primer is to be turned on or off.
func (p *primer) due() bool { return !p.failed && p.on != time.Now().Before(p.until) }

// primer makes one. It takes tens of milliseconds.
func (f *FS) primer(events Set) (*Instance, error) {
	events, err := f.Probe(events)
	if err != nil {
		return nil, err
	}
	i, err := f.make()
	if err != nil {
		return nil, fmt.Errorf("create trace instance: %w", err)
	}
	i.spec.Events = events
	if err := errors.Join(i.dir.write("tracing_on", "0"), i.dir.write("buffer_size_kb", minBuffer)); err != nil {
		return nil, errors.Join(fmt.Errorf("create trace instance: %w", explain(err)), i.Close())
	}
	return i, nil
}

// prime turns the primer on or off, whichever is due. Called with mu held, which it gives up while it works.
func (p *Pool) prime() {
	in, on := p.primer.in, !p.primer.on
	p.mu.Unlock()
	var err error
	if in == nil {
		in, err = p.fs.primer(p.o.Instance.Events)
	}
	switch {
	case err != nil:
	case on:
		err = in.Arm(os.Getpid()) // some thread: nothing is recorded of it
	default:
		err = in.Disarm()
	}
	p.mu.Lock()
	p.primer.in, p.primer.failed = in, err != nil
	if err != nil {
		p.o.Log(fmt.Errorf("prepare the kernel for a recording, which begins later without: %w", err))
		return
	}
	p.primer.on = on
}
