package lazy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Cache returns what the state directory has, with what is known of each blob if detail is set. Without a daemon it looks by itself.
func (c *Client) Cache(ctx context.Context, detail bool) (Cache, error) {
	a, err := c.cache(ctx, opCacheList, cacheCall{Detail: detail})
	if err != nil {
		return Cache{}, err
	}
	if a.Cache == nil {
		return Cache{}, fmt.Errorf("%w: no list of the cache came", ErrVersion)
	}
	return *a.Cache, nil
}

// CollectCache removes what p says, the daemon's own policy if it is nil, and what earlier runs left. It works in steps of about a
// second, between which others have their turn.
func (c *Client) CollectCache(ctx context.Context, p *CachePolicy) (sum Collected, err error) {
	sum.Removed = []string{}
	if p != nil {
		if err := p.check(); err != nil {
			return sum, err
		}
		p = &CachePolicy{Limit: p.Limit, Low: p.Low, Age: p.Age}
	}
	for first := true; ; first = false {
		a, err := c.cache(ctx, opCacheGC, cacheCall{Policy: p})
		if err != nil {
			return sum, err
		}
		if a.Collected == nil {
			return sum, fmt.Errorf("%w: the daemon does not say what it removed", ErrVersion)
		}
		if first {
			sum.Before = a.Collected.Before
		}
		sum.Removed = append(sum.Removed, a.Collected.Removed...)
		sum.Freed += a.Collected.Freed
		sum.After, sum.Wanted = a.Collected.After, a.Collected.Wanted
		if !a.Collected.More {
			return sum, nil
		}
		if p != nil && p.Limit > 0 && a.Collected.Before > p.Limit {
			mark := p.store().Mark() // go on to where the first step was going
			p.Limit, p.Low = mark, mark
		}
	}
}

// PinCache keeps blobs, by [CacheEntry.Name], from being collected; UnpinCache ends that.
func (c *Client) PinCache(ctx context.Context, names ...string) error {
	_, err := c.cache(ctx, opCachePin, cacheCall{Names: names})
	return err
}

// UnpinCache ends [Client.PinCache]. It is no error when a blob was not pinned.
func (c *Client) UnpinCache(ctx context.Context, names ...string) error {
	_, err := c.cache(ctx, opCacheUnpin, cacheCall{Names: names})
	return err
}

// VerifyCache compares the blobs called names, all if there are none, with their digests as the disk has them, and drops
// what is wrong: it is fetched again when it is wanted, at once where a mount has it. progress, if not nil, is told how far it is.
// What a mount had read before stays in the kernel's page cache.
func (c *Client) VerifyCache(ctx context.Context, names []string, progress func(name string, bytes int64)) (sum Verified, err error) {
	sum = Verified{Bad: []BadChunk{}, Removed: []string{}, Failed: []string{}}
	if len(names) == 0 {
		all, err := c.Cache(ctx, false)
		if err != nil {
			return sum, err
		}
		for _, e := range all.Entries {
			if !e.Aside {
				names = append(names, e.Name)
			}
		}
	}
	for _, name := range names {
		for offset := int64(0); ; {
			a, err := c.cache(ctx, opCacheVerify, cacheCall{Name: name, Offset: offset})
			if err != nil {
				return sum, fmt.Errorf("verify %s: %w", name, err)
			}
			if a.Verified == nil || !a.Done && a.Next <= offset {
				return sum, fmt.Errorf("%w: verify %s: no progress at %d", ErrVersion, name, offset)
			}
			sum.add(*a.Verified)
			offset = a.Next
			if progress != nil {
				progress(name, sum.Bytes)
			}
			if a.Done {
				break
			}
		}
	}
	return sum, nil
}

// cache asks the daemon about the cache, and does it here when there is none.
func (c *Client) cache(ctx context.Context, op string, q cacheCall) (*cacheAnswer, error) {
	for deadline := time.Now().Add(startLimit); ; {
		a, err := retry(ctx, func() (*cacheAnswer, error) { return c.askCache(ctx, op, q) })
		if errors.Is(err, ErrNoDaemon) {
			a, err = c.alone(ctx, op, &q)
		}
		// Nobody listens, and somebody has the directory: a daemon that starts or ends, or another command.
		if !errors.Is(err, ErrLocked) || time.Now().After(deadline) {
			return a, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *Client) askCache(ctx context.Context, op string, q cacheCall) (*cacheAnswer, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	a, _, err := c.talk(ctx, conn, call{Op: op, Cache: &q})
	if err = errors.Join(err, conn.Close()); err != nil {
		return nil, err
	}
	if a.Cache == nil {
		return nil, fmt.Errorf("%w: the daemon says nothing of its cache", ErrVersion)
	}
	return a.Cache, nil
}

// alone does what a daemon would, in this process, with nobody else in the state directory meanwhile.
func (c *Client) alone(ctx context.Context, op string, q *cacheCall) (_ *cacheAnswer, err error) {
	if _, err := os.Stat(filepath.Join(c.o.StateDir, "blobs")); errors.Is(err, fs.ErrNotExist) {
		if len(q.Names) == 0 {
			return &cacheAnswer{
				Cache: &Cache{StateDir: c.o.StateDir, Entries: []CacheEntry{}}, Collected: &Collected{Removed: []string{}}, Verified: &Verified{}, Done: true,
			}, nil
		}
		return nil, fmt.Errorf("state directory %s: nothing was ever mounted: %w", c.o.StateDir, fs.ErrNotExist)
	}
	x := &lateIndex{path: indexPath(c.o.StateDir)}
	s, err := store.Open(c.o.StateDir, store.Options{Index: x})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, x.Close(), s.Close()) }() // the index first: whoever gets the directory's lock opens it
	mounts, err := recorded(s)
	if err != nil {
		return nil, err
	}
	k := &keeper{store: s, mounts: mounts, drop: func(_ context.Context, b *store.Blob, bad []rafs.Chunk) (int, error) {
		if blobs, _ := mounts(); len(blobs[b.Name()]) > 0 {
			return 0, errors.New("they stay: a mount has the blob, and no daemon runs to fetch them again; the next mount starts one")
		}
		return 0, b.Drop(bad)
	}}
	k.bootstraps = func() error { return s.CollectBootstraps(k.live().Bootstraps) }
	return k.do(ctx, op, q)
}

// recorded returns what mounts of this boot have, whether or not they still live.
func recorded(s *store.Store) (func() (map[string][]string, map[string]bool), error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	stored, err := s.Mounts()
	if err != nil {
		return nil, err // nobody knows what is in use
	}
	blobs, bootstraps := map[string][]string{}, map[string]bool{}
	for id, data := range stored {
		var rec record
		if err := json.Unmarshal(data, &rec); err != nil {
			return nil, fmt.Errorf("record of mount %s: %w", id, err)
		}
		if rec.Boot != boot {
			continue
		}
		for _, name := range rec.Blobs {
			blobs[name] = append(blobs[name], rec.Dir)
		}
		bootstraps[rec.Bootstrap] = true
	}
	return func() (map[string][]string, map[string]bool) { return blobs, bootstraps }, nil
}
