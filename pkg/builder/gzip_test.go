package builder_test

import (
	"fmt"
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
	for name, o := range map[string]builder.Options{
		"blake3": {Digester: rafs.DigesterBLAKE3, ChunkSize: 64 << 10},
		"sha256": {Digester: rafs.DigesterSHA256, ChunkSize: 64 << 10},
		"v5":     {Digester: rafs.DigesterSHA256, ChunkSize: 64 << 10, FSVersion: rafs.V5},
	} {
		t.Run(name, func(t *testing.T) {
			o.Compressor, o.VerifyData = rafs.CompressorGzip, true
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

// TestGzipV5Apart reads v5 files whose gzip chunks lie apart in the blob, or end it: nydusd takes images of gzip chunks without the
// feature that ours have for old stargz ones, guesses sizes, and ends when chunks are a little apart.
func TestGzipV5Apart(t *testing.T) {
	testenv.Root(t)
	words := func(i int) string { return strings.Repeat(fmt.Sprint("chunk ", i, " "), testChunk/8)[:testChunk] }
	shared, other := words(1), words(2)
	layer := makeTar(t, reg("a", shared+other+words(3)), reg("b", shared+words(4)+other), reg("c", other+string(noise(9, testChunk))+shared),
		reg("d", words(5)+words(3)), reg("e", string(noise(10, 3*testChunk+100))), reg("f", "f"))
	for _, size := range []uint32{testChunk, 16 << 20} {
		o := builder.Options{Compressor: rafs.CompressorGzip, FSVersion: rafs.V5, ChunkSize: size, VerifyData: true}
		l := built(t, convert(t, tars(t, layer), o))
		if f := l.open(t).Blobs[0].Features; f&4 == 0 {
			t.Errorf("the blob has features %#x, want 0x4 among them", f)
		}
		l.judgeTwice(t)
		out, _ := l.optimize(t, builder.OptimizeOptions{List: listOf("/b", "/e")})
		out.judgeTwice(t)
	}
	// A chunk of the largest size that does not compress has a size that a long v6 record cannot say.
	o := builder.Options{Compressor: rafs.CompressorGzip, FSVersion: rafs.V5, ChunkSize: 16 << 20, VerifyData: true}
	built(t, convert(t, tars(t, makeTar(t, reg("noise", string(noise(11, 16<<20))))), o)).judgeTwice(t)
}
