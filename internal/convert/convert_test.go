package convert_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/headstart-oci/headstart/internal/convert"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func list(paths ...string) *persist.List {
	l := &persist.List{}
	for _, p := range paths {
		l.Accesses = append(l.Accesses, trace.Access{Path: p, How: trace.Opened})
	}
	return l
}

func options(t *testing.T, target string) convert.Options {
	t.Helper()
	b := builder.DefaultOptions()
	b.TempDir = t.TempDir()
	return convert.Options{
		Source: "oci:" + filepath.Join(testenv.Fixtures(t), "oci", "source"),
		Target: target, Platform: "linux/amd64", Build: b,
	}
}

func empty(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left in %s: %v, %v", dir, left, err)
	}
}

// The zoo, converted, mounts in the kernel and is the tree that it was made of, for every
// compressor, digester and chunk size.
func TestKernelMount(t *testing.T) {
	testenv.Root(t)
	python := testenv.Tool(t, "python3")
	fixtures := testenv.Fixtures(t)
	for name, set := range map[string]func(o *convert.Options){
		"defaults": func(*convert.Options) {},
		"lz4, sha256, 4 KiB": func(o *convert.Options) {
			o.Build.Compressor, o.Build.Digester, o.Build.ChunkSize = rafs.CompressorLZ4, rafs.DigesterSHA256, rafs.MinChunkSize
		},
		"batches": func(o *convert.Options) {
			o.Build.ChunkSize, o.Build.BatchSize, o.Build.PrefetchBatchSize = 1<<16, 1<<17, 1<<18
		},
		"none, 16 MiB, marked": func(o *convert.Options) {
			o.Build.Compressor, o.Build.ChunkSize, o.Build.MarkPrefetchBlob = rafs.CompressorNone, rafs.MaxChunkSize, true
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := options(t, "oci:"+dir+"/out:v6")
			o.List = list("/app/main", "/bin/tool-alias", "/missing", "/app/dup-in-other-layer")
			set(&o)
			sum, err := convert.Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			empty(t, o.Build.TempDir)
			if p := sum.Prefetch; p.Listed != 4 || p.Files != 3 || p.Missing != 1 || p.Chunks == 0 || len(p.Blob) != 64 || p.RawBytes == 0 {
				t.Errorf("Prefetch = %+v", p)
			}
			img, err := nydusimage.Open(t.Context(), o.Target, nydusimage.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := img.Close(); err != nil {
					t.Error(err)
				}
			}()
			if img.Digest() != sum.TargetDigest {
				t.Errorf("target digest %s, want %s", img.Digest(), sum.TargetDigest)
			}
			if n, ok := img.PrefetchBlob(); !ok || img.RAFS.Blobs[n].ID != sum.Prefetch.Blob {
				t.Errorf("PrefetchBlob = %d, %v, want blob %s", n, ok, sum.Prefetch.Blob)
			}
			root := mount(t, dir, img)
			out, err := exec.Command(python, filepath.Join(fixtures, "cmp_tree.py"), root, filepath.Join(fixtures, "expected.json")).CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// mount expands the blobs of img to device files and mounts its bootstrap with them.
func mount(t *testing.T, dir string, img *nydusimage.Image) string {
	t.Helper()
	var devices []string
	chunks := img.Chunks()
	defer func() {
		if err := chunks.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i := range img.RAFS.Blobs {
		r, err := chunks.Blob(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, fmt.Sprintf("device-%d", i))
		device, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err == nil {
			err = img.RAFS.ExpandBlob(t.Context(), i, r, device)
		}
		if err = errors.Join(err, device.Close()); err != nil {
			t.Fatal(err)
		}
		devices = append(devices, name)
	}
	boot, size := img.Bootstrap()
	b, err := io.ReadAll(io.NewSectionReader(boot, 0, size))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "image.boot"), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return testenv.MountEROFS(t, filepath.Join(dir, "image.boot"), devices...)
}

func TestSummaryAndProgress(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := options(t, "oci:"+dir+"/out:v6")
	o.List = list("/app/main")
	o.List.Digest = "sha256:" + strings.Repeat("0", 64)
	o.List.Losses = []trace.Loss{{Reason: "overflow", Count: -1, Detail: "queue"}}
	ended := map[string]int{}
	o.Progress = func(e convert.Event) {
		if e.Finished {
			ended[e.Task]++
		} else if ended[e.Task] > 0 {
			t.Errorf("%s goes on after its end", e.Task)
		}
	}
	sum, err := convert.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range []string{"layer 1/2", "layer 2/2", "prefetch blob", "bootstrap", "verify"} {
		if ended[task] != 1 {
			t.Errorf("%s ended %d times", task, ended[task])
		}
	}
	if len(ended) != 5+5 {
		t.Errorf("tasks %v, want 5 and 5 pushes", ended)
	}
	if len(sum.Warnings) != 2 || sum.Files != 1541 || sum.VerifiedChunks == 0 || sum.Uploaded != 5 || sum.Existed != 0 || sum.Platform != "linux/amd64" ||
		sum.SourceBytes == 0 || sum.TargetBytes == 0 || sum.BootstrapBytes == 0 || sum.Elapsed <= 0 || sum.SourceDigest == "" || sum.Target != o.Target {
		t.Errorf("Summary = %+v", sum)
	}
	// A second time everything is there, and the result is the same.
	o.Progress = nil
	again, err := convert.Run(t.Context(), o)
	if err != nil || again.TargetDigest != sum.TargetDigest || again.Uploaded != 0 {
		t.Errorf("again: %+v, %v", again, err)
	}
}

// A conversion that is cancelled at any moment leaves no temporary file and no name.
func TestCancelAnywhere(t *testing.T) {
	t.Parallel()
	var tasks []string
	o := options(t, "oci:"+t.TempDir()+"/out:v6")
	o.List = list("/app/main")
	o.Progress = func(e convert.Event) { tasks = append(tasks, fmt.Sprint(e.Task, e.Finished)) }
	if _, err := convert.Run(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, at := range tasks {
		if seen[at] {
			continue
		}
		seen[at] = true
		ctx, cancel := context.WithCancel(t.Context())
		dir := t.TempDir()
		o := options(t, "oci:"+dir+"/out:v6")
		o.List, o.Build.Compressor = list("/app/main"), rafs.CompressorNone
		var once sync.Once
		o.Progress = func(e convert.Event) {
			if fmt.Sprint(e.Task, e.Finished) == at {
				once.Do(cancel)
			}
		}
		_, err := convert.Run(ctx, o)
		cancel()
		empty(t, o.Build.TempDir)
		img, operr := nydusimage.Open(t.Context(), o.Target, nydusimage.Options{})
		switch {
		case err == nil && operr != nil:
			t.Errorf("cancelled at %s: Run = nil, and the image cannot be opened: %v", at, operr)
		case err != nil && (operr == nil || !errors.Is(err, context.Canceled)):
			t.Errorf("cancelled at %s: Run = %v, open = %v, want context.Canceled and no image", at, err, operr)
		}
		if operr == nil {
			if err := img.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	if len(seen) < 12 {
		t.Errorf("cancelled at %d moments only: %v", len(seen), seen)
	}
}

// A registry that fails while the manifest is pushed keeps the old image under the name.
func TestTargetKeepsTheOldImage(t *testing.T) {
	t.Parallel()
	store := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var broken bool
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if broken && r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			w.WriteHeader(http.StatusInsufficientStorage)
			return
		}
		store.ServeHTTP(w, r)
	}))
	defer s.Close()
	ref := strings.TrimPrefix(s.URL, "http://") + "/zoo:v6"
	o := options(t, ref)
	o.TargetRemote = remote.Options{PlainHTTP: true, Retries: -1}
	first, err := convert.Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	broken = true
	o.List = list("/app/main")
	if _, err := convert.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "publish "+ref+": ") || !strings.Contains(err.Error(), "507") {
		t.Errorf("Run = %v, want an error about the target", err)
	}
	empty(t, o.Build.TempDir)
	img, err := nydusimage.Open(t.Context(), ref, nydusimage.Options{Remote: o.TargetRemote, TempDir: o.Build.TempDir})
	if err != nil {
		t.Fatal(err)
	}
	if img.Digest() != first.TargetDigest {
		t.Errorf("the name points at %s, want %s", img.Digest(), first.TargetDigest)
	}
	// Its chunks come over the network, and nothing stays in the temporary directory.
	chunks := img.Chunks()
	for _, ino := range []*rafs.Inode{img.RAFS.Lookup("/app/main"), img.RAFS.Lookup("/bin/tool")} {
		var got bytes.Buffer
		for _, c := range ino.Chunks {
			p, err := chunks.Read(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			got.Write(p)
		}
		if uint64(got.Len()) != ino.Size {
			t.Errorf("read %d bytes, want %d", got.Len(), ino.Size)
		}
	}
	if err := errors.Join(chunks.Close(), img.Close()); err != nil {
		t.Error(err)
	}
	empty(t, o.Build.TempDir)
}

func TestRunErrors(t *testing.T) {
	t.Parallel()
	fixtures := testenv.Fixtures(t)
	for want, set := range map[string]func(o *convert.Options){
		"source: ":                       func(o *convert.Options) { o.Source = "" },
		"target: ":                       func(o *convert.Options) { o.Target = "oci:" },
		"it is the source":               func(o *convert.Options) { o.Target = o.Source },
		"open source oci:/missing/dir: ": func(o *convert.Options) { o.Source = "oci:/missing/dir" },
		"no matching platform":           func(o *convert.Options) { o.Platform = "linux/s390x" },
		"it is a Nydus image already":    func(o *convert.Options) { o.Source = "oci:" + filepath.Join(fixtures, "oci", "nydus-v6") },
		"open target oci:/dev/null/x:":   func(o *convert.Options) { o.Target = "oci:/dev/null/x" },
		"build oci:" + fixtures:          func(o *convert.Options) { o.Build.ChunkSize = 5000 },
		"/missing/temp":                  func(o *convert.Options) { o.Build.TempDir = "/missing/temp" },
	} {
		o := options(t, "oci:"+filepath.Join(t.TempDir(), "out"))
		set(&o)
		if _, err := convert.Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Run = %v, want an error with %s", err, want)
		}
	}
	// A registry that cannot be reached is found out about before anything is built.
	s := httptest.NewServer(http.NotFoundHandler())
	s.Close()
	o := options(t, strings.TrimPrefix(s.URL, "http://")+"/x:y")
	o.TargetRemote.Retries = -1
	o.Progress = func(e convert.Event) { t.Errorf("%s was begun", e.Task) }
	if _, err := convert.Run(t.Context(), o); !errors.Is(err, remote.ErrUnavailable) || !strings.HasPrefix(err.Error(), "target "+o.Target+": ") {
		t.Errorf("Run = %v, want ErrUnavailable about the target", err)
	}
	o = options(t, "oci:"+t.TempDir()+"/out")
	o.Source = "oci:" + filepath.Join(fixtures, "oci", "nydus-v5")
	if _, err := convert.Run(t.Context(), o); !errors.Is(err, convert.ErrUnsupported) {
		t.Errorf("Run = %v, want ErrUnsupported", err)
	}
}
