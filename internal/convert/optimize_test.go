package convert_test

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
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

// optimizeOptions optimize the fixture oci/nydus-v6 around two files.
func optimizeOptions(t *testing.T, target string) convert.OptimizeOptions {
	t.Helper()
	return convert.OptimizeOptions{
		Source: "oci:" + filepath.Join(testenv.Fixtures(t), "oci", "nydus-v6"),
		Target: target, Platform: "linux/amd64",
		Build: builder.OptimizeOptions{List: list("/app/main", "/bin/tool"), TempDir: t.TempDir()},
	}
}

func optimize(t *testing.T, o convert.OptimizeOptions) convert.OptimizeSummary {
	t.Helper()
	sum, err := convert.Optimize(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	empty(t, o.Build.TempDir)
	return sum
}

// selected reads manifest and config of an image.
func selected(t *testing.T, ref string, o remote.Options) remote.Image {
	t.Helper()
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), r, o)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.SelectNydus(t.Context(), src, "linux/amd64")
	if err := errors.Join(err, src.Close()); err != nil {
		t.Fatal(err)
	}
	return img
}

// Images that nydusify made, optimized, are what their documents say, keep their layers, and
// pass all judges.
func TestOptimizeFixtures(t *testing.T) {
	testenv.Root(t)
	for _, name := range []string{"nydus-v5", "nydus-v6"} {
		t.Run(name, func(t *testing.T) {
			o := optimizeOptions(t, "oci:"+t.TempDir()+"/out:fast")
			o.Source = "oci:" + filepath.Join(testenv.Fixtures(t), "oci", name)
			sum := optimize(t, o)
			if p := sum.Prefetch; p.Files != 2 || p.Chunks == 0 || sum.FetchedBytes == 0 || sum.Requests == 0 || sum.SourceDigest == sum.ManifestDigest {
				t.Errorf("summary: %+v", sum)
			}
			before, after := selected(t, o.Source, remote.Options{}), selected(t, o.Target, remote.Options{})
			checkDocuments(t, before, after, sum)
			files := bootstrapFiles(t, o.Target, after)
			if want := []string{"image", "image/image.boot", "image/prefetch.files"}; !slices.Equal(files[:3], want) {
				t.Errorf("bootstrap layer has %q", files)
			}
			for _, f := range bootstrapFiles(t, o.Source, before) {
				if !slices.Contains(files, strings.TrimSuffix(f, "/")) {
					t.Errorf("bootstrap layer has lost %s", f)
				}
			}
			if name == "nydus-v6" {
				judge(t, o.Target)
				return
			}
			checkV5(t, o.Target)
		})
	}
}

// checkDocuments holds the documents of an optimized image against those of its source.
// Lost diff IDs were nydus#1996.
func checkDocuments(t *testing.T, before, after remote.Image, sum convert.OptimizeSummary) {
	t.Helper()
	n := len(before.Layers) - 1
	if len(after.Layers) != n+2 || len(after.Config.RootFS.DiffIDs) != n+2 {
		t.Fatalf("%d layers, %d diff IDs, want %d", len(after.Layers), len(after.Config.RootFS.DiffIDs), n+2)
	}
	for i := range n {
		if after.Layers[i].Descriptor.Digest != before.Layers[i].Descriptor.Digest || after.Layers[i].DiffID != before.Layers[i].DiffID {
			t.Errorf("layer %d: %+v, was %+v", i, after.Layers[i], before.Layers[i])
		}
	}
	prefetch, last := after.Layers[n], after.Layers[n+1].Descriptor
	if prefetch.Descriptor.Digest.Encoded() != sum.Prefetch.Blob || prefetch.DiffID != prefetch.Descriptor.Digest ||
		prefetch.Descriptor.Annotations[nydusimage.AnnotationBlob] != "true" || prefetch.Descriptor.MediaType != nydusimage.MediaTypeBlob {
		t.Errorf("prefetch layer: %+v", prefetch)
	}
	if last.Annotations[nydusimage.AnnotationPrefetch] != sum.Prefetch.Blob {
		t.Errorf("bootstrap layer: %v", last.Annotations)
	}
	for k, v := range before.Layers[n].Descriptor.Annotations {
		if last.Annotations[k] != v && k != "containerd.io/uncompressed" {
			t.Errorf("bootstrap layer: annotation %s is %q, was %q", k, last.Annotations[k], v)
		}
	}
	for k, v := range before.Manifest.Annotations {
		if after.Manifest.Annotations[k] != v {
			t.Errorf("annotation %s is %q, was %q", k, after.Manifest.Annotations[k], v)
		}
	}
	if got := after.Manifest.Annotations[builder.AnnotationOptimizedFrom]; got != before.Descriptor.Digest.String() {
		t.Errorf("optimized from %q, want %s", got, before.Descriptor.Digest)
	}
	full := 0
	for _, h := range after.Config.History {
		if !h.EmptyLayer {
			full++
		}
	}
	if len(after.Config.History) > 0 && full != n+2 {
		t.Errorf("history has %d items with a layer, want %d", full, n+2)
	}
}

// bootstrapFiles lists the last layer's tar.
func bootstrapFiles(t *testing.T, ref string, img remote.Image) []string {
	t.Helper()
	r, err := remote.Parse(ref)
	if err != nil {
		t.Fatal(err)
	}
	src, err := remote.OpenSource(t.Context(), r, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	rc, err := src.Fetch(t.Context(), img.Layers[len(img.Layers)-1].Descriptor)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	z, err := gzip.NewReader(rc)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, strings.TrimSuffix(h.Name, "/"))
	}
}

func checkV5(t *testing.T, ref string) {
	t.Helper()
	img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Platform: "linux/amd64", TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	boot, size := img.Bootstrap()
	open := func(b rafs.Blob) (io.ReaderAt, error) { return img.OpenBlob(t.Context(), b) }
	_, err = rafs.Check(t.Context(), boot, size, open, rafs.CheckOptions{Data: true})
	if err := errors.Join(err, img.Close()); err != nil {
		t.Error(err)
	}
}

// In a registry's repository nothing is sent again, to another one it is mounted, and of the
// source's blobs only what is needed is read.
func TestOptimizeRegistry(t *testing.T) {
	testenv.Root(t)
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	first := optimizeOptions(t, r.Host+"/one/app:nydus")
	first.Build.List = list() // publishes the fixture
	if sum := optimize(t, first); sum.Prefetch.Blob != "" || len(sum.Warnings) == 0 {
		t.Errorf("empty list: %+v", sum)
	}
	layers := int64(0)
	for _, l := range selected(t, first.Target, remote.Options{}).Layers {
		layers += l.Descriptor.Size
	}
	for target, mounted := range map[string]int{"/one/app:fast": 0, "/two/app:fast": 2} {
		o := optimizeOptions(t, r.Host+target)
		o.Source = first.Target
		sum := optimize(t, o)
		// New: the prefetch blob, the bootstrap layer and the config.
		if sum.Uploaded != 3 || sum.Existed != 2 || sum.Mounted != mounted {
			t.Errorf("%s: %d uploaded, %d existed, of them %d mounted; want 3, 2, %d", target, sum.Uploaded, sum.Existed, sum.Mounted, mounted)
		}
		if sum.FetchedBytes == 0 || sum.FetchedBytes > sum.Prefetch.Bytes+1<<20 || sum.FetchedBytes > layers/2 {
			t.Errorf("%s: %d bytes fetched for a blob of %d, of layers of %d", target, sum.FetchedBytes, sum.Prefetch.Bytes, layers)
		}
		judge(t, o.Target)
		again := o
		again.Source, again.Target = o.Target, o.Target+"er"
		if s := optimize(t, again); s.Prefetch.Blob != sum.Prefetch.Blob || s.Dropped != 1 {
			t.Errorf("%s: optimized again: %+v", target, s)
		}
	}
}

// An index keeps everything but the image that was optimized; what attests to that is gone.
func TestOptimizeIndex(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	plain, both := "oci:"+dir+"/src:app", "oci:"+dir+"/both:app"
	pushIndex(t, plain)
	c := indexOptions(t, plain, both)
	c.AllPlatforms, c.MergePlatform = true, true
	if _, err := convert.Run(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	before := readIndex(t, both)
	for _, target := range []string{"oci:" + dir + "/both:fast", "oci:" + dir + "/other:fast", "oci-archive:" + dir + "/x.tar:fast"} {
		o := optimizeOptions(t, target)
		o.Source, o.Build.List = both, list("/file")
		sum := optimize(t, o)
		after := readIndex(t, target)
		if len(after.Entries) != len(before.Entries) || after.Annotations["index"] != "kept" || after.Root.Digest != sum.TargetDigest {
			t.Fatalf("%s: %d entries, want %d; %v", target, len(after.Entries), len(before.Entries), after.Annotations)
		}
		changed := 0
		for i, e := range after.Entries {
			b := before.Entries[i]
			if e.Digest != b.Digest {
				changed++
				if b.Digest != sum.SourceDigest || e.Digest != sum.ManifestDigest || e.ArtifactType != b.ArtifactType || !slices.Equal(e.Platform.OSFeatures, b.Platform.OSFeatures) {
					t.Errorf("%s: entry %d: %+v, was %+v", target, i, e, b)
				}
			}
		}
		if changed != 1 {
			t.Errorf("%s: %d entries changed", target, changed)
		}
		for _, p := range []string{"linux/amd64", "linux/arm64"} {
			if got := nydusFile(t, target, p, "/file"); got != strings.TrimPrefix(p, "linux/") {
				t.Errorf("%s: %s has %q", target, p, got)
			}
		}
	}
}

// faulty is a registry whose requests fail, or whose answers are damaged, from the nth on that match.
type faulty struct {
	next  http.Handler
	match func(*http.Request) bool

	mu   sync.Mutex // guards what follows
	left int        // matching requests that are still answered
	mode string
}

func (f *faulty) set(left int, mode string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left, f.mode = left, mode
}

func (f *faulty) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	mode := ""
	if f.match(r) {
		f.mu.Lock()
		if f.left--; f.left < 0 {
			mode = f.mode
		}
		f.mu.Unlock()
	}
	switch mode {
	case "":
		f.next.ServeHTTP(w, r)
	case "status":
		w.WriteHeader(http.StatusInternalServerError)
	case "damage":
		rec := httptest.NewRecorder()
		f.next.ServeHTTP(rec, r)
		b := rec.Body.Bytes()
		if len(b) > 0 {
			b[len(b)/2] ^= 0x10
		}
		maps.Copy(w.Header(), rec.Header())
		w.WriteHeader(rec.Code)
		_, _ = w.Write(b) // the client may have gone
	case "cut":
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			_ = conn.Close()
		}
	}
}

// A registry that fails at any request leaves the target's name where it was, and no file.
func TestOptimizeFaults(t *testing.T) {
	t.Parallel()
	f := &faulty{next: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	f.match = func(r *http.Request) bool { return true }
	s := httptest.NewServer(f)
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "http://")
	plain := remote.Options{PlainHTTP: true, Retries: -1}
	f.set(1<<30, "")
	first := optimizeOptions(t, host+"/one:nydus")
	first.TargetRemote = plain
	optimize(t, first)
	o := optimizeOptions(t, host+"/one:fast")
	o.Source, o.SourceRemote, o.TargetRemote = first.Target, plain, plain
	o.Build.List = list("/app/main", "/bin/tool", "/app/dup-in-other-layer")
	old := optimize(t, o)
	o.Build.List = list("/app/main")
	failed := 0
	for _, mode := range []string{"status", "cut", "damage"} {
		done := false
		for n := 0; n < 60 && !done; n++ {
			f.set(n, mode)
			_, err := convert.Optimize(t.Context(), o)
			f.set(1<<30, "")
			empty(t, o.Build.TempDir)
			img := selected(t, o.Target, plain)
			switch {
			case err == nil:
				done = true
				if img.Descriptor.Digest == old.ManifestDigest {
					t.Errorf("%s after %d: no error, and the old image", mode, n)
				}
				o.Build.List = list("/app/main", "/bin/tool", "/app/dup-in-other-layer")
				optimize(t, o) // the old image again
				o.Build.List = list("/app/main")
			case img.Descriptor.Digest != old.ManifestDigest && mode == "status":
				t.Errorf("%s after %d: %v, and the name points at %s", mode, n, err, img.Descriptor.Digest)
			default:
				failed++
			}
		}
		if !done {
			t.Errorf("%s: never succeeds", mode)
		}
	}
	if failed < 20 {
		t.Errorf("%d requests failed", failed)
	}
}

// An optimization that is cancelled at any moment leaves no temporary file and no name.
func TestOptimizeCancelAnywhere(t *testing.T) {
	t.Parallel()
	var tasks []string
	o := optimizeOptions(t, "oci:"+t.TempDir()+"/out:fast")
	o.Progress = func(e convert.Event) { tasks = append(tasks, fmt.Sprint(e.Task, e.Finished)) }
	optimize(t, o)
	slices.Sort(tasks)
	tasks = slices.Compact(tasks)
	if len(tasks) < 8 {
		t.Errorf("tasks: %q", tasks)
	}
	for _, at := range tasks {
		ctx, cancel := context.WithCancel(t.Context())
		o := optimizeOptions(t, "oci:"+t.TempDir()+"/out:fast")
		o.Progress = func(e convert.Event) {
			if fmt.Sprint(e.Task, e.Finished) == at {
				cancel()
			}
		}
		_, err := convert.Optimize(ctx, o)
		cancel()
		empty(t, o.Build.TempDir)
		ref, perr := remote.Parse(o.Target)
		if perr != nil {
			t.Fatal(perr)
		}
		var resolved error
		if _, serr := os.Stat(ref.Path); serr != nil {
			resolved = serr
		} else if src, oerr := remote.OpenSource(t.Context(), ref, remote.Options{}); oerr != nil {
			resolved = oerr
		} else {
			_, resolved = src.Resolve(t.Context())
			_ = src.Close()
		}
		if (err == nil) != (resolved == nil) || err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled at %s: %v, and the target: %v", at, err, resolved)
		}
	}
}

// A blob with damaged chunks, or that is not there, is no source.
func TestOptimizeDamagedSource(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(t *testing.T, path string){
		"missing": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		"truncated": func(t *testing.T, path string) {
			if err := os.Truncate(path, 100); err != nil {
				t.Fatal(err)
			}
		},
		"flipped": func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for i := range b {
				b[i] ^= 0x40
			}
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		o := optimizeOptions(t, "oci:"+t.TempDir()+"/out:fast")
		dir := filepath.Join(t.TempDir(), "src")
		if err := os.CopyFS(dir, os.DirFS(strings.TrimPrefix(o.Source, "oci:"))); err != nil {
			t.Fatal(err)
		}
		o.Source = "oci:" + dir
		for _, l := range selected(t, o.Source, remote.Options{}).Layers {
			if l.Descriptor.Annotations[nydusimage.AnnotationBlob] != "" {
				path := filepath.Join(dir, "blobs", "sha256", l.Descriptor.Digest.Encoded())
				if err := os.Chmod(path, 0o600); err != nil {
					t.Fatal(err)
				}
				damage(t, path)
			}
		}
		if sum, err := convert.Optimize(t.Context(), o); err == nil {
			t.Errorf("%s: no error: %+v", name, sum)
		} else {
			t.Logf("%s: %v", name, err)
		}
		empty(t, o.Build.TempDir)
	}
}

func TestOptimizeErrors(t *testing.T) {
	t.Parallel()
	fixtures := testenv.Fixtures(t)
	for want, set := range map[string]func(o *convert.OptimizeOptions){
		"it is a plain container image": func(o *convert.OptimizeOptions) { o.Source = "oci:" + filepath.Join(fixtures, "oci", "source") },
		"it is the source":              func(o *convert.OptimizeOptions) { o.Target = o.Source },
		"no matching platform":          func(o *convert.OptimizeOptions) { o.Platform = "linux/s390x" },
		"no such file":                  func(o *convert.OptimizeOptions) { o.Source = "oci:/nowhere" },
		"source: invalid":               func(o *convert.OptimizeOptions) { o.Source = "UPPER" },
	} {
		o := optimizeOptions(t, "oci:"+t.TempDir()+"/out:fast")
		set(&o)
		if _, err := convert.Optimize(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Optimize = %v, want %q", err, want)
		}
		empty(t, o.Build.TempDir)
	}
}

// Identities are the image's own digest, and those of what it was made from.
func TestIdentities(t *testing.T) {
	t.Parallel()
	own, plain, nydus := digest.FromString("own"), digest.FromString("plain"), digest.FromString("nydus")
	img := remote.Image{Root: ocispec.Descriptor{Digest: own}, Descriptor: ocispec.Descriptor{Digest: own}}
	img.Manifest.Annotations = map[string]string{
		builder.AnnotationSourceDigest: plain.String(), builder.AnnotationOptimizedFrom: nydus.String(), "other": "sha256:x",
	}
	if got := convert.Identities(img); !slices.Equal(got, []digest.Digest{own, nydus, plain}) {
		t.Errorf("Identities = %v", got)
	}
	img.Manifest.Annotations[builder.AnnotationSourceDigest] = "no digest"
	if got := convert.Identities(img); !slices.Equal(got, []digest.Digest{own, nydus}) {
		t.Errorf("Identities = %v", got)
	}
}
