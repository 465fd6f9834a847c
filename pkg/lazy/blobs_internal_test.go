package lazy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// place is a blob of plain chunks in memory, or a place that is down.
type place struct {
	data  []byte
	down  error
	again bool // what is down may come back
	away  atomic.Bool
	asked atomic.Int64
	last  atomic.Int64 // offset of the last request
}

func (p *place) Range(_ context.Context, r fill.Request) (io.ReadCloser, error) {
	p.asked.Add(1)
	p.last.Store(r.Offset)
	if p.away.Load() {
		return nil, errors.New("it is away")
	}
	if p.down != nil {
		return nil, p.down
	}
	return io.NopCloser(bytes.NewReader(p.data[r.Offset:][:r.Length])), nil
}

func (p *place) Retry(error) fill.Retry { return fill.Retry{Again: p.again} }

// plain returns a blob of n plain chunks of one block each, and its bytes.
func plain(n int) (rafs.Blob, []rafs.Chunk, []byte) {
	b := rafs.Blob{
		ID: "plain", Digester: rafs.DigesterSHA256, Compressor: rafs.CompressorNone, ChunkSize: store.BlockSize,
		CompressedSize: uint64(n) * store.BlockSize, UncompressedSize: uint64(n) * store.BlockSize, ChunkCount: uint32(n),
	}
	data := make([]byte, n*store.BlockSize)
	chunks := make([]rafs.Chunk, n)
	for i := range chunks {
		at := uint64(i) * store.BlockSize
		p := data[at:][:store.BlockSize]
		for j := range p {
			p[j] = byte(i*7 + j + 1)
		}
		chunks[i] = rafs.Chunk{
			Digest: b.Digester.Sum(p), Index: uint32(i), CompressedOffset: at, UncompressedOffset: at,
			CompressedSize: store.BlockSize, UncompressedSize: store.BlockSize,
		}
	}
	return b, chunks, data
}

// served is a daemon without a kernel: it fills blobs and watches nothing.
func served(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{blobs: map[string]*blob{}, o: DaemonOptions{Limit: time.Minute}}
	var err error
	d.store, err = store.Open(t.TempDir(), store.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, d.store.Close()) })
	d.fill = fill.New(fill.Options{Limit: time.Minute, Backoff: 10 * time.Millisecond, Ahead: -1})
	t.Cleanup(d.fill.Close)
	return d
}

// use makes an image with these chunks, from src, a user of the blob.
func (d *daemon) use(t *testing.T, info rafs.Blob, chunks []rafs.Chunk, src fill.Source) *blob {
	t.Helper()
	st, err := d.store.OpenBlob(info, chunks)
	must(t, err)
	d.blobMu.Lock()
	defer d.blobMu.Unlock()
	b := d.blobs[st.Name()]
	if b == nil {
		b = &blob{st: st}
		d.blobs[st.Name()] = b
	}
	must(t, d.attachSource(&use{b: b, src: src, share: d.fill.Share()}, info, chunks))
	return b
}

// ensureSoon is ensure, which is to take no time to speak of.
func (d *daemon) ensureSoon(t *testing.T, st *store.Blob, off, n int64) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- d.ensure(ctx, st, off, n) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		t.Fatal("a reader waits still, after 30 s")
		return nil
	}
}

// A mount that is made or ended holds blobMu, for as long as a disk takes to sync. Readers of all mounts go on.
func TestReadersPassWhoOpensBlobs(t *testing.T) {
	t.Parallel()
	d := served(t)
	info, chunks, data := plain(4)
	b := d.use(t, info, chunks, &place{data: data})
	d.blobMu.Lock()
	err := d.ensureSoon(t, b.st, store.BlockSize, store.BlockSize)
	d.blobMu.Unlock()
	got := make([]byte, store.BlockSize)
	if _, rerr := b.st.File().ReadAt(got, store.BlockSize); errors.Join(err, rerr) != nil || !bytes.Equal(got, data[store.BlockSize:][:store.BlockSize]) {
		t.Errorf("ensure = %v, read = %v, right bytes: %t", err, rerr, bytes.Equal(got, data[store.BlockSize:][:store.BlockSize]))
	}
	d.blobMu.Lock()
	defer d.blobMu.Unlock()
	m := &mount{uses: []*use{{b: b, f: b.fillings[0]}}}
	var out Mount
	d.measure(m, &out)
	if out.Local != store.BlockSize || len(d.blobsOf(m)) != 1 {
		t.Errorf("measure = %+v, want one block local", out)
	}
}

// Two images use different chunks of a blob, and the registry of one of them is dead.
func TestDeadSourceOfAnotherImage(t *testing.T) {
	t.Parallel()
	errDead := errors.New("the registry is dead")
	for name, again := range map[string]bool{"for good": false, "for the moment": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := served(t)
			info, chunks, data := plain(4)
			dead, live := &place{down: errDead, again: again}, &place{data: data}
			b := d.use(t, info, chunks[:3], dead)
			if two := d.use(t, info, chunks[1:], live); two != b || len(b.fillings) != 2 {
				t.Fatalf("%d sets of chunks fill the blob, want 2 of one blob", len(b.fillings))
			}
			// What both use, and what the second uses alone, in one read and in two.
			for _, r := range []struct{ off, n int64 }{{1, 1}, {3, 1}, {1, 3}} {
				if err := d.ensureSoon(t, b.st, r.off*store.BlockSize, r.n*store.BlockSize); err != nil {
					t.Errorf("ensure of %d blocks from %d on = %v", r.n, r.off, err)
				}
			}
			got := make([]byte, 3*store.BlockSize)
			if _, err := b.st.File().ReadAt(got, store.BlockSize); err != nil || !bytes.Equal(got, data[store.BlockSize:]) {
				t.Errorf("read = %v, right bytes: %t", err, bytes.Equal(got, data[store.BlockSize:]))
			}
			if dead.asked.Load() == 0 || live.asked.Load() == 0 {
				t.Errorf("%d requests of the dead source, %d of the other, want some", dead.asked.Load(), live.asked.Load())
			}
			if failed := b.fillings[1].fb.Stats().Failed; failed != 0 {
				t.Errorf("%d reads failed at the source that lives", failed)
			}
			if again {
				return // the reader waits, as for any registry that may come back
			}
			if err := d.ensureSoon(t, b.st, 0, store.BlockSize); !errors.Is(err, errDead) {
				t.Errorf("ensure of what only the dead source has = %v, want its error", err)
			}
		})
	}
}

// What is there needs no source, and what nobody has is an error.
func TestEnsureWithoutSource(t *testing.T) {
	t.Parallel()
	d := served(t)
	info, chunks, data := plain(4)
	st, err := d.store.OpenBlob(info, chunks)
	must(t, err)
	must(t, st.Put(chunks[2], data[2*store.BlockSize:][:store.BlockSize]))
	if err := d.ensureSoon(t, st, 2*store.BlockSize, store.BlockSize); err != nil {
		t.Errorf("ensure of what is there = %v", err)
	}
	if err := d.ensureSoon(t, st, 2*store.BlockSize, 2*store.BlockSize); err == nil {
		t.Error("ensure of what no mount has = nil")
	}
}

// A bootstrap that claims more than there may be is refused before anything is opened.
func TestHostileBootstrap(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", "v6-zstd")
	tree, err := readBootstrap(filepath.Join(dir, "image.boot"))
	must(t, err)
	tree.Blobs = append(tree.Blobs, tree.Blobs[0])
	last := len(tree.Blobs) - 1
	third := &tree.Blobs[last]
	third.ID, third.MetaUncompressed, third.MetaCompressed = strings.Repeat("3", 64), 16, 16
	for i := range tree.Blobs {
		tree.Blobs[i].UncompressedSize = 256 << 30
	}
	must(t, tree.Walk(func(_ string, ino *rafs.Inode) error { // a blob has chunks
		if len(ino.Chunks) == 1 && ino.Chunks[0].Blob == 0 && last > 0 {
			ino.Chunks[0].Blob, ino.Chunks[0].Index, tree.Blobs[last].ChunkCount, last = uint16(last), 0, 1, 0
		}
		return nil
	}))
	var boot bytes.Buffer
	_, err = rafs.WriteBootstrap(&boot, tree)
	must(t, err)
	name := filepath.Join(t.TempDir(), "image.boot")
	must(t, os.WriteFile(name, boot.Bytes(), 0o600))
	d := &daemon{} // with nothing that could be used
	m, detached, err := d.mount(t.Context(), &Request{Bootstrap: name, BlobDir: filepath.Join(dir, "blobs")}, "/nowhere")
	if m != nil || detached != nil || !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "want at most 549755813888 in all") {
		t.Errorf("mount of %d blobs of 256 GiB = %v, %v, %v, want ErrUnsupported", len(tree.Blobs), m, detached, err)
	}
}
