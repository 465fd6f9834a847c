package lazy_test

import (
	"archive/tar"
	"errors"
	"fmt"
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

// layered makes an image of n layers, each with files of its own and one that is in all of them, and what they are together in a directory.
func layered(t *testing.T, n int) (source, root string) {
	t.Helper()
	dir := t.TempDir()
	source, root = filepath.Join(dir, "source"), filepath.Join(dir, "root")
	must(t, os.Mkdir(root, 0o755))
	img := empty.Image
	random := rand.NewChaCha8([32]byte{byte(n)})
	for i := range n {
		layer := filepath.Join(dir, fmt.Sprint("layer", i))
		f, err := os.Create(layer)
		must(t, err)
		tw := tar.NewWriter(f)
		for name, most := range map[string]uint64{fmt.Sprintf("d%d/small%03d", i%7, i): 100, fmt.Sprintf("d%d/large%03d", i%5, i): 200_000, "top": 10_000} {
			p := make([]byte, 1+random.Uint64()%most)
			_, _ = random.Read(p)
			must(t, tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(p)), ModTime: time.Unix(1, 0)}))
			_, err := tw.Write(p)
			must(t, err)
			must(t, os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755))
			must(t, os.WriteFile(filepath.Join(root, name), p, 0o644))
		}
		must(t, errors.Join(tw.Close(), f.Close()))
		l, err := tarball.LayerFromFile(layer)
		must(t, err)
		img, err = mutate.AppendLayers(img, l)
		must(t, err)
	}
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	path, err := layout.Write(source, empty.Index)
	must(t, err)
	must(t, path.AppendImage(img))
	return source, root
}

// TestHundredLayers mounts an image of 100 layers, which are more devices than mount options of one page name, reads a part of it, kills the daemon under
// readers, and reads all of it from the next one.
func TestHundredLayers(t *testing.T) {
	const layers = 100
	source, root := layered(t, layers)
	want := sums(t, root)
	ref := "oci:" + filepath.Join(t.TempDir(), "layout") + ":layers"
	run(t, testenv.Binary(t, "optimizer"), "convert", "--quiet", "oci:"+source, ref)
	eachDriver(t, func(t *testing.T, driver string) {
		r := newRigOf(t, driver)
		dir := r.mount(t, "--background", "none", ref)
		if caches, err := filepath.Glob(filepath.Join(r.state, "blobs", "*", "data")); err != nil || len(caches) != layers {
			t.Errorf("%d cache files, %v, want one for each of %d layers", len(caches), err, layers)
		}
		readAll(t, dir, want, 2, 10)
		before, err := r.status()
		must(t, err)
		if len(before.Mounts) != 1 || before.Mounts[0].Local == 0 || before.Mounts[0].Local >= before.Mounts[0].Total {
			t.Errorf("%+v, want a part of one mount to be local", before.Mounts)
		}
		waits := make([]func() (map[string]string, error), 8)
		for i := range waits {
			waits[i] = startWalker(t, walk{Root: dir, Seed: uint64(i + 10), Part: 1, Ways: ways})
		}
		kill(t, before.PID)
		for i, wait := range waits {
			got, err := wait()
			if err != nil {
				t.Errorf("reader %d of %d: %v", i, len(waits), err)
			}
			compareSums(t, got, want, 1)
		}
		r.waitStatus(t, "complete mount of another daemon", func(s status) bool {
			return s.PID != before.PID && len(s.Mounts) == 1 && s.Mounts[0].State == "complete" && s.Mounts[0].Local == before.Mounts[0].Total
		})
		must(t, r.umount(dir))
		r.waitStatus(t, "end of the mount", func(s status) bool { return len(s.Mounts) == 0 })
	})
}
