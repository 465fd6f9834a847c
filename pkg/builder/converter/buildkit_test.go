package converter_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
)

// TestBuildKitModule has BuildKit's own code, its cache and its Nydus compression, build an image of two layers with this package
// in the place of nydus-snapshotter's, and asks nydus-image and nydusd about it. BuildKit is a dependency of the
// module in internal/buildkit alone.
func TestBuildKitModule(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: compiles BuildKit")
	}
	testenv.Root(t)
	// A copy, so that go may bring its requirements in line with those of Headstart's go.mod.
	root, module := testenv.RepoRoot(t), t.TempDir()
	if err := os.CopyFS(module, os.DirFS(filepath.Join(root, "internal", "buildkit"))); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "GOFLAGS=-mod=mod")
	deps := exec.Command("go", "mod", "edit", "-replace=github.com/headstart-oci/headstart="+root)
	deps.Dir = module
	if text, err := deps.CombinedOutput(); err != nil {
		t.Fatalf("go mod edit: %v\n%s", err, text)
	}
	deps = exec.Command("go", "list", "-deps", "-test", "-tags", "nydus", ".")
	deps.Dir, deps.Env = module, env
	if text, err := deps.CombinedOutput(); err != nil {
		testenv.Missing(t, "BuildKit's modules: %v\n%.1000s", err, text)
	}
	out := t.TempDir()
	build := exec.Command("go", "test", "-count=1", "-tags", "nydus", ".")
	build.Dir, build.Env = module, append(env, "HEADSTART_OUT="+out)
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go test in %s: %v\n%s", module, err, text)
	}
	boot, err := os.ReadFile(filepath.Join(out, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	var blobs [][]byte
	names, err := os.ReadDir(filepath.Join(out, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(out, "blobs", n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, b)
	}
	got := served(t, boot, blobs)
	sizes := map[string]int{}
	for name, data := range got {
		sizes[name] = len(data)
	}
	if diff := cmp.Diff(map[string]int{"/lower": 5, "/upper": 5, "/big": 2_500_000}, sizes); diff != "" || got["/upper"] != "above" || got["/lower"] != "below" {
		t.Errorf("nydusd serves other files (-want +got):\n%s", diff)
	}
}
