package builder_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestSameImage converts and optimizes the fixture with 1, 1, 2 and 7 workers: every byte is the same.
func TestSameImage(t *testing.T) {
	entries := readExpected(t)
	for name, o := range map[string]builder.Options{
		"v5":          {FSVersion: rafs.V5, Compressor: rafs.CompressorZstd},
		"v5, small":   {FSVersion: rafs.V5, Compressor: rafs.CompressorLZ4, ChunkSize: 1 << 12, Digester: rafs.DigesterSHA256},
		"v6":          {FSVersion: rafs.V6, Compressor: rafs.CompressorZstd},
		"v6, none":    {FSVersion: rafs.V6, ChunkSize: 1 << 16},
		"v6, batches": {FSVersion: rafs.V6, Compressor: rafs.CompressorZstd, ChunkSize: 1 << 16, BatchSize: 1 << 16, PrefetchBatchSize: 1 << 18},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o.List, o.NoRecompress = fixtureList(t, entries), true
			var manifest, boot []byte
			for _, workers := range []int{1, 1, 2, 7} {
				o.Workers, o.WriteEarly = workers, workers > 1
				res := convert(t, fixture(t), o) // the manifest names every blob by its digest
				opt := builder.OptimizeOptions{List: listOf("/bin/tool", "/app/main"), Workers: workers, BatchSize: o.PrefetchBatchSize}
				out, _ := built(t, res).optimize(t, opt)
				if manifest == nil {
					manifest, boot = res.Manifest, out.boot
				}
				if !bytes.Equal(manifest, res.Manifest) {
					t.Errorf("%d workers: another image", workers)
				}
				if !bytes.Equal(boot, out.boot) {
					t.Errorf("%d workers: another optimized image", workers)
				}
			}
		})
	}
}

// TestSameImageFromShuffledWalk converts tars of the same tree whose walks met names in another order: directories, links and
// all that has no data anywhere, files with data in their order, which is that of the blob. Every byte of the image is the same,
// and of those that are optimized and merged from packed layers.
func TestSameImageFromShuffledWalk(t *testing.T) {
	var files []file
	for i := range 40 {
		d := fmt.Sprintf("dir%d", i%7)
		files = append(files, reg(fmt.Sprintf("%s/sub/data%02d", d, i), string(noise(uint64(i), i*700))+chunked("ab")))
		if i < 7 {
			files = append(files, dir(d, 0o700+int64(i)), dir(d+"/sub", 0o750))
		}
		files = append(files, reg(fmt.Sprintf("%s/empty%d", d, i), ""), sym(fmt.Sprintf("%s/sym%d", d, i), "data"),
			file{tar.Header{Typeflag: tar.TypeFifo, Name: fmt.Sprintf("fifo%d", i), Mode: 0o600}, ""}, xattr(dir(fmt.Sprintf("x%d", i), 0o755), "user.a", "b"))
	}
	shuffled := func(seed uint64) []file {
		var order []file
		var rest []file
		for _, f := range files {
			if f.data != "" {
				order = append(order, f)
			} else {
				rest = append(rest, f)
			}
		}
		r := rand.New(rand.NewPCG(seed, 8))
		for _, f := range rest {
			at := r.IntN(len(order) + 1)
			order = append(order[:at], append([]file{f}, order[at:]...)...)
		}
		return append(order, link("hard", "dir3/sub/data10"))
	}
	eachVersion(t, func(t *testing.T, o builder.Options) {
		o.List = listOf("/dir3/sub/data10", "/hard", "/dir1/sub/data08")
		var boot, optimized, packed []byte
		for seed := range uint64(6) {
			layer := makeTar(t, shuffled(seed)...)
			src := built(t, convert(t, tars(t, layer), o))
			out, _ := src.optimize(t, builder.OptimizeOptions{List: listOf("/dir2/sub/data02", "/hard")})
			var blob bytes.Buffer
			if _, err := builder.PackLayer(t.Context(), &blob, bytes.NewReader(layer), o); err != nil {
				t.Fatal(err)
			}
			if boot == nil {
				boot, optimized, packed = src.boot, out.boot, blob.Bytes()
			}
			if !bytes.Equal(boot, src.boot) || !bytes.Equal(optimized, out.boot) || !bytes.Equal(packed, blob.Bytes()) {
				t.Errorf("walk %d: another image: converted %v, optimized %v, packed %v", seed,
					!bytes.Equal(boot, src.boot), !bytes.Equal(optimized, out.boot), !bytes.Equal(packed, blob.Bytes()))
			}
		}
	})
}
