package lazy_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/internal/workload"
)

// images are one container image of real programs, and Nydus images made of it.
type images struct {
	source *workload.Image
	root   string            // what tar makes of its layers
	want   map[string]string // the digests of its files
	layout string            // of our images: plain, and fast with a prefetch blob
}

// made is the one set of images of this process. It lies in the temporary directory of the package's tests, which goes with them.
var made struct {
	sync.Mutex
	img  *images
	refs map[string]string
}

// newImages returns the images of the Python workload, 230 MB in 12,000 files.
func newImages(t *testing.T) *images {
	t.Helper()
	testenv.Root(t)
	source, err := workload.Build(t.Context(), workload.Python, workload.Options{Log: os.Stderr})
	if errors.Is(err, workload.ErrUnavailable) {
		testenv.Missing(t, "%v", err)
	}
	must(t, err)
	made.Lock()
	defer made.Unlock()
	if made.img != nil {
		return made.img
	}
	dir, err := os.MkdirTemp("", "images-")
	must(t, err)
	img := &images{source: source, root: filepath.Join(dir, "root"), layout: filepath.Join(dir, "layout")}
	must(t, os.Mkdir(img.root, 0o755))
	for i := range source.Manifest.Layers {
		run(t, "tar", "-C", img.root, "-xzf", img.layer(i))
	}
	img.want = sums(t, img.root)
	made.img, made.refs = img, map[string]string{}
	return img
}

// layer returns the file of a layer of the source.
func (img *images) layer(n int) string {
	d := img.source.Manifest.Layers[n].Digest
	return filepath.Join(img.source.Dir, "blobs", d.Algorithm().String(), d.Encoded())
}

// ours converts the image with our own builder, once for each tag, and returns its reference.
func (img *images) ours(t *testing.T, tag string, args ...string) string {
	t.Helper()
	made.Lock()
	defer made.Unlock()
	if ref := made.refs[tag]; ref != "" {
		return ref
	}
	ref := "oci:" + img.layout + ":" + tag
	made.refs[tag] = ref
	run(t, testenv.Binary(t, "optimizer"), append(append([]string{"convert", "--quiet"}, args...), "oci:"+img.source.Dir, ref)...)
	return ref
}

// theirs converts it with the real nydus-image and returns the flags that mount it.
func (img *images) theirs(t *testing.T) []string {
	t.Helper()
	nydus := testenv.Tool(t, "nydus-image")
	dir := t.TempDir()
	blobs, boot := filepath.Join(dir, "blobs"), filepath.Join(dir, "image.boot")
	must(t, os.Mkdir(blobs, 0o755))
	merge := []string{"merge", "--log-level", "error", "-B", boot, "-D", blobs}
	for i := range img.source.Manifest.Layers {
		one := filepath.Join(dir, fmt.Sprint("layer", i))
		must(t, os.Mkdir(one, 0o755))
		run(t, nydus, "create", "--log-level", "error", "-t", "targz-rafs", "--fs-version", "6", "--compressor", "zstd",
			"--whiteout-spec", "oci", "--blob-inline-meta", "-D", one, img.layer(i))
		blobFiles, err := filepath.Glob(filepath.Join(one, "*"))
		must(t, err)
		if len(blobFiles) != 1 {
			t.Fatalf("nydus-image made %q of layer %d, want one blob", blobFiles, i)
		}
		blob := filepath.Join(blobs, filepath.Base(blobFiles[0]))
		must(t, os.Rename(blobFiles[0], blob))
		merge = append(merge, blob)
	}
	run(t, nydus, merge...)
	return []string{"--bootstrap", boot, "--blob-dir", blobs}
}

func run(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out[max(0, len(out)-2000):])
	}
	return out
}

// inRegistry puts an image of the layout into a real registry behind a link and returns its reference there.
func inRegistry(t *testing.T, img *images, ref string, p linksim.Profile) (string, *linksim.Link) {
	t.Helper()
	registry, err := testcri.StartRegistry(t.Context(), testcri.RegistryOptions{Dir: t.TempDir(), Out: os.Stderr})
	must(t, err)
	t.Cleanup(func() { must(t, registry.Close()) })
	tag := ref[len("oci:"+img.layout+":"):]
	index, err := layout.ImageIndexFromPath(img.layout)
	must(t, err)
	manifest, err := index.IndexManifest()
	must(t, err)
	for _, m := range manifest.Manifests {
		if m.Annotations["org.opencontainers.image.ref.name"] != tag {
			continue
		}
		image, err := index.Image(m.Digest)
		must(t, err)
		_, err = registry.Push(t.Context(), "app", tag, image)
		must(t, err)
	}
	link, err := linksim.Start(registry.Host, p)
	must(t, err)
	t.Cleanup(func() { must(t, link.Close()) })
	return link.Host() + "/app:" + tag, link
}
