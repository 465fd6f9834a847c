package builder_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestFixtureV5 converts the image of shared/fixtures into the older format; our reader, nydus-image check and
// nydusd 2.2.0 must see what expected.json says.
func TestFixtureV5(t *testing.T) {
	entries := readExpected(t)
	tests := map[string]func(o *builder.Options){
		"default":  func(*builder.Options) {},
		"prefetch": func(o *builder.Options) { o.List = fixtureList(t, entries) },
		"lz4, sha256, 64 KiB": func(o *builder.Options) {
			*o = builder.Options{Compressor: rafs.CompressorLZ4, Digester: rafs.DigesterSHA256, ChunkSize: 1 << 16, List: fixtureList(t, entries)}
		},
		"none, 4 KiB":           func(o *builder.Options) { *o = builder.Options{ChunkSize: 1 << 12, List: fixtureList(t, entries)} },
		"zstd, sha256, 16 MiB":  func(o *builder.Options) { o.Digester, o.ChunkSize = rafs.DigesterSHA256, 1<<24 },
		"everything prefetched": func(o *builder.Options) { o.List, o.VerifyData = everything(entries), true },
	}
	for name, set := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := builder.DefaultOptions()
			set(&o)
			o.FSVersion = rafs.V5
			res := convert(t, fixture(t), o)
			if v := openImage(t, res).Version; v != rafs.V5 {
				t.Fatalf("the bootstrap has version %v", v)
			}
			checkExpected(t, dumpImage(t, res), entries)
			checkOCI(t, res)
			checkNydusImage(t, res)
			compareNydusd(t, res, entries)
		})
	}
}

// compareNydusd serves the image by the real nydusd and compares it with the fixture's meaning.
func compareNydusd(t *testing.T, res *builder.Result, entries []expected) {
	t.Helper()
	t.Run("nydusd", func(t *testing.T) {
		got := dumpDir(t, mountNydusd(t, res))
		for _, e := range entries { // nydusd shows mtime 0 as the time of the mount
			if g := got[e.Path]; e.Mtime != nil && *e.Mtime == 0 {
				g.Mtime = 0
				got[e.Path] = g
			}
		}
		checkExpected(t, got, entries)
	})
}

func mountNydusd(t testing.TB, res *builder.Result) string {
	t.Helper()
	return testenv.MountNydusdPrefetching(t, res.BootstrapPath, blobDir(t, res))
}

// blobDir makes a directory with the blobs by id, as a Nydus backend has them.
func blobDir(t testing.TB, res *builder.Result) string {
	t.Helper()
	dir := t.TempDir()
	for _, b := range res.Blobs {
		if err := os.Link(b.Path, filepath.Join(dir, b.Descriptor.Digest.Encoded())); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
