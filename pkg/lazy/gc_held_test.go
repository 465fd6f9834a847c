package lazy_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// held is mounts that stay and are read all the time, while others come and go that take more than the cache may, and the collector runs without a pause.
type held struct {
	*drill
	prey  []lazy.Request
	trees []content // of prey
}

// The collector runs without a pause under mounts that are held and read from the disk, with kill -9 of the daemon or its holder at random: no
// wrong byte, no failed read, no entry of the index without its bytes, and the cache is back within its limit.
func TestCollectHeld(t *testing.T) { collectHeld(t, 3, 20, 1) }

// TestSoakCollectHeld is 1,000 cycles under 20 mounts, of both drivers.
func TestSoakCollectHeld(t *testing.T) {
	soak(t)
	collectHeld(t, 20, 1000, 20)
}

// TestSoakCollectDrill is TestCollectDrill, which is long when SOAK is set.
func TestSoakCollectDrill(t *testing.T) {
	soak(t)
	TestCollectDrill(t)
}

func collectHeld(t *testing.T, mounts, cycles, kills int) {
	h := &held{drill: &drill{box: newBox(t)}}
	for _, variant := range []string{"v6-zstd", "v6-zstd-sha256-64k"} {
		h.requests = append(h.requests, loose(t, variant))
	}
	if mounts >= 20 {
		for _, variant := range []string{"v6-zstd", "v5-zstd"} {
			r := loose(t, variant)
			r.Driver = lazy.DriverFUSE
			h.requests = append(h.requests, r)
		}
	}
	for i := range 4 {
		files := mixed(uint64(i)+1, 20, 5)
		h.prey, h.trees = append(h.prey, h.image(fmt.Sprint("prey", i), files)), append(h.trees, files)
	}
	var dirs []string
	for i := range mounts {
		dir := h.mountpoint(fmt.Sprint("held", i))
		r := h.requests[i%len(h.requests)]
		r.Background = []string{"none", "full"}[i/len(h.requests)%2]
		h.mount(dir, r)
		dirs = append(dirs, dir)
	}
	h.tree = treeOf(t, dirs[0])
	for _, dir := range dirs[1:min(len(h.requests), mounts)] {
		compare(t, dir)
	}
	limit := h.cache().Usage.Total() + 6<<20 // room for two of four
	policy := &lazy.CachePolicy{Limit: limit, Low: limit - 2<<20}

	ctx, stop := context.WithCancel(t.Context())
	var work, killing sync.WaitGroup
	for i, dir := range dirs {
		work.Go(func() { h.readOn(ctx, dir, uint64(i)) })
	}
	for i := range 2 {
		work.Go(func() { h.comeAndGo(ctx, i) })
	}
	mortal, endKills := context.WithCancel(ctx)
	killing.Go(func() { h.killer(mortal) })
	removed, done := 0, 0
	for began := time.Now(); (done < cycles || removed == 0 || h.kills.Load() < int64(kills)) && !t.Failed(); {
		c, err := h.client.CollectCache(ctx, policy)
		if err != nil {
			h.again.Add(1) // it died on the way
			if h.again.Load() > h.kills.Load()*5+20 {
				t.Errorf("the collector fails: %v", err)
			}
			continue
		}
		if removed, done = removed+len(c.Removed), done+1; time.Since(began) > 9*time.Minute {
			t.Errorf("after %v there were %d cycles, %d removed", time.Since(began), done, removed)
		}
	}
	endKills()
	killing.Wait()
	stop()
	work.Wait()
	t.Logf("%d cycles of the collector removed %d caches under %d mounts; %d mounts came and went, %d files read, %d kills", done, removed, mounts, h.mounts.Load(), h.reads.Load(), h.kills.Load())
	eventually(t, func() string {
		if _, err := h.client.CollectCache(t.Context(), policy); err != nil {
			return err.Error()
		}
		if got := h.cache().Usage.Total(); got > limit {
			return fmt.Sprintf("the cache takes %d bytes, want at most %d", got, limit)
		}
		return ""
	})
	if v := h.verify(); len(v.Bad) != 0 || len(v.Failed) != 0 || len(v.Removed) != 0 {
		t.Errorf("verify: %+v, want nothing wrong", v)
	}
	for _, dir := range dirs {
		compare(t, dir)
		h.unmount(dir)
	}
	if h.walk() == 0 {
		t.Error("the index names nothing of what is there")
	}
}

// readOn reads files of one mount, of which nothing stays in memory, until ctx ends.
func (h *held) readOn(ctx context.Context, dir string, seed uint64) {
	rnd := rand.New(rand.NewPCG(3, seed))
	for ctx.Err() == nil && !h.t.Failed() {
		name := h.tree.names[rnd.IntN(len(h.tree.names))]
		if sum, err := readFresh(filepath.Join(dir, name)); err != nil {
			h.t.Errorf("read: %v", err)
		} else if sum != h.tree.sums[name] {
			h.t.Errorf("%s%s has wrong bytes", dir, name)
		}
		h.reads.Add(1)
	}
}

// readFresh returns the digest of a file after it has dropped what is in memory of it.
func readFresh(name string) (sum [sha256.Size]byte, err error) {
	f, err := os.Open(name)
	if err != nil {
		return sum, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return sum, err
	}
	p, err := io.ReadAll(f)
	return sha256.Sum256(p), err
}

// comeAndGo mounts images, reads some of them and unmounts them, until ctx ends.
func (h *held) comeAndGo(ctx context.Context, n int) {
	dir := h.mountpoint(fmt.Sprint("prey-mnt", n))
	for i := n; ctx.Err() == nil && !h.t.Failed(); i++ {
		r := h.prey[i%len(h.prey)]
		r.Background = []string{"none", "full"}[i/len(h.prey)%2]
		if err := h.mountAgain(dir, r); err != nil {
			h.t.Errorf("mount: %v", err)
			return
		}
		h.mounts.Add(1)
		for name, want := range h.trees[i%len(h.prey)] { // in any order
			if sum, err := readFresh(filepath.Join(dir, name)); err != nil || sum != sha256.Sum256(want) {
				h.t.Errorf("%s: wrong bytes (%v)", name, err)
			}
			if ctx.Err() != nil {
				break
			}
		}
		if err := unmountSoon(func() error { return unix.Unmount(dir, 0) }); err != nil {
			h.t.Errorf("unmount %s: %v", dir, err)
			return
		}
	}
}
