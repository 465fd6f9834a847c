package share

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// ScopePublic is the scope of what a registry gave to somebody it did not know: everybody could have fetched it.
const ScopePublic = "public"

// ScopeLocal is the scope of what is in files of this machine.
const ScopeLocal = "local"

// Policy is whose chunks a mount uses.
type Policy string

// The policies.
const (
	// Allowed: those that the mount could have fetched itself: public ones, and those of its own scope.
	Allowed Policy = "allowed"
	// All: those of every cache whose scope is known.
	All Policy = "all"
	// None: no others, and no other mount uses its.
	None Policy = "none"
)

// Claim is what one mount brings.
type Claim struct {
	Scope  string // what it has shown that it may read, besides what is public
	Lends  string // where what it fetches comes from; empty: nobody knows, and it lends nothing
	Policy Policy // whose chunks it uses
}

// may reports whether all of claims may use a cache of scopes.
func may(claims []Claim, scopes []string) bool {
	if len(scopes) == 0 {
		return false // nobody knows where it came from
	}
	for _, c := range claims {
		switch {
		case c.Policy == All || slices.Contains(scopes, ScopePublic):
		case c.Policy == Allowed && c.Scope != "" && slices.Contains(scopes, c.Scope):
		default:
			return false
		}
		if c.Policy == None {
			return false
		}
	}
	return len(claims) > 0
}

// MayAsk reports whether the backend of a mount may be asked for what mounts with claims want. By default that is one that answers everybody, or the files
// of this machine, for images of these: a registry that wants to know who asks is asked for its own image's mounts alone.
func (c Claim) MayAsk(claims []Claim) bool {
	if c.Policy == None || c.Lends == "" {
		return false
	}
	for _, o := range claims {
		switch {
		case o.Policy == All:
		case o.Policy == Allowed && (c.Lends == ScopePublic || c.Lends == ScopeLocal && o.Scope == ScopeLocal):
		default:
			return false
		}
	}
	return len(claims) > 0
}

// Options configures [New]. Store and Index are required.
type Options struct {
	Store *store.Store
	Index *index.Index
	// Scopes returns the scopes of a cache that mounts have, of what they fetched so far; nil: only what is noted in the store counts.
	Scopes func(name string) []string
	// Closed reports whether a cache lends nothing now, whatever its scopes; nil: none does.
	Closed func(name string) bool
	// Elsewhere has others fetch chunks that the sources of the cache called name did not give, for mounts with claims, and reports whether they got any;
	// nil: nobody does.
	Elsewhere func(ctx context.Context, name string, claims []Claim, d rafs.Digester, chunks []rafs.Chunk) bool
	// Bad is told of a chunk of a cache that is not what it should be; nil: nobody. It must not wait for the Share.
	Bad func(name string, c rafs.Chunk)
	// OpenOnly leaves alone what no mount has: it may have a mark of a process that is gone.
	OpenOnly bool
	Log      *zap.Logger // nil: nothing is logged
}

// Share lends chunks. Safe for concurrent use.
type Share struct {
	o     Options
	slots chan []byte // buffers of those who copy

	mu     sync.Mutex // guards what follows
	open   map[string]*lender
	recent map[index.Key]index.Place // what is in caches and not in the index yet
	later  map[string]time.Time      // caches that could not be opened, and until when nobody tries
	closed bool
}

// lender is a cache that is kept open for a while after it was used.
type lender struct {
	b    *store.Blob
	refs int // calls that use it
	used time.Time
}

const (
	copies = 2 // at once: they take a processor each
	// keepBuffer is the most that an idle buffer keeps: chunks are rarely larger.
	keepBuffer = 2 << 20
	// maxRecent bounds the chunks that are known before the index has them: what a fast link brings between two syncs.
	maxRecent = 1 << 16
	// maxLenders bounds the caches that are kept open for lending alone.
	maxLenders = 16
	// keepOpen is how long: a collector waits for it.
	keepOpen = 10 * time.Second
	// notAgain is for how long nobody tries to open a cache that could not be: it is waited for by a mount that comes back, or damaged.
	notAgain = 2 * time.Second
)

// New returns a Share. The caller closes it, after all that fills caches, before the store.
func New(o Options) *Share {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	s := &Share{o: o, slots: make(chan []byte, copies), open: map[string]*lender{}, recent: map[index.Key]index.Place{}, later: map[string]time.Time{}}
	for range copies {
		s.slots <- nil
	}
	return s
}

// Close gives everything back.
func (s *Share) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	return s.Release()
}

// Tidy closes caches that nothing was borrowed from for a while, and returns how many.
func (s *Share) Tidy() (closed int, err error) { return s.tidy(keepOpen) }

// Release closes caches that nobody borrows from at this moment.
func (s *Share) Release() error {
	_, err := s.tidy(0)
	return err
}

func (s *Share) tidy(idle time.Duration) (int, error) {
	s.mu.Lock()
	var gone []*store.Blob
	for name, l := range s.open {
		if l.refs == 0 && time.Since(l.used) >= idle {
			gone = append(gone, l.b)
			delete(s.open, name)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, b := range gone {
		errs = append(errs, b.Close())
	}
	return len(gone), errors.Join(errs...)
}

// Lender returns the cache called name as borrowers get it, until GiveBack; nil: it cannot be used now. Neither waits for anybody, or for the disk.
func (s *Share) Lender(name string) *store.Blob { return s.lender(name) }

// GiveBack ends [Share.Lender].
func (s *Share) GiveBack(name string) { s.giveBack(name) }

// lender opens the cache called name; nil: it cannot be used now. It waits for nobody.
func (s *Share) lender(name string) *store.Blob {
	s.mu.Lock()
	if l := s.open[name]; l != nil && !s.closed {
		l.refs++
		s.mu.Unlock()
		return l.b
	}
	full := len(s.open) >= maxLenders
	never := s.closed || time.Now().Before(s.later[name])
	s.mu.Unlock()
	shared := s.o.Store.IsOpen(name) // it stays open, whoever lends it
	if never || s.o.OpenOnly && !shared || full && !shared && !s.room() {
		return nil
	}
	b, err := s.o.Store.ReopenNow(name)
	if err != nil {
		s.refused(name, err)
		return nil
	}
	lent, spare := s.keep(name, b)
	if spare {
		if err := b.Close(); err != nil {
			s.o.Log.Warn("close a cache", zap.Error(err))
		}
	}
	return lent
}

// room closes caches that nobody borrows from at this moment, and reports whether one more may be opened.
func (s *Share) room() bool {
	if _, err := s.tidy(0); err != nil {
		s.o.Log.Warn("close a cache", zap.Error(err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open) < maxLenders
}

// keep notes an open cache as a lender, and returns what is to be used; spare: b is to be closed.
func (s *Share) keep(name string, b *store.Blob) (lent *store.Blob, spare bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, true
	}
	delete(s.later, name)
	if l := s.open[name]; l != nil { // somebody was quicker
		l.refs++
		return l.b, true
	}
	s.open[name] = &lender{b: b, refs: 1}
	return b, false
}

// refused notes that a cache could not be opened.
func (s *Share) refused(name string, err error) {
	if errors.Is(err, fs.ErrNotExist) {
		s.o.Log.Debug("the index names a cache that is not there", zap.String("cache", name))
		return
	}
	s.o.Log.Debug("a cache cannot be borrowed from", zap.String("cache", name), zap.Error(err))
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(s.later, func(_ string, until time.Time) bool { return now.After(until) })
	s.later[name] = now.Add(notAgain)
}

// giveBack ends lender.
func (s *Share) giveBack(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.open[name]; l != nil {
		l.refs--
		l.used = time.Now()
	}
}

// scopes returns where the bytes of a cache came from; nil: it lends nothing.
func (s *Share) scopes(name string, b *store.Blob) []string {
	if s.o.Closed != nil && s.o.Closed(name) {
		return nil
	}
	noted, err := b.Scopes()
	if err != nil {
		s.o.Log.Warn("scopes of a cache", zap.Error(err))
	}
	if s.o.Scopes != nil {
		noted = slices.Concat(noted, s.o.Scopes(name))
	}
	return noted
}

// stored notes that a chunk is in a cache and not in the index yet.
func (s *Share) stored(k index.Key, p index.Place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.recent) < maxRecent {
		s.recent[k] = p
	}
}

// Forget forgets what is in a cache and not in the index.
func (s *Share) Forget(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.recent, func(_ index.Key, p index.Place) bool { return p.Cache == name })
}

// indexed forgets what the index has by now.
func (s *Share) indexed(entries []index.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range entries {
		delete(s.recent, entries[i].Key)
	}
}

// Feed has the index know what is durable of a blob that the caller has open. scopes are those of who fetched it; each is noted before.
func (s *Share) Feed(b *store.Blob, scopes []string) error {
	for _, scope := range scopes {
		if err := b.AddScope(scope); err != nil {
			return err
		}
	}
	if len(s.scopes(b.Name(), b)) == 0 {
		return nil // it can lend nothing, and would take the places of those that can
	}
	have, _ := s.o.Index.Known(b.Name())
	var entries []index.Entry
	return b.Feed(have, func(chunks []rafs.Chunk, known uint64) error {
		entries = entries[:0]
		for i := range chunks {
			entries = append(entries, index.Entry{Key: index.KeyOf(b.Digester(), &chunks[i]), Offset: int64(chunks[i].UncompressedOffset)}) //nolint:gosec // below the blob's size
		}
		err := s.o.Index.Add(b.Name(), entries, known)
		if err == nil {
			s.indexed(entries)
		}
		return err
	})
}

// FeedNamed is Feed for a cache that may be closed, where the index does not know all of it.
func (s *Share) FeedNamed(name string) error {
	if have, _ := s.o.Index.Known(name); have == s.o.Store.DurableBlocks(name) && !s.o.Store.IsOpen(name) {
		return nil
	}
	b, err := s.o.Store.Reopen(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, store.ErrInUse), errors.Is(err, store.ErrUnknownDigest):
		return nil // it is not for us
	case err != nil:
		return err
	}
	return errors.Join(s.Feed(b, nil), b.Close())
}

// Rebuild feeds the index with every cache of the store that it does not know all of, one after the other, and has it forget
// those that are not there. It goes on until ctx ends.
func (s *Share) Rebuild(ctx context.Context) error {
	caches := s.o.Index.Caches() // before those that there are: nobody must forget a new one
	names, err := s.o.Store.Names()
	if err != nil {
		return err
	}
	errs := []error{s.o.Index.Sweep(ctx)}
	for _, name := range caches {
		if ctx.Err() == nil && !slices.Contains(names, name) {
			// It was put aside, or removed by hand.
			errs = append(errs, s.o.Index.RemoveCache(ctx, name))
		}
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		errs = append(errs, s.FeedNamed(name))
	}
	err = errors.Join(errs...)
	if !errors.Is(err, index.ErrBroken) {
		s.o.Index.Filled()
	}
	return err
}
