package builder_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
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
		stored, tar := sha256.New(), sha256.New()
		z, err := gzip.NewReader(io.TeeReader(f, stored))
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.Copy(tar, z)
		if err != nil {
			b.Fatal(err)
		}
		size, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
		plain += n
		ids = append(ids, digest.NewDigest(digest.SHA256, tar))
		src.Layers = append(src.Layers, builder.Layer{
			Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.NewDigest(digest.SHA256, stored), Size: size},
			Open:       func(context.Context) (io.ReadCloser, error) { return os.Open(p) },
		})
	}
	src.Config, _ = json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}})
	return src, plain
}

func BenchmarkConvert(b *testing.B) {
	src, plain := fileSource(b, benchLayers(b))
	for _, c := range []rafs.Compressor{rafs.CompressorZstd, rafs.CompressorLZ4, rafs.CompressorNone} {
		b.Run(c.String(), func(b *testing.B) {
			o := builder.DefaultOptions()
			o.Compressor = c
			o.TempDir = b.TempDir()
			b.SetBytes(plain)
			b.ReportAllocs()
			var size int64
			for b.Loop() {
				res, err := builder.Convert(b.Context(), src, o)
				if err != nil {
					b.Fatal(err)
				}
				size = res.Stats.BlobBytes
				if err := res.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(size), "blob-bytes")
		})
	}
}
