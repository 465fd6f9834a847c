package watch_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/watch"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestEverybodyDies is the end of every process that had the group. The next start makes
// what is not there unreadable, and takes none of it for its own.
func TestEverybodyDies(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	m := openImage(t, "v6-zstd", state, store.Options{})
	w, stop := m.start(t, watch.Config{Group: group, Table: table})
	dir := m.mount(t)
	files := manyFiles(t, dir, 200)
	read := files[:20]
	want := map[string][]byte{}
	for _, f := range read {
		p, err := os.ReadFile(f)
		must(t, err)
		want[f] = p
	}
	stop()
	if _, err := w.DenyAll(); err != nil {
		t.Error(err)
	}
	must(t, errors.Join(m.store.Close(), group.Close()))
	again, err := store.Open(state, store.Options{})
	must(t, err)
	defer again.Close()
	dropCaches(t)
	failed := 0
	for _, f := range files {
		p, err := os.ReadFile(f)
		switch {
		case errors.Is(err, unix.EIO):
			failed++
		case err != nil:
			t.Errorf("%s: %v, want EIO", f, err)
		case !bytes.Equal(p, want[f]):
			t.Errorf("%s: %d bytes that nobody fetched", f, len(p))
		}
	}
	if failed == 0 {
		t.Error("no read failed")
	}
	t.Logf("%d of %d reads failed", failed, len(files))
	// The image can be mounted anew, beside the broken mount, and the old files are
	// deleted once that is gone.
	blob, err := again.OpenBlob(m.img.RAFS.Blobs[0], m.img.RAFS.BlobChunks(0))
	must(t, err)
	if blob.Local() != 0 {
		t.Errorf("Local = %d in a new data file", blob.Local())
	}
}

// TestMarkWithoutKeeper is a mount whose mark lives, and whose descriptors were not kept: opening the state
// directory does not wait for ever, its reads fail, and the image can be mounted anew.
func TestMarkWithoutKeeper(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	m := openImage(t, "v6-zstd", state, store.Options{})
	w, stop := m.start(t, watch.Config{Group: group, Table: table})
	files := manyFiles(t, m.mount(t), 20)
	if _, err := os.ReadFile(files[0]); err != nil {
		t.Error(err)
	}
	stop()
	fd, err := unix.FcntlInt(m.store.LockFile().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	must(t, errors.Join(w.Close(), m.store.Close()))
	next := openImage(t, "v6-zstd", state, store.Options{Lock: os.NewFile(uintptr(fd), "lock")})
	again, _ := next.start(t, watch.Config{Group: group, Table: table})
	dir := next.mount(t)
	compare(t, dir)
	for _, f := range files[1:] {
		if p, err := os.ReadFile(f); !errors.Is(err, unix.EIO) {
			t.Fatalf("%s: %d bytes, %v; want EIO", f, len(p), err)
		}
	}
	if again.Stats().Denied == 0 {
		t.Errorf("stats = %+v, want denied events of the old mount", again.Stats())
	}
}

// TestMarkedTooEarly is a mark that an earlier process left on a data file that no mount has.
func TestMarkedTooEarly(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	s, err := store.Open(state, store.Options{})
	must(t, err)
	defer s.Close()
	w, err := watch.New(watch.Config{Group: group, Table: table})
	must(t, err)
	defer w.Close()
	blob, err := s.OpenBlob(synthetic(4))
	must(t, err)
	must(t, group.Mark(fanotify.Mark{Kind: fanotify.Inode, Mask: fanotify.PreAccess, Dir: int(blob.File().Fd())}))
	must(t, blob.Close())
	blob, err = s.OpenBlob(synthetic(4))
	must(t, err)
	if err := w.Add(blob); !errors.Is(err, watch.ErrMarked) {
		t.Errorf("Add = %v, want ErrMarked", err)
	}
	must(t, blob.Close())
	blob, err = s.OpenBlob(synthetic(4))
	must(t, err)
	must(t, w.Add(blob))
	must(t, synthesize(blob, 0, blob.Size())) // raises no event that nobody answers
	must(t, w.Remove(blob))
}

// manyFiles returns at most n regular files of the mount that are not empty.
func manyFiles(t testing.TB, dir string, n int) []string {
	t.Helper()
	var out []string
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || len(out) >= n {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Size() > 0 {
			out = append(out, path)
		}
		return err
	}))
	return out
}

// TestBeyondTheEnd holds what the rules of package store lean on: EROFS fails a read of a
// block that lies behind the end of its device file, also when the blocks before it are
// there.
func TestBeyondTheEnd(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	m := openImage(t, "v6-zstd", state, store.Options{})
	dir := m.mount(t) // without a mark: nobody is asked
	for _, f := range manyFiles(t, dir, 100) {
		if p, err := os.ReadFile(f); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %d bytes, %v; want EIO from an empty device", f, len(p), err)
		}
	}
	name, c := bigChunk(t, m)
	for _, b := range m.blobs {
		must(t, m.ensure(t.Context(), b, 0, b.Size()))
	}
	whole, err := os.ReadFile(filepath.Join(dir, name))
	must(t, err)
	for _, blocks := range []int64{16, 3, 1, 0} {
		must(t, m.blobs[c.Blob].File().Truncate(int64(c.UncompressedOffset)+blocks*store.BlockSize))
		dropCaches(t)
		f, err := os.Open(filepath.Join(dir, name))
		must(t, err)
		p := make([]byte, c.UncompressedSize)
		n, err := f.ReadAt(p, 0)
		if !bytes.Equal(p[:n], whole[:n]) || err == nil {
			t.Errorf("device ends %d blocks into a file: read %d bytes, the same %t, error %v; want only right ones and an error", blocks, n, bytes.Equal(p[:n], whole[:n]), err)
		}
		t.Logf("device ends %d blocks into a file: %d bytes, %v", blocks, n, err)
		must(t, f.Close())
	}
}

// bigChunk returns the path and the first chunk of a file whose first chunk is at its
// beginning and has many blocks.
func bigChunk(t testing.TB, m *image) (string, rafs.Chunk) {
	t.Helper()
	var name string
	var chunk rafs.Chunk
	must(t, m.img.RAFS.Walk(func(path string, ino *rafs.Inode) error {
		if len(ino.Chunks) > 0 && ino.Chunks[0].UncompressedSize > chunk.UncompressedSize {
			name, chunk = path, ino.Chunks[0]
		}
		return nil
	}))
	if chunk.UncompressedSize < 32*store.BlockSize {
		t.Fatalf("the largest chunk has %d bytes", chunk.UncompressedSize)
	}
	return name, chunk
}
