package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// numbered returns a blob of n chunks of size bytes; fill returns the bytes of one, never zero.
func numbered(n, size int) (rafs.Blob, []rafs.Chunk) {
	b := rafs.Blob{ID: "numbered"}
	var chunks []rafs.Chunk
	for i := range n {
		chunks = append(chunks, rafs.Chunk{Index: uint32(i), UncompressedOffset: b.UncompressedSize, UncompressedSize: uint32(size)})
		b.UncompressedSize += uint64(size+BlockSize-1) / BlockSize * BlockSize
	}
	return b, chunks
}

func fill(c rafs.Chunk) []byte {
	return bytes.Repeat([]byte{byte(c.Index%255) + 1}, int(c.UncompressedSize))
}

// intact counts the ready chunks, and fails when one has not its bytes.
func intact(t testing.TB, b *Blob, chunks []rafs.Chunk) (ready, wrong int) {
	t.Helper()
	for _, c := range chunks {
		if !b.Ready(c) {
			continue
		}
		ready++
		p := make([]byte, c.UncompressedSize)
		if _, err := b.File().ReadAt(p, int64(c.UncompressedOffset)); err != nil || !bytes.Equal(p, fill(c)) {
			wrong++
		}
	}
	return ready, wrong
}

func TestSizes(t *testing.T) {
	if got := binary.Size(header{}); got != sizeHeader {
		t.Errorf("header has %d bytes, want %d", got, sizeHeader)
	}
	if got := binary.Size(chunkRecord{}); got != sizeChunkRecord {
		t.Errorf("chunk record has %d bytes, want %d", got, sizeChunkRecord)
	}
	if got := binary.Size(fiemap{}); got != sizeFiemap {
		t.Errorf("struct fiemap has %d bytes, want %d", got, sizeFiemap)
	}
	if got := binary.Size(fiemapExtent{}); got != sizeFiemapExtent {
		t.Errorf("struct fiemap_extent has %d bytes, want %d", got, sizeFiemapExtent)
	}
}

// TestDamagedFiles changes state files in every way that a byte can be wrong: the blob starts anew, and never
// takes for ready what is not.
func TestDamagedFiles(t *testing.T) {
	dir := t.TempDir()
	b, chunks := numbered(5, 5000)
	s, err := Open(dir, Options{})
	must(t, err)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	for _, c := range chunks[:3] {
		must(t, blob.Put(c, fill(c)))
	}
	must(t, s.Close())
	state := map[string][]byte{}
	for _, name := range []string{"data", "ready", "chunks"} {
		state[name], err = os.ReadFile(filepath.Join(dir, "blobs", b.ID, name))
		must(t, err)
	}
	try := func(what string, change func(dir string), want int) {
		t.Helper()
		must(t, os.RemoveAll(filepath.Join(dir, "blobs")))
		must(t, os.MkdirAll(filepath.Join(dir, "blobs", b.ID), 0o700))
		for name, p := range state {
			must(t, os.WriteFile(filepath.Join(dir, "blobs", b.ID, name), p, 0o600))
		}
		change(filepath.Join(dir, "blobs", b.ID))
		s, err := Open(dir, Options{})
		must(t, err)
		defer s.Close()
		blob, err := s.OpenBlob(b, chunks)
		must(t, err)
		if ready, wrong := intact(t, blob, chunks); ready != want || wrong != 0 || blob.Name() != b.ID {
			t.Errorf("%s: %d chunks are ready in %s, %d of them wrong; want %d in %s", what, ready, blob.Name(), wrong, want, b.ID)
		}
		must(t, blob.Put(chunks[4], fill(chunks[4])))
		if entries, err := os.ReadDir(filepath.Join(dir, "blobs")); err != nil || len(entries) != 1 {
			t.Errorf("%s: %d directories, %v; want one", what, len(entries), err)
		}
	}
	try("nothing changed", func(string) {}, 3)
	stride := 3
	if testing.Short() {
		stride = 11
	}
	for _, name := range []string{"ready", "chunks"} {
		for at := range state[name] {
			if at > 16 && at%stride != 1 {
				continue // enough of each field
			}
			try(name+" with a flipped byte", func(dir string) {
				p := bytes.Clone(state[name])
				p[at] ^= 1 << (at % 8)
				must(t, os.WriteFile(filepath.Join(dir, name), p, 0o600))
			}, 0)
		}
		for _, size := range []int{0, 1, sizeHeader - 1, sizeHeader, len(state[name]) - 1} {
			try(name+" cut", func(dir string) { must(t, os.Truncate(filepath.Join(dir, name), int64(size))) }, 0)
		}
		try(name+" gone", func(dir string) { must(t, os.Remove(filepath.Join(dir, name))) }, 0)
	}
	try("data gone", func(dir string) { must(t, os.Remove(filepath.Join(dir, "data"))) }, 0)
	try("data cut", func(dir string) { must(t, os.Truncate(filepath.Join(dir, "data"), 3*8192-1)) }, 0)
	try("an empty directory", func(dir string) {
		must(t, errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)))
	}, 0)
}

// TestDamagedWhileOpen is a table that broke while mounts have the blob.
func TestDamagedWhileOpen(t *testing.T) {
	dir := t.TempDir()
	b, chunks := numbered(4, 4096)
	s, err := Open(dir, Options{})
	must(t, err)
	defer s.Close()
	blob, err := s.OpenBlob(b, chunks[:2])
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "blobs", b.ID, "chunks"), []byte("broken"), 0o600))
	other, err := s.OpenBlob(b, chunks)
	must(t, err)
	if other.Name() == blob.Name() || other.Total() != 4*4096 {
		t.Errorf("the other image got %s of %d bytes, want a data file of its own", other.Name(), other.Total())
	}
	must(t, blob.Put(chunks[0], fill(chunks[0])))
	if !blob.Ready(chunks[0]) {
		t.Error("the first image cannot be filled any more")
	}
}

// TestUnguarded holds a data file open, as a mount does, while every process that could guard it is gone.
func TestUnguarded(t *testing.T) {
	dir := t.TempDir()
	b, chunks := numbered(4, 4096)
	whole, wholeChunks := numbered(2, 4096)
	whole.ID = "whole"
	s, err := Open(dir, Options{})
	must(t, err)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	must(t, blob.Put(chunks[3], fill(chunks[3])))
	other, err := s.OpenBlob(whole, wholeChunks)
	must(t, err)
	for _, c := range wholeChunks {
		must(t, other.Put(c, fill(c)))
	}
	user, err := os.Open(blob.Path())
	must(t, err)
	defer user.Close()
	otherUser, err := os.Open(other.Path())
	must(t, err)
	defer otherUser.Close()
	must(t, s.Close())
	s, err = Open(dir, Options{})
	must(t, err)
	if info, err := user.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("the unguarded file has %d bytes, %v; want none", info.Size(), err)
	}
	again, err := s.OpenBlob(b, chunks)
	must(t, err)
	if ready, _ := intact(t, again, chunks); ready != 0 {
		t.Errorf("%d chunks are ready in place of the cut file", ready)
	}
	complete, err := s.OpenBlob(whole, wholeChunks)
	must(t, err)
	if ready, wrong := intact(t, complete, wholeChunks); ready != 2 || wrong != 0 {
		t.Errorf("complete blob in use: %d ready, %d wrong; want 2, 0", ready, wrong)
	}
	aside := func() int {
		found, err := filepath.Glob(filepath.Join(dir, "blobs", asidePrefix+"*"))
		must(t, err)
		return len(found)
	}
	if aside() != 1 {
		t.Errorf("%d directories were put aside, want 1", aside())
	}
	must(t, errors.Join(s.Close(), user.Close()))
	s, err = Open(dir, Options{})
	must(t, err)
	defer s.Close()
	if aside() != 0 {
		t.Error("what was put aside is still there, and nobody uses it")
	}
}

// TestOpenedWhileInUse is a file that was never open here and that somebody needs more of than there is.
func TestOpenedWhileInUse(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(4, 4096)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	user, err := os.Open(blob.Path())
	must(t, err)
	defer user.Close()
	must(t, blob.Put(chunks[1], fill(chunks[1])))
	must(t, blob.Close())
	clear(s.left)
	again, err := s.OpenBlob(b, chunks)
	must(t, err)
	if info, err := user.Stat(); err != nil || info.Size() != 0 || again.Local() != 0 {
		t.Errorf("the file of the old mount has %d bytes, %v; %d are local in the new one", info.Size(), err, again.Local())
	}
}

// TestOpenedAgain is a blob that is opened again while a holder has not closed its descriptor yet: what was there stays, and nobody waits.
func TestOpenedAgain(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(4, 4096)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	user, err := os.Open(blob.Path())
	must(t, err)
	defer user.Close()
	for round := range 3 {
		must(t, blob.Put(chunks[round], fill(chunks[round])))
		must(t, blob.Close())
		if blob, err = s.TryOpenBlob(b, chunks, NewPatience()); err != nil || blob.Local() != int64(round+1)*BlockSize {
			t.Fatalf("round %d: TryOpenBlob() = %v, %v, want what was there", round, blob, err)
		}
	}
	must(t, blob.Close())
	if err := s.Remove(b.ID); !errors.Is(err, ErrInUse) {
		t.Errorf("Remove() = %v, want ErrInUse: nobody knows here whether a mount has all it needs", err)
	}
	must(t, s.putAside(b.ID, false))
	if len(s.left) != 0 {
		t.Errorf("%v is said of a name that is free", s.left)
	}
}

// TestOpenedWhileLeaving is a file that was never open here, and that somebody closes a little later: what it had stays.
func TestOpenedWhileLeaving(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(4, 4096)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	user, err := os.Open(blob.Path())
	must(t, err)
	must(t, blob.Put(chunks[1], fill(chunks[1])))
	must(t, blob.Close())
	clear(s.left)
	left := make(chan error)
	go func() {
		time.Sleep(50 * time.Millisecond)
		left <- user.Close()
	}()
	again, err := s.OpenBlob(b, chunks)
	must(t, errors.Join(err, <-left))
	if !again.Ready(chunks[1]) || again.Local() != BlockSize {
		t.Errorf("%d bytes are local in the next mount, want %d", again.Local(), BlockSize)
	}
}

// TestSyncFails is a disk that loses what was written: it is not ready any more.
func TestSyncFails(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(2, 4096)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	must(t, blob.Put(chunks[0], fill(chunks[0])))
	must(t, blob.Sync())
	must(t, blob.Put(chunks[1], fill(chunks[1])))
	<-blob.Done()
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
	if blob.Complete() || !blob.Ready(chunks[0]) || blob.Ready(chunks[1]) {
		t.Errorf("after the failure: complete %t, ready %t %t; want false, true, false", blob.Complete(), blob.Ready(chunks[0]), blob.Ready(chunks[1]))
	}
	select {
	case <-blob.Done():
		t.Error("Done is closed")
	default:
	}
	must(t, blob.Put(chunks[1], fill(chunks[1])))
	if !blob.Complete() || blob.Durable() {
		t.Errorf("after the chunk was stored again: complete %t, durable %t, want true, false", blob.Complete(), blob.Durable())
	}
	must(t, blob.Sync())
	if !blob.Complete() || !blob.Durable() {
		t.Errorf("and synced: complete %t, durable %t, want true, true", blob.Complete(), blob.Durable())
	}
}

// TestPowerCut copies the disk below the file system, where nothing arrives that was not synced (the journal's
// timer is off and pages are not old enough to be written back), and looks at what a machine would find there
// after the power was cut.
func TestPowerCut(t *testing.T) {
	disk := testenv.NewDisk(t, 64<<20, "mkfs.ext4", "-q", "-F")
	dir := testenv.MountImage(t, disk, "commit=300")
	b, chunks := numbered(600, 20_000)
	s, err := Open(filepath.Join(dir, "state"), Options{})
	must(t, err)
	defer s.Close()
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	after := func() (ready, wrong int) {
		t.Helper()
		p, err := os.ReadFile(disk)
		must(t, err)
		copied := filepath.Join(t.TempDir(), "copy")
		must(t, os.WriteFile(copied, p, 0o600))
		cut := testenv.MountImage(t, copied, "")
		s, err := Open(filepath.Join(cut, "state"), Options{})
		must(t, err)
		defer s.Close()
		blob, err := s.OpenBlob(b, chunks)
		must(t, err)
		return intact(t, blob, chunks)
	}
	synced := 0
	for round := range 3 {
		for n, c := range chunks[round*100 : round*100+100] {
			must(t, blob.Put(c, fill(c)))
			if n == 60 {
				must(t, blob.Sync())
				synced = round*100 + 61
			}
		}
		ready, wrong := after()
		t.Logf("%d chunks stored, %d before the last Sync: %d ready after a power cut, %d wrong", round*100+100, synced, ready, wrong)
		if wrong != 0 || ready < synced {
			t.Errorf("%d chunks ready, %d wrong; want at least %d, 0", ready, wrong, synced)
		}
	}
	// The check can fail: bits that are durable before their data, in a file that is long enough.
	must(t, blob.Put(chunks[599], fill(chunks[599])))
	must(t, blob.Sync())
	for _, c := range chunks[300:] {
		must(t, blob.Put(c, fill(c)))
	}
	must(t, blob.writeReady(blob.snapshot()))
	ready, wrong := after()
	t.Logf("bits without data: %d ready, %d wrong", ready, wrong)
	if wrong == 0 {
		t.Error("bits without data give no wrong chunk: this test sees nothing")
	}
}

// TestDiskFull holds that what does not fit fails by itself.
func TestDiskFull(t *testing.T) {
	dir := testenv.MountDisk(t, 16<<20, "mkfs.ext4", "-q", "-F", "-m", "0")
	s, err := Open(filepath.Join(dir, "state"), Options{})
	must(t, err)
	defer s.Close()
	b, chunks := numbered(1000, 20_000)
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	ballast := filepath.Join(dir, "ballast")
	must(t, os.WriteFile(ballast, make([]byte, 4<<20), 0o600))
	failed := 0
	for _, c := range chunks {
		if err := blob.Put(c, fill(c)); err != nil {
			if failed++; blob.Ready(c) {
				t.Errorf("chunk %d is ready, and Put = %v", c.Index, err)
			}
		}
	}
	ready, wrong := intact(t, blob, chunks)
	if failed == 0 || ready+failed != 1000 || wrong != 0 {
		t.Errorf("%d failed, %d ready, %d of them wrong; want 1000 together", failed, ready, wrong)
	}
	must(t, os.Remove(ballast))
	if err := blob.Sync(); err != nil {
		t.Logf("Sync on a disk that was full: %v", err)
	}
	before := ready
	for _, c := range chunks {
		if !blob.Ready(c) {
			_ = blob.Put(c, fill(c)) // until it is full again
		}
	}
	ready, wrong = intact(t, blob, chunks)
	t.Logf("%d ready on a full disk, %d after 4 MiB were given free", before, ready)
	if ready <= before || wrong != 0 {
		t.Errorf("%d chunks ready after there was room again, %d before; %d wrong", ready, before, wrong)
	}
}

func TestProbe(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	testenv.Kernel(t, "pre-content events", Probe(dir))
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("Probe left %d files, %v", len(entries), err)
	}
	for name, args := range map[string][]string{
		"tmpfs":     {"-t", "tmpfs", "tmpfs"},
		"overlayfs": {"-t", "overlay", "overlay", "-o", "lowerdir=/usr/bin,upperdir=" + sub(t, dir, "u") + ",workdir=" + sub(t, dir, "w")},
	} {
		at := t.TempDir()
		if out, err := exec.Command("mount", append(args, at)...).CombinedOutput(); err != nil {
			testenv.Kernel(t, name, errors.New(string(out)))
		}
		err := Probe(at)
		must(t, testenv.Unmount(at))
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte(name)) {
			t.Errorf("Probe on %s = %v, want an error that names it", name, err)
		} else {
			t.Log(err)
		}
	}
	if err := Probe(filepath.Join(dir, "no", "such")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Probe of nothing = %v", err)
	}
}

func sub(t *testing.T, dir, name string) string {
	t.Helper()
	p := filepath.Join(dir, name)
	must(t, os.Mkdir(p, 0o700))
	return p
}
