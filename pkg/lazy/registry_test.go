package lazy_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	ggcrlayout "github.com/google/go-containerregistry/pkg/v1/layout"
	ggcrremote "github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/lazy"
)

// gate is a way to a registry that can be closed, and counts.
type gate struct {
	*httptest.Server
	closed   atomic.Bool
	requests atomic.Int64
}

func newGate(t *testing.T, host string) *gate {
	t.Helper()
	g := &gate{}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: host})
	proxy.Transport = &http.Transport{DisableKeepAlives: true} // nothing stays open behind the test
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.requests.Add(1)
		if g.closed.Load() {
			panic(http.ErrAbortHandler)
		}
		r.Host = host
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(g.Close)
	return g
}

// push puts the zoo into a real registry.
func push(t *testing.T, host string) {
	t.Helper()
	index, err := ggcrlayout.ImageIndexFromPath(strings.TrimPrefix(layout(t).Reference, "oci:"))
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var img ggcr.Image
	if img, err = index.Image(manifest.Manifests[0].Digest); err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewTag(host+"/zoo:nydus", name.Insecure)
	if err == nil {
		err = ggcrremote.Write(ref, img, ggcrremote.WithTransport(&http.Transport{DisableKeepAlives: true}))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A registry that is down fails reads after the limit, and only what it alone has; when it is back, all is well with no
// new mount.
func TestRegistry(t *testing.T) {
	t.Parallel()
	real := critest.StartRegistry(t, testcri.RegistryOptions{})
	push(t, real.Host)
	g := newGate(t, real.Host)
	b := newBox(t)
	var err error
	b.client, err = lazy.NewClient(lazy.ClientOptions{StateDir: b.state, RunDir: b.run, Command: []string{
		b.binary, "lazyd", "--state-dir", b.state, "--run-dir", b.run, "--idle", "100ms", "--limit", "500ms",
	}})
	if err != nil {
		t.Fatal(err)
	}
	r := lazy.Request{
		Reference: strings.TrimPrefix(g.URL, "http://") + "/zoo:nydus", Platform: "linux/amd64", Background: "none", NoPrefetch: true,
		Remote: lazy.Remote{PlainHTTP: true, Retries: -1},
	}
	m := b.mount(b.mountpoint("mnt"), r)
	if n := g.requests.Load(); n > 6 {
		t.Errorf("%d requests for a mount", n)
	}
	big := largest(t, m.Dir)
	g.closed.Store(true)
	if _, err := os.ReadFile(big); !errors.Is(err, unix.EIO) {
		t.Errorf("read while the registry is down: %v, want EIO", err)
	}
	if _, err := os.ReadDir(m.Dir); err != nil {
		t.Errorf("list a directory meanwhile: %v", err)
	}
	kill(t, b.status().PID) // the next daemon needs no registry to start
	if s := b.status(); len(s.Mounts) != 1 || s.Mounts[0].State != lazy.StateLazy {
		t.Errorf("%+v, want one lazy mount", s.Mounts)
	}
	g.closed.Store(false)
	compare(t, m.Dir)
	b.unmount(m.Dir)
	// By way of a proxy, to a host that nobody else knows.
	r.Reference, r.Remote.Proxy = "registry.invalid/zoo:nydus", g.URL
	p := b.mount(b.mountpoint("proxied"), r)
	compare(t, p.Dir)
	viaCommand(t, b, g.URL)
	r.Remote.Proxy = "http://user:secret@127.0.0.1:1"
	if _, err := b.client.Mount(t.Context(), b.mountpoint("secret"), r); err == nil || strings.Contains(err.Error(), "secret") && !strings.Contains(err.Error(), "password") || strings.Contains(err.Error(), "user:secret") {
		t.Errorf("Mount(proxy with a password) = %v, want a refusal without it", err)
	}
	g.closed.Store(true)
	r.Remote.Proxy = g.URL
	if _, err := b.client.Mount(t.Context(), b.mountpoint("none"), r); err == nil {
		t.Error("Mount() from a registry that is down succeeded")
	}
}

// viaCommand mounts by way of the command, whose --proxy is the only way to the image's host.
func viaCommand(t *testing.T, b *box, proxy string) {
	t.Helper()
	mount := func(proxy, dir string) error {
		out, err := exec.Command(b.binary, "mount", "--state-dir", b.state, "--run-dir", b.run, "--plain-http", "--retries", "0", "--platform", "linux/amd64",
			"--background", "none", "--proxy", proxy, "other.invalid/zoo:nydus", dir).CombinedOutput()
		if err != nil {
			return fmt.Errorf("optimizer mount: %w\n%s", err, out)
		}
		return nil
	}
	dir := b.mountpoint("command")
	if err := mount(proxy, dir); err != nil {
		t.Error(err)
	} else {
		compare(t, dir)
		b.unmount(dir)
	}
	err := mount("http://user:secret@127.0.0.1:1", dir)
	if err == nil || !strings.Contains(err.Error(), "no user and password") || strings.Contains(err.Error(), "secret") {
		t.Errorf("optimizer mount --proxy with a password: %v, want a refusal without it", err)
	}
}

// largest returns the largest file of a tree.
func largest(t *testing.T, dir string) (path string) {
	t.Helper()
	size := int64(0)
	err := filepath.Walk(dir, func(p string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() && info.Size() > size {
			path, size = p, info.Size()
		}
		return err
	})
	if err != nil || path == "" {
		t.Fatal(path, err)
	}
	return path
}
