package builder

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// tarOf returns the tar of one file with data at islands, the rest of size being a hole, as a sparse entry or whole.
func tarOf(t *testing.T, size int64, sparse bool, islands ...int64) []byte {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	err = f.Truncate(size)
	for _, at := range islands {
		_, werr := f.WriteAt([]byte("island!"), at)
		err = errors.Join(err, werr)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	args := []string{"-C", dir, "--format=posix", "--mtime=@1000", "--owner=0", "--group=0", "--mode=644", "-cf", "-", "file"}
	if sparse {
		args = append([]string{"--sparse"}, args...)
	}
	b, err := exec.Command(testenv.Tool(t, "tar"), args...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestHoles: a file with holes makes the blob that the same file makes without them, whatever the islands do to chunks
// and to the steps of reading, and however many workers there are.
func TestHoles(t *testing.T) {
	t.Parallel()
	const chunk = 4 * holeStep
	for name, islands := range map[string][]int64{
		"none":            nil,
		"begin":           {0},
		"end":             {9*chunk + 93},
		"second step":     {3*chunk + holeStep, 5*chunk + 2*holeStep - 3},
		"across chunks":   {4*chunk - 3},
		"last of a chunk": {6*chunk - 7},
		"many":            {chunk, 2*chunk + 1, 2*chunk + 3*holeStep + 9, 7 * chunk},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 9*chunk + 100
			dense, sparse := tarOf(t, size, false, islands...), tarOf(t, size, true, islands...)
			if len(sparse) > size/2 {
				t.Fatalf("the tar has %d bytes: are there holes?", len(sparse))
			}
			for _, o := range []Options{{ChunkSize: chunk}, {ChunkSize: chunk, Compressor: rafs.CompressorNone}, {ChunkSize: 4096, BatchSize: 4 * 4096}} {
				o.FSVersion = rafs.V6
				want := packed(t, dense, o, 1)
				for _, workers := range []int{1, 3} {
					if !bytes.Equal(packed(t, sparse, o, workers), want) {
						t.Errorf("%+v: another blob of the sparse tar with %d workers", o, workers)
					}
				}
			}
		})
	}
}

func packed(t *testing.T, layer []byte, o Options, workers int) []byte {
	t.Helper()
	o.Workers = workers
	var b bytes.Buffer
	if _, err := PackLayer(t.Context(), &b, bytes.NewReader(layer), o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// countJob counts what the workers are given.
type countJob struct {
	job
	bytes *int
}

func (j countJob) run(enc *rafs.Encoder) {
	*j.bytes += len(j.job.(*batch).raw)
	j.job.run(enc)
}

// TestHoleWork: what is hashed and compressed of a large hole is one chunk and the file's tail.
func TestHoleWork(t *testing.T) {
	t.Parallel()
	const chunk, size = 1 << 20, 1<<30 + 5
	layer := &countingReader{r: bytes.NewReader(tarOf(t, size, true))}
	o, err := Options{FSVersion: rafs.V6, ChunkSize: chunk, Workers: 1}.complete()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	blob, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Version: rafs.V6, Compressor: o.Compressor, Digester: o.Digester, ChunkSize: chunk})
	if err != nil {
		t.Fatal(err)
	}
	enc, err := rafs.NewEncoder(o.Compressor, rafs.LevelDefault)
	if err != nil {
		t.Fatal(err)
	}
	p := &pool{jobs: make(chan job, 1), workers: 1}
	ck := newChunker(p, newBatches(1, 1), o, nil, 0, blob)
	ck.place = func() int64 { return layer.n }
	reader := layerReader{tree: newTree(), sink: ck, chunkSize: chunk}
	var worked int
	g, ctx := errgroup.WithContext(t.Context())
	g.Go(func() error {
		for j := range p.jobs {
			countJob{j, &worked}.run(enc)
		}
		return nil
	})
	g.Go(func() error { return ck.commit(ctx) })
	g.Go(func() error {
		defer p.close()
		return errors.Join(reader.read(ctx, layer), ck.close(ctx))
	})
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	file := reader.tree.root.dir.get("file").ino
	if n := len(file.Chunks); n != size/chunk+1 || file.Chunks[0] != file.Chunks[n-2] || file.Chunks[0] == file.Chunks[n-1] {
		t.Errorf("the file has %d chunks, want %d, equal but for the last", n, size/chunk+1)
	}
	if want := size % chunk; worked != want {
		t.Errorf("the workers were given %d bytes, want the %d of the tail", worked, want)
	}
}

// TestHoleCancelled: a hole ends when its context does.
func TestHoleCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := PackLayer(ctx, &bytes.Buffer{}, bytes.NewReader(tarOf(t, 1<<40, true)), Options{FSVersion: rafs.V6, ChunkSize: 1 << 20}); !errors.Is(err, context.Canceled) {
		t.Errorf("PackLayer = %v, want %v", err, context.Canceled)
	}
}
