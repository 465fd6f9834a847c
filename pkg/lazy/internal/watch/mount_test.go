package watch_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/fanotify"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/erofs"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/watch"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func needKernel(t testing.TB, dir string) {
	t.Helper()
	testenv.Root(t)
	testenv.Kernel(t, "FAN_PRE_ACCESS", fanotify.Probe(fanotify.FeaturePreAccess))
	testenv.Kernel(t, "EROFS mounts of plain files", erofs.Probe(dir))
	testenv.Kernel(t, "pre-content events of this file system", store.Probe(dir))
}

// image is a fixture with its data files in a state directory.
type image struct {
	dir    string // the fixture's
	img    *nydusimage.Image
	chunks *nydusimage.Chunks
	store  *store.Store
	blobs  []*store.Blob
	index  map[*store.Blob]int
	filled atomic.Int64
}

func openImage(t testing.TB, fixture, state string, o store.Options) *image {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", fixture)
	img, err := nydusimage.OpenFiles(filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs"))
	must(t, err)
	t.Cleanup(func() { must(t, img.Close()) })
	m := &image{dir: dir, img: img, chunks: img.Chunks(), index: map[*store.Blob]int{}}
	t.Cleanup(func() { must(t, m.chunks.Close()) })
	m.store, err = store.Open(state, o)
	must(t, err)
	t.Cleanup(func() { must(t, m.store.Close()) })
	for n, b := range img.RAFS.Blobs {
		blob, err := m.store.OpenBlob(b, img.RAFS.BlobChunks(n))
		must(t, err)
		m.blobs = append(m.blobs, blob)
		m.index[blob] = n
	}
	return m
}

// ensure fills what is missing, from the fixture's blobs.
func (m *image) ensure(ctx context.Context, b *store.Blob, offset, length int64) error {
	missing, err := b.Missing(offset, length)
	if err != nil {
		return err
	}
	r, err := m.chunks.Blob(ctx, m.index[b])
	if err != nil {
		return err
	}
	for _, c := range missing {
		p, err := r.ReadChunk(ctx, c)
		if err != nil {
			return err
		}
		if err := b.Put(c, p); err != nil {
			return err
		}
		m.filled.Add(1)
	}
	return nil
}

// mount mounts the image's tree.
func (m *image) mount(t testing.TB) string {
	t.Helper()
	o := erofs.Options{Bootstrap: filepath.Join(m.dir, "image.boot")}
	for _, b := range m.blobs {
		o.Devices = append(o.Devices, b.Path())
	}
	d, err := erofs.New(t.Context(), o)
	must(t, err)
	dir := t.TempDir()
	must(t, errors.Join(erofs.Attach(d.File(), dir), d.Close()))
	t.Cleanup(func() { must(t, testenv.Unmount(dir)) })
	return dir
}

// start runs a Watcher over the blobs of m until the test ends; then everything that waits
// fails.
func (m *image) start(t testing.TB, c watch.Config) (*watch.Watcher, func()) {
	t.Helper()
	if c.Ensure == nil {
		c.Ensure = m.ensure
	}
	w, err := watch.New(c)
	must(t, err)
	for _, b := range m.blobs {
		must(t, w.Add(b))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	stop := func() {
		if cancel != nil {
			cancel()
			cancel = nil
			must(t, <-done)
		}
	}
	t.Cleanup(func() {
		stop()
		if c.Group.FD() >= 0 {
			_, err := w.DenyAll()
			must(t, err)
		}
		must(t, w.Close())
	})
	return w, stop
}

func newGroup(t testing.TB) *fanotify.Group {
	t.Helper()
	g, err := fanotify.New(fanotify.Options{PreContent: true})
	must(t, err)
	t.Cleanup(func() { must(t, g.Close()) })
	return g
}

func newTable(t testing.TB, slots int) *watch.Table {
	t.Helper()
	table, err := watch.NewTable(slots)
	must(t, err)
	t.Cleanup(func() { must(t, table.Close()) })
	return table
}

// compare holds the mounted tree against what the fixture means, by the fixtures' own tool.
func compare(t testing.TB, dir string) {
	t.Helper()
	if out, err := compareCommand(t, dir).CombinedOutput(); err != nil {
		t.Errorf("cmp_tree.py: %v\n%s", err, out)
	}
}

func compareCommand(t testing.TB, dir string) *exec.Cmd {
	return exec.Command(testenv.Tool(t, "python3"), filepath.Join(testenv.Fixtures(t), "cmp_tree.py"), dir, filepath.Join(testenv.Fixtures(t), "expected.json"))
}

func TestLazyTree(t *testing.T) {
	for _, fixture := range []string{"v6-lz4_block", "v6-zstd", "v6-zstd-batch", "v6-zstd-sha256-64k"} {
		t.Run(fixture, func(t *testing.T) {
			if testing.Short() && fixture != "v6-zstd-batch" {
				t.Skip("one kind of image is enough for -short")
			}
			state := t.TempDir()
			needKernel(t, state)
			group, table := newGroup(t), newTable(t, 0)
			m := openImage(t, fixture, state, store.Options{})
			w, _ := m.start(t, watch.Config{Group: group, Table: table})
			dir := m.mount(t)
			if m.filled.Load() != 0 {
				t.Errorf("mounting fetched %d chunks", m.filled.Load())
			}
			// Some files, then all of them, by several processes at once.
			one := filepath.Join(dir, firstFile(t, dir))
			if _, err := os.ReadFile(one); err != nil {
				t.Error(err)
			}
			some := m.filled.Load()
			var readers []*exec.Cmd
			for range 4 {
				c := compareCommand(t, dir)
				must(t, c.Start())
				readers = append(readers, c)
			}
			for _, c := range readers {
				if err := c.Wait(); err != nil {
					t.Errorf("cmp_tree.py: %v", err)
				}
			}
			compare(t, dir)
			s := w.Stats()
			t.Logf("%d chunks for one file, %d for all; %+v", some, m.filled.Load(), s)
			if some < 1 || some >= m.filled.Load() {
				t.Errorf("%d chunks for one file, %d for all", some, m.filled.Load())
			}
			if s.Events == 0 || s.Denied != 0 || s.Lost != 0 || s.Pending != 0 || s.Ready+s.Waited != s.Events {
				t.Errorf("stats = %+v", s)
			}
			for _, b := range m.blobs {
				if !b.Complete() {
					t.Logf("blob %s is not complete: %d of %d", b.Name(), b.Local(), b.Total())
					must(t, m.ensure(t.Context(), b, 0, b.Size()))
				}
				if settled, err := w.Settle(b); !settled || err != nil {
					t.Errorf("Settle = %t, %v, want true", settled, err)
				}
			}
			dropCaches(t)
			before := w.Stats().Events
			compare(t, dir)
			if after := w.Stats().Events; after != before {
				t.Errorf("%d events of complete blobs", after-before)
			}
		})
	}
}

// firstFile returns a file of the mount that has bytes.
func firstFile(t testing.TB, dir string) string {
	t.Helper()
	var found string
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || found != "" || !d.Type().IsRegular() {
			return err
		}
		if info, err := d.Info(); err != nil || info.Size() < 10 {
			return err
		}
		found = path[len(dir)+1:]
		return nil
	}))
	if found == "" {
		t.Fatal("no file in the mount")
	}
	return found
}

// dropCaches makes the kernel forget clean pages, so that reads reach the data files again.
func dropCaches(t testing.TB) {
	t.Helper()
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0))
}

func TestDenied(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	m := openImage(t, "v6-zstd", state, store.Options{})
	var down atomic.Bool
	down.Store(true)
	w, _ := m.start(t, watch.Config{Group: group, Table: table, Ensure: func(ctx context.Context, b *store.Blob, offset, length int64) error {
		if down.Load() {
			return errors.New("no backend")
		}
		return m.ensure(ctx, b, offset, length)
	}})
	dir := m.mount(t)
	name := filepath.Join(dir, firstFile(t, dir))
	if p, err := os.ReadFile(name); err == nil {
		t.Errorf("read %d bytes that nobody fetched", len(p))
	}
	if s := w.Stats(); s.Denied == 0 {
		t.Errorf("stats = %+v, want denied events", s)
	}
	down.Store(false)
	compare(t, dir) // the same mount goes on
}

// TestNotReadyAfterAll is a fetcher that lies.
func TestNotReadyAfterAll(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	m := openImage(t, "v6-zstd", state, store.Options{})
	m.start(t, watch.Config{Group: group, Table: table, Ensure: func(context.Context, *store.Blob, int64, int64) error { return nil }})
	dir := m.mount(t)
	if p, err := os.ReadFile(filepath.Join(dir, firstFile(t, dir))); err == nil {
		t.Errorf("read %d bytes that nobody fetched", len(p))
	}
}

// TestFileSystems is the way of an image on the other file systems that have pre-content events.
func TestFileSystems(t *testing.T) {
	if testing.Short() {
		t.Skip("ext4 is enough for -short")
	}
	for _, mkfs := range []string{"mkfs.xfs", "mkfs.btrfs"} {
		t.Run(mkfs, func(t *testing.T) {
			state := testenv.MountDisk(t, 400<<20, testenv.Tool(t, mkfs))
			needKernel(t, state)
			group, table := newGroup(t), newTable(t, 0)
			m := openImage(t, "v6-zstd", state, store.Options{})
			w, stop := m.start(t, watch.Config{Group: group, Table: table})
			dir := m.mount(t)
			files := manyFiles(t, dir, 100)
			if _, err := os.ReadFile(files[0]); err != nil {
				t.Error(err)
			}
			// Its guards die, and a mount of it has nothing any more; a new one has it all.
			stop()
			if _, err := w.DenyAll(); err != nil {
				t.Error(err)
			}
			must(t, errors.Join(m.store.Close(), group.Close()))
			next := openImage(t, "v6-zstd", state, store.Options{})
			for _, f := range files[1:] {
				if p, err := os.ReadFile(f); !errors.Is(err, unix.EIO) {
					t.Fatalf("%s: %d bytes, %v; want EIO", f, len(p), err)
				}
			}
			group = newGroup(t)
			w, _ = next.start(t, watch.Config{Group: group, Table: table})
			compare(t, next.mount(t))
			if s := w.Stats(); s.Events == 0 || s.Denied != 0 {
				t.Errorf("stats = %+v", s)
			}
		})
	}
}

// TestDiskFull holds that a read for which there is no room fails, that others go on, and that it works when
// there is room again.
func TestDiskFull(t *testing.T) {
	state := testenv.MountDisk(t, 64<<20, "mkfs.ext4", "-q", "-F", "-m", "0")
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	m := openImage(t, "v6-zstd", state, store.Options{})
	w, _ := m.start(t, watch.Config{Group: group, Table: table})
	dir := m.mount(t)
	files := manyFiles(t, dir, 1<<20)
	want := map[string][]byte{}
	for _, f := range files[:10] {
		p, err := os.ReadFile(f)
		must(t, err)
		want[f] = p
	}
	ballast := filepath.Join(state, "ballast")
	must(t, fillUp(ballast))
	failed := 0
	for _, f := range files[10:] {
		if _, err := os.ReadFile(f); errors.Is(err, unix.EIO) {
			failed++
		} else if err != nil {
			t.Errorf("%s: %v", f, err)
		}
	}
	dropCaches(t)
	for f, p := range want {
		if got, err := os.ReadFile(f); err != nil || !bytes.Equal(got, p) {
			t.Errorf("%s, which was there: %v", f, err)
		}
	}
	t.Logf("%d of %d reads failed; %+v", failed, len(files)-10, w.Stats())
	if failed == 0 {
		t.Error("no read failed on a full disk")
	}
	root, err := os.Open(state)
	must(t, err)
	must(t, os.Remove(ballast))
	must(t, errors.Join(unix.Syncfs(int(root.Fd())), root.Close())) // ext4 gives blocks free when its journal says so
	compare(t, dir)
}

// fillUp writes until the disk is full.
func fillUp(name string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	for size := 1 << 20; size >= 512; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// TestTwoMounts holds that what one mount fetched is there for the next one of the same image.
func TestTwoMounts(t *testing.T) {
	state := t.TempDir()
	needKernel(t, state)
	group, table := newGroup(t), newTable(t, 0)
	m := openImage(t, "v6-zstd", state, store.Options{})
	w, _ := m.start(t, watch.Config{Group: group, Table: table})
	first, second := m.mount(t), m.mount(t)
	compare(t, first)
	filled := m.filled.Load()
	compare(t, second)
	if got := m.filled.Load(); got != filled || w.Stats().Denied != 0 {
		t.Errorf("the second mount fetched %d chunks; %+v", got-filled, w.Stats())
	}
}
