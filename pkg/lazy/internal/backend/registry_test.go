package backend_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/remote"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// registry is a server of one image whose tag is v, and of whatever a test puts before it.
type registry struct {
	*httptest.Server
	host     string
	files    map[string][]byte // by digest
	manifest ocispec.Descriptor
	quit     chan struct{}

	mu       sync.Mutex
	requests []string
	// fault answers a request in place of the registry when it returns true; n counts the requests of blobs, from 1.
	fault func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool
	n     int
}

// serve starts a registry with an optimized image of the fixtures.
func serve(t testing.TB, change func(o *builder.Options)) *registry {
	t.Helper()
	root := filepath.Join(testenv.Fixtures(t), "oci", "source")
	read := func(name string) []byte {
		p, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	file := func(d digest.Digest) string { return filepath.Join(root, "blobs", "sha256", d.Encoded()) }
	var index ocispec.Index
	var m ocispec.Manifest
	decode := func(p []byte, v any) {
		if err := json.Unmarshal(p, v); err != nil {
			t.Fatal(err)
		}
	}
	decode(read(filepath.Join(root, "index.json")), &index)
	decode(read(file(index.Manifests[0].Digest)), &m)
	src := builder.Source{Manifest: index.Manifests[0], Config: read(file(m.Config.Digest))}
	s := &registry{files: map[string][]byte{}, quit: make(chan struct{})}
	for _, l := range m.Layers {
		s.files[l.Digest.String()] = read(file(l.Digest))
		src.Layers = append(src.Layers, builder.Layer{
			Descriptor: l,
			Open:       func(context.Context) (io.ReadCloser, error) { return os.Open(file(l.Digest)) },
			OpenAt:     func(context.Context) (io.ReaderAt, error) { return os.Open(file(l.Digest)) },
		})
	}
	o := builder.DefaultOptions()
	o.TempDir, o.ChunkSize = t.TempDir(), 1<<18
	o.List = &persist.List{Reference: "test", Platform: "linux/amd64", Engine: "fanotify", Grade: "file"}
	for _, p := range []string{"/bin/tool", "/app/main", "/app", "/etc"} {
		o.List.Accesses = append(o.List.Accesses, trace.Access{Path: p, How: trace.Opened})
	}
	change(&o)
	s.publish(t, src, o)
	return s
}

// publish converts src and starts the server.
func (s *registry) publish(t testing.TB, src builder.Source, o builder.Options) {
	t.Helper()
	res, err := builder.Convert(t.Context(), src, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range append(res.Blobs, res.Bootstrap) {
		if s.files[f.Descriptor.Digest.String()], err = os.ReadFile(f.Path); err != nil {
			t.Fatal(err)
		}
	}
	s.files[res.ConfigDescriptor.Digest.String()], s.files[res.ManifestDescriptor.Digest.String()] = res.Config, res.Manifest
	s.manifest = res.ManifestDescriptor
	if err := res.Close(); err != nil {
		t.Fatal(err)
	}
	s.Server = httptest.NewServer(s)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(func() {
		close(s.quit)
		s.CloseClientConnections()
		s.Close()
	})
	s.host = strings.TrimPrefix(s.URL, "http://")
}

func (s *registry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, r.Method+" "+r.URL.Path)
	s.mu.Unlock()
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2/some/app/")
	kind, object, _ := strings.Cut(rest, "/")
	if object == "v" {
		object = s.manifest.Digest.String()
	}
	p := s.files[object]
	if !ok || p == nil {
		http.NotFound(w, r)
		return
	}
	if kind == "blobs" {
		s.mu.Lock()
		s.n++
		n, fault := s.n, s.fault
		s.mu.Unlock()
		if fault != nil && fault(w, r, n, p) {
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
	} else {
		w.Header().Set("Content-Type", s.manifest.MediaType)
	}
	w.Header().Set("Docker-Content-Digest", object)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p))
}

// set makes requests of blobs go wrong from here on, and forgets those so far.
func (s *registry) set(fault func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.n, s.requests = fault, 0, nil
}

func (s *registry) seen() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.requests...)
}

func (s *registry) ref() string { return s.host + "/some/app:v" }

// options reach the registry, with short patience for what hangs.
func options() backend.Options {
	return backend.Options{Platform: "linux/amd64", Remote: remote.Options{
		PlainHTTP: true, HostsDir: "/nonexistent", DockerConfig: "/dev/null", Retries: 2,
		Timeouts: remote.Timeouts{Backoff: 5 * time.Millisecond, Connect: 20 * time.Second, Header: 20 * time.Second, Stall: 20 * time.Second, RetryAfter: 2 * time.Second},
	}}
}

// cache is a cache file in memory.
type cache struct {
	mu    sync.Mutex
	data  []byte
	ready map[uint64]bool
}

func (c *cache) Ready(ch rafs.Chunk) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ready[ch.UncompressedOffset]
}

func (c *cache) Put(ch rafs.Chunk, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	copy(c.data[ch.UncompressedOffset:], p)
	c.ready[ch.UncompressedOffset] = true
	return nil
}

// mount is an image that is being filled.
type mount struct {
	t      testing.TB
	rafs   *rafs.Image
	from   *backend.Blobs
	s      *fill.Scheduler
	caches []*cache
	blobs  []*fill.Blob
}

// mounted opens the blobs of an image.
func mounted(t testing.TB, img *rafs.Image, from *backend.Blobs, limit time.Duration) *mount {
	t.Helper()
	m := &mount{t: t, rafs: img, from: from, s: fill.New(fill.Options{Limit: limit, Backoff: 5 * time.Millisecond, Ahead: -1})}
	for n, b := range img.Blobs {
		c := &cache{data: make([]byte, b.UncompressedSize), ready: map[uint64]bool{}}
		blob, err := m.s.Open(c, from.Blob(n), b, img.BlobChunks(n))
		if err != nil {
			t.Fatal(err)
		}
		m.caches, m.blobs = append(m.caches, c), append(m.blobs, blob)
	}
	return m
}

// readAll reads every chunk, from several goroutines, and returns how many reads failed.
func (m *mount) readAll() (failed int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for n, b := range m.blobs {
		wg.Go(func() {
			for _, c := range m.rafs.BlobChunks(n) {
				if err := b.Ensure(m.t.Context(), int64(c.UncompressedOffset), int64(c.UncompressedSize)); err != nil {
					mu.Lock()
					if failed++; failed == 1 {
						m.t.Logf("the first read that failed: %v", err)
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return failed
}

// check compares what there is of every file with what the fixtures say; whole: all of it must be there.
func (m *mount) check(whole bool) {
	m.t.Helper()
	p, err := os.ReadFile(filepath.Join(testenv.Fixtures(m.t), "expected.json"))
	if err != nil {
		m.t.Fatal(err)
	}
	var want []struct{ Path, Type, SHA256 string }
	if err := json.Unmarshal(p, &want); err != nil {
		m.t.Fatal(err)
	}
	checked := 0
files:
	for _, e := range want {
		if e.Type != "reg" || e.SHA256 == "" {
			continue
		}
		sum := sha256.New()
		for _, c := range m.rafs.Lookup(e.Path).Chunks {
			if !m.caches[c.Blob].Ready(c) {
				if whole {
					m.t.Errorf("%s is not there", e.Path)
				}
				continue files
			}
			sum.Write(m.caches[c.Blob].data[c.UncompressedOffset:][:c.UncompressedSize])
		}
		checked++
		if got := hex.EncodeToString(sum.Sum(nil)); got != e.SHA256 {
			m.t.Errorf("%s is %s, want %s", e.Path, got, e.SHA256)
		}
	}
	if whole && checked < 100 {
		m.t.Errorf("%d files were compared", checked)
	}
}

func (m *mount) close() {
	m.t.Helper()
	m.s.Close()
	if err := m.from.Close(); err != nil {
		m.t.Error(err)
	}
}

// From a reference to the first bytes of the prefetch blob it is four requests, two of them at the same time: the manifest, the config
// and the bootstrap, the blob. Nothing is asked for twice and nothing only looked at.
func TestRoundTrips(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	img, err := backend.Open(t.Context(), s.ref(), options())
	if err != nil {
		t.Fatal(err)
	}
	prefetch := img.Origin().Prefetch
	if prefetch != len(img.RAFS.Blobs)-1 {
		t.Fatalf("Origin = %+v", img.Origin())
	}
	parsed := img.RAFS
	blobs, err := img.Detach()
	if err != nil {
		t.Fatal(err)
	}
	m := mounted(t, parsed, blobs, time.Minute)
	defer m.close()
	run := m.s.Start(fill.Plan{Blobs: m.blobs, Stream: prefetch, Background: fill.BackgroundNone})
	<-run.Listed()
	var manifest ocispec.Manifest
	if err := json.Unmarshal(s.files[s.manifest.Digest.String()], &manifest); err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, r := range s.seen() {
		got[r]++
	}
	last := manifest.Layers[len(manifest.Layers)-1]
	want := []string{
		"manifests/v", "blobs/" + manifest.Config.Digest.String(), "blobs/" + last.Digest.String(),
		"blobs/sha256:" + blobs.Origin().Blobs[prefetch].Data.ID,
	}
	for _, w := range want {
		if got["GET /v2/some/app/"+w] != 1 {
			t.Errorf("%s was not asked for once", w)
		}
	}
	if len(got) != len(want) || s.seen()[0] != "GET /v2/some/app/manifests/v" {
		t.Errorf("requests: %q, want those of %q", s.seen(), want)
	}
}

// part is the answer to a range request that the faults change.
func part(r *http.Request, blob []byte) (from, to int, ranged bool) {
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
		return 0, len(blob), false
	}
	return from, to + 1, true
}

// answer writes p as what r asked for.
func answer(w http.ResponseWriter, r *http.Request, blob, p []byte) {
	from, to, ranged := part(r, blob)
	w.Header().Set("Content-Length", fmt.Sprint(to-from))
	if ranged {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(blob)))
		w.WriteHeader(http.StatusPartialContent)
	}
	_, _ = w.Write(p)
}
