package lazy

import (
	"cmp"
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

const (
	// askLimit is how long another image's backend may keep readers from asking their own again.
	askLimit = 5 * time.Second
	// askPause is how long a backend is not asked for others after it failed.
	askPause = 10 * time.Second
	// askIdle is how long it is remembered where the digests of a blob are after somebody wanted to know.
	askIdle = 30 * time.Second
)

// others is what is known of the backends of other images.
type others struct {
	mu     sync.Mutex              // guards what follows
	failed map[string]time.Time    // until when nobody asks the backends of this cache for others
	tables map[string]*whereabouts // by cache
}

// whereabouts says where the chunks of one blob are, by the beginning of their digests: 16 bytes a chunk, as long as somebody wants to know.
type whereabouts struct {
	list []whereabout // ordered
	end  time.Time    // when it is forgotten
}

type whereabout struct {
	digest uint64
	offset uint64
}

// askOthers has mounts of other images fetch chunks that the backends of the cache called name do not give, and reports whether one of them got any. They
// put them into their own caches, which lend them.
func (d *daemon) askOthers(ctx context.Context, name string, claims []share.Claim, digester rafs.Digester, chunks []rafs.Chunk) (got bool) {
	o := &d.sharing.others
	o.fail(name) // who asks has nothing to give
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	for _, other := range d.mayAsk(name, claims, digester) {
		if ctx.Err() != nil || len(chunks) == 0 {
			break
		}
		if o.failing(other) {
			continue
		}
		left, err := d.askOther(ctx, other, chunks)
		if err != nil {
			if ctx.Err() == nil { // else it was not given the time
				o.fail(other)
			}
			d.log.Info("another image's backend does not give a chunk either", zap.String("blob", name), zap.String("asked", other), zap.Error(err))
		}
		if n := len(chunks) - len(left); n > 0 {
			got = true
			d.log.Info("another image's backend gave chunks", zap.String("blob", name), zap.String("asked", other), zap.Int("chunks", n))
		}
		chunks = left
	}
	return got
}

// askOther has the mounts of the cache called name fetch those of chunks that it can have, and returns the others.
func (d *daemon) askOther(ctx context.Context, name string, chunks []rafs.Chunk) (left []rafs.Chunk, err error) {
	b := d.sharing.Lender(name) // to close it would write what is new of it, while a reader waits
	if b == nil {
		return chunks, nil
	}
	defer d.sharing.GiveBack(name)
	at, err := d.sharing.others.table(ctx, b)
	if err != nil {
		return chunks, err
	}
	for i := range chunks {
		offset, ok, err := at.find(b, &chunks[i])
		if err == nil && ok {
			err = d.ensure(ctx, b, offset, int64(chunks[i].UncompressedSize))
		}
		if err != nil {
			return append(left, chunks[i:]...), err
		}
		if !ok {
			left = append(left, chunks[i])
		}
	}
	return left, nil
}

// mayAsk returns the caches whose mounts may be asked for what others with claims want, in order of their names.
func (d *daemon) mayAsk(name string, claims []share.Claim, digester rafs.Digester) (names []string) {
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	for other, b := range d.blobs {
		if other == name || len(b.users) == 0 || b.st.Digester() != digester {
			continue
		}
		if !slices.ContainsFunc(b.users, func(u *use) bool { return !u.asked().MayAsk(claims) }) {
			names = append(names, other)
		}
	}
	slices.Sort(names)
	return names
}

// asked is the claim of who is asked: its scope is not what it was when a secret was handed out since.
func (u *use) asked() share.Claim {
	c := u.claim
	c.Lends = u.lends()
	return c
}

// fail notes that nobody is to ask the backends of a cache for a while.
func (o *others) fail(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(o.failed, func(_ string, until time.Time) bool { return now.After(until) })
	if o.failed == nil {
		o.failed = map[string]time.Time{}
	}
	o.failed[name] = now.Add(askPause)
}

func (o *others) failing(name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return time.Now().Before(o.failed[name])
}

// tidy forgets tables that nobody wants.
func (o *others) tidy() {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(o.tables, func(_ string, w *whereabouts) bool { return now.After(w.end) })
}

// table returns where the chunks of a blob are. What is added to it later is not in it for a while.
func (o *others) table(ctx context.Context, b *store.Blob) (*whereabouts, error) {
	now := time.Now()
	o.mu.Lock()
	w := o.tables[b.Name()]
	o.mu.Unlock()
	if w != nil && now.Before(w.end) {
		return w, nil
	}
	w = &whereabouts{end: now.Add(askIdle)}
	const step = 1 << 30
	for at := int64(0); at < b.Size(); at += step {
		chunks, err := b.Chunks(at, step)
		if err == nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return nil, err
		}
		for i := range chunks {
			if c := &chunks[i]; c.UncompressedOffset >= uint64(at) {
				w.list = append(w.list, whereabout{binary.BigEndian.Uint64(c.Digest[:]), c.UncompressedOffset})
			}
		}
	}
	slices.SortFunc(w.list, func(x, y whereabout) int {
		return cmp.Or(cmp.Compare(x.digest, y.digest), cmp.Compare(x.offset, y.offset))
	})
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.tables == nil {
		o.tables = map[string]*whereabouts{}
	}
	o.tables[b.Name()] = w
	return w, nil
}

// find returns where b has a chunk.
func (w *whereabouts) find(b *store.Blob, c *rafs.Chunk) (offset int64, ok bool, err error) {
	digest := binary.BigEndian.Uint64(c.Digest[:])
	i, _ := slices.BinarySearchFunc(w.list, digest, func(x whereabout, d uint64) int { return cmp.Compare(x.digest, d) })
	for ; i < len(w.list) && w.list[i].digest == digest; i++ {
		offset = int64(w.list[i].offset) //nolint:gosec // below the blob's size
		found, err := b.Chunks(offset, 1)
		if err != nil {
			return 0, false, err
		}
		if slices.ContainsFunc(found, func(f rafs.Chunk) bool {
			return f.Digest == c.Digest && f.UncompressedSize == c.UncompressedSize && f.UncompressedOffset == w.list[i].offset
		}) {
			return offset, true, nil
		}
	}
	return 0, false, nil
}
