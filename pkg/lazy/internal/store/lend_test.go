package store_test

import (
	"path/filepath"
	"slices"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// forgetful is an index that only counts what it forgets.
type forgetful struct{ times int }

func (f *forgetful) RemoveCache(string) error { f.times++; return nil }

// fed returns the numbers of the chunks that a Feed hands over.
func fed(t *testing.T, b *store.Blob, have uint64) (n []uint32, known uint64) {
	t.Helper()
	must(t, b.Feed(have, func(chunks []rafs.Chunk, k uint64) error {
		n, known = append(n, indexes(chunks)...), k
		return nil
	}))
	return n, known
}

// What a look at claims found wrong is not handed over again, the rest is once the index has forgotten all.
func TestFeedWithoutWhatIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := &forgetful{}
	s := open(t, dir, store.Options{Index: x})
	b, chunks, data := layout(5000, 5000, 5000)
	blob := openBlob(t, s, b, chunks)
	for i := range chunks {
		must(t, blob.Put(chunks[i], data[i]))
	}
	must(t, blob.Close())
	flip(t, filepath.Join(dir, "blobs", b.ID, "data"), int64(chunks[1].UncompressedOffset)+7)
	blob = openBlob(t, s, b, chunks)
	n, known := fed(t, blob, 0)
	if !slices.Equal(n, []uint32{0, 1, 2}) {
		t.Fatalf("chunks %v are fed, want all: nobody knows of a wrong one", n)
	}
	must(t, blob.Confirm(t.Context(), 0, blob.Size()))
	if x.times != 1 || blob.Ready(chunks[1]) {
		t.Fatalf("the index has forgotten %d times, the wrong chunk is ready %t: want once, and not", x.times, blob.Ready(chunks[1]))
	}
	if again, left := fed(t, blob, 0); !slices.Equal(again, []uint32{0, 2}) || left >= known {
		t.Errorf("chunks %v are fed, %d blocks, want those that are right, fewer than %d", again, left, known)
	}
	must(t, blob.Put(chunks[1], data[1]))
	must(t, blob.Sync())
	if again, _ := fed(t, blob, known-2); !slices.Equal(again, []uint32{1}) {
		t.Errorf("chunks %v are fed, want the one that was fetched again", again)
	}
	must(t, blob.Drop(chunks[:1]))
	if again, _ := fed(t, blob, 0); !slices.Equal(again, []uint32{1, 2}) {
		t.Errorf("chunks %v are fed after a drop, want the two that are left", again)
	}
	must(t, blob.Close())
}
