package fuse_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fuse"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) {
	// Here, since the null device stays open.
	if err := fuse.OpenPipes(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	testenv.Main(m)
}

var fixtures = []string{"v5-zstd", "v5-lz4-sha256", "v6-zstd", "v6-lz4_block", "v6-zstd-batch", "v6-zstd-sha256-64k"}

// blob is a cache file that is filled, chunk by chunk, when somebody asks.
type blob struct {
	file   *os.File
	reader *rafs.BlobReader
	chunks []rafs.Chunk

	mu    sync.Mutex
	ready map[uint64]bool // by offset
	hold  chan struct{}   // nil: nobody waits
	deaf  bool            // who waits does not hear that its context ends
	err   error
	held  atomic.Int64 // who waits for hold
}

func (b *blob) File() *os.File { return b.file }

func (b *blob) missing(off, n int64) (missing []rafs.Chunk) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.chunks {
		if int64(c.UncompressedOffset) < off+n && int64(c.UncompressedOffset)+int64(c.UncompressedSize) > off && !b.ready[c.UncompressedOffset] {
			missing = append(missing, c)
		}
	}
	return missing
}

func (b *blob) ReadyRange(off, n int64) bool { return len(b.missing(off, n)) == 0 }

func (b *blob) Ensure(ctx context.Context, off, n int64) error {
	b.mu.Lock()
	hold, err, deaf := b.hold, b.err, b.deaf
	b.mu.Unlock()
	if hold != nil {
		b.held.Add(1)
		defer b.held.Add(-1)
		if deaf {
			<-hold
		}
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err != nil {
		return err
	}
	for _, c := range b.missing(off, n) {
		data, err := b.reader.ReadChunk(ctx, c)
		if err != nil {
			return err
		}
		if _, err := b.file.WriteAt(data, int64(c.UncompressedOffset)); err != nil {
			return err
		}
		b.mu.Lock()
		b.ready[c.UncompressedOffset] = true
		b.mu.Unlock()
	}
	return nil
}

// rig is an image with what serves it.
type rig struct {
	t     testing.TB
	img   *rafs.Image
	tree  *fuse.Tree
	blobs []*blob
	dev   *os.File
	table *fuse.Table
	limit time.Duration // of its servers
	dir   string

	runs sync.WaitGroup
}

func openImage(t testing.TB, variant string) *rig {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", variant)
	boot, err := os.Open(filepath.Join(dir, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { boot.Close() })
	info, err := boot.Stat()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t}
	if r.img, err = rafs.Open(boot, info.Size()); err != nil {
		t.Fatal(err)
	}
	if err := fuse.Align(r.img); err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	for n, b := range r.img.Blobs {
		f, err := os.Open(filepath.Join(dir, "blobs", b.ID))
		if err != nil {
			t.Fatal(err)
		}
		c, err := os.OpenFile(filepath.Join(cache, b.ID), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close(); c.Close() })
		reader, err := rafs.OpenBlob(f, b)
		if err != nil {
			t.Fatal(err)
		}
		r.blobs = append(r.blobs, &blob{file: c, reader: reader, chunks: r.img.BlobChunks(n), ready: map[uint64]bool{}})
	}
	if r.tree, err = fuse.NewTree(r.img); err != nil {
		t.Fatal(err)
	}
	return r
}

// server returns another server of the rig's connection.
func (r *rig) server() *fuse.Server {
	c := fuse.Config{Device: r.dev, Table: r.table, Tree: r.tree, Limit: r.limit}
	for _, b := range r.blobs {
		c.Blobs = append(c.Blobs, b)
	}
	s, err := fuse.NewServer(c)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// mount makes a connection and attaches it.
func (r *rig) mount() *fuse.Server {
	r.t.Helper()
	testenv.Root(r.t)
	testenv.Kernel(r.t, "FUSE", fuse.Probe())
	var err error
	if r.dev, err = fuse.Open(); err != nil {
		r.t.Fatal(err)
	}
	if r.table, err = fuse.NewTable(); err != nil {
		r.t.Fatal(err)
	}
	s := r.server() // before the mount, like the daemon's
	d, err := fuse.New(r.dev, fuse.Options{Source: "test"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.run(s)
	r.dir = r.t.TempDir()
	if err := d.Identify(); err != nil {
		r.t.Fatal(err)
	}
	if err := unix.MoveMount(int(d.File().Fd()), "", unix.AT_FDCWD, r.dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		r.t.Fatal(err)
	}
	if alive, err := fuse.Alive(d.BDI, d.BDIInode); !alive || err != nil {
		r.t.Errorf("Alive(%s) = %v, %v", d.BDI, alive, err)
	}
	if err := d.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := unix.Unmount(r.dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			r.t.Error(err)
		}
		eventually(r.t, func() string {
			if alive, err := fuse.Alive(d.BDI, d.BDIInode); alive || err != nil {
				return fmt.Sprintf("after the unmount: Alive(%s) = %v, %v", d.BDI, alive, err)
			}
			return ""
		})
		r.runs.Wait()
		if err := errors.Join(r.dev.Close(), r.table.Close()); err != nil {
			r.t.Error(err)
		}
		fuse.ClosePipes(0)
	})
	return s
}

// run has s answer until the end of the test's mount.
func (r *rig) run(s *fuse.Server) {
	r.runs.Go(func() {
		if err := s.Run(); err != nil {
			r.t.Error(err)
		}
	})
}

func eventually(t testing.TB, ok func() string) {
	t.Helper()
	said := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if said = ok(); said == "" {
			return
		}
	}
	t.Error(said)
}

// compare has the fixtures' own program compare a tree with what the images mean.
func compare(t testing.TB, dir string) error {
	t.Helper()
	fixtures := testenv.Fixtures(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), dir, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("cmp_tree.py %s: %w\n%.2000s", dir, err, out)
	}
	return nil
}

// Every fixture is the tree that it means, before its data is there and after.
func TestFixtures(t *testing.T) {
	for _, variant := range fixtures {
		t.Run(variant, func(t *testing.T) {
			t.Parallel()
			r := openImage(t, variant)
			s := r.mount()
			if err := compare(t, r.dir); err != nil {
				t.Error(err)
			}
			if s.Failed() != 0 || r.table.Pending() != 0 {
				t.Errorf("%d reads failed, %d are pending", s.Failed(), r.table.Pending())
			}
		})
	}
}
