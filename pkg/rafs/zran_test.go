package rafs_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// tarDir returns a directory as GNU tar packs it. Its sockets and devices are left to other tests.
func tarDir(t testing.TB, dir string) []byte {
	t.Helper()
	out, err := exec.Command("tar", "--format=pax", "--sort=name", "--xattrs", "-C", dir, "-cf", "-", ".").Output()
	must(t, err)
	return out
}

// gzipped compresses p, as one member or as members of size bytes each.
func gzipped(t testing.TB, p []byte, level, size int) []byte {
	t.Helper()
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, level)
	must(t, err)
	for ; ; z.Reset(&out) { // a new one takes about a megabyte
		n := len(p)
		if size > 0 {
			n = min(n, size)
		}
		_, err = z.Write(p[:n])
		must(t, err)
		must(t, z.Close())
		if p = p[n:]; len(p) == 0 {
			return out.Bytes()
		}
	}
}

// refImage lets nydus-image make an image over a layer that stays as it is.
func refImage(t *testing.T, layer []byte, args ...string) *stored {
	t.Helper()
	nydus := testenv.Tool(t, "nydus-image")
	dir := t.TempDir()
	file, blobs, bootstrap := filepath.Join(dir, "layer"), filepath.Join(dir, "blobs"), filepath.Join(dir, "image.boot")
	must(t, os.WriteFile(file, layer, 0o600))
	must(t, os.Mkdir(blobs, 0o700))
	out, err := exec.Command(nydus, append(append([]string{"create", "-t", "targz-ref", "--bootstrap", bootstrap, "--blob-dir", blobs}, args...), file)...).CombinedOutput()
	if err != nil {
		t.Fatalf("nydus-image create: %v\n%s", err, out)
	}
	s := &stored{blobs: map[string][]byte{fmt.Sprintf("%x", sha256.Sum256(layer)): layer}}
	s.bootstrap, err = os.ReadFile(bootstrap)
	must(t, err)
	names, err := filepath.Glob(filepath.Join(blobs, "*"))
	must(t, err)
	for _, n := range names {
		s.blobs[filepath.Base(n)], err = os.ReadFile(n)
		must(t, err)
	}
	return s
}

// TestReadRefImage reads images whose chunks lie in a plain OCI layer, as nydus-image 2.2.0 makes them.
func TestReadRefImage(t *testing.T) {
	testenv.Root(t)
	source := sourceTree(t)
	layer := tarDir(t, source)
	plain := func() []byte { return layer }
	for name, c := range map[string]struct {
		stored func() []byte
		args   []string
	}{
		"gzip":       {func() []byte { return gzipped(t, layer, 6, 0) }, nil},
		"toc":        {func() []byte { return gzipped(t, layer, 9, 0) }, []string{"--features", "blob-toc"}},
		"chunks":     {func() []byte { return gzipped(t, layer, 1, 0) }, []string{"--chunk-size", "0x10000", "--features", "blob-toc"}},
		"stored":     {func() []byte { return gzipped(t, layer, 0, 0) }, nil},
		"members":    {func() []byte { return gzipped(t, layer, 6, 1_000_001) }, nil},
		"plain tar":  {plain, nil},
		"tar, small": {plain, []string{"--chunk-size", "0x1000"}},
	} {
		if raceEnabled && name != "members" && name != "tar, small" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			s := refImage(t, c.stored(), c.args...)
			report, err := s.check(rafs.CheckOptions{Data: true})
			if err != nil {
				t.Error(err)
			}
			if report.CheckedBytes == 0 {
				t.Error("no bytes checked")
			}
			img := s.open(t)
			got := flatten(t, img, img.FS(s.reader))
			want := flattenDir(t, source, got)
			for i := range want { // tar has whole seconds only; nydus-image drops fractions of pax
				got[i].Nsec, want[i].Nsec = 0, 0
			}
			diff(t, "tree", got, want)
			s.compareMount(t)
		})
	}
}

// TestZranDamage flips bytes of every kind and wants each to be found.
func TestZranDamage(t *testing.T) {
	testenv.Root(t)
	layer := gzipped(t, tarDir(t, sourceTree(t)), 6, 0)
	s := refImage(t, layer, "--features", "blob-toc", "--chunk-size", "0x40000")
	img := s.open(t)
	meta, separate := img.Blobs[0].MetaBlob()
	if !separate {
		t.Fatal("the table is in the blob")
	}
	flips := 40
	if raceEnabled {
		flips = 4
	}
	for _, id := range []string{img.Blobs[0].ID, meta.ID} {
		good := s.blobs[id]
		for i := range flips {
			at := len(good) / flips * i
			s.blobs[id] = bytes.Clone(good)
			s.blobs[id][at] ^= 0x10
			if _, err := s.check(rafs.CheckOptions{Data: true}); err == nil {
				t.Errorf("byte %d of blob %s flipped, Check says nothing", at, id)
			}
		}
		s.blobs[id] = good
	}
	// Reading finds what it uses, without Check.
	for i := range flips {
		at := 100 + len(layer)/(flips+1)*i
		s.blobs[img.Blobs[0].ID] = bytes.Clone(layer)
		s.blobs[img.Blobs[0].ID][at] ^= 0x10
		r, err := s.reader(img.Blobs[0])
		must(t, err)
		failed := 0
		for _, c := range img.BlobChunks(0) {
			p, err := r.ReadChunk(t.Context(), c)
			if err == nil {
				continue
			}
			failed++
			if p != nil || !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrDigest) {
				t.Errorf("ReadChunk = %d bytes, %v", len(p), err)
			}
		}
		if failed == 0 {
			t.Logf("byte %d is outside all chunks", at)
		}
	}
}

// countingReader notes which bytes were read.
type countingReader struct {
	io.ReaderAt
	mu    sync.Mutex
	bytes int64
	low   int64
	high  int64
}

func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(p, off)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bytes == 0 || off < c.low {
		c.low = off
	}
	c.high = max(c.high, off+int64(n))
	c.bytes += int64(n)
	return n, err
}

// TestZranReadsLittle reads one chunk from the middle of a layer and counts what that took.
func TestZranReadsLittle(t *testing.T) {
	testenv.Root(t)
	source := t.TempDir()
	for i := range 40 {
		must(t, os.WriteFile(filepath.Join(source, fmt.Sprintf("f%02d", i)), content(newRand(uint64(i)), 700_000), 0o644))
	}
	layer := gzipped(t, tarDir(t, source), 6, 0)
	s := refImage(t, layer)
	img := s.open(t)
	count := &countingReader{ReaderAt: bytes.NewReader(layer)}
	meta, _ := img.Blobs[0].MetaBlob()
	r, err := rafs.OpenSeparateBlob(count, bytes.NewReader(s.blobs[meta.ID]), img.Blobs[0])
	must(t, err)
	c := img.Lookup("f20").Chunks[0]
	_, err = r.ReadChunk(t.Context(), c)
	must(t, err)
	t.Logf("%d of %d bytes read for a chunk of %d, from %d to %d", count.bytes, len(layer), c.UncompressedSize, count.low, count.high)
	if count.bytes == 0 || count.bytes > 4<<20 {
		t.Errorf("%d bytes read for one chunk, want at most 4 MiB of %d", count.bytes, len(layer))
	}
	// All chunks in order: hardly more than the layer once.
	count.bytes = 0
	for _, c := range img.BlobChunks(0) {
		_, err = r.ReadChunk(t.Context(), c)
		must(t, err)
	}
	if limit := int64(len(layer)) * 3 / 2; count.bytes > limit {
		t.Errorf("%d bytes read for all chunks, want at most %d", count.bytes, limit)
	}
}

// TestSeparateNeedsTable holds that the table's file is asked for, and compared.
func TestSeparateNeedsTable(t *testing.T) {
	testenv.Root(t)
	s := refImage(t, gzipped(t, tarDir(t, sourceTree(t)), 6, 0))
	img := s.open(t)
	b := img.Blobs[0]
	if _, err := rafs.OpenBlob(bytes.NewReader(nil), b); !errors.Is(err, rafs.ErrUnsupported) {
		t.Errorf("OpenBlob = %v, want ErrUnsupported", err)
	}
	meta, _ := b.MetaBlob()
	table := s.blobs[meta.ID]
	delete(s.blobs, meta.ID)
	if _, err := s.check(rafs.CheckOptions{}); err == nil || !strings.Contains(err.Error(), meta.ID[:12]) {
		t.Errorf("Check without the table = %v, want the blob that lacks", err)
	}
	s.blobs[meta.ID] = append(bytes.Clone(table), 0)
	if _, err := s.check(rafs.CheckOptions{}); !errors.Is(err, rafs.ErrInvalid) {
		t.Errorf("Check with a longer table = %v, want ErrInvalid", err)
	}
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, seed)) }
