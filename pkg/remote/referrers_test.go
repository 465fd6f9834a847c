package remote_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/remote"
)

const testArtifact = "application/vnd.example.note.v1"

func note(text string) remote.Artifact {
	return remote.Artifact{
		Type: testArtifact, Layers: []remote.Document{remote.NewDocument("text/plain", []byte(text))},
		Annotations: map[string]string{"note": text},
	}
}

// subjectImage publishes an image of nothing and returns its manifest.
func subjectImage(t *testing.T, ref remote.Reference, o remote.Options) ocispec.Descriptor {
	t.Helper()
	to, err := remote.OpenTarget(t.Context(), ref, o)
	if err != nil {
		t.Fatal(err)
	}
	layer := remote.NewDocument(ocispec.MediaTypeImageLayer, make([]byte, 1024))
	config := remote.NewDocument(ocispec.MediaTypeImageConfig, []byte(fmt.Sprintf(
		`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q]}}`, layer.Descriptor.Digest)))
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config.Descriptor, Layers: []ocispec.Descriptor{layer.Descriptor},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := remote.NewDocument(ocispec.MediaTypeImageManifest, manifest)
	_, err = remote.Publish(t.Context(), to, []remote.Blob{layer.Blob()}, config, m, remote.PublishOptions{})
	if err := errors.Join(err, to.Close()); err != nil {
		t.Fatal(err)
	}
	return m.Descriptor
}

// asked counts the requests of a registry by what they ask for.
type asked struct {
	next    http.Handler
	subject bool // answer OCI-Subject
	pages   bool // answer one referrer at a time

	mu    sync.Mutex // guards paths
	paths []string
}

func (a *asked) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.paths = append(a.paths, r.Method+" "+r.URL.Path)
	a.mu.Unlock()
	if strings.Contains(r.URL.Path, "/referrers/") {
		a.referrers(w, r)
		return
	}
	if a.subject && r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
		w.Header().Set("OCI-Subject", "sha256:whatever")
	}
	a.next.ServeHTTP(w, r)
}

// referrers answers what the registry has, with the types and annotations of the manifests,
// which it leaves out; with pages the entry that ?last= names, and a link to the next.
func (a *asked) referrers(w http.ResponseWriter, r *http.Request) {
	rec := httptest.NewRecorder()
	a.next.ServeHTTP(rec, r)
	var index ocispec.Index
	if rec.Code != http.StatusOK || json.Unmarshal(rec.Body.Bytes(), &index) != nil {
		w.WriteHeader(rec.Code)
		return
	}
	repository, _, _ := strings.Cut(r.URL.Path, "/referrers/")
	for i, d := range index.Manifests {
		rec := httptest.NewRecorder()
		a.next.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, repository+"/manifests/"+d.Digest.String(), nil))
		var m ocispec.Manifest
		if err := json.Unmarshal(rec.Body.Bytes(), &m); err == nil {
			index.Manifests[i].ArtifactType, index.Manifests[i].Annotations = m.ArtifactType, m.Annotations
		}
	}
	slices.SortFunc(index.Manifests, func(a, b ocispec.Descriptor) int { return strings.Compare(string(a.Digest), string(b.Digest)) })
	if a.pages {
		n := 0
		_, _ = fmt.Sscan(r.URL.Query().Get("last"), &n)
		if n+1 < len(index.Manifests) {
			w.Header().Set("Link", fmt.Sprintf(`<%s?last=%d>; rel="next"`, r.URL.Path, n+1))
		}
		index.Manifests = index.Manifests[min(n, len(index.Manifests)):min(n+1, len(index.Manifests))]
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	_ = json.NewEncoder(w).Encode(index)
}

func (a *asked) count(part string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, p := range a.paths {
		if strings.Contains(p, part) {
			n++
		}
	}
	return n
}

// Every place keeps artifacts: registries with the interface for referrers, whether they say
// so or not, registries without it, and layouts. A layout still has one image.
func TestReferrers(t *testing.T) {
	t.Parallel()
	quiet := registry.Logger(log.New(io.Discard, "", 0))
	for name, test := range map[string]struct {
		api, subject, pages bool
		tag                 bool // the fallback tag is used
	}{
		"interface":        {api: true, subject: true},
		"interface, pages": {api: true, subject: true, pages: true},
		"silent":           {api: true},
		"none":             {tag: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := &asked{next: registry.New(quiet, registry.WithReferrersSupport(test.api)), subject: test.subject, pages: test.pages}
			s := httptest.NewServer(a)
			defer s.Close()
			ref := parse(t, strings.TrimPrefix(s.URL, "http://")+"/app:v1")
			keepsReferrers(t, ref, remote.Options{PlainHTTP: true})
			if got := a.count("PUT /v2/app/manifests/sha256-") > 0; got != test.tag {
				t.Errorf("fallback tag written: %v, want %v", got, test.tag)
			}
		})
	}
	t.Run("layout", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(t.TempDir(), "layout")
		keepsReferrers(t, remote.Layout(dir, "v1"), remote.Options{})
		src, err := remote.OpenSource(t.Context(), remote.Layout(dir, ""), remote.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		if _, err := remote.Select(t.Context(), src, "linux/amd64"); err != nil {
			t.Errorf("the layout's only image: %v", err)
		}
	})
}

// The real registry server.
func TestReferrersDistribution(t *testing.T) {
	r := critest.StartRegistry(t, testcri.RegistryOptions{})
	keepsReferrers(t, parse(t, r.Host+"/app:v1"), remote.Options{})
}

// keepsReferrers pushes artifacts about an image, lists and reads them.
func keepsReferrers(t *testing.T, ref remote.Reference, o remote.Options) {
	t.Helper()
	subject := subjectImage(t, ref, o)
	if list, err := remote.ListReferrers(t.Context(), ref, o, subject.Digest, ""); err != nil || len(list) != 0 {
		t.Fatalf("at first: %v, %v", list, err)
	}
	var want []digest.Digest
	for _, text := range []string{"one", "two", "one"} {
		d, err := remote.PushReferrer(t.Context(), ref, o, subject, note(text))
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, d.Digest)
	}
	if want[0] != want[2] {
		t.Errorf("the same artifact is %s and %s", want[0], want[2])
	}
	other := note("three")
	other.Type = "application/vnd.example.other"
	if _, err := remote.PushReferrer(t.Context(), ref, o, subject, other); err != nil {
		t.Fatal(err)
	}
	list, err := remote.ListReferrers(t.Context(), ref, o, subject.Digest, testArtifact)
	if err != nil || len(list) != 2 {
		t.Fatalf("list: %v, %v", list, err)
	}
	if all, err := remote.ListReferrers(t.Context(), ref, o, subject.Digest, ""); err != nil || len(all) != 3 {
		t.Errorf("list of all types: %v, %v", all, err)
	}
	src, err := remote.OpenSource(t.Context(), ref, o)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	var texts []string
	for _, d := range list {
		m, err := remote.ReadArtifact(t.Context(), src, d, subject.Digest)
		if err != nil {
			t.Fatal(err)
		}
		data, err := remote.ReadAll(t.Context(), src, m.Layers[0], 100)
		if err != nil || m.Annotations["note"] != string(data) || d.Annotations["note"] != string(data) {
			t.Errorf("artifact %+v has %q, %v", d, data, err)
		}
		texts = append(texts, string(data))
		if _, err := remote.ReadArtifact(t.Context(), src, d, digest.FromString("another")); !errors.Is(err, remote.ErrInvalid) {
			t.Errorf("artifact about another image: %v", err)
		}
	}
	if slices.Sort(texts); !slices.Equal(texts, []string{"one", "two"}) {
		t.Errorf("artifacts %q", texts)
	}
}

// Writers of one fallback index lose nothing of each other.
func TestReferrersConcurrent(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	for name, ref := range map[string]remote.Reference{
		"registry": parse(t, strings.TrimPrefix(s.URL, "http://")+"/app:v1"),
		"layout":   remote.Layout(filepath.Join(t.TempDir(), "layout"), "v1"),
	} {
		o := remote.Options{PlainHTTP: true}
		subject := subjectImage(t, ref, o)
		var wg sync.WaitGroup
		const writers = 6
		for i := range writers {
			wg.Go(func() {
				if _, err := remote.PushReferrer(t.Context(), ref, o, subject, note(fmt.Sprint(i))); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if list, err := remote.ListReferrers(t.Context(), ref, o, subject.Digest, testArtifact); err != nil || len(list) != writers {
			t.Errorf("%s: %d artifacts, want %d; %v", name, len(list), writers, err)
		}
	}
}

// A writer waits for one of another process, and says whom it waited for when its time is over.
func TestReferrersLocked(t *testing.T) {
	t.Parallel()
	ref := remote.Layout(filepath.Join(t.TempDir(), "layout"), "v1")
	subject := subjectImage(t, ref, remote.Options{})
	other, err := os.Open(filepath.Join(ref.Path, ocispec.ImageBlobsDir))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = remote.PushReferrer(ctx, ref, remote.Options{}, subject, note("late"))
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(fmt.Sprint(err), "locked by another writer") {
		t.Errorf("PushReferrer of a locked layout: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.PushReferrer(t.Context(), ref, remote.Options{}, subject, note("again")); err != nil {
		t.Errorf("PushReferrer of a layout that is free again: %v", err)
	}
}

func TestReferrersErrors(t *testing.T) {
	t.Parallel()
	subject := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}
	archive := remote.Archive(filepath.Join(t.TempDir(), "a.tar"), "")
	if _, err := remote.PushReferrer(t.Context(), archive, remote.Options{}, subject, note("x")); !errors.Is(err, remote.ErrUnsupported) {
		t.Errorf("archive: %v", err)
	}
	layout := remote.Layout(filepath.Join(t.TempDir(), "l"), "")
	for name, a := range map[string]remote.Artifact{"no type": {Layers: note("x").Layers}, "no layer": {Type: "x"}} {
		if _, err := remote.PushReferrer(t.Context(), layout, remote.Options{}, subject, a); !errors.Is(err, remote.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := remote.PushReferrer(t.Context(), layout, remote.Options{}, ocispec.Descriptor{}, note("x")); !errors.Is(err, remote.ErrInvalid) {
		t.Errorf("no subject: %v", err)
	}
	if _, err := remote.ListReferrers(t.Context(), layout, remote.Options{}, "sha256:x", ""); !errors.Is(err, remote.ErrInvalid) {
		t.Errorf("bad digest: %v", err)
	}
	// Answers that are none.
	for name, body := range map[string]string{"html": "<html>", "manifest": `{"schemaVersion":2,"config":{}}`, "version": `{"schemaVersion":1,"manifests":[]}`} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/referrers/") {
				_, _ = io.WriteString(w, body)
			}
		}))
		ref := parse(t, strings.TrimPrefix(s.URL, "http://")+"/app:v1")
		if list, err := remote.ListReferrers(t.Context(), ref, remote.Options{PlainHTTP: true, Retries: -1}, subject.Digest, ""); !errors.Is(err, remote.ErrInvalid) || list != nil {
			t.Errorf("%s: %v, %v", name, list, err)
		}
		s.Close()
	}
	// Pages without end, and a page elsewhere.
	for name, link := range map[string]string{"loop": "?again", "elsewhere": "http://example.com/"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "<"+link+`>; rel="next"`)
			_, _ = io.WriteString(w, `{"schemaVersion":2,"manifests":[]}`)
		}))
		ref := parse(t, strings.TrimPrefix(s.URL, "http://")+"/app:v1")
		if _, err := remote.ListReferrers(t.Context(), ref, remote.Options{PlainHTTP: true, Retries: -1}, subject.Digest, ""); err == nil {
			t.Errorf("%s: no error", name)
		}
		s.Close()
	}
}
