package tracefs

import "time"

// expectTime is how long a call of Get is expected that [Pool.Expect] announced: from a container's creation to its start it is less,
// unless somebody creates many before he starts any.
const expectTime = time.Minute

// Expect says that Get is likely to be called once within the next minute, so that there is an instance ready
// then, and that the kernel is prepared, for ten seconds, to arm it in half the time. It returns at once. Many containers that are created
// together start with what is ready, each, if the kernel made so many in time: see [DefaultQuiet] for how long that takes. There are
// never more than Max, besides two that record nothing.
func (p *Pool) Expect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.primer.until, p.primer.failed = time.Now().Add(primeTime), false
	if len(p.likely) < p.o.Max {
		p.likely = append(p.likely, time.Now().Add(expectTime))
	}
	p.signal()
}

// goal returns how many instances are to be ready. Called with mu held.
func (p *Pool) goal() int {
	now := time.Now()
	for len(p.likely) > 0 && now.After(p.likely[0]) {
		p.likely = p.likely[1:]
	}
	return max(p.want, min(len(p.likely), p.o.Max))
}
