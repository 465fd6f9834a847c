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

// primers is how many instances keep the kernel prepared: a tracepoint's first user makes the kernel change its own code, and so
// does the second, where a loop over the users takes the place of the one call. Further ones are an entry in a list.
// Source: kernel/tracepoint.c tracepoint_add_func.
const primers = 2

// primer is instances that record nothing, of which the kernel keeps the work that the arming of another then
// need not do: each change of its code, also for the seven tracepoints that the first filter by thread takes, comes
// with a message to all CPUs (kernel/trace/trace_events.c event_pid_write). Where idle CPUs wake slowly that is nine tenths of
// an arming's 3 to 6 ms: docs/design.md has the figures.
type primer struct {
	in    []*Instance // none: not made yet
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

// equip makes one more of the primer's instances. Called with mu held, which it gives up while it works.
func (p *Pool) equip() {
	p.mu.Unlock()
	i, err := p.fs.primer(p.o.Instance.Events)
	p.mu.Lock()
	if p.primed(err) {
		p.primer.in = append(p.primer.in, i)
	}
}

// primed notes how a step of the preparation went, and reports whether it worked.
func (p *Pool) primed(err error) bool {
	if p.primer.failed = err != nil; err != nil {
		p.o.Log(fmt.Errorf("prepare the kernel for a recording, which begins later without: %w", err))
	}
	return err == nil
}

// prime turns the primer on or off, whichever is due. Called with mu held, which it gives up while it works.
func (p *Pool) prime() {
	if !p.primer.on && len(p.primer.in) < primers {
		if p.equip(); !p.primer.failed || len(p.primer.in) == 0 {
			return // there may be something else to do before the next
		}
	}
	in, on := p.primer.in, !p.primer.on
	p.mu.Unlock()
	var err error
	for _, i := range in {
		if !on {
			err = errors.Join(err, i.Disarm())
		} else if err == nil {
			err = i.Arm(os.Getpid()) // some thread: nothing is recorded of it
		}
	}
	if on && err != nil {
		for _, i := range in {
			_ = i.Disarm() // what failed is said
		}
	}
	p.mu.Lock()
	if p.primed(err) {
		p.primer.on = on
	}
}
