package store_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// What an image needed that was unmounted before it was fetched is not needed by the next one; what was fetched stays.
func TestNarrow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 300_000, 70_000, 9)
	blob := openBlob(t, s, b, chunks[1:])
	must(t, blob.Put(chunks[2], data[2]))
	must(t, blob.Close())
	blob = openBlob(t, s, b, chunks[:2])
	for i := range chunks[:2] {
		if blob.Complete() {
			t.Errorf("complete without chunk %d", i)
		}
		must(t, blob.Put(chunks[i], data[i]))
	}
	if !blob.Complete() || blob.Local() != blob.Total() {
		t.Errorf("all that the image needs is there, and complete is %t, with %d of %d bytes", blob.Complete(), blob.Local(), blob.Total())
	}
	must(t, blob.Sync())
	if _, _, whole := s.Whole(b.ID); !whole {
		t.Error("it is not whole on the disk")
	}
	// Whoever needs more has it again, beside this one.
	both := openBlob(t, s, b, chunks)
	if both != blob || both.Complete() || !both.Ready(chunks[2]) || both.Ready(chunks[3]) {
		t.Errorf("an image with all chunks: same file %t, complete %t, ready %t %t, want true, false, true, false", both == blob, both.Complete(), both.Ready(chunks[2]), both.Ready(chunks[3]))
	}
	must(t, both.Close())
	must(t, blob.Close())
	// Who only looks changes nothing.
	blob, err := s.Reopen(b.ID)
	must(t, err)
	if blob.Complete() {
		t.Error("a look took chunks out of the table")
	}
	must(t, blob.Close())
	blob = openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[3], data[3]))
	must(t, blob.Put(chunks[4], data[4]))
	if n := holds(t, blob, chunks, data); n != 5 || !blob.Complete() {
		t.Errorf("%d chunks are ready, complete %t, want all five", n, blob.Complete())
	}
	must(t, blob.Close())
}

// Who looks at a blob after its mount has gone, as the index does, does not keep the next one from being complete.
func TestNarrowWhileSomebodyLooks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 300_000, 70_000, 9)
	blob := openBlob(t, s, b, chunks[1:])
	must(t, blob.Put(chunks[2], data[2]))
	must(t, blob.Close())
	look, err := s.Reopen(b.ID)
	must(t, err)
	blob = openBlob(t, s, b, chunks[:2])
	if blob != look {
		t.Fatal("it is another file")
	}
	select {
	case <-blob.Done():
		t.Error("done with nothing there")
	default:
	}
	for i := range chunks[:2] {
		if blob.Complete() {
			t.Errorf("complete without chunk %d", i)
		}
		must(t, blob.Put(chunks[i], data[i]))
	}
	if !blob.Complete() || blob.Local() != blob.Total() || !blob.Ready(chunks[2]) {
		t.Errorf("all that the image needs is there, and complete is %t, with %d of %d bytes", blob.Complete(), blob.Local(), blob.Total())
	}
	must(t, blob.Sync())
	if _, _, whole := s.Whole(b.ID); !whole {
		t.Error("it is not whole on the disk")
	}
	// A mount beside it: now nothing may go.
	both := openBlob(t, s, b, chunks)
	again := openBlob(t, s, b, chunks[:2])
	if again.Complete() || again.Ready(chunks[3]) {
		t.Error("chunks of a mount were taken out")
	}
	for _, c := range []*store.Blob{again, both, blob, look} {
		must(t, c.Close())
	}
}

// What is claimed is somebody's, and stays to be confirmed.
func TestNarrowLeavesClaims(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 70_000)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[1], data[1]))
	must(t, blob.Close())
	must(t, os.Chmod(filepath.Join(dir, "blobs", b.ID, "data"), 0o640)) // a change
	blob = openBlob(t, s, b, chunks[:1])
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Confirm(t.Context(), 0, blob.Size()))
	if !blob.Complete() || !blob.Ready(chunks[1]) {
		t.Errorf("complete %t, the claimed chunk ready %t, want both", blob.Complete(), blob.Ready(chunks[1]))
	}
	must(t, blob.Close())
}

// A chunk of another size in the place of one that was written and never synced has nothing of that behind its end.
func TestNarrowLeavesNoBytes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(4096, 4096, 4096)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[2], data[2]))
	must(t, blob.Sync())
	must(t, blob.Put(chunks[1], data[1]))
	// All processes are killed here: the kernel has what they wrote.
	copied := t.TempDir()
	must(t, os.CopyFS(copied, os.DirFS(dir)))
	must(t, blob.Close())
	s = open(t, copied, store.Options{})
	must(t, openBlob(t, s, b, chunks[:1]).Close())
	short := []rafs.Chunk{chunks[1]}
	short[0].UncompressedSize, short[0].Digest = 9, b.Digester.Sum(data[0][:9])
	blob = openBlob(t, s, b, short)
	if blob.Name() != b.ID {
		t.Errorf("it got %s, want a place in %s, where there is room", blob.Name(), b.ID)
	}
	must(t, blob.Put(short[0], data[0][:9]))
	if got := verify(t, blob); len(got.Bad) != 0 {
		t.Errorf("%+v, want nothing bad", got)
	}
	must(t, blob.Close())
}
