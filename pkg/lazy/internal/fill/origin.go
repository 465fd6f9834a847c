package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// origin is a source of a blob, with what is on its way from it.
type origin struct {
	src    Source
	ctx    context.Context //nolint:containedctx // until the source is removed
	cancel context.CancelFunc
	use    sync.WaitGroup
	proven atomic.Bool // it brought a chunk that was right
}

func newOrigin(src Source) *origin {
	o := &origin{src: src}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	return o
}

// errRemoved is the error of a request whose source was removed: another one may have the bytes.
var errRemoved = errors.New("the source was removed")

// errSlow is the error of a request that was ended because next to nothing came: another one may do better, and whoever
// waited for this one is not to meet it again.
var errSlow = errors.New("the source sends next to nothing")

// slowest is the least that a request has to bring, in bytes for each second that it is waited for, seen over a quarter of [Options].Limit or more: what is
// slower than this keeps a chunk of 128 KiB for longer than readers wait by default.
const slowest = 1 << 10

// RemoveSource is [Blob.EndSource], and returns when the channel is closed.
func (b *Blob) RemoveSource(src Source) { <-b.EndSource(src) }

// EndSource forgets src, added by [Blob.AddSource] or [Scheduler.Open]. What it was to bring is asked of others. The channel is closed
// when no request of src is on the way any more; until then src stays open.
func (b *Blob) EndSource(src Source) <-chan struct{} {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	i := slices.IndexFunc(b.sources, func(o *origin) bool { return o.src == src })
	if i < 0 {
		return after(func() {})
	}
	o := b.sources[i]
	b.sources = slices.Delete(slices.Clone(b.sources), i, i+1)
	o.cancel()
	return after(o.use.Wait)
}

// origins returns the sources to ask, in order, and keeps them until they are given back.
func (b *Blob) origins(suspect bool) []*origin {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	list := slices.Clone(b.sources)
	if suspect {
		slices.Reverse(list)
	}
	for _, o := range list {
		o.use.Add(1)
	}
	return list
}

// open makes a request of the sources, one after the other; the last one first for what was not right.
func (b *Blob) open(ctx context.Context, class Class, r Request) (io.ReadCloser, error) {
	list := b.origins(r.Suspect)
	err := fmt.Errorf("blob %s: no source: %w", b.info.ID, ErrClosed)
	for i, o := range list {
		b.s.mu.Lock()
		b.stats.of(class).Requests++
		b.s.mu.Unlock()
		rc, one := o.request(ctx, r, b.s.o.Limit)
		if one == nil {
			for _, rest := range list[i+1:] {
				rest.use.Done()
			}
			rc.b, rc.class = b, class
			return rc, nil
		}
		o.use.Done()
		if i == 0 {
			err = nil
		}
		if err = errors.Join(err, one); ctx.Err() != nil {
			for _, rest := range list[i+1:] {
				rest.use.Done()
			}
			break
		}
	}
	return nil, err
}

// request makes a request that ends with ctx, when the source is removed, and when it is too slow: no answer within limit, or less
// than slowest afterwards. Time in which nobody reads what came does not count. Less than two seconds say nothing about a source.
func (o *origin) request(ctx context.Context, r Request, limit time.Duration) (*counted, error) {
	limit = max(limit, 2*time.Second)
	c := &counted{o: o, period: limit / 2}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.unlink = context.AfterFunc(o.ctx, func() { c.cancel(errRemoved) })
	unanswered := time.AfterFunc(limit, func() { c.cancel(errSlow) })
	rc, err := o.src.Range(c.ctx, r)
	unanswered.Stop()
	if err != nil {
		err = c.explain(err)
		c.end()
		return nil, err
	}
	c.rc = rc
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pulse = time.AfterFunc(c.period, c.check)
	return c, nil
}

// check ends a request that brought too little while it was read. Who waits for memory or for a disk does not read: then there is
// little to judge by, and what there is counts at a later check.
func (c *counted) check() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pulse == nil {
		return
	}
	c.clock(c.reading)
	if c.spent >= c.period/2 {
		if float64(c.came) < slowest*c.spent.Seconds() {
			c.cancel(errSlow)
			return
		}
		c.spent, c.came = 0, 0
	}
	c.pulse.Reset(c.period)
}

// clock counts the time of the read that is running, if one is, and says whether one is from now on. The caller holds mu.
func (c *counted) clock(reading bool) {
	now := time.Now()
	if c.reading {
		c.spent += now.Sub(c.since)
	}
	c.reading, c.since = reading, now
}

// end gives back what makes the request end.
func (c *counted) end() {
	c.mu.Lock()
	if c.pulse != nil {
		c.pulse.Stop()
		c.pulse = nil
	}
	c.mu.Unlock()
	c.unlink()
	c.cancel(nil)
}

// explain says of an error that the removal of the source is behind it, or that it was too slow.
func (c *counted) explain(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	if c.o.ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errRemoved, err)
	}
	if errors.Is(context.Cause(c.ctx), errSlow) && !errors.Is(err, errSlow) {
		return fmt.Errorf("%w: %w", errSlow, err)
	}
	return err
}

// counted is the stream of a request; what is read is counted.
type counted struct {
	rc     io.ReadCloser
	o      *origin
	b      *Blob
	class  Class
	ctx    context.Context //nolint:containedctx // of the request, which its stream belongs to
	cancel context.CancelCauseFunc
	unlink func() bool
	period time.Duration // between two looks at what came

	mu      sync.Mutex    // guards what follows
	pulse   *time.Timer   // nil before the answer, and at the end
	came    int64         // bytes since a look last judged
	spent   time.Duration // in reads of rc since then, up to since
	reading bool          // one is running
	since   time.Time     // when it began, or was looked at
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	c.mu.Lock()
	c.clock(true)
	c.mu.Unlock()
	n, err := c.rc.Read(p)
	c.mu.Lock()
	c.clock(false)
	c.came += int64(n)
	c.mu.Unlock()
	c.b.s.mu.Lock()
	c.b.stats.of(c.class).Bytes += int64(n)
	c.b.s.mu.Unlock()
	return n, c.explain(err)
}

// Trip returns how long the answer took that a source had asked for before; 0 when it had not.
func (c *counted) Trip() time.Duration {
	if asked, ok := c.rc.(interface{ Trip() time.Duration }); ok {
		return asked.Trip()
	}
	return 0
}

// Close implements io.Closer; it is called once.
func (c *counted) Close() error {
	err := c.rc.Close()
	c.end()
	c.o.use.Done()
	return err
}

// proved notes that a chunk was right that came through rc.
func proved(rc io.Reader) {
	if c, ok := rc.(*counted); ok {
		c.o.proven.Store(true)
	}
}

// Proven reports whether src, one of the blob's sources, brought at least one chunk that was right: it does have the blob.
func (b *Blob) Proven(src Source) bool {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return slices.ContainsFunc(b.sources, func(o *origin) bool { return o.src == src && o.proven.Load() })
}
