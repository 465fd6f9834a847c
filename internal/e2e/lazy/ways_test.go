package lazy_test

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// moved are the ways that move no bytes through a read.
var moved = []string{"mmap", "sendfile", "splice"}

// expected returns the digests of the regular files of the fixtures' tree.
func expected(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), "expected.json"))
	must(t, err)
	var entries []struct{ Path, Type, SHA256 string }
	must(t, json.Unmarshal(text, &entries))
	want := map[string]string{}
	for _, e := range entries {
		if e.Type == "reg" {
			want[e.Path] = e.SHA256
		}
	}
	if len(want) == 0 {
		t.Fatal("the fixtures' tree has no files")
	}
	return want
}

// TestFixturesWays reads every v6 fixture through cold mounts by mmap, sendfile and splice, by 1, 8 and 64 processes at once.
func TestFixturesWays(t *testing.T) {
	want := expected(t)
	eachDriver(t, func(t *testing.T, driver string) {
		for name, args := range v6Fixtures(t) {
			if testing.Short() && name != "v6-zstd-batch" {
				continue
			}
			for _, n := range []struct{ readers, part int }{{1, 1}, {8, 1}, {64, 16}} {
				if testing.Short() && n.readers != 8 || n.readers == 64 && name != "v6-zstd" {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d", name, n.readers), func(t *testing.T) {
					r := newRigOf(t, driver)
					dir := r.mount(t, append([]string{"--background", "none"}, args...)...)
					readAllBy(t, dir, want, n.readers, n.part, moved)
					must(t, r.umount(dir))
				})
			}
		}
	})
}

// programs makes an image with this program and data, and the same tree in a directory.
func programs(t *testing.T) (ref, root string) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	source, root := large(t, 4_000_000, 0, 1, 4097, 70_000, 300_000)
	name := filepath.Join(root, "walker")
	program, err := os.ReadFile(self)
	must(t, err)
	must(t, os.WriteFile(name, program, 0o755))
	// A layer above the data.
	layer := filepath.Join(t.TempDir(), "layer.tar")
	f, err := os.Create(layer)
	must(t, err)
	tw := tar.NewWriter(f)
	must(t, tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "walker", Mode: 0o755, Size: int64(len(program))}))
	_, err = tw.Write(program)
	must(t, errors.Join(err, tw.Close(), f.Close()))
	appendLayer(t, source, layer)
	ref = "oci:" + filepath.Join(t.TempDir(), "layout") + ":programs"
	run(t, testenv.Binary(t, "optimizer"), "convert", "--quiet", "--chunk-size", "64KiB", "oci:"+source, ref)
	return ref, root
}

// appendLayer puts a layer on top of the one image of a layout.
func appendLayer(t *testing.T, source, name string) {
	t.Helper()
	index, err := layout.ImageIndexFromPath(source)
	must(t, err)
	manifest, err := index.IndexManifest()
	must(t, err)
	img, err := index.Image(manifest.Manifests[0].Digest)
	must(t, err)
	l, err := tarball.LayerFromFile(name)
	must(t, err)
	img, err = mutate.AppendLayers(img, l)
	must(t, err)
	path, err := layout.FromPath(source)
	must(t, err)
	must(t, path.ReplaceImage(img, match.Digests(manifest.Manifests[0].Digest)))
}

// TestExecutedFromMount executes a program of a cold mount by 1, 8 and 64 processes at once, each of which reads the mount, the program's own file
// with it, by mmap, sendfile and splice meanwhile.
func TestExecutedFromMount(t *testing.T) {
	ref, root := programs(t)
	want := sums(t, root)
	eachDriver(t, func(t *testing.T, driver string) {
		for _, n := range []struct{ readers, part int }{{1, 1}, {8, 1}, {64, 8}} {
			if testing.Short() && n.readers != 8 {
				continue
			}
			t.Run(fmt.Sprint(n.readers), func(t *testing.T) {
				r := newRigOf(t, driver)
				dir := r.mount(t, "--background", "none", ref)
				waits := make([]func() (map[string]string, error), n.readers)
				for i := range waits {
					waits[i] = startWalkerOf(t, filepath.Join(dir, "walker"), walk{Root: dir, Seed: uint64(i + 1), Part: n.part, Ways: moved})
				}
				for i, wait := range waits {
					got, err := wait()
					if err != nil {
						t.Errorf("process %d of %d: %v", i, n.readers, err)
					}
					compareSums(t, got, want, n.part)
				}
				s, err := r.status()
				must(t, err)
				if len(s.Mounts) != 1 || s.Mounts[0].Stats.Demand.Chunks == 0 || s.Mounts[0].Stats.Failed != 0 {
					t.Errorf("%+v, want one mount that was fetched on demand, without failures", s.Mounts)
				}
				must(t, r.umount(dir))
			})
		}
	})
}
