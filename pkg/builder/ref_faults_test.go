package builder_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// sparseTar is a tar with a file that has a hole.
func sparseTar(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err == nil {
		_, err = f.WriteAt([]byte("island"), 5<<20)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	b, err := exec.Command(testenv.Tool(t, "tar"), "-C", dir, "--sparse", "--format=posix", "-cf", "-", "sparse").Output()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRefRefuses holds the errors for what cannot be referred to.
func TestRefRefuses(t *testing.T) {
	t.Parallel()
	plain := makeTar(t, reg("a", string(noise(1, 100_000))), reg("b", "2"))
	bad := gz(t, plain)
	bad[len(bad)/2] ^= 1
	cut := gz(t, plain)
	cut = cut[:len(cut)-9]
	sparse := sparseTar(t)
	long := stored(ocispec.MediaTypeImageLayerGzip, plain, gz(t, plain))
	long.Descriptor.Digest = digest.SHA512.FromBytes(gz(t, plain))
	other := gzLayer(t, plain)
	other.DiffID = digest.FromString("another tar")
	for name, c := range map[string]struct {
		layer  builder.Layer
		change func(o *builder.Options)
		want   error
		text   string
	}{
		"zstd":      {stored(ocispec.MediaTypeImageLayerZstd, plain, zst(t, plain)), nil, builder.ErrUnsupported, "compressed with zstd"},
		"bzip2":     {stored(ocispec.MediaTypeImageLayer, plain, []byte("BZh91AY&SY")), nil, builder.ErrUnsupported, "bzip2"},
		"damage":    {stored(ocispec.MediaTypeImageLayerGzip, plain, bad), nil, builder.ErrInvalid, "layer 0"},
		"cut off":   {stored(ocispec.MediaTypeImageLayerGzip, plain, cut), nil, builder.ErrInvalid, "cut off"},
		"diff ID":   {other, nil, builder.ErrDigest, "diff ID"},
		"sha512":    {long, nil, builder.ErrUnsupported, "sha256"},
		"sparse":    {gzLayer(t, sparse), nil, builder.ErrUnsupported, `entry "sparse"`},
		"v5":        {gzLayer(t, plain), func(o *builder.Options) { o.FSVersion = rafs.V5 }, builder.ErrUnsupported, "want v6"},
		"batches":   {gzLayer(t, plain), func(o *builder.Options) { o.BatchSize = 1 << 20 }, builder.ErrUnsupported, "batches"},
		"records":   {gzLayer(t, plain), func(o *builder.Options) { o.Records = true }, builder.ErrUnsupported, "records"},
		"no random": {gzLayer(t, plain), func(o *builder.Options) { o.List = listOf("/a") }, builder.ErrInvalid, "cannot be read at random"},
	} {
		o := refOptions()
		o.TempDir = t.TempDir()
		if c.change != nil {
			c.change(&o)
		}
		res, err := builder.Convert(t.Context(), source(t, c.layer), o)
		if res != nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.text)
		}
		if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", name, left, err)
		}
	}
}
