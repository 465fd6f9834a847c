package builder

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// countSink takes data without keeping it, and bounds what a sparse file makes of nothing.
type countSink struct{ left int64 }

var errEnough = errors.New("enough")

func (s *countSink) writeFile(_ context.Context, ino *rafs.Inode, r io.Reader, size int64) error {
	if s.left -= size; s.left < 0 {
		return errEnough
	}
	ino.Chunks = []rafs.Chunk{{UncompressedSize: 1}}
	n, err := io.Copy(io.Discard, io.LimitReader(r, size))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// fuzzSeeds are tars of many kinds, and the heads of real layers.
func fuzzSeeds(f *testing.F) [][]byte {
	f.Helper()
	var seeds [][]byte
	add := func(headers ...tar.Header) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			if h.Typeflag == tar.TypeReg {
				h.Size = 1
			}
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
			if h.Size > 0 {
				if _, err := w.Write([]byte("x")); err != nil {
					f.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		seeds = append(seeds, b.Bytes())
	}
	add()
	add(tar.Header{Typeflag: tar.TypeDir, Name: "./"}, tar.Header{Typeflag: tar.TypeReg, Name: "./d/a"},
		tar.Header{Typeflag: tar.TypeLink, Name: "d/b", Linkname: "d/a"}, tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "../d"},
		tar.Header{Typeflag: tar.TypeReg, Name: "s/c"}, tar.Header{Typeflag: tar.TypeReg, Name: ".wh.d"},
		tar.Header{Typeflag: tar.TypeReg, Name: "d/.wh..wh..opq"}, tar.Header{Typeflag: tar.TypeLink, Name: "low", Linkname: "base/a"})
	add(tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("long/", 40) + "x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}},
		tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}, tar.Header{Typeflag: tar.TypeFifo, Name: "p"})
	names, err := filepath.Glob(filepath.Join(testenv.Fixtures(f), "oci", "source", "blobs", "sha256", "*"))
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range names {
		r, err := os.Open(name)
		if err != nil {
			f.Fatal(err)
		}
		if z, err := gzip.NewReader(r); err == nil {
			b := make([]byte, 8<<10)
			if _, err := io.ReadFull(z, b); err != nil {
				f.Fatal(err)
			}
			seeds = append(seeds, b)
		}
		if err := r.Close(); err != nil {
			f.Fatal(err)
		}
	}
	return seeds
}

// FuzzLayer reads any bytes as the tar of an upper layer: no panic, and a tree that is whole.
func FuzzLayer(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		merged := newTree()
		base := newDir(inventedDir())
		base.dir.put("a", entry{ino: &rafs.Inode{Mode: 0o100644}})
		merged.root.dir.put("base", base)
		l := layerReader{tree: newTree(), sink: &countSink{left: 64 << 20}, chunkSize: rafs.DefaultChunkSize}
		if l.read(t.Context(), bytes.NewReader(b)) != nil || merged.merge(l.tree) != nil {
			return
		}
		for _, p := range []string{"base/a", "s/c", "d/../s"} {
			if _, _, err := merged.locate(p, true); err != nil && !errors.Is(err, ErrInvalid) {
				t.Errorf("locate(%q): %v", p, err)
			}
		}
		final := merged.finalize()
		if n := checkTree(t, final.root, "", 0); n != final.entries {
			t.Errorf("%d entries, want %d", n, final.entries)
		}
	})
}

func checkTree(t *testing.T, ino *rafs.Inode, name string, depth int) (entries int) {
	t.Helper()
	if ino == nil || len(name) > maxName || depth > maxPath || ino.Mode&0o170000 == 0 {
		t.Fatalf("inode of %q at depth %d: %+v", name, depth, ino)
	}
	last := ""
	for _, c := range ino.Children {
		if c.Name <= last || c.Name == "." || c.Name == ".." || strings.Contains(c.Name, "/") || strings.HasPrefix(c.Name, whiteoutPrefix) {
			t.Fatalf("entry %q after %q", c.Name, last)
		}
		last = c.Name
		entries += 1 + checkTree(t, c.Inode, c.Name, depth+1)
	}
	return entries
}

// FuzzStream reads any bytes as a stored layer: no panic, and no success for wrong bytes.
func FuzzStream(f *testing.F) {
	for _, s := range fuzzSeeds(f) {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, _ = w.Write(s)
		_ = w.Close()
		f.Add(s, int64(len(s)))
		f.Add(z.Bytes(), int64(z.Len()))
	}
	f.Add([]byte("\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00\x61\x78\x77\xd3\x34"), int64(14))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		l := Layer{
			Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(b), Size: size},
			DiffID:     digest.FromString("never"),
			Open:       func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
		}
		s, err := openLayer(t.Context(), l, nil)
		if err != nil {
			return
		}
		defer s.Close()
		if n, err := io.Copy(io.Discard, io.LimitReader(s, 16<<20)); err != nil || n == 16<<20 {
			return
		}
		if err := s.finish(); err == nil {
			t.Error("finish accepts any diff ID")
		}
	})
}
