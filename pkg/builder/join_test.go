package builder_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// manyLayers are more than the format has blobs for: of several sizes, with chunks that some share, links and whiteouts.
func manyLayers(t testing.TB, n int) [][]byte {
	t.Helper()
	shared := string(noise(9, testChunk))
	var out [][]byte
	for i := range n {
		files := []file{
			dir("d", 0o755), reg(fmt.Sprintf("d/f%03d", i), fmt.Sprintf("layer %d", i)),
			reg(fmt.Sprintf("d/g%03d", i), shared+strings.Repeat(fmt.Sprint("layer", i), 900+i%7*1000)),
		}
		switch {
		case i%50 == 49:
			files = append(files, reg(fmt.Sprintf("d/.wh.f%03d", i-1), ""), link(fmt.Sprintf("d/link%03d", i), fmt.Sprintf("d/g%03d", i-1)))
		case i%60 == 0:
			files = append(files, reg(fmt.Sprintf("d/big%03d", i), string(noise(uint64(i), 20*testChunk+i))))
		}
		out = append(out, makeTar(t, files...))
	}
	return out
}

// TestManyLayers converts 300 layers into the 254 blobs that the format counts: the smallest share one.
func TestManyLayers(t *testing.T) {
	testenv.Root(t)
	layers := manyLayers(t, 300)
	src := tars(t, layers...)
	var ref []builder.Layer
	for _, l := range layers {
		ref = append(ref, gzLayer(t, l))
	}
	refs := atRandom(t, source(t, ref...))
	var want map[string]item
	for name, c := range map[string]struct {
		src builder.Source
		o   builder.Options
	}{
		"v6":         {src, builder.Options{Compressor: rafs.CompressorZstd, ChunkSize: testChunk}},
		"v5":         {src, builder.Options{Compressor: rafs.CompressorZstd, ChunkSize: testChunk, FSVersion: rafs.V5}},
		"prefetched": {src, builder.Options{Compressor: rafs.CompressorLZ4, ChunkSize: testChunk, List: listOf("/d/f000", "/d/g123", "/d/big240"), VerifyData: true}},
		"batches":    {src, builder.Options{Compressor: rafs.CompressorZstd, ChunkSize: testChunk, BatchSize: 4 * testChunk, VerifyData: true}},
		"referred":   {refs, builder.Options{Compressor: rafs.CompressorZstd, ChunkSize: testChunk, OCIRef: true, List: listOf("/d/f000", "/d/g123"), VerifyData: true}},
	} {
		if raceEnabled && name != "prefetched" && name != "referred" {
			t.Logf("left out under the race detector: %s", name)
			continue
		}
		t.Run(name, func(t *testing.T) {
			res := convert(t, c.src, c.o)
			joined := 47
			if c.o.List != nil {
				joined = 48
			}
			if n := res.Stats.JoinedLayers; n != joined || len(res.Blobs) != rafs.MaxBlobs {
				t.Errorf("%d layers share a blob, %d blobs; want %d and %d", n, len(res.Blobs), joined, rafs.MaxBlobs)
			}
			l := builtRef(t, c.src, res)
			tree := l.dump(t)
			if want == nil {
				want = tree
			}
			if diff := cmp.Diff(want, tree); diff != "" {
				t.Errorf("tree (-another image of the layers +this):\n%.3000s", diff)
			}
			checkDocuments(t, res)
			if l.judgeCheck(t); c.o.BatchSize == 0 {
				l.judgeTwice(t)
			}
			if c.o.FSVersion == rafs.V5 {
				return
			}
			bootstrap, _ := l.write(t)
			if diff := cmp.Diff(tree, dumpDir(t, testenv.MountEROFS(t, bootstrap, l.expand(t, l.open(t))...))); diff != "" {
				t.Errorf("tree (-ours +the kernel's):\n%.3000s", diff)
			}
			again := c.o
			again.Workers = 3
			if got := convert(t, c.src, again).ManifestDescriptor.Digest; got != res.ManifestDescriptor.Digest {
				t.Errorf("another manifest with 3 workers")
			}
		})
	}
}

// TestManyReused joins blobs that a build cache has: they are read, and verified.
func TestManyReused(t *testing.T) {
	t.Parallel()
	src := tars(t, manyLayers(t, 260)...)
	o := builder.Options{Compressor: rafs.CompressorZstd, ChunkSize: testChunk, Records: true}
	first := convert(t, src, o)
	if len(first.Records) != len(src.Layers) {
		t.Fatalf("%d records of %d layers", len(first.Records), len(src.Layers))
	}
	again := src
	again.Layers = append([]builder.Layer(nil), src.Layers...)
	for _, r := range first.Records {
		l := &again.Layers[r.Layer]
		l.Open = nil
		l.Record = func(context.Context) (io.ReadCloser, error) { return r.File.Open() }
		l.Stored = &builder.StoredBlob{Descriptor: r.Blob.Descriptor, Open: func(context.Context) (io.ReaderAt, error) {
			f, err := r.Blob.Open()
			if err != nil {
				return nil, err
			}
			b, err := io.ReadAll(f)
			if cerr := f.Close(); err == nil {
				err = cerr
			}
			return bytes.NewReader(b), err
		}}
	}
	second := convert(t, again, o)
	if diff := cmp.Diff(dumpImage(t, first), dumpReused(t, first, second)); diff != "" {
		t.Errorf("tree (-first +with the cache):\n%.3000s", diff)
	}
	if second.Stats.JoinedLayers != first.Stats.JoinedLayers || second.Stats.LayersReused != len(src.Layers) {
		t.Errorf("stats: %+v", second.Stats)
	}
}

// dumpReused reads the tree of an image whose other blobs are in the files of an earlier result.
func dumpReused(t *testing.T, files, res *builder.Result) map[string]item {
	t.Helper()
	both := *res
	both.Blobs = append([]builder.File(nil), files.Blobs...)
	for _, f := range res.Blobs {
		if !f.Stored {
			both.Blobs = append(both.Blobs, f)
		}
	}
	return dumpImage(t, &both)
}
