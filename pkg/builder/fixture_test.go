package builder_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// fixtureList names awkward things: a hard link and its other name, a path twice, through a
// symlink, a directory, a path that is not there, a file of several chunks in part.
func fixtureList(t testing.TB, entries []expected) *persist.List {
	t.Helper()
	l := listOf("/app/main-link", "/bin/tool", "/app/main", "/bin/tool", "/nowhere", "/app", "/app/dup-in-other-layer")
	for _, e := range entries {
		if e.Type == "reg" && e.Size > 1<<20 {
			l.Accesses = append(l.Accesses, trace.Access{Path: e.Path, Ranges: []trace.Range{{Offset: e.Size - 1, Length: 1}, {Offset: 0, Length: 1}}})
		}
	}
	return l
}

// expected is an entry of shared/fixtures/expected.json.
type expected struct {
	Path       string            `json:"path"`
	Type       string            `json:"type"`
	Mode       uint32            `json:"mode"`
	UID        uint32            `json:"uid"`
	GID        uint32            `json:"gid"`
	Mtime      *float64          `json:"mtime"`
	Xattrs     map[string]string `json:"xattrs"`
	Size       int64             `json:"size"`
	SHA256     string            `json:"sha256"`
	Target     string            `json:"target"`
	Rdev       []uint32          `json:"rdev"`
	HardlinkOf string            `json:"hardlink_of"`
}

func readExpected(t testing.TB) []expected {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(testenv.Fixtures(t), "expected.json"))
	if err != nil {
		t.Fatal(err)
	}
	var out []expected
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// checkExpected compares an image with the fixture's meaning.
func checkExpected(t testing.TB, got map[string]item, want []expected) {
	t.Helper()
	types := map[string]uint32{"dir": unix.S_IFDIR, "reg": unix.S_IFREG, "sym": unix.S_IFLNK, "fifo": unix.S_IFIFO, "chr": unix.S_IFCHR, "blk": unix.S_IFBLK}
	for _, e := range want {
		g, ok := got[e.Path]
		if !ok {
			t.Errorf("%q is missing", e.Path)
			continue
		}
		w := item{Mode: types[e.Type] | e.Mode, UID: e.UID, GID: e.GID, Xattrs: e.Xattrs, Size: e.Size, Data: e.SHA256 + e.Target}
		if e.Type == "sym" {
			w.Size = int64(len(e.Target))
		}
		if len(e.Rdev) == 2 {
			w.Rdev = unix.Mkdev(e.Rdev[0], e.Rdev[1])
		}
		if e.Mtime != nil {
			w.Mtime = int64(*e.Mtime) * 1e9
			g.Mtime -= g.Mtime % 1e9
		} else {
			g.Mtime = 0
		}
		if e.HardlinkOf != "" && got["/"+strings.TrimPrefix(e.HardlinkOf, "/")].Link != g.Link {
			t.Errorf("%q is no hard link of %q", e.Path, e.HardlinkOf)
		}
		g.Link = ""
		if diff := cmp.Diff(w, g); diff != "" {
			t.Errorf("%q (-want +got):\n%s", e.Path, diff)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d entries, want %d", len(got), len(want))
	}
}

// TestFixture converts the image of shared/fixtures in many ways; each must mean the same
// and be accepted by all judges.
func TestFixture(t *testing.T) {
	entries := readExpected(t)
	tests := map[string]func(o *builder.Options){
		"default":             func(*builder.Options) {},
		"prefetch":            func(o *builder.Options) { o.List = fixtureList(t, entries) },
		"prefetch, as stored": func(o *builder.Options) { o.List = fixtureList(t, entries); o.NoRecompress = true },
		"lz4, sha256, 64 KiB": func(o *builder.Options) {
			*o = builder.Options{Compressor: rafs.CompressorLZ4, Digester: rafs.DigesterSHA256, ChunkSize: 1 << 16, List: fixtureList(t, entries)}
		},
		"none, 4 KiB":           func(o *builder.Options) { *o = builder.Options{ChunkSize: 1 << 12, List: fixtureList(t, entries)} },
		"zstd, sha256, 16 MiB":  func(o *builder.Options) { o.Digester, o.ChunkSize = rafs.DigesterSHA256, 1<<24 },
		"everything prefetched": func(o *builder.Options) { o.List = everything(entries) },
	}
	for name, set := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := builder.DefaultOptions()
			set(&o)
			res := convert(t, fixture(t), o)
			checkExpected(t, dumpImage(t, res), entries)
			checkOCI(t, res)
			checkTools(t, res)
			checkMount(t, res)
		})
	}
}

func everything(entries []expected) *persist.List {
	var paths []string
	for _, e := range slices.Backward(entries) {
		paths = append(paths, e.Path)
	}
	return listOf(paths...)
}

// expandAll writes the device file of every blob, in the order of the image.
func expandAll(t testing.TB, res *builder.Result) []string {
	t.Helper()
	img := openImage(t, res)
	var devices []string
	for i, b := range img.Blobs {
		r, err := openBlob(t, res, b)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(t.TempDir(), fmt.Sprint(i)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		err = img.ExpandBlob(t.Context(), i, r, f)
		if cerr := f.Close(); err != nil || cerr != nil {
			t.Fatal(err, cerr)
		}
		devices = append(devices, f.Name())
	}
	return devices
}

// asksOthers reports whether other programs are asked what they make of our bytes: not beside the race detector, which
// sees nothing of them. It says so in the test's log.
func asksOthers(t testing.TB) bool {
	t.Helper()
	if raceEnabled {
		t.Log("not asked under the race detector: fsck.erofs, nydus-image, nydusd")
	}
	return !raceEnabled
}

// checkTools asks fsck.erofs and the real nydus-image.
func checkTools(t *testing.T, res *builder.Result) {
	t.Helper()
	if !asksOthers(t) {
		return
	}
	checkFsck(t, res)
	checkNydusImage(t, res)
}

func checkFsck(t *testing.T, res *builder.Result) {
	t.Helper()
	t.Run("fsck.erofs", func(t *testing.T) {
		args := []string{}
		for _, d := range expandAll(t, res) {
			args = append(args, "--device="+d)
		}
		out, err := exec.Command(testenv.Tool(t, "fsck.erofs"), append(args, res.BootstrapPath)...).CombinedOutput()
		if err != nil {
			t.Errorf("fsck.erofs: %v\n%s", err, out)
		}
	})
}

func checkNydusImage(t *testing.T, res *builder.Result) {
	t.Helper()
	t.Run("nydus-image", func(t *testing.T) {
		out, err := exec.Command(testenv.Tool(t, "nydus-image"), "check", "--bootstrap", res.BootstrapPath, "--blob-dir", blobDir(t, res), "--verbose").CombinedOutput()
		if err != nil {
			t.Errorf("nydus-image check: %v\n%s", err, out)
		}
	})
}

// checkMount mounts the image with the kernel and compares it with the fixture's own script.
func checkMount(t *testing.T, res *builder.Result) {
	t.Helper()
	t.Run("kernel", func(t *testing.T) {
		testenv.Root(t)
		python := testenv.Tool(t, "python3")
		root := testenv.MountEROFS(t, res.BootstrapPath, expandAll(t, res)...)
		fixtures := testenv.Fixtures(t)
		out, err := exec.Command(python, filepath.Join(fixtures, "cmp_tree.py"), root, filepath.Join(fixtures, "expected.json")).CombinedOutput()
		if err != nil {
			t.Errorf("cmp_tree.py: %v\n%s", err, out)
		}
	})
}

// checkOCI holds the result's documents against its files, as nydusify check would.
func checkOCI(t *testing.T, res *builder.Result) {
	t.Helper()
	m, cfg, files := checkDocuments(t, res)
	ids := map[string]bool{}
	for _, b := range openImage(t, res).Blobs {
		ids[b.ID] = true
	}
	for _, b := range res.Blobs {
		delete(ids, b.Descriptor.Digest.Encoded())
	}
	if len(ids) > 0 {
		t.Errorf("blobs of the bootstrap that are no layers: %v", ids)
	}
	checkBootstrapLayer(t, res, m.Layers[len(m.Layers)-1], cfg.RootFS.DiffIDs[len(files)-1])
}

// checkDocuments compares manifest and config with each other and with the files.
func checkDocuments(t *testing.T, res *builder.Result) (ocispec.Manifest, ocispec.Image, []builder.File) {
	t.Helper()
	var m ocispec.Manifest
	var cfg ocispec.Image
	if err := json.Unmarshal(res.Manifest, &m); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(res.Config, &cfg); err != nil {
		t.Fatal(err)
	}
	if m.Config.Digest != digest.FromBytes(res.Config) || res.ManifestDescriptor.Digest != digest.FromBytes(res.Manifest) {
		t.Error("descriptors of config or manifest are wrong")
	}
	files := append(slices.Clone(res.Blobs), res.Bootstrap)
	if len(m.Layers) != len(files) || len(cfg.RootFS.DiffIDs) != len(files) {
		t.Fatalf("%d layers and %d diff IDs, want %d", len(m.Layers), len(cfg.RootFS.DiffIDs), len(files))
	}
	full := 0
	for _, h := range cfg.History {
		if !h.EmptyLayer {
			full++
		}
	}
	if len(cfg.History) > 0 && full != len(files) {
		t.Errorf("history has %d items with a layer, want %d", full, len(files))
	}
	for i, f := range files {
		b, err := os.ReadFile(f.Path)
		if err != nil {
			t.Fatal(err)
		}
		if got := digest.FromBytes(b); got != m.Layers[i].Digest || int64(len(b)) != m.Layers[i].Size || got != f.Descriptor.Digest {
			t.Errorf("layer %d has %s and %d bytes, its descriptor says %v", i, got, len(b), m.Layers[i])
		}
		if i < len(res.Blobs) {
			if m.Layers[i].MediaType != builder.MediaTypeBlob || m.Layers[i].Annotations[builder.AnnotationBlob] != "true" || cfg.RootFS.DiffIDs[i] != m.Layers[i].Digest {
				t.Errorf("blob layer %d: %+v, diff ID %s", i, m.Layers[i], cfg.RootFS.DiffIDs[i])
			}
		}
	}
	return m, cfg, files
}

func checkBootstrapLayer(t *testing.T, res *builder.Result, d ocispec.Descriptor, diffID digest.Digest) {
	t.Helper()
	want := map[string]string{builder.AnnotationBootstrap: "true", builder.AnnotationFSVersion: openImage(t, res).Version.String()}
	entries := []string{"image 755", "image/image.boot 444"}
	if last := len(res.Blobs) - 1; res.Stats.Prefetch.Chunks > 0 {
		want[builder.AnnotationPrefetchBlob] = res.Blobs[last].Descriptor.Digest.Encoded()
		entries = append(entries, "image/prefetch.files 444")
	}
	if diff := cmp.Diff(want, d.Annotations); diff != "" || d.MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("bootstrap layer is a %s with annotations (-want +got):\n%s", d.MediaType, diff)
	}
	f, err := os.Open(res.Bootstrap.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(plain); got != diffID {
		t.Errorf("diff ID of the bootstrap layer is %s, the config says %s", got, diffID)
	}
	var got []string
	tr := tar.NewReader(bytes.NewReader(plain))
	for {
		hdr, err := tr.Next()
		if err != nil {
			break
		}
		got = append(got, fmt.Sprintf("%s %o", hdr.Name, hdr.Mode))
		b, _ := io.ReadAll(tr)
		switch hdr.Name {
		case "image/image.boot":
			if boot, _ := os.ReadFile(res.BootstrapPath); !bytes.Equal(b, boot) {
				t.Error("the bootstrap in the layer is another one")
			}
		case "image/prefetch.files":
			if l, err := persist.ReadAny(bytes.NewReader(b)); err != nil || len(l.Accesses) == 0 {
				t.Errorf("image/prefetch.files reads as %v, %v", l, err)
			}
		}
	}
	if diff := cmp.Diff(entries, got); diff != "" {
		t.Errorf("bootstrap layer (-want +got):\n%s", diff)
	}
}
