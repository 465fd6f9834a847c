package store_test

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// reflinking are the commands that make file systems that share blocks between files and have pre-content events.
var reflinking = []string{"mkfs.xfs", "mkfs.btrfs"}

// other returns a blob with the chunks of another one in the opposite order, and which of them is where.
func other(b rafs.Blob, chunks []rafs.Chunk) (rafs.Blob, []rafs.Chunk) {
	o := rafs.Blob{ID: strings.Repeat("cd", 32), Digester: b.Digester}
	var out []rafs.Chunk
	for _, c := range slices.Backward(chunks) {
		c.UncompressedOffset, c.Index = o.UncompressedSize, uint32(len(out))
		o.UncompressedSize += (uint64(c.UncompressedSize) + store.BlockSize - 1) / store.BlockSize * store.BlockSize
		out = append(out, c)
	}
	return o, out
}

// What is cloned is right and takes no room; what is wrong on the lender's disk does not get ready.
//
// Not beside others, as all that starts programs here: a child has every file of this process open until it is one of its own, and
// what a parallel test has closed is in use meanwhile.
func TestClone(t *testing.T) {
	for _, mkfs := range reflinking {
		t.Run(mkfs, func(t *testing.T) {
			dir := testenv.MountDisk(t, 400<<20, testenv.Tool(t, mkfs))
			s := open(t, filepath.Join(dir, "state"), store.Options{})
			b, chunks, data := layout(1, 4095, 4096, 4097, 1<<20, 5000, 300_000, 6<<20)
			info, mirror := other(b, chunks)
			from, to := openBlob(t, s, b, chunks), openBlob(t, s, info, mirror)
			last := len(chunks) - 1
			if got, err := to.Clone(mirror[last], from, 0); got != store.CloneUnable || err != nil {
				t.Errorf("Clone() of what is not ready = %v, %v, want CloneUnable", got, err)
			}
			for i := range chunks {
				must(t, from.Put(chunks[i], data[i]))
			}
			must(t, from.Sync())
			const bad = 5 // with a rest of its last block
			spoil(t, from, chunks[bad])
			before := freeBlocks(t, dir)
			for i := range chunks {
				c := mirror[last-i]
				got, err := to.Clone(c, from, int64(chunks[i].UncompressedOffset))
				must(t, err)
				if want := i != bad; (got == store.CloneReady) != want || (got == store.CloneWrong) == want || to.Ready(c) != want {
					t.Errorf("Clone(%d) = %v, ready %t; want it wrong: %t", i, got, to.Ready(c), !want)
				}
			}
			must(t, to.Sync())
			if took := before - freeBlocks(t, dir); took > 1<<20 {
				t.Errorf("clones of %d bytes took %d on disk", b.UncompressedSize, took)
			}
			must(t, to.Put(mirror[last-bad], data[bad]))
			mirrored := make([][]byte, len(data))
			for i := range data {
				mirrored[last-i] = data[i]
			}
			if n := holds(t, to, mirror, mirrored); n != len(mirror) {
				t.Errorf("%d chunks are ready, want %d", n, len(mirror))
			}
			if c, err := to.Verify(t.Context(), 0); err != nil || len(c.Bad) != 0 || c.Chunks != int64(len(mirror)) {
				t.Errorf("Verify() = %+v, %v: the rest of a block may be of the wrong chunk", c, err)
			}
			// The blocks of both count once, also when one goes.
			for _, e := range mustEntries(t, s) {
				if want := int64(b.UncompressedSize) - 1<<20; e.Shared < want || e.Shared > e.Bytes {
					t.Errorf("%+v, want %d bytes shared or more", e, want)
				}
			}
			u, err := s.Usage(store.Live{})
			must(t, err)
			if most := int64(b.UncompressedSize) + 1<<20; u.Blobs > most || u.InUse != u.Blobs {
				t.Errorf("Usage() = %+v, want at most %d bytes, all of them in use", u, most)
			}
			// Each has its own bytes from the first write on.
			if got, err := to.Clone(mirror[0], from, int64(chunks[last].UncompressedOffset)); got != store.CloneUnable || err != nil {
				t.Errorf("Clone() of what is ready = %v, %v, want CloneUnable", got, err)
			}
			must(t, from.Drop(chunks[:1]))
			_, err = from.File().WriteAt(bytes.Repeat([]byte{7}, 1<<20), int64(chunks[4].UncompressedOffset))
			must(t, err)
			holds(t, to, mirror, mirrored)
			must(t, from.Close())
			must(t, to.Close())
			free := freeBlocks(t, dir)
			first, err := s.Collect(t.Context(), store.Policy{Age: 1}, store.Live{Blobs: map[string]bool{b.ID: true}})
			must(t, err)
			if len(first.Removed) != 1 || first.Freed > 3<<20 {
				t.Errorf("Collect() = %+v, want one removed, and little freed: the other one has the blocks", first)
			}
			second, err := s.Collect(t.Context(), store.Policy{Age: 1}, store.Live{})
			must(t, err)
			if len(second.Removed) != 1 || second.Freed < int64(b.UncompressedSize) {
				t.Errorf("Collect() = %+v, want the other one removed, with all of its blocks", second)
			}
			// xfs gives the blocks of removed files free a little later.
			freed := first.Freed + second.Freed
			for until := time.Now().Add(20 * time.Second); freeBlocks(t, dir)-free < freed-1<<20; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(until) {
					t.Fatalf("%d bytes are free on the disk, want the %d that two collections say", freeBlocks(t, dir)-free, freed)
				}
			}
		})
	}
}

// spoil changes the first byte of a chunk on the disk.
func spoil(t *testing.T, b *store.Blob, c rafs.Chunk) {
	t.Helper()
	flip(t, b.Path(), int64(c.UncompressedOffset))
	must(t, b.File().Sync())
}

// freeBlocks returns the bytes that are free where dir is.
func freeBlocks(t *testing.T, dir string) int64 {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	must(t, unix.Syncfs(int(f.Fd())))
	var st unix.Statfs_t
	must(t, unix.Fstatfs(int(f.Fd()), &st))
	must(t, f.Close())
	return int64(st.Bfree) * st.Bsize
}

// Clones and Puts of the same chunks at once: what is ready is right at every moment.
func TestCloneBesidePut(t *testing.T) {
	dir := testenv.MountDisk(t, 400<<20, testenv.Tool(t, reflinking[0]))
	s := open(t, filepath.Join(dir, "state"), store.Options{})
	sizes := make([]int, 60)
	for i := range sizes {
		sizes[i] = 5000 + i*1000
	}
	b, chunks, data := layout(sizes...)
	info, mirror := other(b, chunks)
	from, to := openBlob(t, s, b, chunks), openBlob(t, s, info, mirror)
	last := len(chunks) - 1
	for i := range chunks {
		must(t, from.Put(chunks[i], data[i]))
	}
	must(t, from.Sync())
	for i := range chunks { // every second one is wrong
		if i%2 == 0 {
			spoil(t, from, chunks[i])
		}
	}
	var work sync.WaitGroup
	for i := range chunks {
		c := mirror[last-i]
		work.Go(func() {
			if _, err := to.Clone(c, from, int64(chunks[i].UncompressedOffset)); err != nil {
				t.Error(err)
			}
		})
		work.Go(func() {
			if err := to.Put(c, data[i]); err != nil {
				t.Error(err)
			}
		})
		work.Go(func() {
			for !to.Ready(c) {
				runtime.Gosched()
			}
			p := make([]byte, len(data[i]))
			if _, err := to.File().ReadAt(p, int64(c.UncompressedOffset)); err != nil || !bytes.Equal(p, data[i]) {
				t.Errorf("chunk %d is ready and has other bytes (%v)", i, err)
			}
		})
	}
	work.Wait()
	must(t, from.Close())
	must(t, to.Close())
}

// A clone that was cut short leaves another chunk's bytes behind: what is stored there has zeros behind its end.
func TestPutAfterClone(t *testing.T) {
	dir := testenv.MountDisk(t, 400<<20, testenv.Tool(t, reflinking[0]))
	s := open(t, filepath.Join(dir, "state"), store.Options{})
	b, chunks, data := layout(5000, 4096, 1)
	blob := openBlob(t, s, b, chunks)
	_, err := blob.File().WriteAt(bytes.Repeat([]byte{9}, int(b.UncompressedSize)), 0)
	must(t, err)
	must(t, blob.Close())
	blob = openBlob(t, s, b, chunks)
	for i := range chunks {
		must(t, blob.Put(chunks[i], data[i]))
	}
	if c, err := blob.Verify(t.Context(), 0); err != nil || len(c.Bad) != 0 || c.Chunks != 3 {
		t.Errorf("Verify() = %+v, %v, want three good chunks", c, err)
	}
	must(t, blob.Close())
}

// Who looks which blocks are shared opens data files without the store's lock: who opens a blob meanwhile does not take that for a mount that nobody guards.
func TestEntriesBesideOpens(t *testing.T) {
	dir := testenv.MountDisk(t, 400<<20, testenv.Tool(t, reflinking[0]))
	s := open(t, filepath.Join(dir, "state"), store.Options{})
	b, chunks, data := layout(5000, 70_000)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Close())
	over := make(chan struct{})
	var work sync.WaitGroup
	for range 2 {
		work.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				if entries, err := s.Entries(false); err != nil || len(entries) != 1 || entries[0].Aside {
					t.Errorf("Entries() = %+v, %v, want the blob", entries, err)
					return
				}
			}
		})
	}
	for range 300 {
		blob := openBlob(t, s, b, chunks)
		if n := holds(t, blob, chunks, data); n != 1 {
			t.Errorf("%d chunks are ready, want 1: it was begun anew", n)
		}
		must(t, blob.Close())
	}
	close(over)
	work.Wait()
}

// Where files cannot share blocks, nothing is tried twice, and what is copied is right.
func TestCloneUnable(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, data := layout(5000, 70_000)
	info, mirror := other(b, chunks)
	from, to := openBlob(t, s, b, chunks), openBlob(t, s, info, mirror)
	for i := range chunks {
		must(t, from.Put(chunks[i], data[i]))
	}
	for i := range chunks {
		got, err := to.Clone(mirror[1-i], from, int64(chunks[i].UncompressedOffset))
		if err != nil || (got == store.CloneReady) != to.Ready(mirror[1-i]) || got == store.CloneWrong {
			t.Errorf("Clone() = %v, %v, ready %t", got, err, to.Ready(mirror[1-i]))
		}
	}
	if got, err := to.Clone(mirror[0], from, 1); got != store.CloneUnable || err != nil {
		t.Errorf("Clone() from within a block = %v, %v, want CloneUnable", got, err)
	}
	must(t, from.Close())
	must(t, to.Close())
}

func mustEntries(t *testing.T, s *store.Store) []store.Entry {
	t.Helper()
	entries, err := s.Entries(false)
	must(t, err)
	return entries
}
