package store_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// A data file that was changed by somebody else counts as filled for who would fetch, and as empty for who would read, until it is confirmed.
func TestClaims(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 300_000, 9, 5<<20, 70_000)
	blob := openBlob(t, s, b, chunks)
	for i := range chunks[:5] {
		must(t, blob.Put(chunks[i], data[i]))
	}
	local := blob.Local()
	must(t, blob.Close())
	blob = openBlob(t, s, b, chunks)
	if blob.Claimed() != 0 || blob.Local() != local || !blob.ReadyRange(0, 1) {
		t.Errorf("nobody changed it: %d blocks claimed, %d local, want 0 and %d", blob.Claimed(), blob.Local(), local)
	}
	must(t, blob.Close())
	flip(t, filepath.Join(dir, "blobs", b.ID, "data"), int64(chunks[2].UncompressedOffset)+100_000)
	blob = openBlob(t, s, b, chunks)
	if blob.Claimed()*store.BlockSize != local || blob.Local() != local || blob.Complete() {
		t.Errorf("changed: %d blocks claimed, %d local, want all of %d", blob.Claimed(), blob.Local(), local)
	}
	for i, c := range chunks[:5] {
		if !blob.Ready(c) || blob.ReadyRange(int64(c.UncompressedOffset), 1) {
			t.Errorf("chunk %d: ready %t, and to read %t; want it there, and not to be read", i, blob.Ready(c), blob.ReadyRange(int64(c.UncompressedOffset), 1))
		}
	}
	// A process that dies here leaves claims.
	must(t, blob.Sync())
	// A reader confirms what it wants, and no more.
	must(t, blob.Confirm(t.Context(), int64(chunks[1].UncompressedOffset), 1))
	if !blob.ReadyRange(int64(chunks[1].UncompressedOffset), 4096) || blob.ReadyRange(0, 1) {
		t.Error("Confirm of the second chunk confirms another, or not that")
	}
	must(t, blob.Confirm(t.Context(), int64(chunks[2].UncompressedOffset)+5, 1))
	if blob.Ready(chunks[2]) {
		t.Error("a wrong chunk is confirmed")
	}
	must(t, blob.Close())
	blob = openBlob(t, s, b, chunks)
	if blob.Claimed() == 0 || blob.Ready(chunks[2]) {
		t.Errorf("opened again with %d claims, wrong chunk ready %t: want claims, and not that", blob.Claimed(), blob.Ready(chunks[2]))
	}
	must(t, blob.Put(chunks[2], data[2]))
	for more, err := true, error(nil); more; {
		before := blob.Claimed()
		more, err = blob.ConfirmSome(t.Context())
		must(t, err)
		if blob.Claimed() >= before {
			t.Fatalf("%d claims before, %d after ConfirmSome", before, blob.Claimed())
		}
	}
	if n := holds(t, blob, chunks, data); n != 5 || blob.Local() != local {
		t.Errorf("%d chunks ready, %d bytes, want 5 and %d", n, blob.Local(), local)
	}
	must(t, blob.Put(chunks[5], data[5]))
	if !blob.Complete() {
		t.Error("all is there, and it is not complete")
	}
	must(t, blob.Close())
	// Confirmed is confirmed.
	blob = openBlob(t, s, b, chunks)
	if blob.Claimed() != 0 || !blob.Complete() {
		t.Errorf("opened once more with %d claims, want none", blob.Claimed())
	}
	must(t, blob.Close())
}

// What a daemon had not confirmed is not confirmed for the one that takes over, nor lost.
func TestClaimsOutliveTheProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096)
	blob := openBlob(t, s, b, chunks)
	must(t, errors.Join(blob.Put(chunks[0], data[0]), blob.Put(chunks[1], data[1]), blob.Close()))
	must(t, os.Chmod(filepath.Join(dir, "blobs", b.ID, "data"), 0o640)) // a change, too
	blob = openBlob(t, s, b, chunks)
	must(t, blob.Confirm(t.Context(), 0, 1))
	d := blob.Descriptors()
	kept, lock := store.Kept{Data: dup(t, d.Data), Bits: dup(t, d.Bits)}, dup(t, s.LockFile())
	must(t, s.Close())
	s = open(t, dir, store.Options{Lock: lock, Kept: map[string]store.Kept{b.ID: kept}})
	blob, err := s.Adopt(b.ID, b, chunks)
	must(t, err)
	if !blob.ReadyRange(0, 1) || blob.Claimed() != 1 || !blob.Ready(chunks[1]) {
		t.Errorf("taken over: first ready %t, %d claimed, second there %t; want true, 1, true", blob.ReadyRange(0, 1), blob.Claimed(), blob.Ready(chunks[1]))
	}
	must(t, blob.Confirm(t.Context(), 0, blob.Size()))
	if !blob.Complete() {
		t.Error("confirmed, and not complete")
	}
	must(t, blob.Close())
}
