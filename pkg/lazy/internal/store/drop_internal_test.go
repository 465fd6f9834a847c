package store

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestDropOnAFullDisk is a chunk that turned out wrong on a disk without room for new ready bits, and a power cut right after: nobody takes it for
// right.
func TestDropOnAFullDisk(t *testing.T) {
	disk := testenv.NewDisk(t, 16<<20, "mkfs.ext4", "-q", "-F", "-m", "0")
	dir := testenv.MountImage(t, disk, "commit=300")
	s, err := Open(filepath.Join(dir, "state"), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(3, 4096) // without a rest of a block, which would be written
	for i := range chunks {
		chunks[i].Digest = b.Digester.Sum(fill(chunks[i]))
	}
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	must(t, errors.Join(blob.Put(chunks[0], fill(chunks[0])), blob.Put(chunks[1], make([]byte, 4096)), blob.Sync())) // not its bytes
	found, err := blob.Verify(t.Context(), 0)
	must(t, err)
	if len(found.Bad) != 1 || found.Bad[0].Index != 1 {
		t.Fatalf("Verify() = %+v, want the second chunk bad", found)
	}
	fillDisk(t, dir)
	if err := blob.writeReady(blob.durable); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("writeReady() = %v, want ENOSPC: nothing is shown", err)
	}
	t.Logf("Drop() = %v", blob.Drop(found.Bad)) // it may find room where the old bits were
	if blob.Ready(chunks[1]) || !blob.Ready(chunks[0]) {
		t.Errorf("ready %t %t, want true, false", blob.Ready(chunks[0]), blob.Ready(chunks[1]))
	}
	p, err := os.ReadFile(disk)
	must(t, err)
	copied := filepath.Join(t.TempDir(), "copy")
	must(t, os.WriteFile(copied, p, 0o600))
	after, err := Open(filepath.Join(testenv.MountImage(t, copied, ""), "state"), Options{})
	must(t, err)
	defer after.Close()
	again, err := after.OpenBlob(b, chunks)
	must(t, err)
	if again.Ready(chunks[1]) {
		t.Errorf("the wrong chunk is ready after a power cut, %d blocks are claimed", again.Claimed())
	}
	must(t, os.Remove(filepath.Join(dir, "ballast")))
	must(t, errors.Join(blob.Put(chunks[1], fill(chunks[1])), blob.Put(chunks[2], fill(chunks[2])), blob.Sync()))
	if !blob.Durable() {
		t.Error("not durable with room on the disk")
	}
}

// fillDisk writes a file "ballast" until there is no room for another block.
func fillDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	must(t, err)
	for size := 1 << 20; size >= 512; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	must(t, errors.Join(f.Sync(), f.Close()))
}
