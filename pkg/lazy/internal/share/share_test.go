package share_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rig is a state directory whose caches share.
type rig struct {
	t     testing.TB
	dir   string
	store *store.Store
	index *index.Index
	share *share.Share
	o     share.Options
	bad   []rafs.Chunk
	gone  func(name string, forget func() error) error // what the store tells of a cache that goes; nil: forget
}

func newRig(t *testing.T) *rig { return newRigIn(t, t.TempDir()) }

func newRigIn(t *testing.T, dir string) *rig {
	r := &rig{t: t, dir: dir}
	r.open()
	t.Cleanup(func() { r.close() })
	return r
}

// indexed is what the store tells of caches that go.
type indexed struct{ r *rig }

func (i indexed) RemoveCache(name string) error {
	forget := func() error { return i.r.index.RemoveCache(context.Background(), name) }
	if i.r.gone != nil {
		return i.r.gone(name, forget)
	}
	return forget()
}

func (r *rig) open() {
	r.t.Helper()
	var err error
	r.store, err = store.Open(r.dir, store.Options{Index: indexed{r}})
	must(r.t, err)
	r.index, err = index.Open(filepath.Join(r.dir, "index"), index.Options{})
	must(r.t, err)
	r.o.Store, r.o.Index = r.store, r.index
	r.o.Bad = func(_ string, c rafs.Chunk) { r.bad = append(r.bad, c) }
	r.share = share.New(r.o)
}

func (r *rig) close() {
	if r.store != nil {
		must(r.t, errors.Join(r.share.Close(), r.index.Close(), r.store.Close()))
		r.store = nil
	}
}

// blob describes a blob of n chunks, the k-th of which is chunk number of[k] of the test.
func blob(id int, of ...int) (rafs.Blob, []rafs.Chunk, [][]byte) {
	b := rafs.Blob{ID: fmt.Sprintf("%064x", id), Digester: rafs.DigesterSHA256}
	var chunks []rafs.Chunk
	var data [][]byte
	for i, n := range of {
		r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)})
		p := make([]byte, 1000+n*37%20000)
		_, _ = r.Read(p)
		data = append(data, p)
		chunks = append(chunks, rafs.Chunk{
			Digest: b.Digester.Sum(p), Index: uint32(i), UncompressedOffset: b.UncompressedSize, UncompressedSize: uint32(len(p)), CompressedSize: 1, CompressedOffset: uint64(i),
		})
		b.UncompressedSize += uint64(len(p)+store.BlockSize-1) / store.BlockSize * store.BlockSize
	}
	return b, chunks, data
}

// fill makes a cache that has all its chunks, durable and fed.
func (r *rig) fill(id int, scope string, of ...int) string {
	r.t.Helper()
	info, chunks, data := blob(id, of...)
	b, err := r.store.OpenBlob(info, chunks)
	must(r.t, err)
	for i := range chunks {
		must(r.t, b.Put(chunks[i], data[i]))
	}
	must(r.t, b.Sync())
	must(r.t, r.share.Feed(b, []string{scope}))
	must(r.t, b.Close())
	return b.Name()
}

// borrow opens a cache for one mount, has it borrow, and returns how many of its chunks it has then.
func (r *rig) borrow(id int, claim share.Claim, of ...int) int {
	r.t.Helper()
	info, chunks, data := blob(id, of...)
	b, err := r.store.OpenBlob(info, chunks)
	must(r.t, err)
	c := r.share.Cache(b, info.Digester, func() []share.Claim { return []share.Claim{claim} })
	found := c.Find(chunks)
	c.Borrow(r.t.Context(), chunks)
	n := 0
	for i := range chunks {
		if !b.Ready(chunks[i]) {
			continue
		}
		n++
		if found == nil || !found[i] {
			r.t.Errorf("chunk %d was borrowed and not found", i)
		}
		p := make([]byte, len(data[i]))
		if _, err := b.File().ReadAt(p, int64(chunks[i].UncompressedOffset)); err != nil || string(p) != string(data[i]) {
			r.t.Errorf("chunk %d: wrong bytes were borrowed: %v", i, err)
		}
	}
	must(r.t, b.Close())
	return n
}

func (r *rig) remove(name string) {
	r.t.Helper()
	must(r.t, r.share.Close())
	r.share = share.New(r.o)
	must(r.t, r.store.Remove(name))
}

var public = share.Claim{Scope: share.ScopePublic, Lends: share.ScopePublic, Policy: share.Allowed}

func TestBorrow(t *testing.T) {
	r := newRig(t)
	one := r.fill(1, share.ScopePublic, 1, 2, 3, 4)
	r.fill(2, "registry.example/app", 5, 6)
	if got := r.borrow(10, public, 9, 3, 5, 1, 8); got != 2 {
		t.Errorf("a public mount borrowed %d chunks, want 2", got)
	}
	if got := r.borrow(11, share.Claim{Scope: "registry.example/app", Policy: share.Allowed}, 9, 3, 5, 1, 8); got != 3 {
		t.Errorf("a mount of the same repository borrowed %d chunks, want 3", got)
	}
	if got := r.borrow(12, share.Claim{Scope: "registry.example/other", Policy: share.All}, 5, 6, 7); got != 2 {
		t.Errorf("a mount that uses all borrowed %d chunks, want 2", got)
	}
	if got := r.borrow(13, share.Claim{Policy: share.None}, 1, 2); got != 0 {
		t.Errorf("a mount that shares nothing borrowed %d chunks", got)
	}
	// The index outlives the daemon, and what was removed is not found.
	r.close()
	r.open()
	if got := r.borrow(14, public, 2, 4); got != 2 {
		t.Errorf("after a new start %d chunks were borrowed, want 2", got)
	}
	r.remove(one)
	if got := r.borrow(15, public, 1, 4); got != 0 {
		t.Errorf("%d chunks were borrowed of a cache that is gone", got)
	}
}

// Chunks that no Sync has made durable are lent, and are not in the index.
func TestRecent(t *testing.T) {
	r := newRig(t)
	info, chunks, data := blob(1, 1, 2)
	b, err := r.store.OpenBlob(info, chunks)
	must(t, err)
	defer func() { must(t, b.Close()) }()
	r.o.Scopes = func(name string) []string {
		if name == b.Name() {
			return []string{share.ScopePublic}
		}
		return nil
	}
	r.share = share.New(r.o)
	c := r.share.Cache(b, info.Digester, func() []share.Claim { return []share.Claim{public} })
	must(t, c.Put(chunks[0], data[0]))
	must(t, r.share.Feed(b, nil))
	if caches := r.index.Caches(); len(caches) != 0 {
		t.Errorf("the index has %v, and nothing is durable", caches)
	}
	if got := r.borrow(2, public, 1, 2); got != 1 {
		t.Errorf("%d chunks were borrowed, want the one that is there", got)
	}
	must(t, b.Sync())
	must(t, r.share.Feed(b, nil))
	must(t, r.share.Feed(b, nil))
	if n, ok := r.index.Known(b.Name()); !ok || n == 0 {
		t.Errorf("Known() = %d, %t after a feed", n, ok)
	}
}

// What a mount gets that lends nothing is not remembered, and what a cache had is forgotten with it.
func TestRecentIsForgotten(t *testing.T) {
	r := newRig(t)
	info, chunks, data := blob(1, 1, 2)
	b, err := r.store.OpenBlob(info, chunks)
	must(t, err)
	defer func() { must(t, b.Close()) }()
	r.o.Scopes = func(string) []string { return []string{share.ScopePublic} }
	r.share = share.New(r.o)
	for i, claim := range []share.Claim{{Policy: share.None}, {Scope: share.ScopePublic, Policy: share.Allowed}} {
		c := r.share.Cache(b, info.Digester, func() []share.Claim { return []share.Claim{public, claim} })
		if claim.Policy != share.None {
			c = r.share.Cache(b, info.Digester, func() []share.Claim { return []share.Claim{claim} })
		}
		must(t, c.Put(chunks[0], data[0]))
		if got := r.borrow(10+i, public, 1, 2); got != 0 {
			t.Errorf("%d chunks were borrowed of a cache with a mount %+v that lends nothing", got, claim)
		}
	}
	c := r.share.Cache(b, info.Digester, func() []share.Claim { return []share.Claim{public} })
	must(t, c.Put(chunks[1], data[1]))
	if got := r.borrow(20, public, 1, 2); got != 1 {
		t.Errorf("%d chunks were borrowed, want one", got)
	}
	r.share.Forget(info.ID)
	r.share.Forget(fmt.Sprintf("%064x", 20))
	if got := r.borrow(21, public, 1, 2); got != 0 {
		t.Errorf("%d chunks were borrowed that were forgotten", got)
	}
}

// What is wrong in a cache is not lent, is forgotten, and is told.
func TestBad(t *testing.T) {
	r := newRig(t)
	name := r.fill(1, share.ScopePublic, 1, 2, 3)
	f, err := os.OpenFile(filepath.Join(r.dir, "blobs", name, "data"), os.O_RDWR, 0)
	must(t, err)
	_, chunks, _ := blob(1, 1, 2, 3)
	_, err = f.WriteAt([]byte("wrong"), int64(chunks[1].UncompressedOffset)+7)
	must(t, errors.Join(err, f.Close()))
	if got := r.borrow(2, public, 3, 2, 1); got != 2 {
		t.Errorf("%d chunks were borrowed, want the two that are right", got)
	}
	if len(r.bad) != 1 || r.bad[0].Digest != chunks[1].Digest || r.bad[0].UncompressedOffset != chunks[1].UncompressedOffset {
		t.Errorf("told of %+v, want chunk 1", r.bad)
	}
	if got := r.borrow(3, public, 2); got != 0 || len(r.bad) != 1 {
		t.Errorf("%d chunks were borrowed, %d times told: a chunk that is wrong is still in the index", got, len(r.bad))
	}
}

// An index that is gone is filled again from what caches say, and forgets caches that are gone.
func TestRebuild(t *testing.T) {
	r := newRig(t)
	r.fill(1, share.ScopePublic, 1, 2, 3)
	two := r.fill(2, share.ScopePublic, 4, 5)
	r.close()
	must(t, os.Remove(filepath.Join(r.dir, "index")))
	must(t, os.RemoveAll(filepath.Join(r.dir, "blobs", two)))
	r.open()
	if !r.index.Fresh() || r.borrow(3, public, 1) != 0 {
		t.Error("something is in a new index")
	}
	must(t, r.index.Add(two, []index.Entry{{Key: index.Key{Size: 1}}}, 1))
	must(t, r.share.Rebuild(t.Context()))
	if r.index.Fresh() {
		t.Error("Fresh() after Rebuild = true")
	}
	if names := r.index.Caches(); strings.Contains(fmt.Sprint(names), two) {
		t.Errorf("Caches() = %v: %s is gone", names, two)
	}
	if got := r.borrow(4, public, 1, 2, 3, 4); got != 3 {
		t.Errorf("%d chunks were borrowed after Rebuild, want 3", got)
	}
}

// Every cache says where its bytes came from, also after a crash between two notes; who does not say lends nothing.
func TestScopes(t *testing.T) {
	r := newRig(t)
	name := r.fill(1, share.ScopePublic, 1, 2)
	must(t, r.store.Remove(name)) // a collector took it, and somebody else fetched it for himself
	r.fill(1, "registry.example/private", 1, 2)
	if got := r.borrow(2, public, 1, 2); got != 0 {
		t.Errorf("%d chunks were borrowed of a private cache", got)
	}
	r.remove(name)
	r.fill(1, share.ScopePublic, 1, 2)
	must(t, os.Remove(filepath.Join(r.dir, "blobs", name, "scopes")))
	if got := r.borrow(3, share.Claim{Scope: "x", Policy: share.All}, 1, 2); got != 0 {
		t.Errorf("%d chunks were borrowed of a cache that does not say where it is from", got)
	}
}

// Collectors remove caches while others borrow from them: what is borrowed is right, and no entry is left of what is gone.
func TestBorrowWhileRemoved(t *testing.T) {
	r := newRig(t)
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	of := []int{1, 2, 3, 4, 5, 6, 7, 8}
	for round := range rounds {
		name := r.fill(1, share.ScopePublic, of...)
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 3 {
				_ = r.share.Release() // so that nothing is kept open
				if err := r.store.Remove(name); err != nil && !errors.Is(err, store.ErrInUse) {
					t.Error(err)
				}
			}
		})
		wg.Go(func() { r.borrow(100+round, public, of...) })
		wg.Wait()
		must(t, errors.Join(r.share.Release(), r.store.Remove(name)))
		must(t, r.index.Walk(func(k index.Key, at []index.Place) error {
			for _, p := range at {
				if p.Cache == name {
					return fmt.Errorf("%x is in %s, which is gone", k.Digest, name)
				}
			}
			return nil
		}))
	}
}

// A cache lends nothing, and is not in the index, while it is kept back, whatever it lent before.
func TestClosed(t *testing.T) {
	r := newRig(t)
	name := r.fill(1, share.ScopePublic, 1, 2)
	closed := true
	r.o.Closed = func(n string) bool { return closed && n == name }
	r.share = share.New(r.o)
	if got := r.borrow(2, public, 1, 2); got != 0 {
		t.Errorf("%d chunks were borrowed of a cache that is kept back", got)
	}
	must(t, r.index.RemoveCache(t.Context(), name))
	must(t, r.share.FeedNamed(name))
	if names := r.index.Caches(); len(names) != 0 {
		t.Errorf("Caches() = %v, want none: it is kept back", names)
	}
	closed = false
	must(t, r.share.FeedNamed(name))
	if got := r.borrow(3, public, 1, 2); got != 2 {
		t.Errorf("%d chunks were borrowed of a cache that is kept back no more, want 2", got)
	}
}

// A cache that does not say where it is from takes nobody's place in the index.
func TestFeedWithoutScope(t *testing.T) {
	r := newRig(t)
	info, chunks, data := blob(1, 1)
	b, err := r.store.OpenBlob(info, chunks)
	must(t, err)
	must(t, errors.Join(b.Put(chunks[0], data[0]), b.Sync(), r.share.Feed(b, nil)))
	if names := r.index.Caches(); len(names) != 0 {
		t.Errorf("Caches() = %v, want none", names)
	}
	must(t, errors.Join(r.share.Feed(b, []string{"local"}), b.Close()))
	if names := r.index.Caches(); len(names) != 1 {
		t.Errorf("Caches() = %v, want the one that says it by now", names)
	}
}

// Of caches that no mount has few are open at once, and none once the Share is closed.
func TestLendersAreFew(t *testing.T) {
	r := newRig(t)
	const many = 40
	var of []int
	for n := range many {
		r.fill(n+1, share.ScopePublic, n+1)
		of = append(of, n+1)
	}
	if got := r.borrow(100, public, of...); got == 0 || got == many {
		t.Errorf("one call borrowed %d chunks, want some of %d: it keeps what it uses open", got, many)
	}
	open := 0
	for n := range many {
		if r.store.IsOpen(fmt.Sprintf("%064x", n+1)) {
			open++
		}
	}
	if open == 0 || open > 16 {
		t.Errorf("%d caches are open for lending, want at most 16", open)
	}
	must(t, r.share.Close())
	if got := r.borrow(101, public, of...); got != 0 {
		t.Errorf("%d chunks were borrowed of a Share that is closed", got)
	}
	for n := range many {
		if r.store.IsOpen(fmt.Sprintf("%064x", n+1)) {
			t.Errorf("cache %d is open, and the Share is closed", n+1)
		}
	}
}
