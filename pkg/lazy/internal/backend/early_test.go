package backend_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/headstart-oci/headstart/pkg/lazy/internal/backend"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
)

// eager are options that want every prefetch blob early.
func eager() backend.Options {
	o := options()
	o.Early = func(string) bool { return true }
	return o
}

// asked counts the requests so far of the prefetch blob.
func (s *registry) asked(id string) (n int) {
	for _, q := range s.seen() {
		if strings.HasSuffix(q, id) {
			n++
		}
	}
	return n
}

// openEager opens the image and returns the index of its prefetch blob and that blob's bytes.
func openEager(t *testing.T, s *registry) (img *backend.Image, n int, blob []byte) {
	t.Helper()
	img, err := backend.Open(t.Context(), s.ref(), eager())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	if n = img.Origin().Prefetch; n < 0 {
		t.Fatal("the image has no prefetch blob")
	}
	return img, n, s.files["sha256:"+img.Origin().Blobs[n].Data.ID]
}

// expect reads a range and compares it.
func expect(t *testing.T, src fill.Source, r fill.Request, blob []byte) {
	t.Helper()
	rc, err := src.Range(t.Context(), r)
	if err != nil {
		t.Fatalf("Range(%+v): %v", r, err)
	}
	got, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(got, blob[r.Offset:][:r.Length]) {
		t.Errorf("Range(%+v) = %d bytes, %v: want those of the blob", r, len(got), err)
	}
	if err := rc.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// TestEarly has the registry keep the bootstrap back until the prefetch blob was asked for.
func TestEarly(t *testing.T) {
	t.Parallel()
	s := program(t, 40, 10)
	id := prefetchOf(t, s)
	asked := make(chan struct{}, 8)
	s.set(func(_ http.ResponseWriter, r *http.Request, _ int, blob []byte) bool {
		switch {
		case strings.HasSuffix(r.URL.Path, id):
			asked <- struct{}{}
		case blob[0] == 0x1f || blob[0] == 0x28: // compressed: the bootstrap
			select {
			case <-asked:
			case <-time.After(15 * time.Second):
				t.Error("the prefetch blob was not asked for before the bootstrap came")
			}
		}
		return false
	})
	img, n, blob := openEager(t, s)
	src := img.Blob(n)
	size := int64(len(blob))
	expect(t, src, fill.Request{Offset: 10, Length: size - 100}, blob) // a demand has a request of its own
	before := s.asked(id)
	expect(t, src, fill.Request{Offset: 1, Length: size - 21, Stream: true}, blob)
	if got := s.asked(id); before != 2 || got != before {
		t.Errorf("%d requests of the prefetch blob with a demand, %d with the stream, want 2 and 2", before, got)
	}
	expect(t, src, fill.Request{Length: size, Stream: true}, blob) // there is one early stream
	if got := s.asked(id); got != before+1 {
		t.Errorf("%d requests of the prefetch blob with a second stream, want %d", got, before+1)
	}
}

// prefetchOf returns the id of the prefetch blob, and forgets the requests that found it.
func prefetchOf(t *testing.T, s *registry) string {
	t.Helper()
	img, err := backend.Open(t.Context(), s.ref(), options())
	if err != nil {
		t.Fatal(err)
	}
	id := img.Origin().Blobs[img.Origin().Prefetch].Data.ID
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if n := s.asked(id); n != 0 {
		t.Errorf("%d requests of the prefetch blob that nobody wanted early", n)
	}
	s.set(nil)
	return id
}

// TestEarlyOfNoUse asks for what the early stream does not bring, or does not bring well.
func TestEarlyOfNoUse(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fault func(w http.ResponseWriter, blob []byte)
		r     fill.Request
		drop  bool
	}{
		"refused": {fault: func(w http.ResponseWriter, _ []byte) { w.WriteHeader(http.StatusNotFound) }},
		"cut": {fault: func(w http.ResponseWriter, blob []byte) {
			w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
			_, _ = w.Write(blob[:1000])
			panic(http.ErrAbortHandler)
		}},
		"dropped":      {drop: true},
		"not right":    {r: fill.Request{Suspect: true}},
		"its table":    {r: fill.Request{Meta: true}},
		"far in":       {r: fill.Request{Offset: 70 << 10}},
		"never wanted": {r: fill.Request{Offset: -1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := program(t, 40, 10)
			id := prefetchOf(t, s)
			first := true
			s.set(func(w http.ResponseWriter, r *http.Request, _ int, blob []byte) bool {
				if test.fault == nil || !strings.HasSuffix(r.URL.Path, id) {
					return false
				}
				s.mu.Lock()
				fail := first
				first = false
				s.mu.Unlock()
				if fail {
					test.fault(w, blob)
				}
				return fail
			})
			img, n, blob := openEager(t, s)
			if test.r.Offset < 0 {
				return // Close ends it
			}
			if test.drop {
				if err := img.DropEarly(); err != nil {
					t.Error(err)
				}
			}
			test.r.Stream = true
			test.r.Length = int64(len(blob)) - test.r.Offset
			expect(t, img.Blob(n), test.r, blob)
		})
	}
}

// TestEarlyEnds cancels who reads the early stream.
func TestEarlyEnds(t *testing.T) {
	t.Parallel()
	s := program(t, 40, 10)
	id := prefetchOf(t, s)
	s.set(func(w http.ResponseWriter, r *http.Request, _ int, blob []byte) bool {
		if !strings.HasSuffix(r.URL.Path, id) {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(blob)))
		_, _ = w.Write(blob[:1000])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	})
	img, n, blob := openEager(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	rc, err := img.Blob(n).Range(ctx, fill.Request{Length: int64(len(blob)), Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(rc, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	cancel()
	if _, err := io.Copy(io.Discard, rc); !errors.Is(err, context.Canceled) {
		t.Errorf("Read of a stream that was cancelled: %v", err)
	}
	if err := rc.Close(); err != nil {
		t.Error(err)
	}
}
