package index_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
)

// An index that somebody else has open, or that cannot be opened now, is not thrown away.
func TestOpenLocked(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "index")
	x := open(t, path)
	if err := x.Add("one", entries(0, 10), 1); err != nil {
		t.Fatal(err)
	}
	if second, err := index.Open(path, index.Options{}); err == nil {
		t.Error(errors.Join(errors.New("Open of an index that is open succeeded"), second.Close()))
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	x = open(t, path)
	if got := places(t, x, 7); len(got) != 1 || x.Fresh() {
		t.Errorf("after an Open beside it the index has %v, Fresh() = %t", got, x.Fresh())
	}
}

// A lock that somebody has for a while, such as a process that ends, is waited for.
func TestOpenLockedForAWhile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "index")
	if err := open(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	time.AfterFunc(1500*time.Millisecond, func() { closed <- f.Close() })
	open(t, path)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
}

// Caches get numbers of their own across a Reset, beside those who look: run with -race.
func TestResetBesideOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	x := open(t, path)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				x.Known("one")
				x.Caches()
				time.Sleep(time.Millisecond) // the disk is busy as it is
				if err := x.RemoveCache(t.Context(), "two"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for n := range 5 {
		if err := errors.Join(x.Add("two", entries(0, 300), 1), x.Reset(), x.Add("one", entries(0, 20), uint64(n))); err != nil {
			t.Error(err)
		}
		if known, ok := x.Known("one"); !ok || known != uint64(n) {
			t.Errorf("round %d: Known() = %d, %t", n, known, ok)
		}
	}
	close(stop)
	wg.Wait()
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	x = open(t, path)
	if known, ok := x.Known("one"); !ok || known != 4 || len(places(t, x, 7)) != 1 {
		t.Errorf("what was added after the last Reset is lost: Known() = %d, %t", known, ok)
	}
}

// A chunk that has as many places as there is room for gets one more in place of those of caches that are being removed.
func TestPlacesOfTheDying(t *testing.T) {
	x := open(t, filepath.Join(t.TempDir(), "index"))
	for n := range 4 {
		if err := x.Add(fmt.Sprint("cache", n), entries(0, 5), 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.Add("late", entries(0, 5), 1); err != nil {
		t.Fatal(err)
	}
	if got := places(t, x, 3); len(got) != 4 || got[0].Cache != "cache3" {
		t.Fatalf("Lookup = %v, want the first four", got)
	}
	if err := errors.Join(x.Condemn("cache1"), x.Condemn("cache3"), x.Add("later", entries(0, 5), 1)); err != nil {
		t.Fatal(err)
	}
	want := []index.Place{{Cache: "later", Offset: 3 * 4096}, {Cache: "cache2", Offset: 3 * 4096}, {Cache: "cache0", Offset: 3 * 4096}}
	if diff := cmp.Diff(want, places(t, x, 3)); diff != "" {
		t.Errorf("Lookup (-want +got):\n%s", diff)
	}
	if err := x.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, places(t, x, 3)); diff != "" {
		t.Errorf("Lookup after Sweep (-want +got):\n%s", diff)
	}
}

// An index that cannot be begun anew has nothing, says that it is broken, and works once it can be.
func TestResetFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	x := open(t, filepath.Join(dir, "index"))
	if err := x.Add("one", entries(0, 10), 1); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+"-away"); err != nil {
		t.Fatal(err)
	}
	if err := x.Reset(); err == nil {
		t.Error("Reset() where there is no directory succeeded")
	}
	lookup := x.Lookup([]index.Key{key(1)}, func(int, []index.Place) bool { t.Error("an index without a file knows something"); return true })
	for _, err := range []error{lookup, x.Condemn("two"), x.Add("two", entries(0, 1), 1)} {
		if !errors.Is(err, index.ErrBroken) && (err != nil || len(x.Caches()) != 0) {
			t.Errorf("without a file: %v, want ErrBroken", err)
		}
	}
	if err := os.Rename(dir+"-away", dir); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(x.Reset(), x.Add("two", entries(0, 5), 1)); err != nil || len(places(t, x, 7)) != 0 || len(places(t, x, 3)) != 1 {
		t.Errorf("after another Reset(): %v, %v, want what was added since", err, places(t, x, 7))
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	if err := x.Reset(); !errors.Is(err, index.ErrClosed) {
		t.Errorf("Reset() after Close() = %v, want ErrClosed", err)
	}
}
