package builder_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestGzip makes blobs of gzip chunks, which nydus-image cannot make and reads: the fixture's tree is the expected one for every judge,
// with a prefetch blob too, and of an image that is optimized later.
func TestGzip(t *testing.T) {
	testenv.Root(t)
	entries := readExpected(t)
	for _, digester := range []rafs.Digester{rafs.DigesterBLAKE3, rafs.DigesterSHA256} {
		t.Run(digester.String(), func(t *testing.T) {
			o := builder.Options{Compressor: rafs.CompressorGzip, Digester: digester, ChunkSize: 64 << 10, VerifyData: true}
			plain := built(t, convert(t, fixture(t), o))
			for _, b := range plain.open(t).Blobs {
				if b.Compressor != rafs.CompressorGzip {
					t.Errorf("blob %+v", b)
				}
			}
			plain.judge(t)
			o.List = fixtureList(t, entries)
			listed := built(t, convert(t, fixture(t), o))
			listed.judge(t)
			listed.judgeTwice(t)
			out, _ := plain.optimize(t, builder.OptimizeOptions{List: fixtureList(t, entries)})
			out.judge(t)
			out.judgeTwice(t)
		})
	}
}

// TestGzipSame holds that neither workers nor chance are in a blob of gzip chunks, and that incompressible chunks are stored raw.
func TestGzipSame(t *testing.T) {
	t.Parallel()
	layer := makeTar(t, reg("noise", string(noise(1, 3*testChunk))), reg("text", strings.Repeat("text ", 10_000)), reg("both", string(noise(2, testChunk))+strings.Repeat("x", testChunk)))
	o := builder.Options{Compressor: rafs.CompressorGzip, ChunkSize: testChunk, VerifyData: true}
	var first string
	for _, workers := range []int{1, 8, 3, 1} {
		o.Workers = workers
		res := convert(t, tars(t, layer), o)
		if first == "" {
			first = string(res.Manifest)
		}
		if diff := cmp.Diff(first, string(res.Manifest)); diff != "" {
			t.Errorf("%d workers (-first +this):\n%s", workers, diff)
		}
		raw := 0
		for _, c := range openImage(t, res).BlobChunks(0) {
			if !c.Compressed {
				raw++
			}
		}
		if raw != 4 {
			t.Errorf("%d raw chunks, want 4", raw)
		}
	}
}
