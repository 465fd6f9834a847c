package builder_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// noise returns n bytes that do not compress.
func noise(seed uint64, n int) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// TestBadLayers holds the texts of errors about layers, and that nothing is left behind.
func TestBadLayers(t *testing.T) {
	good := makeTar(t, reg("a", string(noise(1, 100_000))), reg("b", "2"))
	goodGz := gz(t, good)
	goodZst := zst(t, good)
	other := digest.FromString("other")

	// with changes one thing about a good gzip layer.
	with := func(f func(l *builder.Layer)) builder.Layer {
		l := stored(ocispec.MediaTypeImageLayerGzip, good, goodGz)
		f(&l)
		return l
	}
	of := func(files ...file) builder.Layer { return tarLayer(makeTar(t, files...)) }
	bytesOf := func(b []byte) func(context.Context) (io.ReadCloser, error) {
		return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
	}
	flipped := bytes.Clone(goodGz)
	flipped[len(flipped)/2] ^= 0x40
	cutTar := good[:len(good)/2]
	raw := func(hdr string) builder.Layer { // one header block, as it is
		b := make([]byte, 2048)
		copy(b, hdr)
		copy(b[257:], "ustar\x0000")
		return tarLayer(b)
	}

	tests := map[string]struct {
		layer builder.Layer
		class error
		want  string // part of the text
	}{
		"truncated gzip": {with(func(l *builder.Layer) { l.Open = bytesOf(goodGz[:50_000]) }), builder.ErrInvalid, "the layer ends after 50000 bytes, its descriptor says"},
		"truncated gzip that is what it should be": {
			stored(ocispec.MediaTypeImageLayerGzip, good, goodGz[:50_000]), builder.ErrInvalid, "the compressed stream is cut off after",
		},
		"truncated zstd that is what it should be": {
			stored(ocispec.MediaTypeImageLayerZstd, good, goodZst[:50_000]), builder.ErrInvalid, "the compressed stream is cut off after",
		},
		"truncated tar": {tarLayer(cutTar), builder.ErrInvalid, `entry "a": data: invalid image: broken tar: the archive is cut off`},
		"oversized":     {with(func(l *builder.Layer) { l.Open = bytesOf(append(bytes.Clone(goodGz), 0)) }), builder.ErrInvalid, "the layer has more bytes than the"},
		"wrong digest":  {with(func(l *builder.Layer) { l.Descriptor.Digest = other }), builder.ErrDigest, "its descriptor says " + other.String()},
		"flipped bit":   {with(func(l *builder.Layer) { l.Open = bytesOf(flipped) }), builder.ErrDigest, "the layer's bytes have sha256:"},
		"wrong diff ID": {stored(ocispec.MediaTypeImageLayerGzip, []byte("x"), goodGz), builder.ErrDigest, "the config says " + digest.FromString("x").String()},
		"garbage behind gzip": {
			stored(ocispec.MediaTypeImageLayerGzip, good, append(bytes.Clone(goodGz), "garbage that is long enough"...)), builder.ErrInvalid, "garbage behind the compressed stream",
		},
		"garbage behind zstd": {
			stored(ocispec.MediaTypeImageLayerZstd, good, append(bytes.Clone(goodZst), "garbage that is long enough"...)), builder.ErrInvalid, "garbage behind the compressed stream",
		},
		"no digest":           {with(func(l *builder.Layer) { l.Descriptor.Digest = "sha256:12" }), builder.ErrInvalid, `digest of the descriptor: invalid image: "sha256:12"`},
		"bzip2":               {tarLayer([]byte("BZh91AY&SY" + strings.Repeat("x", 600))), builder.ErrUnsupported, "bzip2 compression; want tar, gzip or zstd"},
		"xz":                  {tarLayer([]byte("\xfd7zXZ\x00" + strings.Repeat("x", 600))), builder.ErrUnsupported, "xz compression"},
		"unknown compression": {tarLayer([]byte(strings.Repeat("hello", 200))), builder.ErrUnsupported, "unknown compression: layer begins with 68656c6c6f68656c"},
		"foreign layer": {
			with(func(l *builder.Layer) {
				l.Descriptor.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
			}), builder.ErrUnsupported, "foreign layers may not be distributed",
		},
		"non-distributable layer": {
			with(func(l *builder.Layer) {
				l.Descriptor.MediaType = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
			}), builder.ErrUnsupported, "may not be distributed",
		},
		"encrypted layer": {
			with(func(l *builder.Layer) { l.Descriptor.MediaType = ocispec.MediaTypeImageLayerGzip + "+encrypted" }), builder.ErrUnsupported, "the layer is encrypted",
		},
		"Nydus layer": {with(func(l *builder.Layer) { l.Descriptor.MediaType = builder.MediaTypeBlob }), builder.ErrUnsupported, "a Nydus image already"},
		"no layer":    {with(func(l *builder.Layer) { l.Descriptor.MediaType = "text/plain" }), builder.ErrUnsupported, `media type "text/plain" is no image layer`},
		"source fails": {with(func(l *builder.Layer) {
			l.Open = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("gone") }
		}), nil, "open: gone"},
		"broken header":      {raw("name"), builder.ErrInvalid, "tar header of entry 0: invalid image: broken tar"},
		"path escapes":       {of(reg("../x", "1")), builder.ErrInvalid, `entry "../x": invalid image: the path escapes the root`},
		"path escapes later": {of(reg("a/../../x", "1")), builder.ErrInvalid, `entry "a/../../x": invalid image: the path escapes the root`},
		"link escapes":       {of(reg("a", "1"), link("b", "../a")), builder.ErrInvalid, `entry "b": hard link to "../a": invalid image: the path escapes the root`},
		"link to nowhere":    {of(reg("a", "1"), link("b", "c")), builder.ErrInvalid, `entry "b": invalid image: hard link to "c", which neither an earlier entry nor a lower layer has`},
		"link to itself":     {of(link("b", "b")), builder.ErrInvalid, `hard link to "b", which neither`},
		"link to later":      {of(link("b", "c"), reg("c", "1")), builder.ErrInvalid, `hard link to "c", which neither`},
		"link to directory":  {of(dir("d", 0o755), link("b", "d")), builder.ErrInvalid, `hard link to directory "d"`},
		"file as parent":     {of(reg("a", "1"), reg("a/b", "1")), builder.ErrInvalid, `entry "a/b": invalid image: "a" is not a directory`},
		"symlink loop":       {of(sym("a", "b"), sym("b", "a"), reg("a/x", "1")), builder.ErrInvalid, `"a" goes through more than 255 symlinks`},
		"long name":          {of(reg(strings.Repeat("n", 256), "1")), builder.ErrInvalid, "name of 256 bytes, at most 255"},
		"long path":          {of(reg(strings.Repeat("a/", 2100)+"b", "1")), builder.ErrInvalid, "path of 4202 bytes, at most 4096"},
		"long path by symlinks": {
			of(reg(strings.Repeat("a/", 2000)+"b", "1"), sym("s", strings.Repeat("a/", 2000)), reg("s/"+strings.Repeat("b/", 60)+"c", "1")),
			builder.ErrInvalid, "path of 4120 bytes, at most 4096",
		},
		"empty symlink":        {of(sym("a", "")), builder.ErrInvalid, "symlink target of 0 bytes, want 1 to 4095"},
		"long symlink":         {of(sym("a", strings.Repeat("x", 4096))), builder.ErrInvalid, "symlink target of 4096 bytes"},
		"xattr value":          {of(xattr(reg("a", "1"), "user.big", strings.Repeat("v", 65536))), builder.ErrInvalid, `xattr "user.big" has a name of 8 bytes and a value of 65536`},
		"xattr name":           {of(xattr(reg("a", "1"), "user."+strings.Repeat("n", 251), "v")), builder.ErrInvalid, "has a name of 256 bytes"},
		"whiteout of nothing":  {of(reg("d/.wh.", "")), builder.ErrInvalid, `a whiteout of ""`},
		"whiteout of parent":   {of(reg("d/.wh...", "")), builder.ErrInvalid, `a whiteout of ".."`},
		"entry below whiteout": {of(reg(".wh.a/b", "")), builder.ErrInvalid, `the parent ".wh.a" is a whiteout`},
		"root is a file":       {of(reg(".", "")), builder.ErrInvalid, "the root is no directory"},
		"odd type":             {of(file{tar.Header{Typeflag: tar.TypeCont, Name: "a"}, ""}), builder.ErrUnsupported, `entry "a": unsupported image: tar entry type '7'`},
		"device number":        {of(file{tar.Header{Typeflag: tar.TypeChar, Name: "a", Devmajor: 4096}, ""}), builder.ErrInvalid, "device number 4096:0, at most 4095:1048575"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base := tarLayer(makeTar(t, reg("base", "0")))
			src := source(t, base, tt.layer)
			tmp := t.TempDir()
			o := builder.DefaultOptions()
			o.TempDir = tmp
			res, err := builder.Convert(t.Context(), src, o)
			if err == nil {
				res.Close()
				t.Fatal("Convert succeeded")
			}
			if tt.class != nil && !errors.Is(err, tt.class) {
				t.Errorf("error is %v, want class %v", err, tt.class)
			}
			for _, want := range []string{tt.want, "layer 1 (" + tt.layer.Descriptor.Digest.String() + "): "} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error is %q, want %q in it", err, want)
				}
			}
			if left, _ := os.ReadDir(tmp); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestBadInput holds the texts of errors that no layer is to blame for.
func TestBadInput(t *testing.T) {
	layer := tarLayer(makeTar(t, reg("a", "1")))
	src := source(t, layer)
	config := func(s string) builder.Source { c := src; c.Config = []byte(s); return c }
	tests := map[string]struct {
		src  builder.Source
		o    builder.Options
		want string
	}{
		"chunk size":     {src, builder.Options{ChunkSize: 5000}, "chunk size 5000, want a power of two from 4096 to 16777216"},
		"big chunk size": {src, builder.Options{ChunkSize: 1 << 25}, "chunk size 33554432"},
		"compressor":     {src, builder.Options{Compressor: 9}, "compressor compressor(9), want zstd, gzip, lz4 or none"},
		"gzip, 16 MiB":   {src, builder.Options{Compressor: rafs.CompressorGzip, ChunkSize: 16 << 20}, "compressor gzip with chunks of 16777216 bytes, want at most 8388608"},
		"digester":       {src, builder.Options{Digester: 9}, "want blake3 or sha256"},
		"workers":        {src, builder.Options{Workers: -1}, "-1 workers"},
		"no config":      {config(""), builder.Options{}, "invalid image: config: unexpected end of JSON input"},
		"no rootfs":      {config("{}"), builder.Options{}, "config has no rootfs"},
		"other rootfs":   {config(`{"rootfs":{"type":"zip"}}`), builder.Options{}, `rootfs type "zip", want layers`},
		"bad history":    {config(`{"rootfs":{"type":"layers"},"history":3}`), builder.Options{}, "config: history: json"},
		"diff IDs":       {config(`{"rootfs":{"type":"layers","diff_ids":[]}}`), builder.Options{}, "the manifest has 1 layers, the config 0 diff IDs"},
		"other diff ID":  {config(`{"rootfs":{"type":"layers","diff_ids":["sha256:00"]}}`), builder.Options{}, "the config says sha256:00"},
		"temp dir":       {src, builder.Options{TempDir: "/nonexistent/dir"}, "make a directory for the result: "},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if tt.o.TempDir == "" {
				tt.o.TempDir = t.TempDir()
			}
			_, err := builder.Convert(t.Context(), tt.src, tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q in it", err, tt.want)
			}
			if left, _ := os.ReadDir(tt.o.TempDir); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// slowReader gives its bytes and then hangs until it is closed.
type slowReader struct {
	r      io.Reader
	closed chan struct{}
}

func (s *slowReader) Read(p []byte) (int, error) {
	if n, err := s.r.Read(p); err == nil {
		return n, nil
	}
	<-s.closed
	return 0, os.ErrClosed
}

func (s *slowReader) Close() error { close(s.closed); return nil }

// TestCancel ends a conversion whose source hangs.
func TestCancel(t *testing.T) {
	blob := gz(t, makeTar(t, reg("a", string(noise(1, 1<<20)))))
	l := stored(ocispec.MediaTypeImageLayerGzip, nil, blob)
	ctx, cancel := context.WithCancel(t.Context())
	reading := make(chan struct{})
	l.Open = func(context.Context) (io.ReadCloser, error) {
		close(reading)
		return &slowReader{bytes.NewReader(blob[:len(blob)/2]), make(chan struct{})}, nil
	}
	go func() {
		<-reading
		cancel()
	}()
	tmp := t.TempDir()
	done := make(chan error, 1)
	go func() {
		_, err := builder.Convert(ctx, source(t, l), builder.Options{TempDir: tmp})
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("Convert = %v, want %v", err, context.Canceled)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Convert did not return")
	}
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
