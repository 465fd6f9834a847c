package rafs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// refer makes an image over a layer with our own writer: its directories and regular files.
func refer(t *testing.T, layer []byte, o rafs.RefOptions) *stored {
	t.Helper()
	rb, err := rafs.NewRefBuilder(iotest.HalfReader(bytes.NewReader(layer)), o)
	must(t, err)
	b := newBuilder(t, combo{compressor: rafs.CompressorGzip, digester: o.Digester, chunkSize: max(o.ChunkSize, 4096)})
	if o.ChunkSize == 0 {
		b.img.ChunkSize = rafs.DefaultChunkSize
	}
	for tr := tar.NewReader(rb); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		name := strings.Trim(h.Name, "./")
		switch h.Typeflag {
		case tar.TypeDir:
			if name != "" {
				b.add(name, &rafs.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: 1})
			}
		case tar.TypeReg:
			f := b.add(name, &rafs.Inode{Mode: unix.S_IFREG | 0o644, Mtime: 1, Size: uint64(h.Size)})
			for at := int64(0); at < h.Size; {
				p := make([]byte, min(int64(b.img.ChunkSize), h.Size-at))
				must(t, rb.Begin(uint32(len(p))))
				_, err := io.ReadFull(tr, p)
				must(t, err)
				place, err := rb.End()
				must(t, err)
				c, err := rb.Append(place, o.Digester.Sum(p))
				must(t, err)
				f.Chunks = append(f.Chunks, c)
				at += int64(len(p))
			}
		}
	}
	var table bytes.Buffer
	blob, err := rb.Close(&table)
	must(t, err)
	meta, separate := blob.MetaBlob()
	if !separate {
		t.Errorf("blob %+v has no table of its own", blob)
	}
	b.img.Blobs = []rafs.Blob{blob}
	var boot bytes.Buffer
	_, err = rafs.WriteBootstrap(&boot, b.img)
	must(t, err)
	return &stored{bootstrap: boot.Bytes(), blobs: map[string][]byte{blob.ID: layer, meta.ID: table.Bytes()}}
}

// refLayer is a tar with sizes around chunks, equal files, and much that compresses in every way.
func refLayer(t *testing.T) ([]byte, map[string][]byte) {
	t.Helper()
	r := newRand(77)
	files := map[string][]byte{}
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	must(t, tw.WriteHeader(&tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}))
	sizes := []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20, 1<<20 + 1, 3<<20 + 5}
	count := 90
	if raceEnabled {
		count = 30
	}
	for i := range count {
		name := "d/" + strings.Repeat("f", 1+i)
		p := content(r, sizes[i%len(sizes)])
		if i%10 == 9 {
			p = files["d/"+strings.Repeat("f", i-3)]
		}
		files[name] = p
		must(t, tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(p))}))
		_, err := tw.Write(p)
		must(t, err)
	}
	must(t, tw.Close())
	return out.Bytes(), files
}

// memberPerEntry compresses a tar as stargz does: every header and every content is a member of its own.
func memberPerEntry(t *testing.T, layer []byte) []byte {
	t.Helper()
	var out []byte
	at := int64(0)
	in := bytes.NewReader(layer)
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return append(out, gzipped(t, layer[at:], 6, 0)...)
		}
		must(t, err)
		begin := int64(len(layer)) - int64(in.Len())
		out = append(out, gzipped(t, layer[at:begin], 6, 0)...)
		if h.Size > 0 {
			out = append(out, gzipped(t, layer[begin:begin+h.Size], 6, 0)...)
		}
		at = begin + h.Size
	}
}

// TestRefBuilder makes images over layers and lets every judge read them.
func TestRefBuilder(t *testing.T) {
	layer, files := refLayer(t)
	plain := func() []byte { return layer }
	for name, c := range map[string]struct {
		stored func() []byte
		o      rafs.RefOptions
	}{
		"entries":     {func() []byte { return memberPerEntry(t, layer) }, rafs.RefOptions{Digester: rafs.DigesterSHA256}},
		"gzip":        {func() []byte { return gzipped(t, layer, 6, 0) }, rafs.RefOptions{Digester: rafs.DigesterSHA256}},
		"toc":         {func() []byte { return gzipped(t, layer, 9, 0) }, rafs.RefOptions{Digester: rafs.DigesterSHA256, TOC: true}},
		"64 KiB":      {func() []byte { return gzipped(t, layer, 1, 0) }, rafs.RefOptions{ChunkSize: 64 << 10}},
		"4 KiB":       {func() []byte { return gzipped(t, layer, 6, 0) }, rafs.RefOptions{ChunkSize: 4 << 10, TOC: true}},
		"huffman":     {func() []byte { return gzipped(t, layer, -2, 0) }, rafs.RefOptions{}},
		"stored":      {func() []byte { return gzipped(t, layer, 0, 0) }, rafs.RefOptions{}},
		"members":     {func() []byte { return gzipped(t, layer, 6, 100_000) }, rafs.RefOptions{Digester: rafs.DigesterSHA256}},
		"blocks":      {func() []byte { return gzipped(t, layer, 6, 512) }, rafs.RefOptions{Digester: rafs.DigesterSHA256}},
		"plain":       {plain, rafs.RefOptions{Digester: rafs.DigesterSHA256, TOC: true}},
		"plain, 4KiB": {plain, rafs.RefOptions{ChunkSize: 4 << 10}},
	} {
		if raceEnabled && name != "members" && name != "64 KiB" && name != "plain" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			z := c.stored()
			s := refer(t, z, c.o)
			if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
				t.Error(err)
			}
			img := s.open(t)
			fsys := img.FS(s.reader)
			for name, want := range files {
				if got, err := fsys.ReadFile(name); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v, want %d", name, len(got), err, len(want))
				}
			}
			t.Logf("layer %d, table %d bytes", len(z), img.Blobs[0].MetaBlobSize)
			t.Run("kernel", s.compareMount)
			t.Run("nydus-image", s.checkNydus)
			t.Run("nydusd", func(t *testing.T) {
				if name == "members" || name == "blocks" {
					t.Skip("nydusd 2.2.0 does not read chunks that span gzip members, its own neither")
				}
				s.compareNydusd(t)
			})
		})
	}
}

// TestRefBuilderTwice holds that equal layers give equal tables, however the layer is read.
func TestRefBuilderTwice(t *testing.T) {
	t.Parallel()
	layer, _ := refLayer(t)
	z := gzipped(t, layer, 6, 1_000_000)
	a, b := refer(t, z, rafs.RefOptions{TOC: true}), refer(t, z, rafs.RefOptions{TOC: true})
	if !bytes.Equal(a.bootstrap, b.bootstrap) {
		t.Error("bootstraps differ")
	}
}

func TestRefBuilderRefuses(t *testing.T) {
	t.Parallel()
	layer, _ := refLayer(t)
	z := gzipped(t, layer, 6, 0)
	for name, c := range map[string]struct {
		layer []byte
		o     rafs.RefOptions
		want  error
	}{
		"zstd":       {[]byte("\x28\xb5\x2f\xfd\x00\x00"), rafs.RefOptions{}, rafs.ErrUnsupported},
		"chunk size": {z, rafs.RefOptions{ChunkSize: 5000}, rafs.ErrInvalid},
		"digester":   {z, rafs.RefOptions{Digester: 7}, rafs.ErrUnsupported},
	} {
		if _, err := rafs.NewRefBuilder(bytes.NewReader(c.layer), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: NewRefBuilder = %v, want %v", name, err, c.want)
		}
	}
	// Damage anywhere, behind the last chunk too, fails the blob and writes nothing.
	for _, at := range []int{20, len(z) / 2, len(z) - 6} {
		bad := bytes.Clone(z)
		bad[at] ^= 1
		rb, err := rafs.NewRefBuilder(bytes.NewReader(bad), rafs.RefOptions{})
		must(t, err)
		if err = rb.Begin(512); err == nil {
			_, err = io.ReadFull(rb, make([]byte, 512))
		}
		var place rafs.RefPlace
		if err == nil {
			place, err = rb.End()
		}
		if err == nil {
			_, err = rb.Append(place, rafs.Digest{})
		}
		if err == nil {
			var out bytes.Buffer
			_, err = rb.Close(&out)
			if out.Len() > 0 {
				t.Errorf("%d bytes written in spite of the damage at %d", out.Len(), at)
			}
		}
		if !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("damage at %d: %v", at, err)
		}
	}
	cut, err := rafs.NewRefBuilder(bytes.NewReader(z[:len(z)-9]), rafs.RefOptions{})
	must(t, err)
	if _, err := cut.Close(io.Discard); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Close of a short layer = %v", err)
	}
	empty, err := rafs.NewRefBuilder(bytes.NewReader(z), rafs.RefOptions{})
	must(t, err)
	if _, err := empty.Append(rafs.RefPlace{}, rafs.Digest{}); err == nil {
		t.Error("Append of no place succeeded")
	}
	if _, err := empty.End(); err == nil {
		t.Error("End without Begin succeeded")
	}
	if _, err := empty.Close(io.Discard); !errors.Is(err, rafs.ErrNoChunks) {
		t.Errorf("Close without chunks = %v, want ErrNoChunks", err)
	}
}

// TestRefChunkAtEnd refers to the last bytes of a stream, and of a member, with nothing behind them.
func TestRefChunkAtEnd(t *testing.T) {
	t.Parallel()
	p := randomBytes(newRand(4), 5000)
	for name, z := range map[string][]byte{"one": gzipped(t, p, 6, 0), "two": gzipped(t, p, 6, 2000), "plain": p} {
		rb, err := rafs.NewRefBuilder(bytes.NewReader(z), rafs.RefOptions{ChunkSize: 4096})
		must(t, err)
		var chunks []rafs.Chunk
		for _, n := range []uint32{2000, 2000, 1000} {
			must(t, rb.Begin(n))
			buf := make([]byte, n)
			_, err := io.ReadFull(rb, buf)
			must(t, err)
			place, err := rb.End()
			must(t, err)
			c, err := rb.Append(place, rafs.DigesterBLAKE3.Sum(buf))
			must(t, err)
			chunks = append(chunks, c)
		}
		var table bytes.Buffer
		blob, err := rb.Close(&table)
		must(t, err)
		r, err := rafs.OpenSeparateBlob(bytes.NewReader(z), bytes.NewReader(table.Bytes()), blob)
		must(t, err)
		for i, at := range []int{0, 2000, 4000} {
			got, err := r.ReadChunk(context.Background(), chunks[i])
			if err != nil || !bytes.Equal(got, p[at:][:len(got)]) {
				t.Errorf("%s: chunk %d = %d bytes, %v", name, i, len(got), err)
			}
		}
	}
}
