package remote_test

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ggcrregistry "github.com/google/go-containerregistry/pkg/registry"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// impatient repeats quickly, and waits long for what comes in the end.
func impatient() remote.Options {
	const long = 20 * time.Second
	return remote.Options{
		Retries:  2,
		Timeouts: remote.Timeouts{Connect: long, Header: long, Commit: long, Stall: long, Backoff: 10 * time.Millisecond, RetryAfter: 2 * time.Second},
	}
}

// stall is how long hasty waits.
const stall = 600 * time.Millisecond

// hasty is impatient with what hangs, too.
func hasty() remote.Options {
	o := impatient()
	o.Timeouts.Connect, o.Timeouts.Header, o.Timeouts.Commit, o.Timeouts.Stall = stall, stall, stall, stall
	return o
}

// optionsFor is hasty for cases that hang or test the difference.
func optionsFor(name string) remote.Options {
	if strings.Contains(name, "hang") || strings.Contains(name, "slow") {
		return hasty()
	}
	return impatient()
}

// faulty is a registry that answers wrongly where fault says so: it returns whether it
// answered. n counts the requests that match, from 1.
type faulty struct {
	*httptest.Server
	host string
	quit chan struct{} // closed when the test ends: who hangs waits for it

	mu       sync.Mutex // guards what follows
	match    func(*http.Request) bool
	fault    func(w http.ResponseWriter, r *http.Request, n int) bool
	matched  int
	requests []*http.Request
}

func newFaulty(t testing.TB) *faulty {
	t.Helper()
	f := &faulty{quit: make(chan struct{})}
	inner := ggcrregistry.New(ggcrregistry.Logger(log.New(io.Discard, "", 0)))
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.requests = append(f.requests, r.Clone(r.Context()))
		match, fault := f.match, f.fault
		n := 0
		if match != nil && match(r) {
			f.matched++
			n = f.matched
		}
		f.mu.Unlock()
		if n > 0 && fault(w, r, n) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(func() {
		close(f.quit)
		f.CloseClientConnections()
		f.Close()
	})
	f.host = strings.TrimPrefix(f.URL, "http://")
	return f
}

// break makes requests that match go wrong from here on.
func (f *faulty) set(match func(*http.Request) bool, fault func(http.ResponseWriter, *http.Request, int) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.match, f.fault, f.matched, f.requests = match, fault, 0, nil
}

func (f *faulty) seen() []*http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*http.Request(nil), f.requests...)
}

func (f *faulty) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.matched
}

func method(m, part string) func(*http.Request) bool {
	return func(r *http.Request) bool { return r.Method == m && strings.Contains(r.URL.Path, part) }
}

type fault = func(w http.ResponseWriter, r *http.Request, n int) bool

// status answers with a code; first limits it to the first requests, 0: all.
func status(code, first int, header ...string) fault {
	return func(w http.ResponseWriter, r *http.Request, n int) bool {
		if first > 0 && n > first {
			return false
		}
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"errors":[{"code":"TEST","message":"on  purpose\n"}]}`)
		return true
	}
}

// hangs says nothing until the client is gone.
func (f *faulty) hangs(first int) fault {
	return func(_ http.ResponseWriter, r *http.Request, n int) bool {
		if first > 0 && n > first {
			return false
		}
		f.wait(r)
		return true
	}
}

func (f *faulty) wait(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-f.quit:
	}
}

// serve answers a GET of data, from its Range, with a body that edit changes; it is cut after
// cut bytes, when that is not negative, by closing the connection or, with hang, by silence.
type serve struct {
	f         *faulty
	data      []byte
	first     int
	cut       int
	hang      bool
	noRange   bool
	badRange  bool
	announced int // Content-Length other than the data's
}

func (s serve) fault(w http.ResponseWriter, r *http.Request, n int) bool {
	if s.first > 0 && n > s.first && !s.noRange {
		return false
	}
	body, code := s.data, http.StatusOK
	var from, to int
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err == nil && !s.noRange {
		code = http.StatusPartialContent
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(s.data)))
		if s.badRange {
			w.Header().Set("Content-Range", "bytes 0-1/2")
		}
		body = body[from : to+1]
	}
	length := len(body)
	if s.announced > 0 {
		length = s.announced
	}
	w.Header().Set("Content-Length", strconv.Itoa(length))
	w.WriteHeader(code)
	if s.cut < 0 || (s.first > 0 && n > s.first) {
		_, _ = w.Write(body)
		return true
	}
	_, _ = w.Write(body[:min(s.cut, len(body))])
	_ = http.NewResponseController(w).Flush()
	if s.hang {
		s.f.wait(r)
	}
	panic(http.ErrAbortHandler)
}

// TestPullFaults breaks the answer to a blob's GET in every way.
func TestPullFaults(t *testing.T) {
	t.Parallel()
	good := bytes.Repeat([]byte("content "), 400_000) // 3.2 MB
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 0x10
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, good)
	hex := doc.Descriptor.Digest.Encoded()
	for name, c := range map[string]struct {
		fault    func(f *faulty) fault
		class    error // nil: it works all the same
		parts    []string
		requests int // GETs that match; 0: any number
	}{
		"401":                   {fault: fixed(status(401, 0)), class: remote.ErrUnauthorized, parts: []string{"repository app", "pull blob sha256:" + hex, "401", "TEST: on purpose"}, requests: 1},
		"403":                   {fault: fixed(status(403, 0)), class: remote.ErrUnauthorized, parts: []string{"403 Forbidden"}, requests: 1},
		"404":                   {fault: fixed(status(404, 0)), class: remote.ErrNotFound, parts: []string{"404 Not Found"}, requests: 1},
		"418":                   {fault: fixed(status(418, 0)), class: nil, parts: []string{"418 I'm a teapot"}, requests: 1},
		"429 for an hour":       {fault: fixed(status(429, 0, "Retry-After", "3600")), class: remote.ErrUnavailable, parts: []string{"429 Too Many Requests", "asks to wait 1h0m0s"}, requests: 1},
		"429 until far date":    {fault: fixed(status(429, 0, "Retry-After", "Fri, 01 Jan 2100 00:00:00 GMT")), class: remote.ErrUnavailable, requests: 1},
		"429 once, one second":  {fault: fixed(status(429, 1, "Retry-After", "1")), requests: 2},
		"429 always":            {fault: fixed(status(429, 0)), class: remote.ErrUnavailable, requests: 3},
		"500 twice":             {fault: fixed(status(500, 2)), requests: 3},
		"500 always":            {fault: fixed(status(500, 0)), class: remote.ErrUnavailable, parts: []string{"500 Internal Server Error"}, requests: 3},
		"503 once":              {fault: fixed(status(503, 1, "Retry-After", "nonsense")), requests: 2},
		"hang":                  {fault: func(f *faulty) fault { return f.hangs(0) }, class: remote.ErrStalled, parts: []string{"no response"}, requests: 2},
		"hang once":             {fault: func(f *faulty) fault { return f.hangs(1) }, requests: 2},
		"hang in the body":      {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 1000, hang: true}.fault }, class: remote.ErrStalled, parts: []string{"no byte received", "at byte"}, requests: 2},
		"hang in the body once": {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 1000, hang: true, first: 1}.fault }, requests: 2},
		"closed once":           {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 1_500_000, first: 1}.fault }, requests: 2},
		"closed at every MiB":   {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 1 << 20}.fault }, requests: 4},
		"closed at once":        {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 10}.fault }, class: remote.ErrUnavailable, parts: []string{"pull sha256:" + hex, "at byte 30 of 3200000"}, requests: 3},
		"closed, no ranges":     {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 1_500_000, first: 1, noRange: true}.fault }, requests: 2},
		"closed, wrong range":   {fault: func(f *faulty) fault { return serve{f: f, data: good, cut: 1_500_000, badRange: true}.fault }, class: remote.ErrInvalid, parts: []string{"Content-Range"}},
		"flipped bit":           {fault: func(f *faulty) fault { return serve{f: f, data: flipped, cut: -1}.fault }, class: remote.ErrDigest, parts: []string{hex}, requests: 1},
		"shorter":               {fault: func(f *faulty) fault { return serve{f: f, data: good[:1000], cut: -1}.fault }, class: remote.ErrDigest, parts: []string{"has 1000 bytes", "says 3200000"}, requests: 1},
		"longer":                {fault: func(f *faulty) fault { return serve{f: f, data: append(bytes.Clone(good), 'x'), cut: -1}.fault }, class: remote.ErrDigest, parts: []string{"has 3200001 bytes"}, requests: 1},
		"endless":               {fault: fixed(endless), class: remote.ErrDigest, parts: []string{"more than the 3200000 bytes"}, requests: 1},
		"steady but slow":       {fault: fixed(slow(good)), requests: 1},
		"redirect loop":         {fault: fixed(loop), class: remote.ErrUnavailable, parts: []string{"10 redirects"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFaulty(t)
			if _, err := openTarget(t, f.host+"/app:v", remote.Options{}).Push(t.Context(), doc.Blob()); err != nil {
				t.Fatal(err)
			}
			f.set(method(http.MethodGet, "/blobs/"), c.fault(f))
			got, err := readAll(t.Context(), openSource(t, f.host+"/app:v", optionsFor(name)), doc.Descriptor)
			if c.class == nil && c.parts == nil {
				if err != nil || !bytes.Equal(got, good) {
					t.Errorf("Fetch = %d bytes, %v, want all", len(got), err)
				}
			} else {
				wantError(t, "Fetch", err, c.class, append(c.parts, f.host)...)
				if int64(len(got)) >= doc.Descriptor.Size {
					t.Errorf("Fetch gave all %d bytes in spite of its error", len(got))
				}
			}
			if n := f.count(); c.requests != 0 && n != c.requests {
				t.Errorf("%d requests, want %d", n, c.requests)
			}
		})
	}
}

func fixed(v fault) func(*faulty) fault { return func(*faulty) fault { return v } }

func endless(w http.ResponseWriter, _ *http.Request, _ int) bool {
	for {
		if _, err := w.Write(bytes.Repeat([]byte("content "), 8192)); err != nil {
			return true
		}
	}
}

// slow takes longer in all than a stall may, but never stalls.
func slow(data []byte) fault {
	return func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		for i := range 8 {
			_, _ = w.Write(data[i*len(data)/8 : (i+1)*len(data)/8])
			_ = http.NewResponseController(w).Flush()
			time.Sleep(stall / 6)
		}
		return true
	}
}

func loop(w http.ResponseWriter, r *http.Request, _ int) bool {
	http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
	return true
}

// TestManifestFaults breaks what a tag resolves by.
func TestManifestFaults(t *testing.T) {
	t.Parallel()
	const schema1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	for name, c := range map[string]struct {
		match func(*http.Request) bool
		fault fault
		class error
		parts []string
	}{
		"no HEAD":          {match: method("HEAD", "/manifests/"), fault: status(405, 0)},
		"HEAD says little": {match: method("HEAD", "/manifests/"), fault: answer("", "", "")},
		"401":              {match: method("HEAD", "/manifests/"), fault: status(401, 0), class: remote.ErrUnauthorized, parts: []string{"pull manifest v"}},
		"403":              {match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }, fault: status(403, 0), class: remote.ErrUnauthorized, parts: []string{"TEST: on purpose"}},
		"404":              {match: method("HEAD", "/manifests/"), fault: status(404, 0), class: remote.ErrNotFound, parts: []string{"pull manifest v: 404"}},
		"too large by HEAD": {
			match: method("HEAD", "/manifests/"), fault: answer(ocispec.MediaTypeImageManifest, strings.Repeat(" ", 5<<20), ""),
			class: remote.ErrTooLarge, parts: []string{"5242880 bytes, at most 4194304"},
		},
		"too large by GET": {
			match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") },
			fault: func(w http.ResponseWriter, r *http.Request, n int) bool {
				if r.Method == http.MethodHead {
					return status(405, 0)(w, r, n)
				}
				return endless(w, r, n)
			}, class: remote.ErrTooLarge,
		},
		"schema 1": {match: method("HEAD", "/manifests/"), fault: answer(schema1, "{}", ""), class: remote.ErrUnsupported, parts: []string{"schema 1"}},
		"schema 1, quietly": {
			match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") },
			fault: answer("text/plain", `{"schemaVersion":1,"fsLayers":[]}`, ""), class: remote.ErrUnsupported, parts: []string{"schema 1"},
		},
		"a login page": {
			match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") },
			fault: answer("text/html", "<html>please log in</html>", ""), class: remote.ErrInvalid, parts: []string{"pull manifest v"},
		},
		"an artifact": {
			match: func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") },
			fault: answer("application/json", `{"schemaVersion":2,"mediaType":"application/vnd.cncf.oras.artifact.manifest.v1+json"}`, ""), class: remote.ErrUnsupported,
		},
		"other bytes by digest": {
			match: method("GET", "/manifests/sha256:"), fault: answer(ocispec.MediaTypeImageManifest, `{"schemaVersion":2}`, ""), class: remote.ErrDigest,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFaulty(t)
			img := newImage(t, 1, "amd64", 1000)
			publish(t, f.host+"/app:v", img, remote.Options{})
			f.set(c.match, c.fault)
			src := openSource(t, f.host+"/app:v", impatient())
			_, err := remote.Select(t.Context(), src, "linux/amd64")
			if c.class == nil {
				if err != nil {
					t.Errorf("Select: %v", err)
				}
				return
			}
			wantError(t, "Select", err, c.class, c.parts...)
		})
	}
}

func answer(mediaType, body, digest string) fault {
	return func(w http.ResponseWriter, r *http.Request, _ int) bool {
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		if digest != "" {
			w.Header().Set("Docker-Content-Digest", digest)
		} else if mediaType == ocispec.MediaTypeImageManifest && r.Method == http.MethodHead {
			w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
		}
		if r.Method != http.MethodHead {
			_, _ = io.WriteString(w, body)
		}
		return true
	}
}

// TestPushFaults breaks an upload in every way; what works is read back, what fails leaves
// no tag.
func TestPushFaults(t *testing.T) {
	t.Parallel()
	start, send := method(http.MethodPost, "/blobs/uploads/"), method(http.MethodPut, "/blobs/uploads/")
	manifest := method(http.MethodPut, "/manifests/")
	for name, c := range map[string]struct {
		match func(*http.Request) bool
		fault func(*faulty) fault
		class error
		parts []string
	}{
		"look: 401":             {match: method(http.MethodHead, "/blobs/"), fault: fixed(status(401, 0)), class: remote.ErrUnauthorized, parts: []string{"look for sha256:"}},
		"look: 500 once":        {match: method(http.MethodHead, "/blobs/"), fault: fixed(status(500, 1))},
		"start: 403":            {match: start, fault: fixed(status(403, 0)), class: remote.ErrUnauthorized, parts: []string{"start the upload", "repository app"}},
		"start: 404":            {match: start, fault: fixed(status(404, 0)), class: remote.ErrNotFound},
		"start: 429 once":       {match: start, fault: fixed(status(429, 1, "Retry-After", "1"))},
		"start: no Location":    {match: start, fault: fixed(status(202, 0)), class: remote.ErrInvalid, parts: []string{"no Location"}},
		"start: odd Location":   {match: start, fault: fixed(status(202, 0, "Location", "ftp://x/y")), class: remote.ErrInvalid, parts: []string{"ftp://x/y"}},
		"send: 401":             {match: send, fault: fixed(status(401, 0)), class: remote.ErrUnauthorized},
		"send: 413":             {match: send, fault: fixed(status(413, 0)), parts: []string{"413", "upload chunk"}},
		"send: 500 once":        {match: send, fault: fixed(status(500, 1))},
		"send: 500 always":      {match: send, fault: fixed(status(500, 0)), class: remote.ErrUnavailable, parts: []string{"push blob sha256:"}},
		"send: session lost":    {match: send, fault: fixed(status(404, 1))},
		"send: 429 for an hour": {match: send, fault: fixed(status(429, 0, "Retry-After", "3600")), class: remote.ErrUnavailable, parts: []string{"1h0m0s"}},
		"send: hang":            {match: send, fault: func(f *faulty) fault { return f.hangs(0) }, class: remote.ErrStalled},
		"send: hang once":       {match: send, fault: func(f *faulty) fault { return f.hangs(1) }},
		"send: closed once":     {match: send, fault: fixed(aborts(1))},
		"send: closed always":   {match: send, fault: fixed(aborts(0)), class: remote.ErrUnavailable},
		"tag: 400":              {match: manifest, fault: fixed(status(400, 0)), parts: []string{"push manifest v", "400 Bad Request", "TEST: on purpose"}},
		"tag: 500 once":         {match: manifest, fault: fixed(status(500, 1))},
		"tag: 500 always":       {match: manifest, fault: fixed(status(500, 0)), class: remote.ErrUnavailable},
		"tag: hang":             {match: manifest, fault: func(f *faulty) fault { return f.hangs(0) }, class: remote.ErrStalled},
		"tag: other digest":     {match: manifest, fault: fixed(status(201, 0, "Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))), class: remote.ErrDigest},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFaulty(t)
			f.set(c.match, c.fault(f))
			img := newImage(t, 1, "amd64", 2_000_000)
			dst := openTarget(t, f.host+"/app:v", optionsFor(name))
			_, err := remote.Publish(t.Context(), dst, img.blobs, img.config, img.manifest, remote.PublishOptions{})
			f.set(nil, nil)
			src := openSource(t, f.host+"/app:v", impatient())
			if c.class == nil && c.parts == nil {
				if err != nil {
					t.Fatalf("Publish: %v", err)
				}
				checkImage(t, src, img)
				return
			}
			wantError(t, "Publish", err, c.class, append(c.parts, f.host)...)
			if _, err := src.Resolve(t.Context()); err == nil && !strings.HasPrefix(name, "tag: ") {
				t.Error("the image is tagged")
			}
		})
	}
}

// aborts reads a part of the request's body and closes the connection.
func aborts(first int) fault {
	return func(_ http.ResponseWriter, r *http.Request, n int) bool {
		if first > 0 && n > first {
			return false
		}
		_, _ = io.CopyN(io.Discard, r.Body, 100_000)
		panic(http.ErrAbortHandler)
	}
}

// TestReadersEndWithContext cancels a download that hangs.
func TestReadersEndWithContext(t *testing.T) {
	t.Parallel()
	f := newFaulty(t)
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, make([]byte, 1<<20))
	if _, err := openTarget(t, f.host+"/app:v", remote.Options{}).Push(t.Context(), doc.Blob()); err != nil {
		t.Fatal(err)
	}
	f.set(method(http.MethodGet, "/blobs/"), serve{f: f, data: doc.Data, cut: 1000, hang: true}.fault)
	ctx, cancel := contextWithTimeout(t, 100*time.Millisecond)
	defer cancel()
	_, err := readAll(ctx, openSource(t, f.host+"/app:v", remote.Options{}), doc.Descriptor)
	wantError(t, "Fetch", err, ctx.Err())
}

// TestRedirectLeaksNothing redirects a blob to another port of the same host: credentials
// and configured headers stay behind.
func TestRedirectLeaksNothing(t *testing.T) {
	t.Parallel()
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, []byte("hello"))
	var leaked atomic.Pointer[http.Header]
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := r.Header.Clone()
		leaked.Store(&h)
		_, _ = w.Write(doc.Data)
	}))
	t.Cleanup(other.Close)
	f := newFaulty(t)
	f.set(func(*http.Request) bool { return true }, func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if user, pass, ok := r.BasicAuth(); !ok || user != "u" || pass != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		http.Redirect(w, r, other.URL+"/elsewhere", http.StatusTemporaryRedirect)
		return true
	})
	dir := hostsDir(t, f.host, fmt.Sprintf("server = %q\n[host.%q]\n[host.%q.header]\nX-Secret = \"s\"\n", f.URL, f.URL, f.URL))
	o := remote.Options{HostsDir: dir, Credentials: func(string) (string, string, error) { return "u", "p", nil }}
	got, err := readAll(t.Context(), openSource(t, f.host+"/app:v", o), doc.Descriptor)
	if err != nil || !bytes.Equal(got, doc.Data) {
		t.Fatalf("Fetch = %q, %v", got, err)
	}
	for _, r := range f.seen() {
		if r.Header.Get("X-Secret") != "s" {
			t.Errorf("the registry itself did not get its header: %v", r.Header)
		}
	}
	for _, k := range []string{"Authorization", "X-Secret", "Cookie", "Referer"} {
		if v := leaked.Load().Get(k); v != "" {
			t.Errorf("the other host got %s: %s", k, v)
		}
	}
}
