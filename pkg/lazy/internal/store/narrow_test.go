package store_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
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

// What only an image needed that has been unmounted is not needed by those that are left, nor by those that somebody looks at it for; what was fetched stays.
func TestNarrowBeside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 300_000, 70_000, 9)
	all := openBlob(t, s, b, chunks)
	first := openBlob(t, s, b, chunks[:2])
	second := openBlob(t, s, b, chunks[1:3])
	must(t, all.Put(chunks[4], data[4]))
	must(t, all.Close())
	for i := range chunks[:3] {
		must(t, first.Narrow(chunks[1:3], chunks[:2]))
		if first.Complete() {
			t.Errorf("complete without chunk %d", i)
		}
		must(t, first.Put(chunks[i], data[i]))
	}
	if !first.Complete() || first.Local() != first.Total() || !first.Ready(chunks[4]) {
		t.Errorf("all that images need is there: complete %t, %d of %d bytes, what was fetched for the other one is ready %t", first.Complete(), first.Local(), first.Total(), first.Ready(chunks[4]))
	}
	all = openBlob(t, s, b, chunks)
	if all.Complete() || all.Ready(chunks[3]) {
		t.Error("an image with all chunks has one that nobody fetched")
	}
	must(t, all.Put(chunks[3], data[3]))
	if n := holds(t, all, chunks, data); n != 5 || !all.Complete() {
		t.Errorf("%d chunks are ready, complete %t, want all five", n, all.Complete())
	}
	for _, c := range []*store.Blob{all, first, second} {
		must(t, c.Close())
	}
}

// Where somebody may read the file who is not known here, nothing is taken out: he would read zeros.
func TestNarrowLeavesStrangers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096)
	all := openBlob(t, s, b, chunks)
	must(t, all.Put(chunks[0], data[0]))
	d := all.Descriptors()
	kept, lock := store.Kept{Data: dup(t, d.Data), Bits: dup(t, d.Bits)}, dup(t, s.LockFile())
	must(t, s.Close())
	s = open(t, dir, store.Options{Lock: lock, Kept: map[string]store.Kept{b.ID: kept}})
	some, err := s.Adopt(b.ID, b, chunks[:1])
	must(t, err)
	must(t, some.Narrow(chunks[:1]))
	if some.Complete() || !some.Ready(chunks[0]) {
		t.Errorf("complete %t, the first chunk ready %t: chunks of who is not known were taken out", some.Complete(), some.Ready(chunks[0]))
	}
	must(t, some.Close())
}

// A complete mount needs a chunk of which a claim was wrong, though nothing of it is there: it is an error to read it, for one who does so beside others too.
func TestNarrowLeavesWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 70_000)
	blob := openBlob(t, s, b, chunks[:1])
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Close()) // complete: its mount needs nobody
	f, err := os.OpenFile(filepath.Join(dir, "blobs", b.ID, "data"), os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("wrong"), 100)
	must(t, errors.Join(err, f.Close()))
	blob = openBlob(t, s, b, chunks[1:2])
	must(t, blob.Confirm(t.Context(), 0, blob.Size()))
	must(t, blob.Narrow(chunks[1:2]))
	if blob.ReadyRange(0, 5000) {
		t.Error("a chunk of a complete mount reads as zeros beside another mount")
	}
	must(t, blob.Close())
	blob = openBlob(t, s, b, chunks[1:2])
	if blob.ReadyRange(0, 5000) {
		t.Error("a chunk of a complete mount reads as zeros after another mount")
	}
	must(t, blob.Close())
}

// A table that was written, and then not opened, is found by whoever needs what it has.
func TestTableBehindView(t *testing.T) {
	t.Parallel()
	dir, other := t.TempDir(), t.TempDir()
	b, chunks, data := layout(5000, 4096)
	must(t, openBlob(t, open(t, other, store.Options{}), b, chunks).Close())
	s := open(t, dir, store.Options{})
	blob := openBlob(t, s, b, chunks[:1])
	must(t, blob.Put(chunks[0], data[0]))
	table, err := os.ReadFile(filepath.Join(other, "blobs", b.ID, "chunks"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "blobs", b.ID, "chunks"), table, 0o600))
	both := openBlob(t, s, b, chunks)
	if both.Complete() || both.ReadyRange(8192, 4096) {
		t.Error("a chunk that nobody fetched reads as zeros")
	}
	must(t, both.Put(chunks[1], data[1]))
	if n := holds(t, both, chunks, data); n != 2 {
		t.Errorf("%d chunks are right, want 2", n)
	}
	must(t, both.Close())
	must(t, blob.Close())
}

// So is one of other chunks, as large as those that are seen, while somebody looks at what there is.
func TestTableBesideView(t *testing.T) {
	t.Parallel()
	dir, other := t.TempDir(), t.TempDir()
	b, chunks, data := layout(5000, 4096, 4096)
	both := []rafs.Chunk{chunks[0], chunks[2]}
	must(t, openBlob(t, open(t, other, store.Options{}), b, both).Close())
	s := open(t, dir, store.Options{})
	blob := openBlob(t, s, b, chunks[:2])
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Close())
	look, err := s.Reopen(b.ID)
	must(t, err)
	table, err := os.ReadFile(filepath.Join(other, "blobs", b.ID, "chunks"))
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "blobs", b.ID, "chunks"), table, 0o600))
	blob = openBlob(t, s, b, both)
	if blob.Ready(chunks[2]) || blob.ReadyRange(int64(chunks[2].UncompressedOffset), 4096) {
		t.Error("a chunk that nobody fetched reads as zeros")
	}
	must(t, errors.Join(blob.Close(), look.Close()))
}

// What was dropped as wrong stays in the file for a mount that nobody serves any more, whoever else comes.
func TestNarrowLeavesDropped(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 70_000)
	all := openBlob(t, s, b, chunks[:2])
	must(t, errors.Join(all.Put(chunks[0], data[0]), all.Put(chunks[1], data[1])))
	mount, err := os.Open(all.Path())
	must(t, err)
	defer mount.Close()
	must(t, all.Close())
	look, err := s.Reopen(b.ID)
	must(t, err)
	must(t, errors.Join(look.Drop(chunks[1:2]), look.Close()))
	one := openBlob(t, s, b, chunks[:1])
	p := make([]byte, len(data[1]))
	_, err = mount.ReadAt(p, int64(chunks[1].UncompressedOffset))
	must(t, err)
	if !bytes.Equal(p, data[1]) || one.ReadyRange(int64(chunks[1].UncompressedOffset), 4096) {
		t.Errorf("the bytes are as they were: %t, and said to be there: %t", bytes.Equal(p, data[1]), one.ReadyRange(int64(chunks[1].UncompressedOffset), 4096))
	}
	must(t, one.Close())
}

// Images that come and go beside another one keep no files open.
func TestNarrowKeepsNothing(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096)
	some := openBlob(t, s, b, chunks[:1])
	must(t, some.Put(chunks[0], data[0]))
	names := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		for _, fd := range fds {
			if name, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(name, dir) {
				n++
			}
		}
		return n
	}
	before := names()
	for range 10 {
		all := openBlob(t, s, b, chunks)
		if all.Complete() {
			t.Error("complete without the second chunk")
		}
		must(t, all.Close())
		must(t, some.Narrow(chunks[:1]))
		if !some.Complete() {
			t.Error("the second chunk is needed still")
		}
	}
	if after := names(); after != before {
		t.Errorf("%d files are open, %d before", after, before)
	}
	must(t, some.Close())
}
