package convert_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// run converts or fails the test.
func run(t *testing.T, o convert.Options) convert.Summary {
	t.Helper()
	sum, err := convert.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	empty(t, o.Build.TempDir)
	return sum
}

// judge opens a published image and has everything look at it: our check of every chunk, the real
// nydus-image, and the kernel with the comparer of the fixture.
func judge(t *testing.T, ref string) {
	t.Helper()
	img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Platform: "linux/amd64", TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}()
	boot, size := img.Bootstrap()
	open := func(b rafs.Blob) (io.ReaderAt, error) { return img.OpenBlob(t.Context(), b) }
	if _, err := rafs.Check(t.Context(), boot, size, open, rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	dir := t.TempDir()
	root := mount(t, dir, img)
	fixtures := testenv.Fixtures(t)
	if out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), root, filepath.Join(fixtures, "expected.json")).CombinedOutput(); err != nil {
		t.Errorf("kernel mount: %v\n%s", err, out)
	}
	blobs := filepath.Join(dir, "blobs")
	if err := os.Mkdir(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, b := range img.RAFS.Blobs {
		f, err := img.OpenBlob(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(f)
		if err := errors.Join(err, f.Close(), os.WriteFile(filepath.Join(blobs, b.ID), data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	nydus := exec.Command(testenv.Tool(t, "nydus-image"), "check", "--bootstrap", filepath.Join(dir, "image.boot"), "--blob-dir", blobs)
	if out, err := nydus.CombinedOutput(); err != nil {
		t.Errorf("nydus-image check: %v\n%s", err, out)
	}
}

// hollow copies the fixture's layout without the layers: who converts it must not read them.
func hollow(t *testing.T) string {
	t.Helper()
	from := filepath.Join(testenv.Fixtures(t), "oci", "source")
	to := filepath.Join(t.TempDir(), "hollow")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), remote.Layout(to, ""), remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Select(t.Context(), src, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range img.Layers {
		if err := os.Remove(filepath.Join(to, "blobs", "sha256", l.Descriptor.Digest.Encoded())); err != nil {
			t.Fatal(err)
		}
	}
	if err := src.Close(); err != nil {
		t.Fatal(err)
	}
	return "oci:" + to
}

// An image converted with a build cache, from a source whose layers are gone, is the image that the
// layers make; its blobs come from the cache's repository without being sent again.
func TestBuildCache(t *testing.T) {
	testenv.Root(t)
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	o := options(t, r.Host+"/one/app:v6")
	o.BuildCache = r.Host + "/cache/app:cache"
	first := run(t, o)
	if first.LayersReused != 0 || len(first.Warnings) != 0 {
		t.Errorf("first: %+v", first)
	}
	o.Source, o.Target = hollow(t), r.Host+"/two/app:v6"
	again := run(t, o)
	if again.LayersReused != 2 || again.SourceBytes != 0 || again.TargetDigest != first.TargetDigest || again.Mounted != 2 || len(again.Warnings) != 0 {
		t.Errorf("again: %+v, want the image %s of two mounted blobs", again, first.TargetDigest)
	}
	judge(t, o.Target)
	// With a list too: the prefetch blob is made of chunks that are fetched by range.
	o.List, o.Target = list("/app/main", "/bin/tool"), r.Host+"/three/app:v6"
	listed := run(t, o)
	o.Source, o.BuildCache, o.Target = options(t, "").Source, "", r.Host+"/four/app:v6"
	if plain := run(t, o); plain.TargetDigest != listed.TargetDigest || listed.LayersReused != 2 || listed.Prefetch.Chunks == 0 {
		t.Errorf("with a list: %+v, want image %s", listed, plain.TargetDigest)
	}
	// Other options do not fit, and both are kept.
	o.BuildCache, o.List = r.Host+"/cache/app:cache", nil
	o.Build.Compressor = rafs.CompressorLZ4
	if sum := run(t, o); sum.LayersReused != 0 {
		t.Errorf("lz4: %+v", sum)
	}
	o.Source = hollow(t)
	if sum := run(t, o); sum.LayersReused != 2 {
		t.Errorf("lz4 again: %+v", sum)
	}
	o.Build.Compressor = rafs.CompressorZstd
	if sum := run(t, o); sum.LayersReused != 2 || sum.TargetDigest != first.TargetDigest {
		t.Errorf("zstd again: %+v", sum)
	}
	// A cache for one layer forgets the others.
	o.BuildCacheMax = 1
	run(t, o)
	if _, err := convert.Run(t.Context(), o); err == nil {
		t.Error("both layers were found in a cache for one")
	}
}

// A cache in a layout whose content is damaged or gone costs a warning, not the image.
func TestBuildCacheDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := run(t, options(t, "oci:"+dir+"/plain")).TargetDigest
	for name, harm := range map[string]func(path string, data []byte) error{
		"gone":     func(path string, _ []byte) error { return os.Remove(path) },
		"cut off":  func(path string, data []byte) error { return os.Truncate(path, int64(len(data)/2)) },
		"bit flip": func(path string, data []byte) error { data[len(data)-900] ^= 1; return os.WriteFile(path, data, 0o600) },
	} {
		o := options(t, "oci:"+dir+"/out")
		o.BuildCache = "oci:" + filepath.Join(dir, strings.ReplaceAll(name, " ", "-")) + ":cache"
		run(t, o)
		store := filepath.Join(strings.TrimSuffix(strings.TrimPrefix(o.BuildCache, "oci:"), ":cache"), "blobs", "sha256")
		files, err := os.ReadDir(store)
		if err != nil {
			t.Fatal(err)
		}
		harmed := 0
		for _, f := range files {
			path := filepath.Join(store, f.Name())
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if len(data) > 1000 && !bytes.HasPrefix(data, []byte("{")) {
				harmed++
				if err := harm(path, data); err != nil {
					t.Fatal(err)
				}
			}
		}
		if harmed != 4 {
			t.Errorf("harmed %d files, want two records and two blobs", harmed)
		}
		sum := run(t, o)
		if sum.TargetDigest != want || sum.LayersReused != 0 || len(sum.Warnings) == 0 {
			t.Errorf("%s: %+v, want image %s and a warning", name, sum, want)
		}
		// What was wrong is forgotten, and damaged files are replaced.
		if sum := run(t, o); sum.LayersReused != 2 || len(sum.Warnings) != 0 {
			t.Errorf("%s, the next time: %+v", name, sum)
		}
	}
}

// A source that fails is no reason to build the image again without the cache, nor without the dictionary that was found.
func TestHelpersSourceFails(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(o *convert.Options, dir string){
		"cache": func(o *convert.Options, dir string) { // the first layer's
			o.BuildCache, o.BuildCacheMax = "oci:"+dir+"/cache:cache", 1
		},
		"dictionary": func(o *convert.Options, _ string) { o.ChunkDict = convert.DictAuto },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := options(t, "oci:"+dir+"/out:a")
			o.Build.Workers = 1 // one layer after the other
			set(&o, dir)
			run(t, o)
			if sum := run(t, o); sum.LayersReused+sum.DictBlobs == 0 {
				t.Fatalf("%+v, want something of the first image", sum)
			}
			var gone string
			o.Source, gone = withoutLayer(t, o.Source)
			built := 0 // times that the first layer, which the source has, was made
			o.Progress = func(e convert.Event) {
				if e.Finished && e.Task == "layer 1/2" {
					built++
				}
			}
			if _, err := convert.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), gone) || built != 1 {
				t.Errorf("Run = %v after the first layer was made %d times, want one time and an error about %s", err, built, gone)
			}
			empty(t, o.Build.TempDir)
		})
	}
}

// withoutLayer copies a layout but for the image's second layer, and returns the copy and what it lacks.
func withoutLayer(t *testing.T, from string) (ref, gone string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "source")
	if err := os.CopyFS(dir, os.DirFS(strings.TrimPrefix(from, "oci:"))); err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), remote.Layout(dir, ""), remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Select(t.Context(), src, "linux/amd64")
	if err := errors.Join(err, src.Close()); err != nil {
		t.Fatal(err)
	}
	gone = img.Layers[1].Descriptor.Digest.Encoded()
	if err := os.Remove(filepath.Join(dir, "blobs", "sha256", gone)); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir, gone
}

func TestHelperErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	nydus := run(t, options(t, "oci:"+dir+"/nydus:a")).Target
	for want, set := range map[string]func(o *convert.Options){
		"build cache: oci-archive:":   func(o *convert.Options) { o.BuildCache = "oci-archive:" + dir + "/x.tar" },
		"build cache: invalid: ":      func(o *convert.Options) { o.BuildCache = "\x00" },
		"and would replace it":        func(o *convert.Options) { o.BuildCache = o.Target },
		"name something else":         func(o *convert.Options) { o.BuildCache = nydus },
		"chunk dictionary: open oci:": func(o *convert.Options) { o.ChunkDict = o.Source },
		"chunk dictionary: ":          func(o *convert.Options) { o.ChunkDict = "oci:" + dir + "/missing" },
		"the image is to have 4096":   func(o *convert.Options) { o.ChunkDict, o.Build.ChunkSize = nydus, 4096 },
	} {
		o := options(t, "oci:"+dir+"/out:x")
		set(&o)
		if _, err := convert.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Run = %v, want an error with %s", err, want)
		}
		empty(t, o.Build.TempDir)
	}
}

// With a dictionary in another repository of the registry, what it has is mounted from there and
// nothing of it is sent; the image stands on its own all the same.
func TestChunkDict(t *testing.T) {
	testenv.Root(t)
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	o := options(t, r.Host+"/base/dict:v6")
	o.Build.Compressor = rafs.CompressorLZ4
	dict := run(t, o)
	o = options(t, r.Host+"/app/app:v6")
	o.ChunkDict = "bootstrap:registry:" + dict.Target
	o.List = list("/app/main")
	sum := run(t, o)
	if sum.DictBlobs != 2 || sum.Mounted != 2 || sum.DictChunks == 0 || sum.UploadedBytes > sum.Prefetch.Bytes+sum.BootstrapBytes+4096 {
		t.Errorf("Summary = %+v, want two mounted blobs and no others but the prefetch blob", sum)
	}
	judge(t, o.Target)
	// Elsewhere they are copied.
	o.Target = "oci:" + t.TempDir() + "/out:v6"
	if copied := run(t, o); copied.TargetDigest != sum.TargetDigest || copied.Uploaded != 5 {
		t.Errorf("copied: %+v", copied)
	}
	judge(t, o.Target)
}

// The image that the target names already, and those beside it, are the dictionary of the one that replaces it, where they can be.
func TestChunkDictAuto(t *testing.T) {
	testenv.Root(t)
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	for name, target := range map[string]string{"registry": r.Host + "/app/app:v6", "layout": "oci:" + t.TempDir() + "/out:v6"} {
		t.Run(name, func(t *testing.T) {
			o := options(t, target)
			o.ChunkDict = convert.DictAuto
			first := run(t, o)
			if first.DictChunks != 0 || len(first.Warnings) != 0 {
				t.Errorf("the first at the target: %+v, want no dictionary, and no warning", first)
			}
			o.List = list("/app/main")
			again := run(t, o)
			if again.DictChunks == 0 || again.DictBlobs == 0 || again.UploadedBytes > again.Prefetch.Bytes+again.BootstrapBytes+4096 || again.TargetDigest == first.TargetDigest {
				t.Errorf("replaced: %+v, want nothing sent but the prefetch blob and the bootstrap", again)
			}
			judge(t, o.Target)
			// Another name, at which nothing is: the images beside it are the dictionary.
			o.Target = target[:strings.LastIndex(target, ":")+1] + "new"
			beside := run(t, o)
			if beside.DictChunks == 0 || beside.UploadedBytes > beside.Prefetch.Bytes+beside.BootstrapBytes+4096 || len(beside.Warnings) != 0 {
				t.Errorf("beside: %+v, want nothing sent but the prefetch blob and the bootstrap", beside)
			}
			judge(t, o.Target)
			for _, change := range []func(*builder.Options){
				func(b *builder.Options) { b.ChunkSize /= 2 },
				func(b *builder.Options) { b.Compressor = rafs.CompressorLZ4 },
				func(b *builder.Options) { b.FSVersion = rafs.V5 },
				func(b *builder.Options) { b.Compressor = rafs.CompressorNone }, // of v5, too
			} {
				change(&o.Build)
				other := run(t, o)
				if other.DictBlobs != 0 || len(other.Warnings) != 1 || !strings.Contains(other.Warnings[0], "are not referred to") {
					t.Errorf("with %+v: %+v, want no dictionary, and a warning", o.Build, other)
				}
				if o.Build.FSVersion != rafs.V5 { // the kernel mounts v6 alone
					judge(t, o.Target)
				}
			}
		})
	}
}

// An image at the target that contradicts itself is no dictionary, and no reason to fail.
func TestChunkDictAutoDamage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := options(t, "oci:"+dir+"/out:a")
	o.ChunkDict = convert.DictAuto
	first := run(t, o)
	store := filepath.Join(dir, "out", "blobs", "sha256")
	data, err := os.ReadFile(filepath.Join(store, first.TargetDigest.Encoded()))
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	m.Layers[0].Size = 1 // of a blob that has more, as the bootstrap says
	if data, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	bad := digest.FromBytes(data)
	index, err := os.ReadFile(filepath.Join(dir, "out", "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var i ocispec.Index
	if err := json.Unmarshal(index, &i); err != nil || len(i.Manifests) != 1 {
		t.Fatalf("index %s: %v", index, err)
	}
	i.Manifests[0].Digest, i.Manifests[0].Size = bad, int64(len(data))
	if index, err = json.Marshal(i); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(store, bad.Encoded()), data, 0o600), os.WriteFile(filepath.Join(dir, "out", "index.json"), index, 0o600)); err != nil {
		t.Fatal(err)
	}
	again := run(t, o)
	if again.TargetDigest != first.TargetDigest || again.DictChunks != 0 || len(again.Warnings) != 1 || !strings.Contains(again.Warnings[0], "its bootstrap says") {
		t.Errorf("Summary = %+v, want the image %s and a warning", again, first.TargetDigest)
	}
	// Who names it is told.
	if err := os.WriteFile(filepath.Join(dir, "out", "index.json"), index, 0o600); err != nil {
		t.Fatal(err)
	}
	o.ChunkDict, o.Target = o.Target, "oci:"+dir+"/other:a"
	if _, err := convert.Run(t.Context(), o); !errors.Is(err, builder.ErrInvalid) {
		t.Errorf("Run = %v, want ErrInvalid", err)
	}
	empty(t, o.Build.TempDir)
}

// An image beside the target that lost a blob, or the end of one, does not stop what shares chunks with it.
func TestChunkDictAutoNeighbour(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	o := options(t, "oci:"+dir+"/out:a")
	o.ChunkDict = convert.DictAuto
	run(t, o)
	files, err := filepath.Glob(filepath.Join(dir, "out", "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	var largest string
	var most int64
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.Size() > most {
			largest, most = f, st.Size()
		}
	}
	damages := []func(string) error{os.Remove, func(name string) error { return os.Truncate(name, most-1) }}
	for i, damage := range damages {
		if err := damage(largest); err != nil {
			t.Fatal(err)
		}
		o.Target = fmt.Sprintf("oci:%s/out:b%d", dir, i)
		if sum := run(t, o); sum.DictBlobs != 0 {
			t.Errorf("damage %d: %+v, want nothing of that image", i, sum)
		}
		judge(t, o.Target) // the blob is whole again
	}
}
