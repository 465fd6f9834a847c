package lazy_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// large makes an image of one layer with about size bytes in files of sizes chosen from sizes, all of which compress
// to a half, and the same tree in a directory.
func large(t *testing.T, size int64, sizes ...int64) (source, root string) {
	t.Helper()
	dir := t.TempDir()
	source, root = filepath.Join(dir, "source"), filepath.Join(dir, "root")
	must(t, os.Mkdir(root, 0o755))
	random := rand.New(rand.NewPCG(uint64(size), 5))
	bytes := rand.NewChaCha8([32]byte{byte(size)})
	layer, err := os.Create(filepath.Join(dir, "layer.tar"))
	must(t, err)
	tw := tar.NewWriter(layer)
	piece := make([]byte, 8<<10)
	for i := 0; size > 0; i++ {
		n := min(size, sizes[random.IntN(len(sizes))])
		size -= max(n, 1000)
		name := fmt.Sprintf("f%06d", i)
		f, err := os.Create(filepath.Join(root, name))
		must(t, err)
		must(t, tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: n, ModTime: time.Unix(1, 0)}))
		both := io.MultiWriter(f, tw)
		for left := n; left > 0; left -= int64(len(piece)) {
			_, _ = bytes.Read(piece[:len(piece)/2]) // the other half is zeros
			_, err := both.Write(piece[:min(left, int64(len(piece)))])
			must(t, err)
		}
		must(t, f.Close())
	}
	must(t, errors.Join(tw.Close(), layer.Close()))
	l, err := tarball.LayerFromFile(layer.Name())
	must(t, err)
	img, err := mutate.AppendLayers(empty.Image, l)
	must(t, err)
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	path, err := layout.Write(source, empty.Index)
	must(t, err)
	must(t, path.AppendImage(img))
	must(t, os.Remove(layer.Name()))
	return source, root
}

// TestSoakLarge reads an image of 1 GB through cold mounts by 1, 8 and 64 processes, each of which reads all of it but for the 64, of whom each reads an
// eighth.
func TestSoakLarge(t *testing.T) {
	if os.Getenv("SOAK") == "" {
		t.Skip("SOAK is not set")
	}
	source, root := large(t, 1_000_000_000, 0, 1, 4095, 4096, 4097, 70_000, 1<<20, 1<<20+1, 9_000_000, 40_000_000)
	want := sums(t, root)
	ref := "oci:" + filepath.Join(t.TempDir(), "layout") + ":large"
	run(t, testenv.Binary(t, "optimizer"), "convert", "--quiet", "oci:"+source, ref)
	for _, n := range []struct{ readers, part int }{{1, 1}, {8, 1}, {64, 8}} {
		t.Run(fmt.Sprint(n.readers), func(t *testing.T) {
			r := newRig(t)
			dir := r.mount(t, "--background", "none", ref)
			readAll(t, dir, want, n.readers, n.part)
			must(t, r.umount(dir))
		})
	}
}
