package fill_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/fill"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// image is an image whose files mean what the fixtures' expected.json says.
type image struct {
	*rafs.Image
	files map[string][]byte // blob files by id
}

// nydus opens an image that the real nydus-image made.
func nydus(t testing.TB, variant string) *image {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", variant)
	boot, err := os.ReadFile(filepath.Join(dir, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	img := &image{Image: parse(t, boot), files: map[string][]byte{}}
	for _, b := range img.Blobs {
		img.files[b.ID] = read(t, filepath.Join(dir, "blobs", b.ID))
	}
	return img
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func parse(t testing.TB, boot []byte) *rafs.Image {
	t.Helper()
	img, err := rafs.Open(strings.NewReader(string(boot)), int64(len(boot)))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// convert builds an image of the fixtures' source.
func convert(t testing.TB, change func(o *builder.Options)) *image {
	t.Helper()
	root := filepath.Join(testenv.Fixtures(t), "oci", "source")
	blob := func(hex string) string { return filepath.Join(root, "blobs", "sha256", hex) }
	decode := func(name string, v any) []byte {
		p := read(t, name)
		if err := json.Unmarshal(p, v); err != nil {
			t.Fatal(err)
		}
		return p
	}
	var index ocispec.Index
	var m ocispec.Manifest
	var config ocispec.Image
	decode(filepath.Join(root, "index.json"), &index)
	decode(blob(index.Manifests[0].Digest.Encoded()), &m)
	src := builder.Source{Manifest: index.Manifests[0], Config: decode(blob(m.Config.Digest.Encoded()), &config)}
	img := &image{files: map[string][]byte{}}
	for _, l := range m.Layers {
		img.files[l.Digest.Encoded()] = read(t, blob(l.Digest.Encoded()))
		src.Layers = append(src.Layers, builder.Layer{
			Descriptor: l,
			Open:       func(context.Context) (io.ReadCloser, error) { return os.Open(blob(l.Digest.Encoded())) },
			OpenAt:     func(context.Context) (io.ReaderAt, error) { return os.Open(blob(l.Digest.Encoded())) },
		})
	}
	o := builder.DefaultOptions()
	o.TempDir = t.TempDir()
	change(&o)
	res, err := builder.Convert(t.Context(), src, o)
	if err != nil {
		t.Fatal(err)
	}
	img.Image = parse(t, read(t, res.BootstrapPath))
	for _, f := range res.Blobs {
		img.files[f.Descriptor.Digest.Encoded()] = read(t, f.Path)
	}
	if err := res.Close(); err != nil {
		t.Fatal(err)
	}
	return img
}

// startList names files of the fixtures that make a prefetch blob.
func startList() *persist.List {
	l := &persist.List{Reference: "test", Platform: "linux/amd64", Engine: "fanotify", Grade: "file"}
	for _, p := range []string{"/bin/tool", "/app/main", "/app", "/etc"} {
		l.Accesses = append(l.Accesses, trace.Access{Path: p, How: trace.Opened})
	}
	return l
}

// kinds are images of every kind that the format has.
var kinds = map[string]func(t testing.TB) *image{
	"nydus zstd":   func(t testing.TB) *image { return nydus(t, "v6-zstd") },
	"nydus lz4":    func(t testing.TB) *image { return nydus(t, "v6-lz4_block") },
	"nydus batch":  func(t testing.TB) *image { return nydus(t, "v6-zstd-batch") },
	"nydus sha256": func(t testing.TB) *image { return nydus(t, "v6-zstd-sha256-64k") },
	"none": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.Compressor = rafs.CompressorNone })
	},
	"gzip": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.Compressor = rafs.CompressorGzip })
	},
	"batch": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.ChunkSize, o.BatchSize = 1<<16, 1<<18 })
	},
	"prefetch": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.ChunkSize, o.List, o.MarkPrefetchBlob = 1<<16, startList(), true })
	},
	"prefetch batches": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.ChunkSize, o.List, o.PrefetchBatchSize = 1<<16, startList(), 1<<18 })
	},
	"ref": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.OCIRef, o.Digester = true, rafs.DigesterSHA256 })
	},
	"ref with prefetch": func(t testing.TB) *image {
		return convert(t, func(o *builder.Options) { o.OCIRef, o.List, o.ChunkSize = true, startList(), 1<<14 })
	},
}

// prefetchBlob returns the index of the blob that no layer is; -1: all are.
func (i *image) prefetchBlob() int {
	if n := len(i.Blobs) - 1; n == 2 {
		return n
	}
	return -1
}

// cache is a cache file in memory.
type cache struct {
	mu    sync.Mutex
	data  []byte
	ready map[uint64]bool
	puts  map[uint64]int
	err   error // of Put
}

func newCache(b rafs.Blob) *cache {
	return &cache{data: make([]byte, b.UncompressedSize), ready: map[uint64]bool{}, puts: map[uint64]int{}}
}

func (c *cache) Ready(ch rafs.Chunk) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ready[ch.UncompressedOffset]
}

func (c *cache) Put(ch rafs.Chunk, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if uint32(len(p)) != ch.UncompressedSize {
		return errors.New("a chunk of another size")
	}
	copy(c.data[ch.UncompressedOffset:], p)
	c.ready[ch.UncompressedOffset] = true
	c.puts[ch.UncompressedOffset]++
	return nil
}

func (c *cache) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

// mount is an image with its caches and blobs.
type mount struct {
	*image
	t       testing.TB
	s       *fill.Scheduler
	caches  []*cache
	sources []*source
	blobs   []*fill.Blob
}

// mounted opens all blobs of img over sources with these faults.
func mounted(t testing.TB, img *image, o fill.Options) *mount {
	t.Helper()
	m := &mount{image: img, t: t, s: fill.New(o)}
	t.Cleanup(m.s.Close)
	for n, b := range img.Blobs {
		src := &source{data: img.files[b.ID], quit: make(chan struct{})}
		if meta, separate := b.MetaBlob(); separate {
			src.meta = img.files[meta.ID]
		}
		c := newCache(b)
		blob, err := m.s.Open(c, src, b, img.BlobChunks(n))
		if err != nil {
			t.Fatal(err)
		}
		m.caches, m.sources, m.blobs = append(m.caches, c), append(m.sources, src), append(m.blobs, blob)
	}
	return m
}

// ensure reads a chunk as the kernel does.
func (m *mount) ensure(ctx context.Context, c rafs.Chunk) error {
	return m.blobs[c.Blob].Ensure(ctx, int64(c.UncompressedOffset), int64(c.UncompressedSize))
}

// ensureAll reads every chunk of every blob, by its blocks.
func (m *mount) ensureAll() {
	m.t.Helper()
	for n := range m.blobs {
		for _, c := range m.BlobChunks(n) {
			if err := m.ensure(m.t.Context(), c); err != nil {
				m.t.Fatal(err)
			}
		}
	}
}

// check compares what the caches hold of every file with what the fixtures say that is in it.
func (m *mount) check() {
	m.t.Helper()
	var want []struct {
		Path, Type, SHA256 string
		Size               int64
	}
	if err := json.Unmarshal(read(m.t, filepath.Join(testenv.Fixtures(m.t), "expected.json")), &want); err != nil {
		m.t.Fatal(err)
	}
	files := 0
	for _, e := range want {
		if e.Type != "reg" || e.SHA256 == "" {
			continue
		}
		files++
		ino := m.Lookup(e.Path)
		if ino == nil {
			m.t.Fatalf("no %s", e.Path)
		}
		sum := sha256.New()
		for _, c := range ino.Chunks {
			sum.Write(m.caches[c.Blob].data[c.UncompressedOffset:][:c.UncompressedSize])
		}
		if got := hex.EncodeToString(sum.Sum(nil)); got != e.SHA256 {
			m.t.Errorf("%s is %s, want %s", e.Path, got, e.SHA256)
		}
	}
	if files < 100 {
		m.t.Errorf("the fixtures have %d files only", files)
	}
}

// once fails the test when a chunk went into its cache twice.
func (m *mount) once() {
	m.t.Helper()
	for n, c := range m.caches {
		c.mu.Lock()
		for off, puts := range c.puts {
			if puts != 1 {
				m.t.Errorf("blob %d: the chunk at %d was put %d times", n, off, puts)
			}
		}
		c.mu.Unlock()
	}
}

// sum adds the statistics of all blobs.
func (m *mount) sum() fill.Stats {
	var s fill.Stats
	for _, b := range m.blobs {
		s.Add(b.Stats())
	}
	return s
}
