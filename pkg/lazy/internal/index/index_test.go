package index_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("HEADSTART_TEST_INDEX"); path != "" {
		os.Exit(writeUntilKilled(path))
	}
	testenv.Main(m)
}

// key returns the n-th of the test's chunks.
func key(n int) index.Key {
	var d rafs.Digest
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for i := 0; i < len(d); i += 8 {
		binary.LittleEndian.PutUint64(d[i:], r.Uint64())
	}
	return index.Key{Digester: rafs.Digester(n % 2), Size: uint32(4096 + n%3), Digest: d}
}

func entries(from, to int) (list []index.Entry) {
	for n := from; n < to; n++ {
		list = append(list, index.Entry{Key: key(n), Offset: int64(n-from) * 4096})
	}
	return list
}

func open(t *testing.T, path string) *index.Index {
	t.Helper()
	x, err := index.Open(path, index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	})
	return x
}

// places returns where the n-th chunk is.
func places(t *testing.T, x *index.Index, n int) (found []index.Place) {
	t.Helper()
	if err := x.Lookup([]index.Key{key(n)}, func(_ int, at []index.Place) bool { found = at; return true }); err != nil {
		t.Fatal(err)
	}
	return found
}

// walked returns all that Walk gives, by cache.
func walked(t *testing.T, x *index.Index) map[string]map[index.Key]int64 {
	t.Helper()
	all := map[string]map[index.Key]int64{}
	if err := x.Walk(func(k index.Key, at []index.Place) error {
		for _, p := range at {
			if all[p.Cache] == nil {
				all[p.Cache] = map[index.Key]int64{}
			}
			all[p.Cache][k] = p.Offset
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// raw counts what the file has, read by nothing of ours.
func raw(t *testing.T, path string) (chunks, others int) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			t.Error(err)
		}
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			n := b.Stats().KeyN
			if string(name) == "chunks" {
				chunks += n
			} else if string(name) != "meta" {
				others += n
			}
			return nil
		})
	}); err != nil {
		t.Fatal(err)
	}
	return chunks, others
}

func TestIndex(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	x := open(t, path)
	if !x.Fresh() {
		t.Error("Fresh() of a new index = false")
	}
	x.Filled()
	const many = 10_000
	for range 2 { // the second time nothing changes
		if err := x.Add("one", entries(0, many), 7); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.Add("two", entries(many/2, many+100), 8); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	x = open(t, path)
	if x.Fresh() {
		t.Error("Fresh() of an index that was there = true")
	}
	if diff := cmp.Diff([]string{"one", "two"}, x.Caches()); diff != "" {
		t.Errorf("Caches() (-want +got):\n%s", diff)
	}
	if n, ok := x.Known("one"); n != 7 || !ok {
		t.Errorf("Known(one) = %d, %t, want 7", n, ok)
	}
	for n, want := range map[int][]index.Place{
		3: {{Cache: "one", Offset: 3 * 4096}}, many / 2: {{Cache: "two"}, {Cache: "one", Offset: many / 2 * 4096}},
		many: {{Cache: "two", Offset: many / 2 * 4096}}, many + 100: nil,
	} {
		if diff := cmp.Diff(want, places(t, x, n)); diff != "" {
			t.Errorf("Lookup of chunk %d (-want +got):\n%s", n, diff)
		}
	}
	for _, other := range []index.Key{ // same digest, and yet another chunk
		{Digester: 1 - key(3).Digester, Size: key(3).Size, Digest: key(3).Digest}, {Digester: key(3).Digester, Size: key(3).Size + 1, Digest: key(3).Digest},
	} {
		if err := x.Lookup([]index.Key{other}, func(int, []index.Place) bool { t.Errorf("Lookup(%v) finds something", other); return true }); err != nil {
			t.Fatal(err)
		}
	}
	if err := x.Remove("two", []index.Key{key(many / 2), key(1)}); err != nil {
		t.Fatal(err)
	}
	if got, want := places(t, x, many/2), []index.Place{{Cache: "one", Offset: many / 2 * 4096}}; !cmp.Equal(got, want) {
		t.Errorf("Lookup of a chunk that was removed from one cache = %v, want %v", got, want)
	}
	if err := x.RemoveCache(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	got := walked(t, x)
	if len(got) != 1 || len(got["two"]) != many/2+99 {
		t.Errorf("Walk without the first cache finds %d caches, %d chunks of the other, want 1 and %d", len(got), len(got["two"]), many/2+99)
	}
	if err := errors.Join(x.RemoveCache(t.Context(), "two"), x.RemoveCache(t.Context(), "none"), x.Close()); err != nil {
		t.Fatal(err)
	}
	if chunks, others := raw(t, path); chunks != 0 || others != 0 {
		t.Errorf("the file of an empty index has %d chunks and %d others", chunks, others)
	}
	if err := x.Add("one", nil, 0); !errors.Is(err, index.ErrClosed) {
		t.Errorf("Add after Close = %v, want ErrClosed", err)
	}
}

func TestRemovalCutShort(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	x := open(t, path)
	if err := x.Add("one", entries(0, 9000), 1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.RemoveCache(ctx, "one"); !errors.Is(err, context.Canceled) {
		t.Fatalf("RemoveCache without time = %v, want context.Canceled", err)
	}
	if got := places(t, x, 5); got != nil {
		t.Errorf("Lookup of a cache that is being removed = %v, want nothing", got)
	}
	// The same name comes again before the rest is gone: another cache, which stays.
	if err := x.Add("one", entries(0, 10), 1); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	x = open(t, path)
	if got := walked(t, x); len(got["one"]) != 10 {
		t.Errorf("Walk finds %d chunks, want 10", len(got["one"]))
	}
	if err := errors.Join(x.Sweep(t.Context()), x.Close()); err != nil {
		t.Fatal(err)
	}
	if chunks, _ := raw(t, path); chunks != 10 {
		t.Errorf("after Sweep the file has %d chunks, want 10", chunks)
	}
}

// TestDamage gives the index files that it did not write: it begins anew, or says that it is broken, and goes on after a Reset.
func TestDamage(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good")
	x := open(t, good)
	if err := errors.Join(x.Add("one", entries(0, 2000), 1), x.Close()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	use := func(t *testing.T, path string) {
		x := open(t, path)
		var err error
		for n := 0; n < 2000 && err == nil; n += 50 {
			err = x.Lookup([]index.Key{key(n)}, func(int, []index.Place) bool { return true })
		}
		err = errors.Join(err, x.Walk(func(index.Key, []index.Place) error { return nil }), x.Add("two", entries(0, 500), 1), x.RemoveCache(t.Context(), "one"))
		if err != nil {
			if !x.Broken() || !errors.Is(err, index.ErrBroken) {
				t.Logf("use: %v", err) // an error of bbolt's own
			}
			if err := x.Reset(); err != nil {
				t.Fatal(err)
			}
			if !x.Fresh() {
				t.Error("Fresh() after Reset = false")
			}
		}
		if err := x.Add("three", entries(0, 500), 1); err != nil {
			t.Fatal(err)
		}
		if got := places(t, x, 400); len(got) == 0 {
			t.Error("Lookup after damage finds nothing of what was added")
		}
	}
	t.Run("other file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "index")
		if err := os.WriteFile(path, []byte("no database"), 0o600); err != nil {
			t.Fatal(err)
		}
		if x := open(t, path); !x.Fresh() {
			t.Error("Fresh() of an index in place of another file = false")
		}
		use(t, path+"2")
	})
	t.Run("version", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "index")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.Open(path, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(db.Update(func(tx *bolt.Tx) error {
			return tx.Bucket([]byte("meta")).Put([]byte("version"), []byte{99})
		}), db.Close()); err != nil {
			t.Fatal(err)
		}
		if x := open(t, path); !x.Fresh() || len(x.Caches()) != 0 {
			t.Errorf("index of another version: Fresh() = %t, Caches() = %v", x.Fresh(), x.Caches())
		}
	})
	t.Run("cut", func(t *testing.T) {
		for _, n := range []int{1, 4096, 5000, 3 * 4096, len(data) / 2, len(data) - 1} {
			path := filepath.Join(t.TempDir(), strconv.Itoa(n))
			if err := os.WriteFile(path, data[:n], 0o600); err != nil {
				t.Fatal(err)
			}
			use(t, path)
		}
	})
	t.Run("cut while open", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "index")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		x := open(t, path)
		if err := os.Truncate(path, 4096); err != nil {
			t.Fatal(err)
		}
		if err := x.Lookup([]index.Key{key(1)}, func(int, []index.Place) bool { return true }); !errors.Is(err, index.ErrBroken) {
			t.Errorf("Lookup in a file that was cut = %v, want ErrBroken", err)
		}
		if err := errors.Join(x.Reset(), x.Add("one", entries(0, 10), 1)); err != nil {
			t.Error(err)
		}
	})
	t.Run("flipped", func(t *testing.T) {
		rounds := 300
		if testing.Short() {
			rounds = 40
		}
		r := rand.New(rand.NewPCG(1, 2))
		path := filepath.Join(t.TempDir(), "index")
		for range rounds {
			p := append([]byte(nil), data...)
			for range 1 + r.IntN(20) {
				page := r.IntN(len(p) / 4096)
				at := page*4096 + r.IntN(4096)
				if r.IntN(2) == 0 {
					at = page*4096 + r.IntN(64) // headers
				}
				p[at] ^= byte(1 + r.IntN(255))
			}
			if err := os.WriteFile(path, p, 0o600); err != nil {
				t.Fatal(err)
			}
			use(t, path)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestConcurrent(t *testing.T) {
	x := open(t, filepath.Join(t.TempDir(), "index"))
	var wg sync.WaitGroup
	for n := range 4 {
		name := fmt.Sprint("cache", n%2)
		wg.Go(func() {
			for i := range 5 {
				if err := x.Add(name, entries(i*100, i*100+100), 1); err != nil {
					t.Error(err)
				}
				if n == 3 {
					if err := x.RemoveCache(t.Context(), name); err != nil {
						t.Error(err)
					}
				}
				if err := x.Lookup([]index.Key{key(i), key(i + 100)}, func(int, []index.Place) bool { return true }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := walked(t, x); len(got["cache0"]) != 500 {
		t.Errorf("Walk finds %d chunks of the cache that nobody removed, want 500", len(got["cache0"]))
	}
	if len(x.Caches()) > 2 {
		t.Errorf("Caches() = %v, want at most 2", x.Caches())
	}
}

// writeUntilKilled is a process of TestKill: it adds caches, tells when each is there, and removes every other.
func writeUntilKilled(path string) int {
	x, err := index.Open(path, index.Options{})
	if err != nil {
		fmt.Println("error", err)
		return 1
	}
	for n := len(x.Caches()) * 7; ; n++ {
		name := fmt.Sprint("cache", n)
		if err := x.Add(name, entries(n*50, n*50+100), 1); err != nil {
			fmt.Println("error", err)
			return 1
		}
		fmt.Println("added", n)
		if n%2 == 1 {
			if err := x.RemoveCache(context.Background(), name); err != nil {
				fmt.Println("error", err)
				return 1
			}
			fmt.Println("removed", n)
		}
	}
}

// TestKill ends a writer with SIGKILL at any moment: what it said it added is there, what it said it removed is not.
func TestKill(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 4
	}
	path := filepath.Join(t.TempDir(), "index")
	there := map[int]bool{}
	for range rounds {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "HEADSTART_TEST_INDEX="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := 1 + rand.IntN(20)
		var what string
		var n int
		for i := 0; ; i++ {
			if i == lines {
				_ = cmd.Process.Kill()
			}
			if _, err := fmt.Fscan(out, &what, &n); err != nil {
				break
			}
			there[n] = what == "added"
		}
		_ = cmd.Wait()
		x := open(t, path)
		if x.Fresh() && len(there) > 0 {
			t.Fatal("the index was thrown away after its writer was killed")
		}
		all := walked(t, x)
		for n, want := range there {
			got := len(all[fmt.Sprint("cache", n)])
			// Its removal may have been under way, or done and not told.
			if want && n%2 == 0 && got != 100 || !want && got != 0 {
				t.Errorf("cache %d has %d chunks, added %t", n, got, want)
			}
		}
		if err := errors.Join(x.Sweep(t.Context()), x.Close()); err != nil {
			t.Fatal(err)
		}
		raw(t, path)
	}
}

func TestShrink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "index")
	x := open(t, path)
	x.Filled()
	if err := errors.Join(x.Add("one", entries(0, 20_000), 1), x.Shrink()); err != nil {
		t.Fatal(err)
	}
	if got := places(t, x, 7); len(got) != 1 {
		t.Errorf("Shrink of an index that has something lost %v", got)
	}
	before := x.Size()
	if err := errors.Join(x.RemoveCache(t.Context(), "one"), x.Shrink()); err != nil {
		t.Fatal(err)
	}
	if after := x.Size(); after >= before/4 || x.Fresh() {
		t.Errorf("an index that has nothing takes %d bytes, it took %d with something", after, before)
	}
	if err := x.Add("two", entries(0, 10), 1); err != nil || len(places(t, x, 7)) != 1 {
		t.Errorf("Add after Shrink: %v", err)
	}
}
