package share

import (
	"context"
	"errors"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Cache is a data file that borrows chunks, and lends what it gets. Safe for concurrent use.
type Cache struct {
	*store.Blob
	s        *Share
	digester rafs.Digester
	claims   func() []Claim
}

// Cache returns b as one that borrows for the mounts of claims, all of which get what it has. It stays the caller's.
func (s *Share) Cache(b *store.Blob, d rafs.Digester, claims func() []Claim) *Cache {
	return &Cache{Blob: b, s: s, digester: d, claims: claims}
}

// Put stores a chunk that was fetched, which other caches may borrow from now on.
func (c *Cache) Put(chunk rafs.Chunk, p []byte) error {
	if err := c.Blob.Put(chunk, p); err != nil {
		return err
	}
	if !c.lends() {
		return nil
	}
	c.s.stored(index.KeyOf(c.digester, &chunk), index.Place{Cache: c.Name(), Offset: int64(chunk.UncompressedOffset)}) //nolint:gosec // below the blob's size
	return nil
}

// lends reports whether what the cache gets may be lent.
func (c *Cache) lends() bool {
	known := false
	for _, claim := range c.claims() {
		if claim.Policy == None {
			return false
		}
		known = known || claim.Lends != ""
	}
	return known
}

// borrows reports whether any mount of the cache may borrow.
func (c *Cache) borrows() bool {
	for _, claim := range c.claims() {
		if claim.Policy == None {
			return false
		}
	}
	return true
}

// look calls f with the places of chunks, until it returns false.
func (c *Cache) look(chunks []rafs.Chunk, f func(n int, at []index.Place) bool) {
	if len(chunks) == 0 || !c.borrows() {
		return
	}
	keys := make([]index.Key, len(chunks))
	for i := range chunks {
		keys[i] = index.KeyOf(c.digester, &chunks[i])
	}
	found := make([][]index.Place, len(chunks))
	err := c.s.o.Index.Lookup(keys, func(n int, at []index.Place) bool { found[n] = at; return true })
	if err != nil && !errors.Is(err, index.ErrBroken) && !errors.Is(err, index.ErrClosed) {
		c.s.o.Log.Warn("look chunks up", zap.Error(err))
	}
	c.s.mu.Lock()
	for i := range keys {
		if p, ok := c.s.recent[keys[i]]; ok {
			found[i] = append(found[i], p)
		}
	}
	c.s.mu.Unlock()
	for n, at := range found {
		if len(at) > 0 && !f(n, at) {
			return
		}
	}
}

// Find implements fill.Borrower.
func (c *Cache) Find(chunks []rafs.Chunk) []bool {
	var found []bool
	allowed := map[string]bool{} // by cache
	c.look(chunks, func(n int, at []index.Place) bool {
		for _, p := range at {
			ok, known := allowed[p.Cache]
			if !known {
				if b := c.s.lender(p.Cache); b != nil {
					ok = may(c.claims(), c.s.scopes(p.Cache, b))
					c.s.giveBack(p.Cache)
				}
				allowed[p.Cache] = ok
			}
			if ok {
				if found == nil {
					found = make([]bool, len(chunks))
				}
				found[n] = true
				break
			}
		}
		return true
	})
	return found
}

// Borrow implements fill.Borrower.
func (c *Cache) Borrow(ctx context.Context, chunks []rafs.Chunk) {
	lenders := map[string]*store.Blob{} // nil: not to be used
	defer func() {
		for name, b := range lenders {
			if b != nil {
				c.s.giveBack(name)
			}
		}
	}()
	usable := func(name string) *store.Blob {
		b, known := lenders[name]
		if known {
			return b
		}
		if b = c.s.lender(name); b != nil && !may(c.claims(), c.s.scopes(name, b)) {
			c.s.giveBack(name)
			b = nil
		}
		lenders[name] = b
		return b
	}
	c.look(chunks, func(n int, at []index.Place) bool {
		for _, p := range at {
			if b := usable(p.Cache); b != nil && c.copy(ctx, &chunks[n], b, p.Offset) {
				break
			}
		}
		return ctx.Err() == nil
	})
}

// copy shares or copies one chunk from a place in b and reports whether it has it now.
func (c *Cache) copy(ctx context.Context, chunk *rafs.Chunk, b *store.Blob, offset int64) bool {
	if b == c.Blob && offset == int64(chunk.UncompressedOffset) { //nolint:gosec // below the blob's size
		return false
	}
	var p []byte
	select {
	case p = <-c.s.slots:
	case <-ctx.Done():
		return false
	}
	defer func() {
		if cap(p) > keepBuffer {
			p = nil
		}
		c.s.slots <- p
	}()
	switch cloned, err := c.Clone(*chunk, b, offset); {
	case cloned == store.CloneReady:
		return true
	case cloned == store.CloneWrong:
		c.wrong(chunk, b, offset)
		return false
	case err != nil:
		c.s.o.Log.Warn("borrow a chunk's blocks", zap.Error(err)) // its bytes may do
	}
	var ok bool
	var err error
	if p, ok, err = b.ReadChunk(chunk.UncompressedSize, offset, p); !ok {
		if err != nil {
			c.s.o.Log.Warn("borrow a chunk", zap.String("cache", b.Name()), zap.Error(err))
		}
		return false
	}
	if c.digester.Sum(p) != chunk.Digest {
		c.wrong(chunk, b, offset)
		return false
	}
	if err := c.Blob.Put(*chunk, p); err != nil {
		c.s.o.Log.Warn("borrow a chunk", zap.String("cache", c.Name()), zap.Error(err)) // what fetches it gets the error
		return false
	}
	return true
}

// wrong drops a chunk that is not where the index says.
func (c *Cache) wrong(chunk *rafs.Chunk, b *store.Blob, offset int64) {
	key := index.KeyOf(c.digester, chunk)
	c.s.o.Log.Warn("a chunk of a cache is not what it should be", zap.String("cache", b.Name()), zap.Int64("offset", offset), zap.Stringer("digest", chunk.Digest))
	c.s.mu.Lock()
	if p, ok := c.s.recent[key]; ok && p.Cache == b.Name() {
		delete(c.s.recent, key)
	}
	c.s.mu.Unlock()
	if err := c.s.o.Index.Remove(b.Name(), []index.Key{key}); err != nil {
		c.s.o.Log.Warn("forget a chunk", zap.Error(err))
	}
	if c.s.o.Bad != nil {
		c.s.o.Bad(b.Name(), rafs.Chunk{Digest: chunk.Digest, UncompressedOffset: uint64(offset), UncompressedSize: chunk.UncompressedSize}) //nolint:gosec // not below 0
	}
}

// Elsewhere implements fill.Asker: other mounts are asked to fetch chunks, from where their images are, and lend them.
func (c *Cache) Elsewhere(ctx context.Context, chunks []rafs.Chunk) {
	if c.s.o.Elsewhere == nil || len(chunks) == 0 || !c.borrows() {
		return
	}
	if c.s.o.Elsewhere(ctx, c.Name(), c.claims(), c.digester, chunks) {
		c.Borrow(ctx, chunks)
	}
}
