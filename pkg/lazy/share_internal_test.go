package lazy

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/index"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/share"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// An index that is broken, and cannot be begun anew, keeps no cache from going.
func TestCondemnWithoutIndex(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	x, err := index.Open(filepath.Join(dir, "index"), index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &sharing{index: x, log: zap.NewNop(), sweep: make(chan struct{}, 1), Share: share.New(share.Options{Index: x})}
	c := &cacheIndex{}
	if err := c.RemoveCache("early"); err != nil {
		t.Error(err)
	}
	if err := c.use(s); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := x.Reset(); err == nil {
		t.Fatal("Reset() where there is no directory succeeded")
	}
	if err := c.RemoveCache("one"); err != nil {
		t.Errorf("RemoveCache() = %v, and nothing is in the index", err)
	}
	if err := x.Close(); err != nil {
		t.Error(err)
	}
}

// What was closed before a daemon ends is in the index afterwards, though nobody is to wait for it any more; a daemon that was not fed is not done
// with collecting.
func TestFeedAtTheEnd(t *testing.T) {
	t.Parallel()
	d := served(t)
	d.log = zap.NewNop()
	x, err := index.Open(filepath.Join(t.TempDir(), "index"), index.Options{})
	must(t, err)
	d.sharing = &sharing{index: x, log: d.log, feeds: make(chan string, 4), sweep: make(chan struct{}, 1), Share: share.New(share.Options{Store: d.store, Index: x})}
	info, chunks, data := plain(4)
	b, err := d.store.OpenBlob(info, chunks)
	must(t, err)
	for i := range chunks {
		must(t, b.Put(chunks[i], data[i*store.BlockSize:][:store.BlockSize]))
	}
	must(t, b.AddScope("local"))
	must(t, b.Close())
	d.feedSoon([]string{b.Name()})
	if d.collected() {
		t.Error("with a cache in the queue the daemon is done")
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	d.shareLoop(over)
	if known, ok := x.Known(b.Name()); !ok || known != uint64(len(chunks)) {
		t.Errorf("the index knows %d blocks of the cache (%t), want %d", known, ok, len(chunks))
	}
	d.gcDone.Store(d.gcAsked.Load())
	if !d.collected() {
		t.Error("with an empty queue, and everything collected, the daemon is not done")
	}
	must(t, d.stopSharing())
}
