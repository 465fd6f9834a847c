package store_test

import (
	"errors"
	"os"
	"testing"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
)

// What is durable of a data file is told range by range, whatever more other images use of it.
func TestDurable(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, data := layout(store.BlockSize, 100, 70*store.BlockSize, store.BlockSize)
	blob := openBlob(t, s, b, chunks)
	must(t, errors.Join(blob.Put(chunks[0], data[0]), blob.Put(chunks[2], data[2]), blob.Sync(), blob.Put(chunks[3], data[3])))
	dev, ino, ready, err := s.Durable(blob.Name())
	must(t, err)
	if wantDev, wantIno := blob.Inode(); dev != wantDev || ino != wantIno {
		t.Errorf("Durable = %d, %d, want %d, %d", dev, ino, wantDev, wantIno)
	}
	const most = 1<<63 - 1
	for _, tt := range []struct {
		off, n int64 // in bytes
		want   bool
	}{
		{0, store.BlockSize, true},
		{0, store.BlockSize + 1, false},
		{store.BlockSize, 1, false},
		{2 * store.BlockSize, 70 * store.BlockSize, true},
		{2 * store.BlockSize, 70*store.BlockSize + 1, false}, // ready, and not durable
		{72*store.BlockSize + 5, 1, false},
		{73 * store.BlockSize, most, true}, // nothing is needed there
		{0, most, false},
		{most, most, true},
		{0, 0, true},
		{-1, 1, false},
		{0, -1, false},
	} {
		if got := ready(tt.off, tt.n); got != tt.want {
			t.Errorf("%d bytes at %d: %t, want %t", tt.n, tt.off, got, tt.want)
		}
	}
	must(t, errors.Join(blob.Put(chunks[1], data[1]), blob.Sync()))
	if _, _, ready, err = s.Durable(blob.Name()); err != nil || !ready(0, most) {
		t.Errorf("with all chunks durable: %v, want all ready", err)
	}
	for _, name := range []string{"", "none", "..", "../../etc"} {
		if _, _, _, err := s.Durable(name); err == nil {
			t.Errorf("Durable(%q) gives something", name)
		}
	}
}

// Descriptors of a whole data file are given up also while somebody has it, those of one with holes are not.
func TestReleaseWhole(t *testing.T) {
	t.Parallel()
	for name, whole := range map[string]bool{"whole": true, "with a hole": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			b, chunks, data := layout(5000, 4096)
			first, err := store.Open(dir, store.Options{})
			must(t, err)
			blob := openBlob(t, first, b, chunks)
			must(t, blob.Put(chunks[0], data[0]))
			if whole {
				must(t, blob.Put(chunks[1], data[1]))
			}
			d := blob.Descriptors()
			kept := map[string]store.Kept{blob.Name(): {Data: dup(t, d.Data), Bits: dup(t, d.Bits)}}
			user, err := os.Open(blob.Path())
			must(t, errors.Join(err, first.Close()))
			defer user.Close()
			s := open(t, dir, store.Options{Kept: kept})
			unmarked := 0
			err = s.ReleaseWhole(blob.Name(), func(*os.File) error { unmarked++; return nil })
			if whole && (err != nil || unmarked != 1 || len(s.Unadopted()) != 0) {
				t.Errorf("ReleaseWhole = %v, %d times unmarked, want once", err, unmarked)
			}
			if !whole && (!errors.Is(err, store.ErrInUse) || unmarked != 0 || len(s.Unadopted()) != 1) {
				t.Errorf("ReleaseWhole = %v, %d times unmarked, want ErrInUse, 0", err, unmarked)
			}
		})
	}
}
