package store_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// claiming returns a store and a blob of which everything is claimed: its data file was touched since it was closed.
func claiming(t *testing.T) *store.Blob {
	t.Helper()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 70_000, 4096)
	blob := openBlob(t, s, b, chunks)
	for i := range chunks {
		must(t, blob.Put(chunks[i], data[i]))
	}
	must(t, blob.Close())
	name := filepath.Join(dir, "blobs", b.ID, "data")
	must(t, os.Chtimes(name, time.Now(), time.Now()))
	blob = openBlob(t, s, b, chunks)
	if blob.Claimed() == 0 {
		t.Fatal("nothing is claimed")
	}
	return blob
}

// Whoever describes a mount that ends may look at its blobs after they were given back.
func TestLocalAfterClose(t *testing.T) {
	t.Parallel()
	for range 20 {
		blob := claiming(t)
		if blob.Local() != blob.Total() {
			t.Errorf("Local() = %d, want all of %d claimed", blob.Local(), blob.Total())
		}
		var look sync.WaitGroup
		look.Go(func() {
			for range 1000 {
				if n := blob.Local(); n < 0 || n > blob.Total() {
					t.Errorf("Local() = %d of %d", n, blob.Total())
				}
			}
		})
		must(t, blob.Close())
		look.Wait()
	}
}

// A step of verifying gets on however little time it has, so that whoever goes on comes to an end.
func TestVerifyGetsOn(t *testing.T) {
	t.Parallel()
	blob := claiming(t)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	steps := 0
	for at := int64(0); at < blob.Size(); steps++ {
		c, err := blob.Verify(over, at)
		must(t, err)
		if c.Next <= at || len(c.Bad) != 0 {
			t.Fatalf("Verify(%d) without time = %+v, want it to get on", at, c)
		}
		at = c.Next
	}
	if steps != 3 {
		t.Errorf("%d steps for three chunks", steps)
	}
	must(t, blob.Close())
}
