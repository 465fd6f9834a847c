package store_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// flip changes one byte of a file.
func flip(t testing.TB, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	var p [1]byte
	_, err = f.ReadAt(p[:], at)
	must(t, err)
	p[0] ^= 0x10
	_, err = f.WriteAt(p[:], at)
	must(t, err)
	must(t, errors.Join(f.Sync(), f.Close()))
}

func verify(t testing.TB, b *store.Blob) store.Checked {
	t.Helper()
	c, err := b.Verify(t.Context(), 0)
	must(t, err)
	if c.Next != b.Size() {
		t.Errorf("Verify ended at %d of %d", c.Next, b.Size())
	}
	return c
}

func indexes(chunks []rafs.Chunk) (out []uint32) {
	for _, c := range chunks {
		out = append(out, c.Index)
	}
	return out
}

// Every byte of every chunk counts, and what lies behind it in its last block.
func TestVerify(t *testing.T) {
	t.Parallel()
	for _, digester := range []rafs.Digester{rafs.DigesterSHA256, rafs.DigesterBLAKE3} {
		dir := t.TempDir()
		s := open(t, dir, store.Options{})
		b, chunks, data := layout(1, 4096, 4097, 5<<20, 300_000, 9)
		b.Digester = digester
		for i := range chunks {
			chunks[i].Digest = digester.Sum(data[i])
		}
		blob := openBlob(t, s, b, chunks)
		for i := range chunks[:5] { // the last is never there
			must(t, blob.Put(chunks[i], data[i]))
		}
		must(t, blob.Close())
		file := filepath.Join(dir, "blobs", b.ID, "data")
		blob, err := s.Reopen(b.ID)
		must(t, err)
		if got := verify(t, blob); got.Chunks != 5 || len(got.Bad) != 0 || blob.Digester() != digester {
			t.Errorf("%v: %+v, want 5 good chunks", digester, got)
		}
		for _, c := range []struct {
			at  int64
			bad uint32
		}{
			{int64(chunks[0].UncompressedOffset), 0},
			{int64(chunks[0].UncompressedOffset) + 1, 0}, // behind the chunk
			{int64(chunks[1].UncompressedOffset) + 4095, 1},
			{int64(chunks[2].UncompressedOffset) + 4096, 2},
			{int64(chunks[2].UncompressedOffset) + 8191, 2},
			{int64(chunks[3].UncompressedOffset) + 5<<20 - 1, 3},
			{int64(chunks[4].UncompressedOffset) + 150_000, 4},
		} {
			flip(t, file, c.at)
			got := verify(t, blob)
			if !slices.Equal(indexes(got.Bad), []uint32{c.bad}) {
				t.Errorf("%v: byte %d flipped: bad %v, want %d", digester, c.at, indexes(got.Bad), c.bad)
			}
			before := blob.Local()
			must(t, blob.Drop(got.Bad))
			if blob.Ready(chunks[c.bad]) || blob.Complete() || blob.Local() >= before {
				t.Errorf("chunk %d is dropped, and ready", c.bad)
			}
			if got := verify(t, blob); got.Chunks != 4 || len(got.Bad) != 0 {
				t.Errorf("after Drop: %+v, want 4 good chunks", got)
			}
			// Durably: as if the process had died here.
			if all, err := s.Entries(true); err != nil || len(all) != 1 || all[0].Local != blob.Local() {
				t.Errorf("entries %+v, %v, want %d bytes local", all, err, blob.Local())
			}
			must(t, blob.Put(chunks[c.bad], data[c.bad]))
			if got := verify(t, blob); got.Chunks != 5 || len(got.Bad) != 0 {
				t.Errorf("fetched again: %+v, want 5 good chunks", got)
			}
		}
		must(t, blob.Close())
	}
}

// Who drops a chunk must not make others durable whose data is not.
func TestDropMakesNothingDurable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 5000, 5000)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Put(chunks[1], data[1]))
	must(t, blob.Sync())
	must(t, blob.Put(chunks[2], data[2]))
	must(t, blob.Drop(chunks[:1]))
	if blob.Ready(chunks[0]) || !blob.Ready(chunks[1]) || !blob.Ready(chunks[2]) {
		t.Error("Drop of the first chunk makes others not ready, or not the first")
	}
	copied := t.TempDir()
	must(t, os.CopyFS(copied, os.DirFS(dir)))
	after := open(t, copied, store.Options{})
	again := openBlob(t, after, b, chunks)
	if again.Ready(chunks[0]) || !again.Ready(chunks[1]) || again.Ready(chunks[2]) {
		t.Errorf("durable are %t, %t, %t, want the second alone", again.Ready(chunks[0]), again.Ready(chunks[1]), again.Ready(chunks[2]))
	}
	must(t, errors.Join(again.Close(), blob.Close()))
}

func TestVerifyInSteps(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, data := layout(9<<20, 4096, 1<<20, 8<<20)
	blob := openBlob(t, s, b, chunks)
	for i := range chunks {
		must(t, blob.Put(chunks[i], data[i]))
	}
	seen, steps := int64(0), 0
	for at := int64(0); at < blob.Size(); steps++ {
		ctx := &expiring{Context: t.Context(), left: 1}
		c, err := blob.Verify(ctx, at)
		must(t, err)
		if c.Next <= at {
			t.Fatalf("step from %d ends at %d", at, c.Next)
		}
		at, seen = c.Next, seen+c.Chunks
	}
	if seen != 4 || steps < 4 {
		t.Errorf("%d chunks in %d steps, want each of 4 once, one a step", seen, steps)
	}
	must(t, blob.Close())
}

// expiring ends after it was asked left times.
type expiring struct {
	context.Context
	left int
}

func (e *expiring) Err() error {
	if e.left--; e.left < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

func TestReopenByName(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	if _, err := s.Reopen("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Reopen(none) = %v, want fs.ErrNotExist", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "blobs", "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Reopen makes a directory: %v", err)
	}
	cached(t, s, "one", 5000, time.Hour)
	blob, err := s.Reopen("one")
	must(t, err)
	// A mount that begins shares it.
	b, chunks, _ := named("one", 5000)
	if shared := openBlob(t, s, b, chunks); shared != blob {
		t.Error("a mount does not share what is being looked at")
	}
	if err := s.Remove("one"); !errors.Is(err, store.ErrInUse) {
		t.Errorf("Remove() = %v, want ErrInUse", err)
	}
	must(t, errors.Join(blob.Close(), blob.Close()))
	must(t, os.Truncate(filepath.Join(dir, "blobs", "one", "chunks"), 100))
	if _, err := s.Reopen("one"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Reopen(broken table) = %v, want that it is corrupt", err)
	}
	if all, err := s.Entries(true); err != nil || len(all) != 1 || all[0].Damaged == "" {
		t.Errorf("entries %+v, %v, want a damaged one", all, err)
	}
}
