package remote_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/remote"
)

// memorySource is a source of one blob that counts what is asked for.
type memorySource struct {
	remote.Source
	data  []byte
	bytes atomic.Int64
	fail  atomic.Bool
}

func (s *memorySource) FetchRange(_ context.Context, _ ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	s.bytes.Add(n)
	if s.fail.Load() {
		n /= 2
	}
	return io.NopCloser(bytes.NewReader(s.data[off : off+n])), nil
}

func TestRangeCache(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 7))
	src := &memorySource{data: make([]byte, 1<<20)}
	for i := range src.data {
		src.data[i] = byte(r.Uint32())
	}
	desc := ocispec.Descriptor{Digest: digest.FromBytes(src.data), Size: int64(len(src.data))}
	for range 20 {
		src.bytes.Store(0)
		c, err := remote.NewRangeCache(t.Context(), src, desc, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		known := make([]bool, len(src.data))
		var union int64
		for range 30 {
			off := r.Int64N(desc.Size)
			n := min(1+r.Int64N(60_000), desc.Size-off)
			if err := c.Fetch(t.Context(), []remote.Range{{Offset: off, Length: n}}); err != nil {
				t.Fatal(err)
			}
			for i := off; i < off+n; i++ {
				if !known[i] {
					known[i] = true
					union++
				}
			}
			p := make([]byte, n)
			if got, err := c.ReadAt(p, off); int64(got) != n || err != nil || !bytes.Equal(p, src.data[off:off+n]) {
				t.Fatalf("ReadAt(%d, %d) = %d, %v", off, n, got, err)
			}
			if _, fetched := c.Traffic(); fetched != union || src.bytes.Load() != union {
				t.Fatalf("fetched %d, asked for %d, want %d: nothing twice", fetched, src.bytes.Load(), union)
			}
		}
		all := make([]byte, desc.Size+10)
		if n, err := c.ReadAt(all, 0); int64(n) != desc.Size || !errors.Is(err, io.EOF) || !bytes.Equal(all[:n], src.data) {
			t.Fatalf("ReadAt of everything = %d, %v", n, err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRangeCacheFaults(t *testing.T) {
	t.Parallel()
	src := &memorySource{data: make([]byte, 1000)}
	desc := ocispec.Descriptor{Digest: digest.FromBytes(src.data), Size: 1000}
	c, err := remote.NewRangeCache(t.Context(), src, desc, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Fetch(t.Context(), []remote.Range{{Offset: 900, Length: 101}}); !errors.Is(err, remote.ErrRange) {
		t.Errorf("range outside: %v", err)
	}
	if n, err := c.ReadAt(make([]byte, 1), 1000); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt at the end = %d, %v", n, err)
	}
	if _, err := c.ReadAt(make([]byte, 1), -1); !errors.Is(err, remote.ErrRange) {
		t.Errorf("ReadAt before the beginning: %v", err)
	}
	// A stream that ends early leaves nothing that would be taken for content.
	src.fail.Store(true)
	if err := c.Fetch(t.Context(), []remote.Range{{Offset: 0, Length: 100}}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short stream: %v", err)
	}
	src.fail.Store(false)
	src.bytes.Store(0)
	if n, err := c.ReadAt(make([]byte, 10), 0); n != 10 || err != nil || src.bytes.Load() == 0 {
		t.Errorf("ReadAt after a short stream = %d, %v, %d bytes asked for", n, err, src.bytes.Load())
	}
}

// TestRangeCacheLocal reads a blob of a layout directory where it is: nothing is copied.
func TestRangeCacheLocal(t *testing.T) {
	t.Parallel()
	img := newImage(t, 1, "amd64", 300_000)
	dir := t.TempDir()
	ref, err := remote.Parse("oci:" + dir + ":v")
	if err != nil {
		t.Fatal(err)
	}
	publish(t, "oci:"+dir+":v", img, remote.Options{})
	src, err := remote.OpenSource(t.Context(), ref, remote.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	desc := img.blobs[0].Descriptor
	file := filepath.Join(dir, "blobs", "sha256", desc.Digest.Encoded())
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	open := func(dir string) *remote.RangeCache {
		t.Helper()
		c, err := remote.NewRangeCache(t.Context(), src, desc, dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	c := open(filepath.Join(dir, "no such directory")) // which a temporary file would need
	if err := c.Fetch(t.Context(), []remote.Range{{Offset: 10, Length: 20}, {Offset: desc.Size, Length: 1}}); !errors.Is(err, remote.ErrRange) {
		t.Errorf("range outside: %v", err)
	}
	got := make([]byte, desc.Size+1)
	if n, err := c.ReadAt(got, 0); int64(n) != desc.Size || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], want) {
		t.Errorf("ReadAt of everything = %d, %v", n, err)
	}
	if _, fetched := c.Traffic(); fetched != desc.Size {
		t.Errorf("counted %d bytes, want the %d of the blob", fetched, desc.Size)
	}
	// What is no such file is refused as from anywhere else.
	if err := os.Truncate(file, desc.Size-1); err != nil {
		t.Fatal(err)
	}
	if n, err := c.ReadAt(got, 1); int64(n) != desc.Size-2 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt of a file that became shorter = %d, %v", n, err)
	}
	if _, err := open(t.TempDir()).ReadAt(got[:1], 0); !errors.Is(err, remote.ErrDigest) {
		t.Errorf("file of another size: %v, want %v", err, remote.ErrDigest)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t.TempDir()).ReadAt(got[:1], 0); !errors.Is(err, remote.ErrNotFound) {
		t.Errorf("no file: %v, want %v", err, remote.ErrNotFound)
	}
}
