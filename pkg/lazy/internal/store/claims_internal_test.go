package store

import (
	"errors"
	"os"
	"testing"
)

// TestSyncFailsAfterWrongClaim is a chunk that turned out wrong and was stored again on a disk that loses it: what the disk has is the wrong
// one, whatever an earlier process said of it.
func TestSyncFailsAfterWrongClaim(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(2, 4096)
	for i := range chunks {
		chunks[i].Digest = b.Digester.Sum(fill(chunks[i]))
	}
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	must(t, errors.Join(blob.Put(chunks[0], fill(chunks[0])), blob.Put(chunks[1], fill(chunks[1])), blob.Close()))
	f, err := os.OpenFile(blob.Path(), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("wrong"), int64(chunks[1].UncompressedOffset))
	must(t, errors.Join(err, f.Close()))
	blob, err = s.OpenBlob(b, chunks)
	must(t, err)
	if blob.Claimed() != 2 {
		t.Fatalf("%d blocks are claimed, want both", blob.Claimed())
	}
	must(t, blob.Confirm(t.Context(), 0, blob.Size()))
	if !blob.Ready(chunks[0]) || blob.Ready(chunks[1]) {
		t.Fatalf("confirmed: ready %t %t, want true, false", blob.Ready(chunks[0]), blob.Ready(chunks[1]))
	}
	must(t, blob.Put(chunks[1], fill(chunks[1])))
	if blob.Durable() {
		t.Error("durable before Sync")
	}
	r, w, err := os.Pipe() // fdatasync of a pipe is EINVAL
	must(t, err)
	data := blob.data
	blob.data = w
	if err := blob.Sync(); err == nil {
		t.Error("Sync of lost data = nil")
	}
	blob.data = data
	must(t, errors.Join(r.Close(), w.Close()))
	if !blob.Ready(chunks[0]) || blob.Ready(chunks[1]) || blob.Durable() {
		t.Errorf("after the failure: ready %t %t, durable %t; want true, false, false", blob.Ready(chunks[0]), blob.Ready(chunks[1]), blob.Durable())
	}
	must(t, errors.Join(blob.Put(chunks[1], fill(chunks[1])), blob.Sync()))
	if !blob.Durable() {
		t.Error("not durable, stored again and synced")
	}
}

// TestWrongClaimIsForgotten is a chunk that turned out wrong while others are claimed still: the next Sync takes it out of the file.
func TestWrongClaimIsForgotten(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(3, 4096)
	for i := range chunks {
		chunks[i].Digest = b.Digester.Sum(fill(chunks[i]))
	}
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	must(t, errors.Join(blob.Put(chunks[0], fill(chunks[0])), blob.Put(chunks[2], fill(chunks[2]))))
	must(t, errors.Join(blob.Put(chunks[1], make([]byte, 4096)), blob.Close())) // not its bytes
	must(t, os.Chmod(blob.Path(), 0o640))                                       // a change
	for round := range 2 {
		blob, err = s.OpenBlob(b, chunks)
		must(t, err)
		if blob.Claimed() != int64(3-round) {
			t.Errorf("round %d: %d blocks are claimed, want %d", round, blob.Claimed(), 3-round)
		}
		must(t, blob.Sync()) // the file's stamp is none from now on
		must(t, errors.Join(blob.Confirm(t.Context(), int64(chunks[1].UncompressedOffset), 1), blob.Close()))
	}
}
