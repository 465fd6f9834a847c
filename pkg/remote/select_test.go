package remote_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// memory is a Source in memory.
type memory struct {
	root    ocispec.Descriptor
	content map[digest.Digest][]byte
}

func newMemory() *memory { return &memory{content: map[digest.Digest][]byte{}} }

func (m *memory) add(mediaType string, data []byte) ocispec.Descriptor {
	d := remote.NewDocument(mediaType, data)
	m.content[d.Descriptor.Digest] = data
	return d.Descriptor
}

func (m *memory) Resolve(context.Context) (ocispec.Descriptor, error) { return m.root, nil }

func (m *memory) Fetch(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := m.content[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("%w: %s", remote.ErrNotFound, desc.Digest)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (m *memory) FetchRange(context.Context, ocispec.Descriptor, int64, int64) (io.ReadCloser, error) {
	return nil, errors.ErrUnsupported
}

func (m *memory) Close() error { return nil }

// image adds an image whose config says the platform, and returns its entry.
func (m *memory) image(t testing.TB, platform, name string) ocispec.Descriptor {
	p := split(platform)
	config := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}, Author: name}
	mf := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	mf.Config = m.add(ocispec.MediaTypeImageConfig, encode(t, config))
	mf.Layers = []ocispec.Descriptor{}
	d := m.add(ocispec.MediaTypeImageManifest, encode(t, mf))
	d.Platform = &p
	return d
}

func split(s string) ocispec.Platform {
	parts := append(strings.Split(s, "/"), "", "")
	return ocispec.Platform{OS: parts[0], Architecture: parts[1], Variant: parts[2]}
}

func (m *memory) index(t testing.TB, entries ...ocispec.Descriptor) ocispec.Descriptor {
	return m.add(ocispec.MediaTypeImageIndex, encode(t, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: entries,
	}))
}

// TestSelect picks from an index like those of Docker Hub.
func TestSelect(t *testing.T) {
	t.Parallel()
	m := newMemory()
	nydus := m.image(t, "linux/amd64", "nydus")
	nydus.ArtifactType = "application/vnd.nydus.image.manifest.v1+json"
	old := m.image(t, "linux/arm64/v8", "old nydus")
	old.Platform.OSFeatures = []string{"nydus.remoteimage.v1"}
	attestation := m.image(t, "unknown/unknown", "attestation")
	attestation.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	quiet := m.image(t, "linux/s390x", "attestation with a platform")
	quiet.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	other := m.add("application/vnd.other+json", []byte("{}"))
	other.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	nested := m.index(t, m.image(t, "linux/riscv64", "nested"), m.image(t, "linux/amd64", "second amd64"))
	m.root = m.index(t, nydus, old, attestation, quiet, other,
		m.image(t, "linux/arm/v5", "v5"), m.image(t, "linux/arm/v7", "v7"), m.image(t, "linux/arm64", "arm64"),
		m.image(t, "linux/amd64/v2", "amd64v2"), m.image(t, "linux/amd64", "amd64"), m.image(t, "windows/amd64", "windows"), nested)

	for platform, want := range map[string]string{
		"linux/amd64": "amd64", "linux/amd64/v2": "amd64v2", "linux/amd64/v3": "amd64v2", "linux/arm64": "arm64", "linux/arm64/v8": "arm64",
		"linux/arm/v7": "v7", "linux/arm/v6": "v5", "linux/arm": "v7", "linux/riscv64": "nested", "windows/amd64": "windows", "linux/aarch64": "arm64", "linux/x86_64": "amd64",
	} {
		img, err := remote.Select(t.Context(), m, platform)
		if err != nil || img.Config.Author != want {
			t.Errorf("Select(%s) = %q, %v, want %q", platform, img.Config.Author, err, want)
			continue
		}
		if img.Root.Digest != m.root.Digest || img.Descriptor.Platform == nil {
			t.Errorf("Select(%s): root %s, platform %v", platform, img.Root.Digest, img.Descriptor.Platform)
		}
	}
	_, err := remote.Select(t.Context(), m, "linux/s390x")
	wantError(t, "no such", err, remote.ErrPlatform, "want linux/s390x", "linux/arm/v7, linux/arm64", "windows/amd64")
	_, err = remote.Select(t.Context(), m, "linux/amd64/v2/x/y")
	wantError(t, "nonsense", err, remote.ErrInvalid, "platform")

	m.root = m.index(t, nydus)
	_, err = remote.Select(t.Context(), m, "linux/amd64")
	wantError(t, "only Nydus", err, remote.ErrPlatform, "Nydus")
	m.root = m.index(t, old, m.image(t, "linux/amd64", "amd64"))
	_, err = remote.Select(t.Context(), m, "linux/arm64")
	wantError(t, "only old Nydus", err, remote.ErrPlatform, "Nydus", "linux/amd64")
	list, err := remote.List(t.Context(), m)
	if err != nil || len(list) != 2 {
		t.Errorf("List = %v, %v, want two", list, err)
	}
}

// TestSelectWithoutIndex trusts the config.
func TestSelectWithoutIndex(t *testing.T) {
	t.Parallel()
	m := newMemory()
	m.root = m.image(t, "linux/arm/v7", "x")
	m.root.Platform = nil
	if img, err := remote.Select(t.Context(), m, "linux/arm/v7"); err != nil || img.Descriptor.Platform.Variant != "v7" {
		t.Errorf("Select = %v, %v", img.Descriptor.Platform, err)
	}
	_, err := remote.Select(t.Context(), m, "linux/amd64")
	wantError(t, "Select", err, remote.ErrPlatform, "want linux/amd64", "linux/arm/v7")
	m.root = m.index(t, m.root) // an index that says no platform
	if _, err := remote.Select(t.Context(), m, "linux/arm/v7"); err != nil {
		t.Error(err)
	}
	_, err = remote.Select(t.Context(), m, "linux/amd64")
	wantError(t, "Select", err, remote.ErrPlatform)
}

// TestSelectRefuses what is no image.
func TestSelectRefuses(t *testing.T) {
	t.Parallel()
	config := `"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"%s","size":%d}`
	for name, c := range map[string]struct {
		build func(m *memory) ocispec.Descriptor
		class error
		parts []string
	}{
		"no manifest": {func(m *memory) ocispec.Descriptor {
			return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: someDigest, Size: 5}
		}, remote.ErrNotFound, nil},
		"schema 1": {func(m *memory) ocispec.Descriptor {
			return m.add("application/vnd.docker.distribution.manifest.v1+prettyjws", []byte("{}"))
		}, remote.ErrUnsupported, []string{"schema 1"}},
		"schema 1 inside": {func(m *memory) ocispec.Descriptor {
			return m.add(ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":1,"fsLayers":[]}`))
		}, remote.ErrUnsupported, []string{"schema 1"}},
		"schema 3":    {raw(`{"schemaVersion":3}`), remote.ErrInvalid, []string{"version 3, want 2"}},
		"no JSON":     {raw(`no`), remote.ErrInvalid, nil},
		"an index":    {raw(`{"schemaVersion":2,"manifests":[]}`), remote.ErrInvalid, []string{"an index where a manifest"}},
		"no config":   {raw(`{"schemaVersion":2,"layers":[]}`), remote.ErrInvalid, []string{"config"}},
		"bad digest":  {raw(`{"schemaVersion":2,"config":{"digest":"sha256:1","size":1}}`), remote.ErrInvalid, []string{`"sha256:1"`}},
		"bad size":    {raw(`{"schemaVersion":2,"config":{"digest":"` + someDigest.String() + `","size":-1}}`), remote.ErrInvalid, []string{"size -1"}},
		"an artifact": {raw(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"` + someDigest.String() + `","size":2}}`), remote.ErrUnsupported, []string{"no container image"}},
		"huge config": {raw(`{"schemaVersion":2,` + fmt.Sprintf(config, someDigest, 17<<20) + `}`), remote.ErrTooLarge, []string{"config of"}},
		"bad layer":   {raw(`{"schemaVersion":2,` + fmt.Sprintf(config, someDigest, 1) + `,"layers":[{}]}`), remote.ErrInvalid, []string{"layer 0"}},
		"many layers": {raw(`{"schemaVersion":2,` + fmt.Sprintf(config, someDigest, 1) + `,"layers":[{}` + strings.Repeat(",{}", 4096) + `]}`), remote.ErrTooLarge, []string{"4097 layers"}},
		"config is no JSON": {func(m *memory) ocispec.Descriptor {
			c := m.add("", []byte("no"))
			return raw(`{"schemaVersion":2,` + fmt.Sprintf(config, c.Digest, c.Size) + `}`)(m)
		}, remote.ErrInvalid, []string{"config sha256:"}},
		"diff IDs do not fit": {func(m *memory) ocispec.Descriptor {
			c := m.add("", []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["`+someDigest+`"]}}`))
			return raw(`{"schemaVersion":2,` + fmt.Sprintf(config, c.Digest, c.Size) + `}`)(m)
		}, remote.ErrInvalid, []string{"0 layers, its config 1 diff IDs"}},
		"bad diff ID": {func(m *memory) ocispec.Descriptor {
			c := m.add("", []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["x"]}}`))
			return raw(`{"schemaVersion":2,` + fmt.Sprintf(config, c.Digest, c.Size) + `,"layers":[{"digest":"` + someDigest.String() + `","size":1}]}`)(m)
		}, remote.ErrInvalid, []string{`diff ID 0 "x"`}},
		"deep indexes": {func(m *memory) ocispec.Descriptor {
			d := m.image(t, "linux/amd64", "x")
			for range 6 {
				d = m.index(t, d)
			}
			return d
		}, remote.ErrTooLarge, []string{"inside each other"}},
		"wide indexes": {func(m *memory) ocispec.Descriptor {
			var all []ocispec.Descriptor
			for i := range 300 {
				all = append(all, m.index(t, m.image(t, "linux/amd64", fmt.Sprint(i))))
			}
			return m.index(t, all...)
		}, remote.ErrTooLarge, []string{"256 indexes"}},
		"index of a million": {func(m *memory) ocispec.Descriptor {
			return m.add(ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[{}`+strings.Repeat(",{}", 1_000_000)+`]}`))
		}, remote.ErrTooLarge, nil},
		"huge index": {func(m *memory) ocispec.Descriptor {
			return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: someDigest, Size: 1 << 40}
		}, remote.ErrTooLarge, nil},
	} {
		m := newMemory()
		m.root = c.build(m)
		img, err := remote.Select(t.Context(), m, "linux/amd64")
		wantError(t, name, err, c.class, c.parts...)
		if img.ManifestBytes != nil {
			t.Errorf("%s: an image in spite of an error", name)
		}
	}
}

func raw(manifest string) func(*memory) ocispec.Descriptor {
	return func(m *memory) ocispec.Descriptor { return m.add(ocispec.MediaTypeImageManifest, []byte(manifest)) }
}

// TestIndexBomb unfolds an index that holds itself many times over, by way of others.
func TestIndexBomb(t *testing.T) {
	t.Parallel()
	m := newMemory()
	d := m.image(t, "linux/amd64", "x")
	for range 3 {
		var many []ocispec.Descriptor
		for range 1000 {
			many = append(many, d)
		}
		d = m.index(t, many...)
	}
	m.root = d
	if img, err := remote.Select(t.Context(), m, "linux/amd64"); err != nil || img.Config.Author != "x" {
		t.Errorf("Select = %v", err)
	}
}

func TestPublishRefuses(t *testing.T) {
	t.Parallel()
	img := newImage(t, 1, "amd64", 100)
	dir := t.TempDir()
	try := func(ref string, blobs []remote.Blob, config, manifest remote.Document) error {
		dst := openTarget(t, ref, remote.Options{})
		_, err := remote.Publish(t.Context(), dst, blobs, config, manifest, remote.PublishOptions{})
		return err
	}
	wantError(t, "blob missing", try("oci:"+dir, nil, img.config, img.manifest), remote.ErrInvalid, "which is not pushed", img.blobs[0].Descriptor.Digest.String())
	wantError(t, "wrong config", try("oci:"+dir, img.blobs, remote.Document{Descriptor: img.config.Descriptor, Data: []byte("{}")}, img.manifest), remote.ErrDigest, "config")
	wantError(t, "wrong manifest", try("oci:"+dir, img.blobs, img.config, remote.Document{Descriptor: img.manifest.Descriptor, Data: []byte("{}")}), remote.ErrDigest, "manifest")
	wantError(t, "no manifest", try("oci:"+dir, img.blobs, img.config, remote.NewDocument("text/plain", []byte("{}"))), remote.ErrInvalid, "text/plain")
	wantError(t, "other digest", try("oci:"+dir+"@"+someDigest.String(), img.blobs, img.config, img.manifest), remote.ErrInvalid, "names a digest")
	wrong := append([]remote.Blob(nil), img.blobs...)
	wrong[0].Descriptor.Size++
	wantError(t, "other size", try("oci:"+dir, wrong, img.config, img.manifest), remote.ErrInvalid, "the manifest says")
	wrong[0] = remote.Blob{Descriptor: img.blobs[0].Descriptor}
	wantError(t, "no Open", try("oci:"+dir, wrong, img.config, img.manifest), remote.ErrInvalid, "cannot be opened")
	wantError(t, "nothing there", readImage(t, "oci:"+dir), remote.ErrInvalid, "no index.json")
}

// TestProgress counts every byte of every blob.
func TestProgress(t *testing.T) {
	t.Parallel()
	img := newImage(t, 1, "amd64", 1_000_000, 500_000)
	last := map[digest.Digest]remote.Progress{}
	steps := 0
	p, err := remote.Publish(t.Context(), openTarget(t, "oci:"+t.TempDir(), remote.Options{}), img.blobs, img.config, img.manifest, remote.PublishOptions{
		Progress: func(p remote.Progress) {
			steps++
			last[p.Descriptor.Digest] = p
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(last) != 3 || steps < 6 {
		t.Errorf("%d blobs in %d steps", len(last), steps)
	}
	var sum int64
	for _, v := range last {
		if v.Offset != v.Descriptor.Size || v.Result != remote.Uploaded {
			t.Errorf("ended with %+v", v)
		}
		sum += v.Offset
	}
	if sum != p.UploadedBytes {
		t.Errorf("UploadedBytes = %d, want %d", p.UploadedBytes, sum)
	}
}
