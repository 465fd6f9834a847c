package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/headstart-oci/headstart/internal/nriplugin"
	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/rebuild"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// shelf is a registry with one image, and a queue whose builds are real.
type shelf struct {
	t      testing.TB
	host   string
	dir    string
	digest string
	logs   *observer.ObservedLogs
	queue  *rebuild.Queue
	halt   func() // ends the work on the queue

	mu     sync.Mutex // guards what follows
	built  []rebuild.Result
	failed []rebuild.Failure
}

func newShelf(t testing.TB, layers ...v1.Layer) *shelf {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	s := &shelf{t: t, host: strings.TrimPrefix(srv.URL, "http://"), dir: t.TempDir()}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	must(t, err)
	cfg, err := img.ConfigFile()
	must(t, err)
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	img, err = mutate.ConfigFile(img, cfg)
	must(t, err)
	ref, err := name.ParseReference(s.host + "/team/app:v1")
	must(t, err)
	must(t, ggcr.Write(ref, img))
	d, err := img.Digest()
	must(t, err)
	s.digest = d.String()

	core, logs := observer.New(zapcore.DebugLevel)
	s.logs = logs
	plugin := testenv.Binary(t, "optimizer-nri-plugin")
	s.queue, err = rebuild.Open(filepath.Join(s.dir, "queue"), rebuild.QueueOptions{
		Command: func(job string) *exec.Cmd { return exec.Command(plugin, verbRebuild, job) },
		Backoff: func(int) time.Duration { return 10 * time.Millisecond }, MaxAttempts: 2, Log: zap.New(core),
		Built: func(j rebuild.Job, r rebuild.Result) {
			nriplugin.LogBuilt(zap.New(core), j, r)
			s.mu.Lock()
			s.built = append(s.built, r)
			s.mu.Unlock()
		},
		Failed: func(j rebuild.Job, f rebuild.Failure) {
			nriplugin.LogFailed(zap.New(core), j, f)
			s.mu.Lock()
			s.failed = append(s.failed, f)
			s.mu.Unlock()
		},
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.queue.Run(ctx) }()
	s.halt = func() {
		cancel()
		<-done
	}
	t.Cleanup(func() {
		s.halt()
		must(t, s.queue.Close())
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func layer(t testing.TB, files map[string]string) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range files {
		must(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text)), Typeflag: tar.TypeReg}))
		_, err := io.WriteString(w, text)
		must(t, err)
	}
	must(t, w.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	must(t, err)
	return l
}

// add queues a rebuild of the shelf's image as the plugin would.
func (s *shelf) add(change func(*nriplugin.Config, *rebuild.Request)) rebuild.Decision {
	s.t.Helper()
	store, err := persist.OpenStore(s.dir)
	must(s.t, err)
	defer store.Close()
	l := &persist.List{
		Reference: s.host + "/team/app:v1", Digest: s.digest, Platform: "linux/amd64", Container: "c1", Engine: "fanotify", Grade: "file",
		Started: time.Now(), Duration: time.Second, End: "exit",
		Trace: trace.Trace{Accesses: []trace.Access{
			{Path: "/bin/app", How: trace.Opened | trace.Executed, Size: 300000},
			{Path: "/etc/conf", How: trace.Opened | trace.Read, Size: 5},
		}},
	}
	saved, err := store.Save(l, persist.SaveOptions{})
	must(s.t, err)
	c := nriplugin.DefaultConfig()
	c.PersistDir = s.dir
	c.ContainerdAddress = filepath.Join(s.dir, "no.sock") // nobody there: the registry has it
	r := rebuild.Request{
		Image: rebuild.Image{Reference: l.Reference, Digest: l.Digest, Platform: l.Platform},
		List:  saved.Native, ListHash: l.ContentHash(),
		Recording: rebuild.Recording{Container: "c1", Files: 2, Bytes: 300005, End: "exit", List: saved.Native},
	}
	if change != nil {
		change(&c, &r)
	}
	r.Options = c.Build()
	d, err := s.queue.Add(context.Background(), r)
	must(s.t, err)
	return d
}

func (s *shelf) wait() {
	s.t.Helper()
	eventually(s.t, "the end of the rebuild", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.built)+len(s.failed) > 0
	})
}

func someLayers(t testing.TB) []v1.Layer {
	return []v1.Layer{
		layer(t, map[string]string{"bin/app": strings.Repeat("the program ", 25000), "usr/unused": strings.Repeat("x", 1<<20)}),
		layer(t, map[string]string{"etc/conf": "conf\n"}),
	}
}

func TestRebuildIntoALayout(t *testing.T) {
	s := newShelf(t, someLayers(t)...)
	d := s.add(nil)
	if want := "oci:" + s.dir + "/optimized:" + strings.NewReplacer(":", "_", "/", "_").Replace(s.host) + "_team_app_v1-optimized"; d.Target != want {
		t.Errorf("target %s, want %s", d.Target, want)
	}
	s.wait()
	if len(s.failed) > 0 {
		t.Fatal(s.failed[0].Error)
	}
	s.wantImage(d.Target)
	for _, e := range s.logs.FilterMessageSnippet("rebuilt ").All() {
		t.Log(e.Message, e.ContextMap())
	}
	if n := s.logs.FilterMessageSnippet("rebuilt " + s.host + "/team/app:v1: read 2 files (293.0 KiB)").Len(); n != 1 {
		t.Errorf("%d lines, want 1", n)
	}
}

// wantImage checks that the target is a Nydus image with the prefetch blob that the result names.
func (s *shelf) wantImage(target string) {
	s.t.Helper()
	img, err := nydusimage.Open(context.Background(), target, nydusimage.Options{TempDir: s.t.TempDir()})
	must(s.t, err)
	defer img.Close()
	must(s.t, img.CheckLayers(context.Background(), true))
	_, has := img.PrefetchBlob()
	res := s.built[0]
	if !has || res.PrefetchFiles != 2 || res.PrefetchBytes == 0 || res.PrefetchBlob == "" || res.Manifest != img.Digest().String() {
		s.t.Errorf("prefetch blob: %v; result %+v", has, res)
	}
}

func TestRebuildIntoTheRegistry(t *testing.T) {
	s := newShelf(t, someLayers(t)...)
	d := s.add(func(c *nriplugin.Config, _ *rebuild.Request) {
		c.Rebuild.Target = rebuild.TargetRegistry
		c.Rebuild.Compressor, c.Rebuild.Digester, c.Rebuild.ChunkSize = "lz4", "sha256", 4096
	})
	s.wait()
	if len(s.failed) > 0 {
		t.Fatal(s.failed[0].Error)
	}
	if d.Target != s.host+"/team/app:v1-optimized" {
		t.Errorf("target %s", d.Target)
	}
	s.wantImage(d.Target)
}

// failing is a rebuild that cannot succeed.
type failing struct {
	layers    func(testing.TB) []v1.Layer
	change    func(*shelf) func(*nriplugin.Config, *rebuild.Request)
	permanent bool
	want      string
}

func failures() map[string]failing {
	return map[string]failing{
		"path outside of the root": {
			layers: func(t testing.TB) []v1.Layer {
				return []v1.Layer{layer(t, map[string]string{"../../etc/passwd": "x", "bin/app": "y"})}
			},
			permanent: true, want: "../../etc/passwd",
		},
		"manifest that is gone": {
			layers: someLayers,
			change: func(*shelf) func(*nriplugin.Config, *rebuild.Request) {
				return func(_ *nriplugin.Config, r *rebuild.Request) { r.Image.Digest = "sha256:" + strings.Repeat("0", 64) }
			},
			want: "404 Not Found",
		},
		"list that is broken": {
			layers: someLayers,
			change: func(s *shelf) func(*nriplugin.Config, *rebuild.Request) {
				return func(_ *nriplugin.Config, r *rebuild.Request) {
					r.List = filepath.Join(s.dir, "broken.list")
					must(s.t, os.WriteFile(r.List, []byte("headstart access list 1\nnonsense\n"), 0o600))
				}
			},
			permanent: true, want: "line",
		},
		"target that is unreachable": {
			layers: someLayers,
			change: func(*shelf) func(*nriplugin.Config, *rebuild.Request) {
				return func(c *nriplugin.Config, _ *rebuild.Request) {
					c.Rebuild.Target, c.Rebuild.Reference = rebuild.TargetRegistry, "127.0.0.1:1/{repository}:{tag}-x"
				}
			},
			want: "127.0.0.1:1",
		},
	}
}

func TestRebuildThatFails(t *testing.T) {
	for name, tc := range failures() {
		t.Run(name, func(t *testing.T) {
			s := newShelf(t, tc.layers(t)...)
			var change func(*nriplugin.Config, *rebuild.Request)
			if tc.change != nil {
				change = tc.change(s)
			}
			d := s.add(change)
			s.wait()
			if len(s.failed) != 1 {
				t.Fatalf("built %+v", s.built)
			}
			f := s.failed[0]
			if f.Permanent != tc.permanent || !strings.Contains(f.Error, tc.want) {
				t.Errorf("failure %+v, want %q, permanent %v", f, tc.want, tc.permanent)
			}
			t.Log(f.Error)
			if _, err := os.Stat(filepath.Join(s.dir, "queue", "failed", d.Key+".json")); err != nil {
				t.Error(err)
			}
			if left, err := os.ReadDir(filepath.Join(s.dir, "queue", "work")); err != nil || len(left) > 0 {
				t.Errorf("work/ has %v, %v", left, err)
			}
			if _, err := os.Stat(filepath.Join(s.dir, "optimized", "index.json")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("something was published: %v", err)
			}
			if n := s.logs.FilterMessageSnippet("not rebuilt ").Len(); n != 1 {
				t.Errorf("%d lines, want 1", n)
			}
		})
	}
}

// TestRebuildKilled kills real builds at several moments: the layout has no image or a
// whole one at each, and the next build succeeds.
func TestRebuildKilled(t *testing.T) {
	files := map[string]string{"bin/app": strings.Repeat("the program ", 25000), "etc/conf": "conf\n"}
	for i := range 40 {
		files[fmt.Sprintf("data/%d", i)] = strings.Repeat(fmt.Sprintf("%08d ", i*7919), 1<<16)
	}
	s := newShelf(t, layer(t, files))
	s.halt()
	d := s.add(nil)
	build := func() *exec.Cmd {
		return exec.Command(testenv.Binary(t, "optimizer-nri-plugin"), verbRebuild, filepath.Join(s.dir, "queue", "jobs", d.Key[:24]+".json"))
	}
	began := time.Now()
	if out, err := build().CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	whole := time.Since(began)
	must(t, os.RemoveAll(filepath.Join(s.dir, "optimized")))
	const moments = 8
	for i := range moments {
		cmd := build()
		must(t, cmd.Start())
		time.Sleep(whole * time.Duration(i+1) / moments)
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		index, err := os.ReadFile(filepath.Join(s.dir, "optimized", "index.json"))
		if err == nil && bytes.Contains(index, []byte("v1-optimized")) {
			s.wantWhole(d.Target)
		}
	}
	if out, err := build().CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s.wantWhole(d.Target)
}

func (s *shelf) wantWhole(target string) {
	s.t.Helper()
	img, err := nydusimage.Open(context.Background(), target, nydusimage.Options{TempDir: s.t.TempDir()})
	must(s.t, err)
	must(s.t, errors.Join(img.CheckLayers(context.Background(), true), img.Close()))
}
