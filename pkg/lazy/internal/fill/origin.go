package fill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
)

// origin is a source of a blob, with what is on its way from it.
type origin struct {
	src    Source
	ctx    context.Context //nolint:containedctx // until the source is removed
	cancel context.CancelFunc
	use    sync.WaitGroup
}

func newOrigin(src Source) *origin {
	o := &origin{src: src}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	return o
}

// errRemoved is the error of a request whose source was removed: another one may have the bytes.
var errRemoved = errors.New("the source was removed")

// RemoveSource forgets src, added by [Blob.AddSource] or [Scheduler.Open], and returns when no request of it is on the way any
// more. What it was to bring is asked of others.
func (b *Blob) RemoveSource(src Source) {
	b.s.mu.Lock()
	i := slices.IndexFunc(b.sources, func(o *origin) bool { return o.src == src })
	if i < 0 {
		b.s.mu.Unlock()
		return
	}
	o := b.sources[i]
	b.sources = slices.Delete(slices.Clone(b.sources), i, i+1)
	b.s.mu.Unlock()
	o.cancel()
	o.use.Wait()
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
		rc, one := o.request(ctx, r)
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

// request makes a request that ends with ctx, and when the source is removed.
func (o *origin) request(ctx context.Context, r Request) (*counted, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(o.ctx, func() { cancel(errRemoved) })
	rc, err := o.src.Range(ctx, r)
	if err != nil {
		stop()
		cancel(nil)
		return nil, o.explain(err)
	}
	return &counted{rc: rc, o: o, end: func() { stop(); cancel(nil) }}, nil
}

// explain says of an error that the removal of the source is behind it.
func (o *origin) explain(err error) error {
	if err != nil && o.ctx.Err() != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", errRemoved, err)
	}
	return err
}

// counted is the stream of a request; what is read is counted.
type counted struct {
	rc    io.ReadCloser
	o     *origin
	b     *Blob
	class Class
	end   func()
}

// Read implements io.Reader.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.rc.Read(p)
	c.b.s.mu.Lock()
	c.b.stats.of(c.class).Bytes += int64(n)
	c.b.s.mu.Unlock()
	return n, c.o.explain(err)
}

// Close implements io.Closer; it is called once.
func (c *counted) Close() error {
	err := c.rc.Close()
	c.end()
	c.o.use.Done()
	return err
}
