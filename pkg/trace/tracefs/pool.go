package tracefs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Defaults of [PoolOptions].
const (
	DefaultReady  = 6
	DefaultMax    = 64
	DefaultBudget = 128 << 20 // bytes
	// DefaultQuiet is longer than a container needs from its hook to its first instructions. Making, resetting
	// and removing an instance each hold the kernel's trace locks for 24 to 50 ms (Linux 6.18), which is
	// how long the arming of another one then takes, in place of 2 ms.
	DefaultQuiet = time.Second
)

// leastRing is what an instance gets when the budget is used up, in bytes: enough for a start, and for a
// million events a second on two CPUs where the reader runs first. Where the CPUs are busy such a burst loses
// some, which are counted: see docs/design.md.
const leastRing = 512 << 10

// PoolOptions says how a pool is kept. The zero value is the default.
type PoolOptions struct {
	// Instance is what every instance is like; its Ring is the most that one gets.
	Instance Options
	// Budget is the size of all ring buffers of all instances together, in bytes, at least 0;
	// 0: DefaultBudget. While it lasts an instance gets Instance.Ring, then what is left when
	// 512 KiB are kept for every further one, and at least that, or 128 KiB for each
	// CPU where that is more. Once it is used up one is kept ready, and others are made for who asks.
	Budget int64
	// Ready is how many instances are kept waiting, at least 0; 0: DefaultReady. When that was
	// too few there are up to a quarter of Max for some minutes.
	Ready int
	// Max is how many there are at most, waiting ones included, at least 0; 0: DefaultMax.
	Max int
	// Quiet is how long after a Get nothing is made, reset or removed, unless somebody waits for it, at
	// least 0; 0: DefaultQuiet. When half of Ready or less are left it is a twentieth of that.
	Quiet time.Duration
	// Announced says that calls of Get follow calls of Expect: what prepares the kernel is made before the first.
	Announced bool
	// Log is told what goes wrong in the background, one error each; nil: nobody is. It may
	// be called at any time until Close returns, from one goroutine at a time.
	Log func(error)
}

// Pool keeps instances ready, so that nobody waits while they are made, reset or removed. It
// is safe for concurrent use.
type Pool struct {
	fs   *FS
	o    PoolOptions
	wake chan struct{} // one token: there is work
	quit chan struct{}
	done chan struct{} // closed when the worker has ended

	// mu guards what follows.
	mu     sync.Mutex
	ready  []*Instance
	queue  []chan<- got // calls of Get that wait, each with room for its answer
	used   []*Instance  // given back, not yet reset
	idle   []*Instance  // given back and disarmed, not yet emptied
	broken []*Instance  // given back, to be removed
	count  int          // instances that there are, wherever they are
	out    int          // those that Get returned and Put did not take back
	rings  map[*Instance]int64
	spent  int64       // bytes of rings
	want   int         // instances to keep ready: at least o.Ready, more after a rush
	last   time.Time   // of the last Get
	rushed time.Time   // when want was last raised or lowered
	likely []time.Time // of calls of Get that were announced: when they are not expected any more, in order
	primer primer
	failed error // of the last attempt to make one; nil after a success
	closed bool
}

// NewPool removes the instances that dead processes left, now and from time to time, and begins to make new ones, in
// the background: it returns at once. The caller closes the pool before fs.
func NewPool(fs *FS, o PoolOptions) (*Pool, error) {
	if o.Ready < 0 || o.Max < 0 || o.Budget < 0 || o.Instance.Ring < 0 || o.Quiet < 0 {
		return nil, fmt.Errorf("pool of trace instances: %d ready of %d at most, budget of %d bytes, rings of %d, quiet of %v",
			o.Ready, o.Max, o.Budget, o.Instance.Ring, o.Quiet)
	}
	if o.Quiet == 0 {
		o.Quiet = DefaultQuiet
	}
	if o.Budget == 0 {
		o.Budget = DefaultBudget
	}
	if o.Instance.Ring == 0 {
		o.Instance.Ring = DefaultRing
	}
	if o.Ready == 0 {
		o.Ready = DefaultReady
	}
	if o.Max == 0 {
		o.Max = DefaultMax
	}
	o.Ready = min(o.Ready, o.Max)
	if o.Log == nil {
		o.Log = func(error) {}
	}
	p := &Pool{fs: fs, o: o, want: o.Ready, rings: map[*Instance]int64{}, wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{})}
	go p.work()
	return p, nil
}

// got is what a waiting Get is answered.
type got struct {
	i   *Instance
	err error
}

// Get returns an instance that is as new, at once where one is ready; else it waits for one
// that is made. The caller hands it back with [Pool.Put] and does not close it. It returns
// [ErrLimit] when all are in use, [ErrClosed] after Close, what [FS.Create] does, and ctx's
// error when that is over first.
func (p *Pool) Get(ctx context.Context) (*Instance, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, fmt.Errorf("pool of trace instances: %w", ErrClosed)
	}
	p.last = time.Now()
	if len(p.likely) > 0 {
		p.likely = p.likely[1:]
	}
	p.signal()
	if n := len(p.ready); n > 0 {
		i := p.ready[n-1]
		p.ready = p.ready[:n-1]
		p.out++
		p.mu.Unlock()
		return i, nil
	}
	if p.out+len(p.queue) >= p.o.Max {
		p.mu.Unlock()
		return nil, fmt.Errorf("pool of trace instances: %w: all %d are in use", ErrLimit, p.o.Max)
	}
	p.want, p.rushed = max(min(2*p.want, p.o.Max/4), p.want), time.Now()
	answer := make(chan got, 1)
	p.queue = append(p.queue, answer)
	p.mu.Unlock()
	select {
	case g := <-answer:
		return g.i, g.err
	case <-ctx.Done():
	}
	p.mu.Lock()
	at := slices.IndexFunc(p.queue, func(c chan<- got) bool { return c == answer })
	if at >= 0 {
		p.queue = slices.Delete(p.queue, at, at+1)
	}
	p.mu.Unlock()
	if at < 0 { // answered meanwhile
		if g := <-answer; g.err == nil {
			return g.i, nil
		}
	}
	return nil, ctx.Err()
}

// answer hands g to the call of Get that waits longest and reports whether there is one.
// Called with mu held.
func (p *Pool) answer(g got) bool {
	if len(p.queue) == 0 {
		return false
	}
	if g.err == nil {
		p.out++
	}
	p.queue[0] <- g // has room
	p.queue = p.queue[1:]
	return true
}

// create makes an instance. Called with mu held, which it gives up while it works.
func (p *Pool) create() (*Instance, error) {
	o := p.o.Instance
	o.Ring = p.share()
	p.count++
	p.spent += o.Ring // until it is known
	p.mu.Unlock()
	i, err := p.fs.Create(o)
	p.mu.Lock()
	p.spent -= o.Ring
	if err != nil {
		p.count--
		return nil, err
	}
	p.rings[i] = i.size
	p.spent += i.size
	return i, nil
}

// share returns the size of the rings of the next instance. Called with mu held.
func (p *Pool) share() int64 {
	others := int64(p.o.Max - p.count - 1)
	return max(min(p.o.Budget-p.spent-others*leastRing, p.o.Instance.Ring), min(leastRing, p.o.Instance.Ring))
}

// Put takes back what Get returned, in whatever state it is; it returns at once, except after Close: then it
// removes the instance first, which takes tens of milliseconds. All readers of it should be closed: until they are
// it cannot be removed.
func (p *Pool) Put(i *Instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out--
	if !p.closed {
		p.used = append(p.used, i)
		p.signal()
		return
	}
	// The worker has ended.
	p.mu.Unlock()
	defer p.mu.Lock()
	if err := end(i); err != nil {
		p.o.Log(err)
	}
}

// end removes an instance that may be armed. The kernel turns off its events and forgets its threads with it, and
// waits once for what is under way, where Disarm, which is for one that cannot be removed yet, waits too.
func end(i *Instance) error {
	err := i.Close()
	if err != nil {
		err = errors.Join(err, i.Disarm())
	}
	return err
}

func (p *Pool) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// again is when the worker tries once more what did not work, and calm how long after a rush
// it keeps one instance less ready, and then another.
const (
	again = time.Second
	calm  = time.Minute
)

// The first and the longest time from one look for instances of dead processes to the next. The tracer of a
// process that was killed has its instance for a moment longer, or for as long as it is starved of CPU.
const (
	firstClean = 2 * time.Second
	lastClean  = 10 * time.Minute
)

// work makes, resets and removes instances until the pool is closed.
func (p *Pool) work() {
	defer close(p.done)
	if err := p.fs.Clean(); err != nil {
		p.o.Log(err)
	}
	cleaned, rest := time.Now(), firstClean
	timer := time.NewTimer(again)
	defer timer.Stop()
	for {
		if p.step() {
			continue
		}
		timer.Reset(p.rest())
		select {
		case <-p.quit:
			return
		case <-p.wake:
		case <-timer.C:
		}
		if time.Since(cleaned) >= rest {
			if err := p.fs.Clean(); err != nil {
				p.o.Log(err)
			}
			cleaned, rest = time.Now(), min(4*rest, lastClean)
		}
		p.mu.Lock()
		p.failed = nil
		if p.want > p.o.Ready && time.Since(p.rushed) > calm {
			p.want, p.rushed = p.want-1, time.Now()
		}
		p.mu.Unlock()
	}
}

// rest returns how long the worker waits before it looks again.
func (p *Pool) rest() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.quiet(); d > 0 {
		return min(d, again)
	}
	return again
}

// quiet returns for how long a container that starts is not to be disturbed, 0 when none starts.
// Called with mu held.
func (p *Pool) quiet() time.Duration {
	d := p.o.Quiet
	switch {
	case len(p.ready) == 0 && len(p.likely) > 0: // the next one would wait longer for what is not made
		return 0
	case len(p.ready) <= p.goal()/2:
		d /= 20
	}
	return max(d-time.Since(p.last), 0)
}

// step does one piece of work and reports whether there may be more.
func (p *Pool) step() bool {
	select {
	case <-p.quit:
		return false
	default:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case len(p.queue) > 0 && p.serve():
		return true
	case !p.primer.on && p.primer.due():
		p.prime()
		return true
	case p.quiet() > 0:
		return false
	case p.primer.due():
		p.prime()
		return true
	case len(p.idle) > 0:
		p.recycle()
		return true
	case len(p.used) > 0:
		p.disarm()
		return true
	case len(p.ready) > p.goal():
		p.broken = append(p.broken, p.ready[0])
		p.ready = p.ready[1:]
		return true
	case len(p.ready) < p.goal() && p.count < p.o.Max && p.failed == nil && (p.spent < p.o.Budget || len(p.ready) == 0):
		i, err := p.create()
		if p.failed = err; err != nil {
			p.o.Log(err)
			return true
		}
		if !p.answer(got{i: i}) {
			p.ready = append(p.ready, i)
		}
		return true
	case p.o.Announced && !p.primer.on && len(p.primer.in) < primers && !p.primer.failed:
		p.equip()
		return true
	case len(p.broken) > 0:
		return p.remove()
	}
	return false
}

// disarm begins to reset an instance that came back: the first of two steps, so that a start that comes
// between them has to wait for one only. Called with mu held, which it gives up while it works.
func (p *Pool) disarm() {
	i := p.used[0]
	p.used = p.used[1:]
	p.mu.Unlock()
	err := i.Disarm()
	p.mu.Lock()
	if err != nil {
		p.o.Log(err)
		p.broken = append(p.broken, i)
		return
	}
	p.idle = append(p.idle, i)
}

// serve does what brings those who wait nearer to an instance, the quickest first, and reports whether there
// was something to do. Called with mu held, like disarm.
func (p *Pool) serve() bool {
	many := p.count >= p.o.Max/4 // to reset one takes longer than to make one, but makes no more of them
	switch {
	case len(p.idle) > 0:
		p.recycle()
	case len(p.used) > 0 && many:
		p.disarm()
	case p.count < p.o.Max:
		i, err := p.create()
		if !p.answer(got{i, err}) && err == nil {
			p.ready = append(p.ready, i)
		}
	case len(p.used) > 0:
		p.disarm()
	default:
		return false
	}
	return true
}

// recycle empties a disarmed instance, which is as new then. Called with mu held, like disarm.
func (p *Pool) recycle() {
	i := p.idle[0]
	p.idle = p.idle[1:]
	p.mu.Unlock()
	err := i.empty()
	p.mu.Lock()
	if err != nil {
		p.o.Log(err)
	}
	switch {
	case err != nil:
		p.broken = append(p.broken, i)
	case p.answer(got{i: i}):
	case len(p.ready) < p.goal():
		p.ready = append(p.ready, i)
	default:
		p.broken = append(p.broken, i)
	}
}

// remove removes one instance and reports whether that worked. Called with mu held, like
// recycle.
func (p *Pool) remove() bool {
	i := p.broken[0]
	p.broken = p.broken[1:]
	p.mu.Unlock()
	err := i.Close()
	p.mu.Lock()
	if err != nil { // busy: somebody reads it still
		p.broken = append(p.broken, i)
		return false
	}
	p.count--
	p.spent -= p.rings[i]
	delete(p.rings, i)
	return true
}

// Close removes the instances that are not in use; those that are go when they are put
// back. It takes tens of milliseconds for each. Later calls return nil.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	close(p.quit)
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, i := range p.used {
		errs = append(errs, end(i))
	}
	rest := slices.Concat(p.ready, p.idle, p.broken, p.primer.in)
	for _, i := range rest {
		errs = append(errs, i.Close())
	}
	for p.answer(got{err: fmt.Errorf("pool of trace instances: %w", ErrClosed)}) {
	}
	p.ready, p.used, p.idle, p.broken = nil, nil, nil, nil
	return errors.Join(errs...)
}
