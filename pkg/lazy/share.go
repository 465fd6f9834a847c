package lazy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// The values of [Request].Share.
const (
	// ShareAllowed uses what other mounts fetched where this one could have fetched it too: from a registry that gave it without asking who one is,
	// from the same repository, or, of images in local files, from local files.
	ShareAllowed = "allowed"
	// ShareAll uses whatever is on the node: whoever knows a digest gets its bytes.
	ShareAll = "all"
	// ShareNone neither uses what others fetched nor lets them use what this mount fetches. A cache file that it has in common with mounts that share
	// lends nothing while it is there; of two images that name a blob by the same digest, what was fetched for either is lent once it is gone.
	ShareNone = "none"
)

// claim is what the request says about sharing; lends is the scope of its image, and own what it has shown that it may read besides what is public.
func (r *Request) claim(lends, own string) (share.Claim, error) {
	switch r.Share {
	case "", ShareAllowed:
		return share.Claim{Scope: own, Lends: lends, Policy: share.Allowed}, nil
	case ShareAll:
		return share.Claim{Scope: own, Lends: lends, Policy: share.All}, nil
	case ShareNone:
		return share.Claim{Policy: share.None}, nil
	}
	return share.Claim{Policy: share.None}, fmt.Errorf("share %q: want %s, %s or %s", r.Share, ShareAllowed, ShareAll, ShareNone)
}

// sharing is what a daemon has to share chunks between its mounts. Without an index nothing is shared, and everything else works.
type sharing struct {
	*share.Share
	index *index.Index
	log   *zap.Logger
	feeds chan string   // caches that were closed, to be fed
	sweep chan struct{} // something was condemned
	bad   chan badPlace // chunks that are not what they should be

	feeding atomic.Int64 // caches in feeds, until they are fed

	others others
}

// badPlace is where a chunk is that is not what it should be.
type badPlace struct {
	name  string
	chunk rafs.Chunk
}

// cacheIndex has the index forget caches that go. It is there before the index, which is opened when the directory is locked.
type cacheIndex struct {
	mu      sync.Mutex // guards what follows
	s       *sharing   // nil: not yet
	pending []string
}

// RemoveCache implements store.Index.
func (c *cacheIndex) RemoveCache(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.s == nil {
		c.pending = append(c.pending, name)
		return nil
	}
	return c.s.condemn(name)
}

// use gives c its index, which hears of what went before.
func (c *cacheIndex) use(s *sharing) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, name := range c.pending {
		errs = append(errs, s.condemn(name))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.s, c.pending = s, nil
	return nil
}

// condemn has the index forget a cache at once, and its entries soon. One that is broken has forgotten all, and is begun anew, later if not now: it is a hint,
// and nothing else may fail for it.
func (s *sharing) condemn(name string) error {
	s.Forget(name)
	err := s.index.Condemn(name)
	if errors.Is(err, index.ErrBroken) {
		if err = s.index.Reset(); err != nil {
			s.log.Warn("begin the index of chunks anew", zap.Error(err))
			err = nil
		}
	}
	select {
	case s.sweep <- struct{}{}:
	default:
	}
	return err
}

// startSharing opens the index. A daemon without one shares nothing.
func (d *daemon) startSharing(ci *cacheIndex) {
	x, err := index.Open(indexPath(d.o.StateDir), index.Options{Log: d.log})
	if err != nil {
		d.log.Error("mounts do not share chunks", zap.Error(err))
		return
	}
	s := &sharing{index: x, log: d.log, feeds: make(chan string, 1024), sweep: make(chan struct{}, 1), bad: make(chan badPlace, 1024)}
	s.Share = share.New(share.Options{Store: d.store, Index: x, Scopes: d.scopesOf, Closed: d.keptBack, Bad: s.tellBad, Elsewhere: d.askOthers, OpenOnly: d.lost, Log: d.log})
	if err := ci.use(s); err != nil {
		d.log.Error("mounts do not share chunks", zap.Error(errors.Join(err, s.Close(), x.Close())))
		return
	}
	d.sharing = s
}

// stopSharing gives back what startSharing made.
func (d *daemon) stopSharing() error {
	if d.sharing == nil {
		return nil
	}
	return errors.Join(d.sharing.Close(), d.sharing.index.Close())
}

// cacheOf is what fills b: it borrows from other caches, for all mounts that have b.
func (d *daemon) cacheOf(b *blob, digester rafs.Digester) fill.Cache {
	if d.sharing == nil {
		return b.st
	}
	return d.sharing.Cache(b.st, digester, func() []share.Claim {
		d.usedMu.Lock()
		defer d.usedMu.Unlock()
		claims := make([]share.Claim, 0, len(b.users))
		for _, u := range b.users {
			claims = append(claims, u.claim)
		}
		return claims
	})
}

// scopesOf returns the scopes of what mounts fetched of a cache that they have.
func (d *daemon) scopesOf(name string) (scopes []string) {
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	b := d.blobs[name]
	if b == nil {
		return nil
	}
	for _, u := range b.users {
		if scope := u.scope(); scope != "" && !slices.Contains(scopes, scope) {
			scopes = append(scopes, scope)
		}
	}
	return scopes
}

// keptBack reports whether a cache lends nothing now, whatever its scopes are: one of the mounts that fill it shares nothing.
func (d *daemon) keptBack(name string) bool {
	d.usedMu.Lock()
	defer d.usedMu.Unlock()
	b := d.blobs[name]
	return b != nil && slices.ContainsFunc(b.users, func(u *use) bool { return u.claim.Policy == share.None })
}

// scope is where the bytes of u's blob came from, as far as u's mount brought some; empty: it did not, or does not lend. It is asked after fetches
// that succeeded: what was public when the image was opened is public as long as no secret was handed out.
func (u *use) scope() string {
	if u.f == nil || u.claim.Policy == share.None || !u.f.fb.Proven(u.src) {
		return ""
	}
	return u.lends()
}

// lends is the scope of u's image: what was public when it was opened may not be any more.
func (u *use) lends() string {
	if u.claim.Lends != share.ScopePublic {
		return u.claim.Lends
	}
	if u.narrow == nil {
		return ""
	}
	return u.narrow(share.ScopePublic)
}

// feed has the index know what became durable of a cache that mounts have.
func (d *daemon) feed(name string) {
	if d.sharing == nil {
		return
	}
	scopes := d.scopesOf(name)
	b, err := d.store.Reopen(name)
	if err == nil {
		err = errors.Join(d.sharing.Feed(b, scopes), b.Close())
	}
	d.fed(name, err)
}

// fed looks at the error of a feeding: a broken index is begun anew, and filled by the next look at everything.
func (d *daemon) fed(name string, err error) {
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, index.ErrClosed):
	case errors.Is(err, index.ErrBroken):
		if err := d.sharing.index.Reset(); err != nil {
			d.log.Error("begin the index of chunks anew", zap.Error(err))
		}
	default:
		d.log.Warn("note what is in a cache", zap.String("cache", name), zap.Error(err))
	}
}

// feedSoon has what is durable of closed caches fed, once they are closed.
func (d *daemon) feedSoon(names []string) {
	if d.sharing == nil {
		return
	}
	for _, name := range names {
		d.sharing.feeding.Add(1)
		select {
		case d.sharing.feeds <- name:
		default: // the next daemon does
			d.sharing.feeding.Add(-1)
		}
	}
}

// feedNow feeds what feedSoon was told.
func (d *daemon) feedNow(name string) {
	s := d.sharing
	d.fed(name, s.FeedNamed(name))
	s.Forget(name)  // what the index does not have of it by now it will not get
	d.collectSoon() // it may have found the cache open here
	s.feeding.Add(-1)
}

// feedRest feeds what is queued, for a moment: the daemon ends.
func (d *daemon) feedRest() {
	for until := time.Now().Add(stuckLimit / 2); time.Now().Before(until); {
		select {
		case name := <-d.sharing.feeds:
			d.feedNow(name)
		default:
			return
		}
	}
}

// tellBad has a chunk dropped, soon.
func (s *sharing) tellBad(name string, c rafs.Chunk) {
	select {
	case s.bad <- badPlace{name, c}:
	default: // it is lent no more, and verifying finds it
	}
}

// dropShared drops a chunk of a cache that turned out wrong when it was to be lent.
func (d *daemon) dropShared(ctx context.Context, p badPlace) {
	b, err := d.store.Reopen(p.name)
	if err != nil {
		return // it is gone, or nobody can say what it should be
	}
	chunks, err := b.Chunks(int64(p.chunk.UncompressedOffset), int64(p.chunk.UncompressedSize)) //nolint:gosec // below the blob's size
	chunks = slices.DeleteFunc(chunks, func(c rafs.Chunk) bool {
		return c.UncompressedOffset != p.chunk.UncompressedOffset || c.Digest != p.chunk.Digest
	})
	if err == nil && len(chunks) > 0 {
		_, err = d.dropBad(ctx, b, chunks)
	}
	if err = errors.Join(err, b.Close()); err != nil {
		d.log.Warn("drop a chunk that is wrong", zap.String("cache", p.name), zap.Error(err))
	}
}

// sharePause is how long is waited before the index is filled again when that failed.
const sharePause = 10 * time.Second

// shareLoop keeps the index in step with caches that nobody has open.
func (d *daemon) shareLoop(ctx context.Context) {
	if d.sharing == nil {
		return
	}
	defer d.feedRest()
	for {
		err := d.sharing.Rebuild(ctx)
		d.collectSoon() // as after every feeding
		if err != nil && ctx.Err() == nil {
			d.fed("", err)
			select {
			case <-ctx.Done():
			case <-time.After(sharePause):
			}
		}
		if !d.shareEvents(ctx) {
			return
		}
	}
}

// shareEvents works until ctx ends, or, which is true, until the index is begun anew.
func (d *daemon) shareEvents(ctx context.Context) bool {
	s := d.sharing
	for !s.index.Fresh() {
		select {
		case <-ctx.Done():
			return false
		case name := <-s.feeds:
			d.feedNow(name)
		case p := <-s.bad:
			d.dropShared(ctx, p)
		case <-s.sweep:
			err := s.index.Sweep(ctx)
			if err == nil {
				err = s.index.Shrink()
			}
			if ctx.Err() == nil {
				d.fed("", err)
			}
		}
	}
	return ctx.Err() == nil
}

// syncShared is a part of syncLoop: what became durable is indexed, what nobody borrows from is closed.
func (d *daemon) syncShared(m *mount) {
	if d.sharing == nil {
		return
	}
	for _, b := range d.blobsOf(m) {
		d.feed(b.st.Name())
	}
}

// tidyShared closes caches that nobody borrows from any more.
func (d *daemon) tidyShared() {
	if d.sharing == nil {
		return
	}
	d.sharing.others.tidy()
	closed, err := d.sharing.Tidy()
	if err != nil {
		d.log.Warn("close a cache", zap.Error(err))
	}
	if closed > 0 {
		d.collectSoon()
	}
}

// releaseUnused closes caches that nobody borrows from at this moment, and those that were kept for a mount which has ended since: they
// may have to go.
func (d *daemon) releaseUnused() {
	if len(d.store.Unadopted()) > 0 {
		d.dropUnused()
	}
	if d.sharing == nil {
		return
	}
	if err := d.sharing.Release(); err != nil {
		d.log.Warn("close a cache", zap.Error(err))
	}
}

// noteScope notes, when u is closed, where its bytes came from.
func (d *daemon) noteScope(u *use, st *store.Blob) {
	if d.sharing == nil {
		return
	}
	if scope := u.scope(); scope != "" {
		if err := st.AddScope(scope); err != nil {
			d.log.Warn("note where a cache's bytes came from", zap.Error(err))
		}
	}
}
