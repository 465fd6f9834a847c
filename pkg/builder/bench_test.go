package builder_test

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// benchLayers returns gzip layers: the files of HEADSTART_BENCH_LAYERS (separated by
// colons), else two made of the Go toolchain's sources and tools.
func benchLayers(b *testing.B) []string {
	b.Helper()
	if env := os.Getenv("HEADSTART_BENCH_LAYERS"); env != "" {
		return strings.Split(env, ":")
	}
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Skipf("skipped: no Go toolchain: %v", err)
	}
	root := strings.TrimSpace(string(out))
	var layers []string
	for _, part := range []string{"src", "pkg"} {
		name := filepath.Join(b.TempDir(), part+".tar.gz")
		if out, err := exec.Command("tar", "-C", root, "-czf", name, part).CombinedOutput(); err != nil {
			b.Fatalf("tar: %v: %s", err, out)
		}
		layers = append(layers, name)
	}
	return layers
}

// fileSource makes an image of gzip layers in files.
func fileSource(b *testing.B, paths []string) (src builder.Source, plain int64) {
	b.Helper()
	var ids []digest.Digest
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			b.Fatal(err)
		}
		stored, whole := sha256.New(), sha256.New()
		z, err := gzip.NewReader(io.TeeReader(f, stored))
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.Copy(whole, z)
		if err != nil {
			b.Fatal(err)
		}
		size, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
		plain += n
		ids = append(ids, digest.NewDigest(digest.SHA256, whole))
		src.Layers = append(src.Layers, builder.Layer{
			Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.NewDigest(digest.SHA256, stored), Size: size},
			Open:       func(context.Context) (io.ReadCloser, error) { return os.Open(p) },
		})
	}
	src.Config, _ = json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	return src, plain
}

// BenchmarkConvert converts the layers of [benchLayers] in several ways; with a list it
// prefetches every twentieth file.
func BenchmarkConvert(b *testing.B) {
	src, plain := fileSource(b, benchLayers(b))
	run := func(name string, o builder.Options) {
		b.Run(name, func(b *testing.B) {
			o.TempDir = b.TempDir()
			b.SetBytes(plain)
			b.ReportAllocs()
			var stats builder.Stats
			for b.Loop() {
				res, err := builder.Convert(b.Context(), src, o)
				if err != nil {
					b.Fatal(err)
				}
				stats = res.Stats
				if err := res.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(stats.BlobBytes), "blob-bytes")
			b.ReportMetric(float64(stats.Prefetch.BlobBytes), "prefetch-bytes")
		})
	}
	for _, c := range []rafs.Compressor{rafs.CompressorZstd, rafs.CompressorLZ4, rafs.CompressorNone} {
		run(c.String(), builder.Options{Compressor: c})
	}
	verified := builder.DefaultOptions()
	verified.VerifyData = true
	run("verified", verified)
	listed := builder.DefaultOptions()
	listed.List = someFiles(b, src)
	run("listed", listed)
}

// someFiles lists every twentieth file of src.
func someFiles(b *testing.B, src builder.Source) *persist.List {
	b.Helper()
	var paths []string
	for _, l := range src.Layers {
		f, err := l.Open(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			b.Fatal(err)
		}
		r := tar.NewReader(z)
		for n := 0; ; n++ {
			hdr, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				b.Fatal(err)
			}
			if n%20 == 0 {
				paths = append(paths, path.Join("/", hdr.Name))
			}
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
	return listOf(paths...)
}
