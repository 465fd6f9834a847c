package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// memoryRows are the images that the memory row converts. bytes a file are told of pairs with 100,000 and 1,000,000 files, one
// behind the other.
var memoryRows = []struct {
	name  string
	files int
	size  int64
	flags []string
}{
	{"300 MB in 3,000 files", 3_000, 100_000, nil},
	{"3 GB in 30,000 files", 30_000, 100_000, nil},
	{"3 GB in 3 files", 3, 1_000_000_000, nil},
	{"300 MB in 3,000 files, --oci-ref", 3_000, 100_000, []string{"--oci-ref"}},
	{"3 GB in 30,000 files, --oci-ref", 30_000, 100_000, []string{"--oci-ref"}},
	{"100,000 files of 100 bytes", 100_000, 100, nil},
	{"1,000,000 files of 100 bytes", 1_000_000, 100, nil},
	{"100,000 files of 100 bytes, RAFS v5", 100_000, 100, []string{"--fs-version", "5"}},
	{"1,000,000 files of 100 bytes, RAFS v5", 1_000_000, 100, []string{"--fs-version", "5"}},
}

// benchMemory converts images that differ in size by ten, and in the number of files by
// ten, and prints the peak memory of each conversion.
func benchMemory(ctx context.Context, b *bench) error {
	fmt.Fprintf(b.out, "\nmemory of one conversion (largest resident set)\n%-44s %10s %10s %14s\n", "", "wall", "memory", "bytes a file")
	var few int64
	for _, c := range memoryRows {
		s, err := b.convertSynthetic(ctx, c.files, c.size, c.flags)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		perFile := "-"
		switch c.files {
		case 100_000:
			few = s.rss
		case 1_000_000:
			perFile = fmt.Sprintf("%.0f", float64(s.rss-few)/900_000)
			b.aim("memory: "+c.name+", bytes a file", float64(s.rss-few)/900_000, 600)
		}
		fmt.Fprintf(b.out, "%-44s %9.2fs %10s %14s\n", c.name, s.wall.Seconds(), mib(s.rss), perFile)
	}
	return nil
}

func (b *bench) convertSynthetic(ctx context.Context, files int, size int64, flags []string) (s sample, err error) {
	dir, err := os.MkdirTemp(b.dir, "memory-")
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	layout := filepath.Join(dir, "in")
	if err := writeSynthetic(layout, files, size); err != nil {
		return sample{}, err
	}
	args := append([]string{b.bin + "optimizer", "convert", "--quiet", "--temp-dir", dir}, flags...)
	return timed(ctx, append(args, "oci:"+layout+":bench", "oci:"+filepath.Join(dir, "out")+":bench"))
}

// writeSynthetic writes an image of one layer whose files compress to about a third and
// are all different, as an OCI layout.
func writeSynthetic(dir string, files int, size int64) error {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	layer, diffID, err := writeLayer(blobs, files, size)
	if err != nil {
		return err
	}
	return writeLayout(dir, []ocispec.Descriptor{layer}, []digest.Digest{diffID})
}

// writeLayout makes an OCI layout with the tag bench of layers that lie in dir already.
func writeLayout(dir string, layers []ocispec.Descriptor, diffIDs []digest.Digest) error {
	blobs := filepath.Join(dir, "blobs", "sha256")
	put := func(mediaType string, v any) (ocispec.Descriptor, error) {
		body, err := json.Marshal(v)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
		return d, os.WriteFile(filepath.Join(blobs, d.Digest.Encoded()), body, 0o644)
	}
	config, err := put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffIDs},
	})
	if err != nil {
		return err
	}
	manifest, err := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: layers,
	})
	if err != nil {
		return err
	}
	manifest.Annotations = map[string]string{ocispec.AnnotationRefName: "bench"}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{manifest}})
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644),
		os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
}

func writeLayer(blobs string, files int, size int64) (d ocispec.Descriptor, diffID digest.Digest, err error) {
	name := filepath.Join(blobs, "layer")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return d, "", err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	stored, plain := digest.SHA256.Digester(), digest.SHA256.Digester()
	zw, err := gzip.NewWriterLevel(io.MultiWriter(f, stored.Hash()), gzip.BestSpeed)
	if err != nil {
		return d, "", err
	}
	tw := tar.NewWriter(io.MultiWriter(zw, plain.Hash()))
	content := newContent()
	for i := range files {
		h := &tar.Header{
			Typeflag: tar.TypeReg, Name: fmt.Sprintf("data/%04d/file-%07d", i/1000, i), Size: size, Mode: 0o644, ModTime: time.Unix(1_700_000_000, 0),
		}
		if err := tw.WriteHeader(h); err != nil {
			return d, "", err
		}
		if _, err := io.CopyN(tw, content, size); err != nil {
			return d, "", err
		}
	}
	if err := errors.Join(tw.Close(), zw.Close()); err != nil {
		return d, "", err
	}
	info, err := f.Stat()
	if err != nil {
		return d, "", err
	}
	d = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: stored.Digest(), Size: info.Size()}
	return d, plain.Digest(), os.Rename(name, filepath.Join(blobs, d.Digest.Encoded()))
}

// content yields words of a small dictionary between random ones: no two chunks of it
// are equal, and compressors make about a third of it.
type content struct {
	rand  *rand.ChaCha8
	words []byte
	buf   bytes.Buffer
}

func newContent() *content {
	c := &content{rand: rand.NewChaCha8([32]byte{1})}
	c.words = make([]byte, 4096)
	if _, err := c.rand.Read(c.words); err != nil {
		panic("bench: ChaCha8 read: " + err.Error()) // documented never to fail
	}
	return c
}

func (c *content) Read(p []byte) (int, error) {
	for c.buf.Len() < len(p) {
		n := c.rand.Uint64()
		at := n % 4000
		c.buf.Write(c.words[at : at+16+n>>32%64])
		c.buf.Write(binary.LittleEndian.AppendUint64(nil, n))
	}
	return c.buf.Read(p)
}
