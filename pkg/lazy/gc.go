package lazy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// cacheStep is how long one call about the cache works, about.
const cacheStep = time.Second

// keeper works on what a state directory has: in the daemon, beside its mounts, or alone.
type keeper struct {
	store  *store.Store
	policy CachePolicy
	// mounts returns what mounts have: the directories where they are, by name of blob, and the bootstraps.
	mounts func() (blobs map[string][]string, bootstraps map[string]bool)
	// release closes caches that no mount has, such as those that were only lent from; nil: there are none.
	release func()
	// bootstraps removes those that no mount has.
	bootstraps func() error
	// drop makes bad chunks of b not ready, and returns how many of them could be fetched again for mounts that have them.
	drop func(ctx context.Context, b *store.Blob, bad []rafs.Chunk) (refetched int, err error)

	// step is how long a collection works before it looks whether it got on; 0: cacheStep.
	step time.Duration

	collecting sync.Mutex // held by who collects
	verifying  sync.Mutex // held by who verifies
}

// do answers a call about the cache.
func (k *keeper) do(ctx context.Context, op string, q *cacheCall) (*cacheAnswer, error) {
	if q == nil {
		q = &cacheCall{}
	}
	switch op {
	case opCacheList:
		c, err := k.list(q.Detail)
		return &cacheAnswer{Cache: c}, err
	case opCacheGC:
		p := k.policy
		if q.Policy != nil {
			p = *q.Policy
		}
		c, err := k.collect(ctx, p)
		return &cacheAnswer{Collected: &c}, err
	case opCacheVerify:
		return k.verify(ctx, q.Name, q.Offset)
	case opCachePin, opCacheUnpin:
		f := k.store.Pin
		if op == opCacheUnpin {
			f = k.store.Unpin
		}
		var errs []error
		for _, name := range q.Names {
			errs = append(errs, f(name))
		}
		return &cacheAnswer{}, errors.Join(errs...)
	default:
		return nil, fmt.Errorf("%w: operation %q is not known", ErrVersion, op)
	}
}

func (k *keeper) live() store.Live {
	blobs, bootstraps := k.mounts()
	l := store.Live{Blobs: map[string]bool{}, Bootstraps: bootstraps}
	for name := range blobs {
		l.Blobs[name] = true
	}
	return l
}

func (k *keeper) list(detail bool) (*Cache, error) {
	entries, err := k.store.Entries(detail)
	if err != nil {
		return nil, err
	}
	blobs, _ := k.mounts()
	usage, err := k.store.Usage(k.live())
	if err != nil {
		return nil, err
	}
	c := &Cache{StateDir: k.store.Path(), Usage: usage, Entries: make([]CacheEntry, len(entries))}
	for i, e := range entries {
		dirs := blobs[e.Name]
		if dirs == nil {
			dirs = []string{}
		}
		e.InUse = e.InUse || len(dirs) > 0
		c.Entries[i] = CacheEntry{Entry: e, Mounts: dirs}
	}
	return c, nil
}

// collect removes what p says, for a while; Collected.More when there is more to do. It goes on until it removed something or there is
// nothing to remove, so that whoever calls it again and again comes to an end: on a slow disk to look alone may take longer.
func (k *keeper) collect(ctx context.Context, p CachePolicy) (Collected, error) {
	if err := p.check(); err != nil {
		return Collected{}, err
	}
	k.collecting.Lock()
	defer k.collecting.Unlock()
	if k.release != nil {
		k.release()
	}
	for step := cmp.Or(k.step, cacheStep); ; step *= 2 {
		limited, cancel := context.WithTimeout(ctx, step)
		c, err := k.store.Collect(limited, p.store(), k.live())
		cancel()
		if err != nil || !c.More || len(c.Removed) > 0 || c.Freed > 0 || ctx.Err() != nil {
			return c, errors.Join(err, k.bootstraps())
		}
	}
}

// verify compares one blob with its digests, from offset on, for a while, and drops what is wrong.
func (k *keeper) verify(ctx context.Context, name string, offset int64) (*cacheAnswer, error) {
	k.verifying.Lock()
	defer k.verifying.Unlock()
	b, err := k.store.Reopen(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &cacheAnswer{Verified: &Verified{}, Done: true}, nil // it was removed meanwhile
	case errors.Is(err, store.ErrInUse), errors.Is(err, store.ErrUnknownDigest):
		return &cacheAnswer{Verified: &Verified{Failed: []string{err.Error()}}, Done: true}, nil
	case err != nil:
		return &cacheAnswer{Verified: k.useless(name, err), Done: true}, nil
	}
	a := &cacheAnswer{Verified: &Verified{}}
	err = k.verifyOpen(ctx, b, offset, a)
	if a.Done {
		a.Verified.Blobs = 1
	}
	return a, errors.Join(err, b.Close())
}

// useless removes a blob of which nothing can be used.
func (k *keeper) useless(name string, why error) *Verified {
	if err := k.store.Discard(name); err != nil {
		return &Verified{Failed: []string{fmt.Errorf("%w; %w", why, err).Error()}}
	}
	return &Verified{Blobs: 1, Removed: []string{name}}
}

func (k *keeper) verifyOpen(ctx context.Context, b *store.Blob, offset int64, a *cacheAnswer) error {
	step, cancel := context.WithTimeout(ctx, cacheStep)
	defer cancel()
	c, err := b.Verify(step, offset)
	if err != nil {
		return err
	}
	v := a.Verified
	v.Chunks, v.Bytes = c.Chunks, c.Bytes
	a.Next, a.Done = c.Next, c.Next >= b.Size()
	if len(c.Bad) == 0 {
		return nil
	}
	for _, bad := range c.Bad {
		v.Bad = append(v.Bad, BadChunk{Name: b.Name(), Offset: int64(bad.UncompressedOffset), Size: int64(bad.UncompressedSize), Digest: bad.Digest.String()}) //nolint:gosec // below the blob's size
	}
	if v.Refetched, err = k.drop(ctx, b, c.Bad); err != nil {
		v.Failed = append(v.Failed, fmt.Errorf("blob %s: %d corrupt chunks: %w", b.Name(), len(c.Bad), err).Error())
	}
	return nil
}

// keep makes the keeper of a daemon.
func (d *daemon) keep() *keeper {
	return &keeper{store: d.store, policy: d.o.Cache, mounts: d.cacheMounts, bootstraps: d.collectBootstraps, drop: d.dropBad, release: d.releaseUnused}
}

// cacheMounts returns what mounts have.
func (d *daemon) cacheMounts() (blobs map[string][]string, bootstraps map[string]bool) {
	blobs, bootstraps = map[string][]string{}, map[string]bool{}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.mounts {
		for _, name := range m.rec.Blobs {
			blobs[name] = append(blobs[name], m.dir)
		}
		bootstraps[m.rec.Bootstrap] = true
	}
	return blobs, bootstraps
}

// collectBootstraps removes bootstraps that no mount has, and none is about to have.
func (d *daemon) collectBootstraps() error {
	d.bootMu.Lock()
	defer d.bootMu.Unlock()
	live := map[string]bool{}
	for sum := range d.bootstraps {
		live[sum] = true
	}
	return d.store.CollectBootstraps(live)
}

// DefaultCachePause is how long the collector rests between two looks.
const DefaultCachePause = time.Minute

// Pauses of a collector that met what is open and that no mount has; the longest is CachePause where that is longer.
const (
	busyPause  = 100 * time.Millisecond
	busyAtMost = 5 * time.Second
)

// gcLoop keeps the cache within the policy: at the start, when a mount ended, and now and then. What nobody has but a holder that did
// not get to close it is tried again soon.
func (d *daemon) gcLoop(ctx context.Context) {
	tick := time.NewTicker(d.o.CachePause)
	defer tick.Stop()
	short, pause := false, busyPause
	for {
		var again <-chan time.Time
		busy, err := d.gcRun(ctx, &short, pause >= busyAtMost)
		if err != nil && ctx.Err() == nil {
			d.log.Error("collect what nobody uses", zap.Error(err))
		}
		if busy {
			again = time.After(pause)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-again:
			pause = min(2*pause, max(busyAtMost, d.o.CachePause))
		case <-d.collectNow:
			pause = busyPause
		}
	}
}

// gcRun collects in steps, and reports whether something was in its way that may be gone soon. short is whether the last run could not
// reach the mark, which is said once, and when it is known to last.
func (d *daemon) gcRun(ctx context.Context, short *bool, lasts bool) (busy bool, err error) {
	p := d.o.Cache
	asked := d.gcAsked.Load()
	removed, freed := 0, int64(0)
	for {
		c, err := d.keeper.collect(ctx, p)
		removed, freed = removed+len(c.Removed), freed+c.Freed
		if p.Limit > 0 && c.Before > p.Limit {
			p.Limit, p.Low = p.store().Mark(), 0 // go on to the mark that the first step had
			p.Low = p.Limit
		}
		if c.More && ctx.Err() == nil && (err == nil || len(c.Removed) > 0 || c.Freed > 0) {
			continue // one that cannot be removed does not keep the others
		}
		if removed > 0 {
			d.log.Info("collected what nobody uses", zap.Int("blobs", removed), zap.Int64("bytes", freed), zap.Int64("left", c.After))
		}
		if c.Busy == 0 && !c.More {
			d.gcDone.Store(asked)
		}
		wanted := c.Wanted > 0 && (c.Busy == 0 || lasts || *short)
		if wanted && !*short {
			d.log.Warn("the cache takes more than it may, and all that is left is in use or pinned", zap.Int64("bytes", c.After), zap.Int64("limit", d.o.Cache.Limit))
		}
		*short = wanted
		return c.Busy > 0, err
	}
}

// collectSoon has the collector look: a mount ended.
func (d *daemon) collectSoon() {
	d.gcAsked.Add(1)
	select {
	case d.collectNow <- struct{}{}:
	default:
	}
}

// gcGrace is how much longer than [DaemonOptions].Idle a daemon with nothing mounted stays for what it has to collect.
const gcGrace = 20 * time.Second

// collected reports whether the collector has seen the end of every mount and cache: who ends before leaves more than the policy allows.
func (d *daemon) collected() bool {
	return d.gcDone.Load() == d.gcAsked.Load() && (d.sharing == nil || d.sharing.feeding.Load() == 0)
}

// serveCache answers a call about the cache.
func (d *daemon) serveCache(ctx context.Context, c *net.UnixConn, q *call) {
	a, err := d.keeper.do(ctx, q.Op, q.Cache)
	if err != nil {
		d.say(c, failure(err), nil)
		return
	}
	if a.Cache != nil {
		a.Cache.Policy = &d.o.Cache
	}
	d.say(c, answer{Cache: a}, nil)
}
