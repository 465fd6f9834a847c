package lazy

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// However little time a step has, a call of the collector removes something while there is anything, and whoever calls it again and again
// comes to an end.
func TestCollectGetsOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	const caches = 5
	for n := range caches { // nothing of them can be used, which is no reason to keep them
		name := filepath.Join(dir, "blobs", fmt.Sprint("blob", n))
		if err := os.Mkdir(name, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(name, "data"), make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	k := &keeper{
		store: s, step: 1, bootstraps: func() error { return nil },
		mounts: func() (map[string][]string, map[string]bool) { return nil, nil },
	}
	calls, removed := 0, 0
	for more := true; more && calls < 2*caches; calls++ {
		c, err := k.collect(t.Context(), CachePolicy{Age: time.Nanosecond})
		if err != nil {
			t.Fatal(err)
		}
		if c.More && len(c.Removed) == 0 {
			t.Errorf("call %d: %+v, want something removed while there is more", calls, c)
		}
		removed, more = removed+len(c.Removed), c.More
	}
	if removed != caches {
		t.Errorf("%d of %d removed in %d calls", removed, caches, calls)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
