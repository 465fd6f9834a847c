package lazy_test

import (
	"bytes"
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

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/lazy"
)

// fault answers a request of a blob, the n-th since it is in force, in place of the registry when it returns true.
type fault = func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool

// badRegistry has one image of a layout, wants a token, and misbehaves as it is told to.
type badRegistry struct {
	*httptest.Server
	t        testing.TB
	blobs    string
	manifest ocispec.Descriptor
	quit     chan struct{}

	mu     sync.Mutex
	fault  fault
	n      int    // requests of blobs since then
	wrong  int    // requests since then that were not answered as they should be
	serial int    // of the token that is good
	stale  string // what the token service gives in place of that
}

func newBadRegistry(t *testing.T, dir string) *badRegistry {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(dir, "index.json"))
	var index ocispec.Index
	if err == nil {
		err = json.Unmarshal(p, &index)
	}
	if err != nil || len(index.Manifests) != 1 {
		t.Fatalf("%s: %d manifests, %v", dir, len(index.Manifests), err)
	}
	b := &badRegistry{t: t, blobs: filepath.Join(dir, "blobs"), manifest: index.Manifests[0], quit: make(chan struct{})}
	b.Server = httptest.NewServer(b)
	b.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(func() {
		close(b.quit)
		b.CloseClientConnections()
		b.Close()
	})
	return b
}

// request mounts its image, with no patience but that of the mount.
func (b *badRegistry) request(background string) lazy.Request {
	return lazy.Request{
		Reference: strings.TrimPrefix(b.URL, "http://") + "/some/app:v", Platform: "linux/amd64", Background: background, NoPrefetch: true, Share: lazy.ShareNone,
		Remote: lazy.Remote{PlainHTTP: true, Retries: -1, HostsDir: b.blobs}, // which configures no registry
	}
}

// set makes requests of blobs go wrong from here on; nil: right.
func (b *badRegistry) set(f fault) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault, b.n, b.wrong, b.stale = f, 0, 0, ""
}

// expire makes the token that was given worth nothing; with stay, also those that are given from here on.
func (b *badRegistry) expire(stay bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.serial++
	if stay {
		b.stale = "worthless"
	}
}

func (b *badRegistry) misbehaves() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wrong++
}

// misbehaved returns how often it did since it was told to.
func (b *badRegistry) misbehaved() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wrong
}

func (b *badRegistry) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	good := fmt.Sprint("t", b.serial)
	given := good
	if b.stale != "" {
		given = b.stale
	}
	b.mu.Unlock()
	if r.URL.Path == "/token" {
		fmt.Fprintf(w, `{"token": %q, "expires_in": 3600}`, given)
		return
	}
	if r.Header.Get("Authorization") != "Bearer "+good {
		b.misbehaves()
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s",error="invalid_token"`, b.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	rest, _ := strings.CutPrefix(r.URL.Path, "/v2/some/app/")
	kind, object, _ := strings.Cut(rest, "/")
	if object == "v" {
		object = b.manifest.Digest.String()
	}
	p, err := os.ReadFile(filepath.Join(b.blobs, strings.Replace(object, ":", "/", 1)))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", b.manifest.MediaType)
	if kind == "blobs" {
		b.mu.Lock()
		b.n++
		n, f := b.n, b.fault
		b.mu.Unlock()
		if f != nil {
			wrong := true
			defer func() { // also where it panics
				if wrong {
					b.misbehaves()
				}
			}()
			if wrong = f(w, r, n, p); wrong {
				return
			}
		}
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	w.Header().Set("Docker-Content-Digest", object)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(p))
}

// every makes a fault of every k-th request, the first one included.
func every(k int, f func(w http.ResponseWriter, r *http.Request, blob []byte)) fault {
	return func(w http.ResponseWriter, r *http.Request, n int, blob []byte) bool {
		if n%k != 1%k {
			return false
		}
		f(w, r, blob)
		return true
	}
}

func says(code int, header ...string) func(w http.ResponseWriter, r *http.Request, blob []byte) {
	return func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// asked returns the range that a request asks for, and answers with its header.
func asked(w http.ResponseWriter, r *http.Request, blob []byte) []byte {
	var from, to int
	if n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); n < 2 {
		to = len(blob) - 1
	}
	to = min(to+1, len(blob))
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(blob)))
	w.WriteHeader(http.StatusPartialContent)
	return blob[from:to]
}

// changed answers with other bytes, or fewer.
func changed(change func(p []byte) []byte) func(w http.ResponseWriter, r *http.Request, blob []byte) {
	return func(w http.ResponseWriter, r *http.Request, blob []byte) {
		p := bytes.Clone(asked(w, r, blob))
		_, _ = w.Write(change(p))
	}
}

func truncated(p []byte) []byte { return p[:len(p)/2] }

func emptied(p []byte) []byte { return p[:0] }

func flipped(p []byte) []byte {
	for i := len(p) % 3; i < len(p); i += 10 {
		p[i] ^= 0x10
	}
	return p
}

func zeroed(p []byte) []byte { return make([]byte, len(p)) }

func closedAtOnce(http.ResponseWriter, *http.Request, []byte) { panic(http.ErrAbortHandler) }

func closedMidBody(w http.ResponseWriter, r *http.Request, blob []byte) {
	_, _ = w.Write(truncated(asked(w, r, blob)))
	_ = http.NewResponseController(w).Flush() // the connection is going to be broken
	panic(http.ErrAbortHandler)
}

func anotherRange(w http.ResponseWriter, _ *http.Request, blob []byte) {
	w.Header().Set("Content-Range", fmt.Sprintf("bytes 7-%d/%d", len(blob)-1, len(blob)))
	w.WriteHeader(http.StatusPartialContent)
	_, _ = w.Write(blob[7:])
}

func late(w http.ResponseWriter, r *http.Request, blob []byte) {
	time.Sleep(30 * time.Millisecond)
	_, _ = w.Write(asked(w, r, blob))
}

// silent says nothing until the client leaves.
func (b *badRegistry) silent(_ http.ResponseWriter, r *http.Request, _ []byte) {
	select {
	case <-r.Context().Done():
	case <-b.quit:
	}
}

// stuck says half of what it should, and then nothing.
func (b *badRegistry) stuck(w http.ResponseWriter, r *http.Request, blob []byte) {
	_, _ = w.Write(truncated(asked(w, r, blob)))
	_ = http.NewResponseController(w).Flush() // the client is going to leave
	b.silent(w, r, blob)
}
