package remote_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	ggcrregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testcri"
	"github.com/headstart-oci/headstart/internal/testcri/critest"
	"github.com/headstart-oci/headstart/pkg/remote"
)

// place is somewhere images can be written to and read from.
type place struct {
	ref     func(name string) string // "a" → a reference; names differ in tag
	options remote.Options
	single  bool // holds one image only
}

func places(t *testing.T) map[string]func(*testing.T) place {
	return map[string]func(*testing.T) place{
		"layout": func(t *testing.T) place {
			dir := t.TempDir()
			return place{ref: func(n string) string { return "oci:" + dir + ":" + n }}
		},
		"archive": func(t *testing.T) place {
			dir := t.TempDir()
			return place{ref: func(n string) string { return "oci-archive:" + filepath.Join(dir, "image.tar") + ":" + n }, single: true}
		},
		"in-process registry": func(t *testing.T) place {
			host := ggcrHost(t)
			return place{ref: func(n string) string { return host + "/some/app:" + n }}
		},
		"registry": func(t *testing.T) place {
			r := critest.StartRegistry(t, testcri.RegistryOptions{})
			return place{ref: func(n string) string { return r.Host + "/some/app:" + n }}
		},
		"containerd": func(t *testing.T) place {
			e := critest.Start(t, testcri.Options{})
			return place{
				ref:     func(n string) string { return "containerd:example/registry.test/some/app:" + n },
				options: remote.Options{ContainerdAddress: e.Address()},
			}
		},
	}
}

func ggcrHost(t testing.TB) string {
	t.Helper()
	s := httptest.NewServer(ggcrregistry.New(ggcrregistry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// TestPlaces holds every place against the same contract.
func TestPlaces(t *testing.T) {
	for name, open := range places(t) {
		t.Run(name, func(t *testing.T) {
			p := open(t)
			t.Run("round trip", func(t *testing.T) { testRoundTrip(t, p) })
			t.Run("ranges", func(t *testing.T) { testRanges(t, p) })
			t.Run("not there", func(t *testing.T) { testNotThere(t, p) })
			t.Run("wrong bytes", func(t *testing.T) { testWrongBytes(t, p) })
			t.Run("tag moves", func(t *testing.T) { testTagMoves(t, p) })
			t.Run("failure tags nothing", func(t *testing.T) { testFailureTagsNothing(t, p) })
			t.Run("cancelled", func(t *testing.T) { testCancelled(t, p) })
		})
	}
}

func testRoundTrip(t *testing.T, p place) {
	img := newImage(t, 1, "amd64", 100_000, 0, 3_000_000)
	ref := p.ref("roundtrip")
	got := publish(t, ref, img, p.options)
	if got.Uploaded != 4 || got.Existed != 0 || got.Descriptor.Digest != img.manifest.Descriptor.Digest {
		t.Errorf("Publish = %+v, want 4 uploads of %s", got, img.manifest.Descriptor.Digest)
	}
	if !p.single {
		if again := publish(t, ref, img, p.options); again.Existed != 4 || again.Uploaded != 0 {
			t.Errorf("second Publish = %+v, want 4 that existed", again)
		}
	}
	src := openSource(t, ref, p.options)
	checkImage(t, src, img)
	if p.single {
		return
	}
	pinned := parse(t, ref).WithDigest(img.manifest.Descriptor.Digest).String()
	checkImage(t, openSource(t, pinned, p.options), img)
}

func checkImage(t *testing.T, src remote.Source, want testImage) {
	t.Helper()
	img, err := remote.Select(t.Context(), src, "linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	if img.Descriptor.Digest != want.manifest.Descriptor.Digest || !bytes.Equal(img.ManifestBytes, want.manifest.Data) || !bytes.Equal(img.ConfigBytes, want.config.Data) {
		t.Fatalf("Select = manifest %s, want %s", img.Descriptor.Digest, want.manifest.Descriptor.Digest)
	}
	if len(img.Layers) != len(want.data) {
		t.Fatalf("Select: %d layers, want %d", len(img.Layers), len(want.data))
	}
	for i, l := range img.Layers {
		data, err := readAll(t.Context(), src, l.Descriptor)
		if err != nil {
			t.Errorf("layer %d: %v", i, err)
		}
		if !bytes.Equal(data, want.data[i]) {
			t.Errorf("layer %d: %d bytes differ from the %d written", i, len(data), len(want.data[i]))
		}
	}
}

func testRanges(t *testing.T, p place) {
	img := newImage(t, 2, "amd64", 2_500_000)
	ref := p.ref("ranges")
	publish(t, ref, img, p.options)
	src := openSource(t, ref, p.options)
	desc, data := img.blobs[0].Descriptor, img.data[0]
	size := desc.Size
	for _, r := range [][2]int64{{0, 0}, {0, 1}, {0, size}, {size - 1, 1}, {size, 0}, {1, size - 1}, {1_048_575, 2}, {1_048_576, 1_048_577}} {
		got, err := readRange(t.Context(), src, desc, r[0], r[1])
		if err != nil || !bytes.Equal(got, data[r[0]:r[0]+r[1]]) {
			t.Errorf("FetchRange(%d, %d) = %d bytes, %v; want those of the blob", r[0], r[1], len(got), err)
		}
	}
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, size + 1}, {size + 1, 0}, {size, 1}, {1 << 62, 1 << 62}} {
		if _, err := src.FetchRange(t.Context(), desc, r[0], r[1]); !errors.Is(err, remote.ErrRange) {
			t.Errorf("FetchRange(%d, %d): error %v, want %v", r[0], r[1], err, remote.ErrRange)
		}
	}
}

func testNotThere(t *testing.T, p place) {
	img := newImage(t, 3, "amd64", 1000)
	publish(t, p.ref("here"), img, p.options)
	src := openSource(t, p.ref("elsewhere"), p.options)
	_, err := src.Resolve(t.Context())
	wantError(t, "Resolve", err, remote.ErrNotFound)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("nowhere"), Size: 7}
	_, err = readAll(t.Context(), src, desc)
	wantError(t, "Fetch", err, remote.ErrNotFound, desc.Digest.String())
	_, err = readRange(t.Context(), src, desc, 1, 2)
	wantError(t, "FetchRange", err, remote.ErrNotFound, desc.Digest.String())
	dst := openTarget(t, p.ref("elsewhere"), p.options)
	if ok, err := dst.Exists(t.Context(), desc); ok || err != nil {
		t.Errorf("Exists = %v, %v, want false", ok, err)
	}
	for _, bad := range []ocispec.Descriptor{{}, {Digest: "sha256:zz", Size: 1}, {Digest: desc.Digest, Size: -1}, {Digest: desc.Digest, Size: 1 << 60}, {Digest: "md5:d41d8cd98f00b204e9800998ecf8427e", Size: 1}} {
		if _, err := src.Fetch(t.Context(), bad); !errors.Is(err, remote.ErrInvalid) {
			t.Errorf("Fetch(%+v): error %v, want %v", bad, err, remote.ErrInvalid)
		}
		if _, err := dst.Push(t.Context(), remote.Blob{Descriptor: bad}); !errors.Is(err, remote.ErrInvalid) {
			t.Errorf("Push(%+v): error %v, want %v", bad, err, remote.ErrInvalid)
		}
	}
}

// testWrongBytes pushes blobs that are not what their descriptor says.
func testWrongBytes(t *testing.T, p place) {
	dst := openTarget(t, p.ref("wrong"), p.options)
	good := bytes.Repeat([]byte("0123456789"), 50_000)
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	broken := errors.New("disk on fire")
	for name, c := range map[string]struct {
		r     io.Reader
		class error
	}{
		"flipped bit": {bytes.NewReader(flipped), remote.ErrDigest},
		"short":       {bytes.NewReader(good[:len(good)-1]), remote.ErrDigest},
		"empty":       {bytes.NewReader(nil), remote.ErrDigest},
		"long":        {io.MultiReader(bytes.NewReader(good), strings.NewReader("x")), remote.ErrDigest},
		"fails":       {io.MultiReader(bytes.NewReader(good[:100_000]), failing{broken}), broken},
	} {
		doc := remote.NewDocument(ocispec.MediaTypeImageLayer, good)
		b := doc.Blob()
		b.Open = func(context.Context) (io.ReadCloser, error) { return io.NopCloser(c.r), nil }
		_, err := dst.Push(t.Context(), b)
		wantError(t, name, err, c.class)
		if ok, err := dst.Exists(t.Context(), doc.Descriptor); ok || err != nil {
			t.Errorf("%s: Exists = %v, %v, want false", name, ok, err)
		}
	}
	// The target works after that.
	if got, err := dst.Push(t.Context(), remote.NewDocument(ocispec.MediaTypeImageLayer, good).Blob()); err != nil || got != remote.Uploaded {
		t.Errorf("Push of the right bytes = %v, %v", got, err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func testTagMoves(t *testing.T, p place) {
	ref := p.ref("moves")
	first, second := newImage(t, 10, "amd64", 1000), newImage(t, 11, "amd64", 2000)
	publish(t, ref, first, p.options)
	publish(t, p.ref("other"), first, p.options)
	publish(t, ref, second, p.options)
	checkImage(t, openSource(t, ref, p.options), second)
	if !p.single {
		checkImage(t, openSource(t, p.ref("other"), p.options), first)
	}
}

// testFailureTagsNothing breaks one blob of an image: the tag keeps its old image.
func testFailureTagsNothing(t *testing.T, p place) {
	ref := p.ref("kept")
	old, broken := newImage(t, 20, "amd64", 1000), newImage(t, 21, "amd64", 2000, 3000)
	publish(t, ref, old, p.options)
	broken.blobs[1].Open = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("gone") }
	dst, err := remote.OpenTarget(t.Context(), parse(t, ref), p.options)
	if err != nil {
		t.Fatal(err)
	}
	_, err = remote.Publish(t.Context(), dst, broken.blobs, broken.config, broken.manifest, remote.PublishOptions{})
	wantError(t, "Publish", err, nil, "gone")
	if err := dst.Close(); err != nil {
		t.Error(err)
	}
	checkImage(t, openSource(t, ref, p.options), old)
}

func testCancelled(t *testing.T, p place) {
	dst := openTarget(t, p.ref("cancelled"), p.options)
	doc := remote.NewDocument(ocispec.MediaTypeImageLayer, make([]byte, 1<<20))
	ctx, cancel := context.WithCancel(t.Context())
	b := doc.Blob()
	b.Open = func(context.Context) (io.ReadCloser, error) {
		cancel()
		return io.NopCloser(bytes.NewReader(doc.Data)), nil
	}
	_, err := dst.Push(ctx, b)
	wantError(t, "Push", err, context.Canceled)
	if ok, err := dst.Exists(t.Context(), doc.Descriptor); ok || err != nil {
		t.Errorf("Exists = %v, %v, want false", ok, err)
	}
}
