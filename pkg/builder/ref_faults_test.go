package builder_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// TestRefCancel ends soon at every stage and leaves nothing.
func TestRefCancel(t *testing.T) {
	t.Parallel()
	src := atRandom(t, fixture(t))
	for _, stage := range []builder.Stage{builder.StageLayer, builder.StagePrefetch, builder.StageBootstrap, builder.StageVerify} {
		ctx, cancel := context.WithCancel(t.Context())
		o := refOptions()
		o.TempDir, o.List, o.VerifyData = t.TempDir(), listOf("/app/main", "/bin/tool"), true
		o.Progress = func(e builder.Event) {
			if e.Stage == stage {
				cancel()
			}
		}
		res, err := builder.Convert(ctx, src, o)
		cancel()
		if res != nil || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, %v", stage, res, err)
		}
		if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", stage, left, err)
		}
	}
}

// closing counts what is open.
type closing struct {
	*bytes.Reader
	open *int
}

func (c closing) Close() error { *c.open--; return nil }

// TestRefDamagedAtRandom: what is read of a layer a second time is verified, whoever gives it, and given back.
func TestRefDamagedAtRandom(t *testing.T) {
	t.Parallel()
	for _, verify := range []bool{false, true} {
		src := fixture(t)
		open := 0
		for i := range src.Layers {
			b := stored1(t, src.Layers[i])
			for at := 100; at < len(b); at += 50_000 {
				b[at] ^= 0x10
			}
			src.Layers[i].OpenAt = func(context.Context) (io.ReaderAt, error) {
				open++
				return closing{bytes.NewReader(b), &open}, nil
			}
		}
		o := refOptions()
		o.TempDir = t.TempDir()
		if o.VerifyData = verify; !verify {
			o.List = everything(readExpected(t))
		}
		res, err := builder.Convert(t.Context(), src, o)
		if res != nil || !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrDigest) {
			t.Errorf("verify %v: %v, want ErrInvalid or ErrDigest", verify, err)
		}
		if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 || open != 0 {
			t.Errorf("verify %v: left behind: %v, %v, %d open", verify, left, err, open)
		}
	}
}

// TestRefLarge refers to a file of 5 GiB, with data before and behind the first 4.
func TestRefLarge(t *testing.T) {
	if raceEnabled || testing.Short() {
		t.Skip("skipped: digests 5 GiB")
	}
	testenv.Root(t)
	const size = 5<<30 + 12345
	var layer bytes.Buffer
	z, err := gzip.NewWriterLevel(&layer, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	plain := digest.SHA256.Digester()
	want := map[int64]string{0: "first", 4<<30 - 3: "middle", size - 6: "behind"}
	writeLarge(t, io.MultiWriter(z, plain.Hash()), size, want)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	l := stored(ocispec.MediaTypeImageLayerGzip, nil, layer.Bytes())
	l.DiffID = plain.Digest()
	src := atRandom(t, source(t, l))
	res := convert(t, src, refOptions())
	if n := openImage(t, res).Blobs[0].ChunkCount; n > 8 {
		t.Errorf("%d chunks, want those of the zeros once", n)
	}
	out := builtRef(t, src, res)
	out.judgeCheck(t)
	bootstrap, blobs := out.write(t)
	for name, root := range map[string]string{
		"nydusd": testenv.MountNydusd(t, bootstrap, blobs),
		"kernel": testenv.MountEROFS(t, bootstrap, out.expand(t, out.open(t))...),
	} {
		f, err := os.Open(filepath.Join(root, "large"))
		if err != nil {
			t.Fatal(err)
		}
		for off, text := range want {
			got := make([]byte, len(text))
			if _, err := f.ReadAt(got, off); err != nil || string(got) != text {
				t.Errorf("%s: %q at %d, %v, want %q", name, got, off, err, text)
			}
		}
		info, err := f.Stat()
		if err := errors.Join(err, f.Close()); err != nil || info.Size() != size {
			t.Errorf("%s: %v, size %d", name, err, info.Size())
		}
	}
}

// writeLarge writes a tar with one file of zeros and some texts.
func writeLarge(t testing.TB, w io.Writer, size int64, texts map[int64]string) {
	t.Helper()
	tw := tar.NewWriter(w)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "large", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	const step = 1 << 20
	for at := int64(0); at < size; at += step {
		p := make([]byte, min(step, size-at))
		for off, text := range texts {
			for i := range text {
				if k := off + int64(i) - at; k >= 0 && k < int64(len(p)) {
					p[k] = text[i]
				}
			}
		}
		if err := write(tw, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
}
