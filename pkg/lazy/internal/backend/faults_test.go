package backend_test

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/internal/linksim"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

type fault = func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool

// every makes a fault of every k-th request.
func every(k int, f func(w http.ResponseWriter, r *http.Request, blob []byte)) fault {
	return func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool {
		if n%k != 1%k {
			return false
		}
		f(w, r, blob)
		return true
	}
}

func status(code int, header ...string) func(w http.ResponseWriter, r *http.Request, blob []byte) {
	return func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// passing are faults that every second or third request has: reads are right all the same.
var passing = map[string]fault{
	"429":        every(2, status(http.StatusTooManyRequests)),
	"429, later": every(101, status(http.StatusTooManyRequests, "Retry-After", "1")),
	"500":        every(2, status(http.StatusInternalServerError)),
	"503":        every(2, status(http.StatusServiceUnavailable)),
	"truncated": every(2, func(w http.ResponseWriter, r *http.Request, blob []byte) {
		from, to, _ := part(r, blob)
		answer(w, r, blob, blob[from:(from+to)/2])
	}),
	"closed at once":  every(2, func(http.ResponseWriter, *http.Request, []byte) { panic(http.ErrAbortHandler) }),
	"closed mid-body": every(2, cut),
	"flipped bits":    every(2, flipped),
	"late": every(3, func(w http.ResponseWriter, r *http.Request, blob []byte) {
		time.Sleep(30 * time.Millisecond)
		from, to, _ := part(r, blob)
		answer(w, r, blob, blob[from:to])
	}),
	"range ignored": every(1, func(w http.ResponseWriter, _ *http.Request, blob []byte) { _, _ = w.Write(blob) }),
	"another range": every(3, func(w http.ResponseWriter, _ *http.Request, blob []byte) { other(w, blob) }),
	"zeros, sometimes": every(3, func(w http.ResponseWriter, r *http.Request, blob []byte) {
		from, to, _ := part(r, blob)
		answer(w, r, blob, make([]byte, to-from))
	}),
}

func cut(w http.ResponseWriter, r *http.Request, blob []byte) {
	from, to, _ := part(r, blob)
	answer(w, r, blob, blob[from:(from+to)/2])
	_ = http.NewResponseController(w).Flush() // the connection is going to be broken
	panic(http.ErrAbortHandler)
}

func flipped(w http.ResponseWriter, r *http.Request, blob []byte) {
	from, to, _ := part(r, blob)
	p := bytes.Clone(blob[from:to])
	p[len(p)/3] ^= 0x10
	answer(w, r, blob, p)
}

func other(w http.ResponseWriter, blob []byte) {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes 7-%d/%d", len(blob)-1, len(blob)))
	w.WriteHeader(http.StatusPartialContent)
	_, _ = w.Write(blob[7:])
}

// open opens the registry's image before anything goes wrong.
func (s *registry) open(t testing.TB, o backend.Options, limit time.Duration) *mount {
	t.Helper()
	img, err := backend.Open(t.Context(), s.ref(), o)
	if err != nil {
		t.Fatal(err)
	}
	parsed := img.RAFS
	blobs, err := img.Detach()
	if err != nil {
		t.Fatal(err)
	}
	return mounted(t, parsed, blobs, limit)
}

// Whatever a registry does now and then, reads are right, by readers alone and with a prefetch stream beside them.
func TestRegistryFaultsPass(t *testing.T) {
	t.Parallel()
	for kind, change := range map[string]func(*builder.Options){
		"plain": func(*builder.Options) {},
		"batch": func(o *builder.Options) { o.BatchSize, o.PrefetchBatchSize = 1<<18, 1<<18 },
		"ref":   func(o *builder.Options) { o.OCIRef, o.Digester = true, rafs.DigesterSHA256 },
	} {
		s := serve(t, change)
		for name, f := range passing {
			for _, running := range []bool{false, true} {
				if testing.Short() && !running {
					continue
				}
				if kind != "plain" && name != "flipped bits" && name != "truncated" && name != "range ignored" {
					continue // what a server does to requests does not depend on what is in a blob
				}
				s.set(nil)
				m := s.open(t, options(), time.Minute)
				s.set(f)
				if running {
					m.s.Start(fill.Plan{Blobs: m.blobs, Stream: m.from.Origin().Prefetch, Background: fill.BackgroundFull})
				}
				failed := m.readAll()
				// Twice wrong in a row is an error: of that read, and not of the next.
				if strings.Contains(name, "flipped") || strings.Contains(name, "zeros") || strings.Contains(name, "another") {
					m.check(false)
					s.set(nil)
					failed = m.readAll()
				}
				if failed != 0 {
					t.Errorf("%s, %s, running %v: %d reads failed", kind, name, running, failed)
				}
				m.check(true)
				m.close()
			}
		}
	}
}

// What a registry does for good is an error of reads, nothing wrong is read, and all is well when it ends.
func TestRegistryFaultsStay(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	for name, f := range map[string]fault{
		"403":           every(1, status(http.StatusForbidden)),
		"404":           every(1, status(http.StatusNotFound)),
		"500":           every(1, status(http.StatusInternalServerError)),
		"429 for long":  every(1, status(http.StatusTooManyRequests, "Retry-After", "3600")),
		"flipped":       every(1, flipped),
		"cut":           every(1, cut),
		"another range": every(1, func(w http.ResponseWriter, _ *http.Request, blob []byte) { other(w, blob) }),
		"another size":  every(1, func(w http.ResponseWriter, _ *http.Request, blob []byte) { _, _ = w.Write(blob[1:]) }),
		"nonsense":      every(1, func(w http.ResponseWriter, _ *http.Request, _ []byte) { _, _ = w.Write([]byte("<html>")) }),
	} {
		s.set(nil)
		o := options()
		o.Remote.Retries = -1
		m := s.open(t, o, 500*time.Millisecond) // enough for a busy machine to ask once more
		s.set(f)
		c := m.rafs.BlobChunks(0)[1]
		err := m.blobs[0].Ensure(t.Context(), int64(c.UncompressedOffset), 1)
		if err == nil || m.caches[0].Ready(c) {
			t.Errorf("%s: Ensure = %v", name, err)
		}
		s.set(nil)
		if failed := m.readAll(); failed != 0 {
			t.Errorf("%s: %d reads failed later", name, failed)
		}
		m.check(true)
		m.close()
	}
}

// A registry that hangs is given up and asked again.
func TestRegistryHangs(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	o := options()
	o.Remote.Timeouts.Header, o.Remote.Timeouts.Stall, o.Remote.Timeouts.Connect = 300*time.Millisecond, 300*time.Millisecond, 300*time.Millisecond
	m := s.open(t, o, time.Minute)
	defer m.close()
	s.set(func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool {
		switch n {
		case 1: // no answer
		case 2: // half of one
			from, to, _ := part(r, blob)
			answer(w, r, blob, blob[from:(from+to)/2])
			_ = http.NewResponseController(w).Flush() // the client is going to leave
		default:
			return false
		}
		select {
		case <-r.Context().Done():
		case <-s.quit:
		}
		return true
	})
	if failed := m.readAll(); failed != 0 {
		t.Errorf("%d reads failed", failed)
	}
	m.check(true)
}

// While nobody answers, reads wait; they are right when the registry is back, with nothing restarted.
func TestRegistryAway(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	link, err := linksim.Start(s.host, linksim.Profile{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := link.Close(); err != nil {
			t.Error(err)
		}
	})
	img, err := backend.Open(t.Context(), link.Host()+"/some/app:v", options())
	if err != nil {
		t.Fatal(err)
	}
	m := mounted(t, img.RAFS, img.Blobs, time.Minute)
	link.Cut()
	m.s.Start(fill.Plan{Blobs: m.blobs, Stream: img.Origin().Prefetch, Background: fill.BackgroundFull})
	done := make(chan int)
	go func() { done <- m.readAll() }()
	for m.blobs[0].Stats().Retries < 3 {
		time.Sleep(time.Millisecond)
	}
	link.Mend()
	if failed := <-done; failed != 0 {
		t.Errorf("%d reads failed", failed)
	}
	m.check(true)
	m.s.Close()
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}

// Blobs that lie on another host are found there again without asking the registry each time, until that fails.
func TestRegistryRedirects(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	var there, expired, leaked atomic.Int64
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		there.Add(1)
		if r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
		if r.URL.Query().Get("signed") != fmt.Sprint(expired.Load()) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.files[strings.TrimPrefix(r.URL.Path, "/")]))
	}))
	defer store.Close()
	m := s.open(t, options(), time.Minute)
	defer m.close()
	s.set(func(w http.ResponseWriter, r *http.Request, _ int, _ []byte) bool {
		object := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		http.Redirect(w, r, fmt.Sprintf("%s/%s?signed=%d", store.URL, url.PathEscape(object), expired.Load()), http.StatusTemporaryRedirect)
		return true
	})
	chunks := m.rafs.BlobChunks(0)
	for i, c := range chunks {
		if i == len(chunks)/2 {
			expired.Add(1) // what was signed before is worth nothing any more
		}
		if err := m.blobs[0].Ensure(t.Context(), int64(c.UncompressedOffset), 1); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(s.seen()); got != 2 || there.Load() < int64(got) || leaked.Load() != 0 {
		t.Errorf("%d requests of the registry, %d of the store, %d with a secret; want 2 of the registry", got, there.Load(), leaked.Load())
	}
	if failed := m.readAll(); failed != 0 {
		t.Errorf("%d reads failed", failed)
	}
	m.check(true)
}

// A token that expires in the middle is replaced.
func TestRegistryTokenExpires(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	var serial atomic.Int64
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			fmt.Fprintf(w, `{"token": "t%d", "expires_in": 3600}`, serial.Load())
			return
		}
		if r.Header.Get("Authorization") != fmt.Sprintf("Bearer t%d", serial.Load()) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s",error="invalid_token"`, server.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.ServeHTTP(w, r)
	}))
	defer server.Close()
	img, err := backend.Open(t.Context(), strings.TrimPrefix(server.URL, "http://")+"/some/app:v", options())
	if err != nil {
		t.Fatal(err)
	}
	m := mounted(t, img.RAFS, img.Blobs, time.Minute)
	chunks := m.rafs.BlobChunks(0)
	for i, c := range chunks {
		if i%10 == 5 {
			serial.Add(1)
		}
		if err := m.blobs[0].Ensure(t.Context(), int64(c.UncompressedOffset), 1); err != nil {
			t.Fatal(err)
		}
	}
	if failed := m.readAll(); failed != 0 {
		t.Errorf("%d reads failed", failed)
	}
	m.check(true)
	m.s.Close()
	if err := img.Close(); err != nil {
		t.Error(err)
	}
}

// What a mirror gives wrongly the registry itself is asked for; a mirror that is away costs nothing but its turn.
func TestMirrors(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	var mode atomic.Value
	mode.Store("right")
	var asked atomic.Int64
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		object := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		switch p := s.files[object]; {
		case mode.Load() == "wrong" && p != nil:
			flipped(w, r, p)
		case mode.Load() == "away":
			panic(http.ErrAbortHandler)
		default:
			s.ServeHTTP(w, r)
		}
	}))
	defer mirror.Close()
	dir := t.TempDir()
	text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", s.URL, mirror.URL)
	if err := os.MkdirAll(filepath.Join(dir, s.host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, s.host, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"right", "wrong", "away"} {
		mode.Store("right")
		o := options()
		o.Remote.HostsDir = dir
		m := s.open(t, o, time.Minute)
		mode.Store(how)
		asked.Store(0)
		if failed := m.readAll(); failed != 0 {
			t.Errorf("%s: %d reads failed", how, failed)
		}
		m.check(true)
		m.close()
		if asked.Load() == 0 {
			t.Errorf("%s: the mirror was not asked", how)
		}
	}
}

// All requests go through a proxy that is named.
func TestProxy(t *testing.T) {
	t.Parallel()
	s := serve(t, func(*builder.Options) {})
	var passed atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		passed.Add(1)
		out, err := http.NewRequestWithContext(r.Context(), r.Method, r.URL.String(), nil)
		if err != nil {
			t.Error(err)
			return
		}
		out.Header = r.Header.Clone()
		resp, err := http.DefaultTransport.RoundTrip(out)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		maps.Copy(w.Header(), resp.Header)
		w.WriteHeader(resp.StatusCode)
		_, _ = io.Copy(w, resp.Body)
	}))
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	defer proxy.Close()
	o := options()
	o.Remote.Proxy = proxy.URL
	m := s.open(t, o, time.Minute)
	defer m.close()
	if failed := m.readAll(); failed != 0 {
		t.Errorf("%d reads failed", failed)
	}
	m.check(true)
	if got := len(s.seen()); got == 0 || passed.Load() != int64(got) {
		t.Errorf("%d requests through the proxy, %d at the registry", passed.Load(), got)
	}
	for _, bad := range []string{"nonsense", "ftp://x", "http://", ":"} {
		o.Remote.Proxy = bad
		if img, err := backend.Open(t.Context(), s.ref(), o); img != nil || err == nil || !strings.Contains(err.Error(), "proxy") {
			t.Errorf("Open with proxy %q = %v", bad, err)
		}
	}
}
