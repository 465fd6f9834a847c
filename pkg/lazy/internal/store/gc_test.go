package store_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// named is layout with another blob id.
func named(id string, sizes ...int) (rafs.Blob, []rafs.Chunk, [][]byte) {
	b, chunks, data := layout(sizes...)
	b.ID = id
	return b, chunks, data
}

// cached fills a blob and closes it. It is as old as age says.
func cached(t testing.TB, s *store.Store, id string, size int, age time.Duration) {
	t.Helper()
	b, chunks, data := named(id, size)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Close())
	at := time.Now().Add(-age)
	must(t, os.Chtimes(filepath.Join(s.Path(), "blobs", id, "used"), at, at))
}

func entries(t testing.TB, s *store.Store) (names []string) {
	t.Helper()
	all, err := s.Entries(true)
	must(t, err)
	for _, e := range all {
		names = append(names, e.Name)
	}
	return names
}

func collect(t testing.TB, s *store.Store, p store.Policy, live store.Live) store.Collected {
	t.Helper()
	c, err := s.Collect(t.Context(), p, live)
	must(t, err)
	return c
}

const mib = 1 << 20

func TestCollectBySize(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	for i, id := range []string{"oldest", "older", "old", "young"} {
		cached(t, s, id, mib, time.Duration(10-i)*time.Hour)
	}
	before := collect(t, s, store.Policy{Limit: 100 * mib}, store.Live{})
	if len(before.Removed) != 0 || before.Before < 4*mib || before.After != before.Before {
		t.Errorf("below the limit: %+v, want nothing removed of 4 MiB", before)
	}
	got := collect(t, s, store.Policy{Limit: 4 * mib, Low: 5 * mib / 2}, store.Live{})
	if want := []string{"oldest", "older"}; !slices.Equal(got.Removed, want) || got.After > 5*mib/2 || got.Freed != got.Before-got.After || got.Wanted != 0 || got.More {
		t.Errorf("over the limit: %+v, want %v removed", got, want)
	}
	if names := entries(t, s); !slices.Equal(names, []string{"old", "young"}) {
		t.Errorf("%v are left, want old and young", names)
	}
	u, err := s.Usage(store.Live{})
	must(t, err)
	if u.Count != 2 || u.Total() != got.After {
		t.Errorf("usage %+v, want 2 blobs and %d bytes", u, got.After)
	}
}

func TestCollectByAge(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	cached(t, s, "old", 5000, 49*time.Hour)
	cached(t, s, "young", 5000, 47*time.Hour)
	cached(t, s, "mounted", 5000, 49*time.Hour)
	cached(t, s, "pinned", 5000, 49*time.Hour)
	must(t, s.Pin("pinned"))
	p := store.Policy{Age: 48 * time.Hour}
	if got := collect(t, s, p, store.Live{Blobs: map[string]bool{"mounted": true}}); !slices.Equal(got.Removed, []string{"old"}) {
		t.Errorf("removed %v, want old", got.Removed)
	}
	must(t, s.Unpin("pinned"))
	must(t, s.Unpin("pinned"))
	// What somebody uses is not old any more.
	b, chunks, _ := named("mounted", 5000)
	must(t, openBlob(t, s, b, chunks).Close())
	if got := collect(t, s, p, store.Live{}); !slices.Equal(got.Removed, []string{"pinned"}) {
		t.Errorf("removed %v, want what was pinned", got.Removed)
	}
	if err := s.Pin("pinned"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Pin(removed) = %v, want fs.ErrNotExist", err)
	}
	for _, name := range []string{"", "..", "a/b", ".aside-x"} {
		if err := errors.Join(s.Pin(name), s.Unpin(name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Pin(%q) = %v, want fs.ErrNotExist", name, err)
		}
		if err := s.Remove(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Remove(%q) = %v, want fs.ErrNotExist", name, err)
		}
	}
}

// What somebody has open stays: here, in another process as a mount has it, or kept for a daemon to come.
func TestCollectLeavesWhatIsUsed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	for _, id := range []string{"here", "elsewhere", "pinned", "free"} {
		cached(t, s, id, mib, time.Hour)
	}
	must(t, s.Pin("pinned"))
	b, chunks, data := named("here", mib)
	blob := openBlob(t, s, b, chunks)
	defer blob.Close()
	other, err := os.Open(filepath.Join(dir, "blobs", "elsewhere", "data"))
	must(t, err)
	defer other.Close()
	got := collect(t, s, store.Policy{Limit: 1, Age: 1}, store.Live{})
	if !slices.Equal(got.Removed, []string{"free"}) || got.Wanted < 3*mib {
		t.Errorf("%+v, want the free one removed, and 3 MiB wanted", got)
	}
	holds(t, blob, chunks, data)
	for name, want := range map[string]error{"here": store.ErrInUse, "elsewhere": store.ErrInUse, "pinned": store.ErrPinned, "none": nil} {
		if err := s.Remove(name); !errors.Is(err, want) {
			t.Errorf("Remove(%s) = %v, want %v", name, err, want)
		}
	}
	all, err := s.Entries(true)
	must(t, err)
	for _, e := range all {
		if e.InUse != (e.Name != "pinned") || e.Pinned != (e.Name == "pinned") || e.Local != mib || e.Total != mib || e.Bytes < mib {
			t.Errorf("entry %+v, want it in use or pinned, with 1 MiB", e)
		}
	}
	must(t, other.Close())
	must(t, s.Remove("elsewhere"))
}

// order is an index that looks at what there still is when it forgets.
type order struct {
	t    *testing.T
	dir  string
	fail error
	hook func()

	mu        sync.Mutex
	forgotten []string
}

func (o *order) RemoveCache(name string) error {
	if o.hook != nil {
		o.hook()
	}
	if _, err := os.Stat(filepath.Join(o.dir, "blobs", name, "data")); err != nil {
		o.t.Errorf("the index forgets %s after its data went: %v", name, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.forgotten = append(o.forgotten, name)
	return o.fail
}

func TestIndexFirst(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := &order{t: t, dir: dir}
	s := open(t, dir, store.Options{Index: x})
	cached(t, s, "one", 5000, time.Hour)
	b, chunks, _ := named("one", 5000)
	// Who opens the blob while the index forgets it gets an empty one, not what is on its way out.
	opened := make(chan *store.Blob, 1)
	x.hook = func() {
		x.hook = nil
		go func() { opened <- openBlob(t, s, b, chunks) }()
		time.Sleep(10 * time.Millisecond) // more would show no more
	}
	must(t, s.Remove("one"))
	blob := <-opened
	if blob.Local() != 0 || blob.Name() != "one" || !slices.Equal(x.forgotten, []string{"one"}) {
		t.Errorf("%s has %d bytes, %v forgotten, want an empty one, and one", blob.Name(), blob.Local(), x.forgotten)
	}
	must(t, blob.Close())
	x.fail = errors.New("the index is broken")
	if err := s.Remove("one"); !errors.Is(err, x.fail) {
		t.Errorf("Remove() = %v, want that of the index", err)
	}
	if names := entries(t, s); !slices.Equal(names, []string{"one"}) {
		t.Errorf("%v are there, want one: the index may still name it", names)
	}
}

// An index that needs room on a full disk does not keep the collector from making some.
func TestCollectOnAFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := &order{t: t, dir: dir}
	s := open(t, dir, store.Options{Index: &fullDisk{order: x}})
	cached(t, s, "one", mib, time.Hour)
	if got := collect(t, s, store.Policy{Age: 1}, store.Live{}); !slices.Equal(got.Removed, []string{"one"}) {
		t.Errorf("%+v, want one removed", got)
	}
	if names := entries(t, s); len(names) != 0 || x.forgotten[0] != "one" {
		t.Errorf("%v are left, %v forgotten", names, x.forgotten)
	}
}

// fullDisk is an index that has no room until data are gone.
type fullDisk struct{ *order }

func (f *fullDisk) RemoveCache(name string) error {
	if _, err := os.Stat(filepath.Join(f.dir, "blobs", name, "data")); err == nil {
		return fmt.Errorf("write: %w", unix.ENOSPC)
	}
	f.forgotten = append(f.forgotten, name)
	return nil
}

// What a process left that died between two steps goes with the next run, or the next start.
func TestCollectLeftovers(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		dir := t.TempDir()
		s := open(t, dir, store.Options{})
		cached(t, s, "one", mib, time.Hour)
		must(t, os.Rename(filepath.Join(dir, "blobs", "one"), filepath.Join(dir, "blobs", ".aside-one-XYZ")))
		if all, err := s.Entries(true); err != nil || len(all) != 1 || !all[0].Aside || all[0].ID != "one" || all[0].Bytes < mib {
			t.Errorf("entries %+v, %v, want what was left", all, err)
		}
		if restart {
			must(t, s.Close())
			s = open(t, dir, store.Options{})
		} else if got := collect(t, s, store.Policy{}, store.Live{}); got.Freed < mib {
			t.Errorf("%+v, want 1 MiB freed", got)
		}
		if names := entries(t, s); len(names) != 0 {
			t.Errorf("restart %t: %v are left", restart, names)
		}
	}
}

// To look at a cache, as who verifies or lends does, is no use of it.
func TestCollectByAgeWhatWasLookedAt(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	for _, id := range []string{"seen", "mounted"} {
		cached(t, s, id, 5000, 48*time.Hour)
		blob, err := s.Reopen(id)
		must(t, err)
		if id == "mounted" {
			b, chunks, _ := named(id, 5000)
			must(t, openBlob(t, s, b, chunks).Close())
		}
		must(t, blob.Close())
	}
	if got := collect(t, s, store.Policy{Age: 48 * time.Hour}, store.Live{}); !slices.Equal(got.Removed, []string{"seen"}) {
		t.Errorf("removed %v, want what nobody has mounted since", got.Removed)
	}
}

func TestCollectStopsInTime(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	cached(t, s, "one", 5000, time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	got, err := s.Collect(ctx, store.Policy{Age: 1}, store.Live{})
	if err != nil || !got.More || len(got.Removed) != 0 {
		t.Errorf("%+v, %v, want more to do", got, err)
	}
}

func TestCollectBootstraps(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	_, keep, err := s.PutBootstrap(strings.NewReader("keep"), 4)
	must(t, err)
	_, drop, err := s.PutBootstrap(strings.NewReader("drop"), 4)
	must(t, err)
	must(t, s.CollectBootstraps(map[string]bool{keep: true}))
	if _, err := s.Bootstrap(keep); err != nil {
		t.Errorf("a live bootstrap is gone: %v", err)
	}
	if _, err := s.Bootstrap(drop); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Bootstrap(collected) = %v, want fs.ErrNotExist", err)
	}
}

// Mounts come and go while the collector takes all that it can get: nobody ever finds wrong bytes.
func TestCollectUnderLoad(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	stop := make(chan struct{})
	var users, gc sync.WaitGroup
	for n := range 4 {
		users.Go(func() {
			rnd := rand.New(rand.NewPCG(2, uint64(n)))
			for range 30 {
				b, chunks, data := named(fmt.Sprint("blob", rnd.IntN(3)), 5000, 70_000, 4096)
				blob, err := s.OpenBlob(b, chunks)
				if err != nil {
					t.Errorf("OpenBlob() = %v", err)
					return
				}
				for i := range chunks {
					if !blob.Ready(chunks[i]) {
						if err := blob.Put(chunks[i], data[i]); err != nil {
							t.Errorf("Put() = %v", err)
						}
					}
				}
				if n := holds(t, blob, chunks, data); n != len(chunks) {
					t.Errorf("%d chunks are ready, want %d", n, len(chunks))
				}
				if err := blob.Close(); err != nil {
					t.Errorf("Close() = %v", err)
				}
			}
		})
	}
	removed := 0
	gc.Go(func() {
		for {
			got, err := s.Collect(t.Context(), store.Policy{Limit: 1}, store.Live{})
			if err != nil {
				t.Errorf("Collect() = %v", err)
			}
			removed += len(got.Removed)
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	users.Wait()
	close(stop)
	gc.Wait()
	removed += len(collect(t, s, store.Policy{Limit: 1}, store.Live{}).Removed) // what was closed after the last look
	if removed == 0 {
		t.Error("nothing was removed")
	}
	if names := entries(t, s); len(names) != 0 {
		t.Errorf("%v are left", names)
	}
}
