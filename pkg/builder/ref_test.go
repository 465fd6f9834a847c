package builder_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// refOptions are those of an image over its source's layers, as nydusify makes them.
func refOptions() builder.Options {
	o := builder.DefaultOptions()
	o.OCIRef, o.Digester = true, rafs.DigesterSHA256
	return o
}

// ranged is a layer in memory that is told what will be read of it, and holds readers to it.
type ranged struct {
	*bytes.Reader
	t      testing.TB
	ranges []builder.StoredRange
}

func (r *ranged) Fetch(_ context.Context, ranges []builder.StoredRange) error {
	r.ranges = append(r.ranges, ranges...)
	return nil
}

func (r *ranged) ReadAt(p []byte, off int64) (int, error) {
	inside := slices.ContainsFunc(r.ranges, func(w builder.StoredRange) bool {
		return off >= w.Offset && off+int64(len(p)) <= w.Offset+w.Length
	})
	if !inside {
		r.t.Errorf("%d bytes at %d are read, which nobody announced", len(p), off)
	}
	return r.Reader.ReadAt(p, off)
}

// atRandom makes the layers of src readable at random.
func atRandom(t testing.TB, src builder.Source) builder.Source {
	t.Helper()
	src.Layers = slices.Clone(src.Layers)
	for i := range src.Layers {
		l := &src.Layers[i]
		l.OpenAt = func(context.Context) (io.ReaderAt, error) {
			return &ranged{Reader: bytes.NewReader(stored1(t, *l)), t: t}, nil
		}
	}
	return src
}

// stored1 returns the stored bytes of a layer.
func stored1(t testing.TB, l builder.Layer) []byte {
	t.Helper()
	rc, err := l.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(rc)
	if cerr := rc.Close(); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	return b
}

// builtRef returns the result with the layers that it refers to.
func builtRef(t *testing.T, src builder.Source, res *builder.Result) *loose {
	t.Helper()
	l := built(t, res)
	for _, d := range res.Layers {
		i := slices.IndexFunc(src.Layers, func(l builder.Layer) bool { return l.Descriptor.Digest == d.Digest })
		if i < 0 {
			t.Fatalf("the result refers to %s, which the source has not", d.Digest)
		}
		l.blobs[d.Digest.Encoded()] = &counted{data: stored1(t, src.Layers[i])}
	}
	return l
}

// gzLayer is a gzip layer.
func gzLayer(t testing.TB, plain []byte) builder.Layer {
	return stored(ocispec.MediaTypeImageLayerGzip, plain, gz(t, plain))
}

// TestRefFixture makes an image over the fixture's own layers: its tree is the expected one for every judge.
func TestRefFixture(t *testing.T) {
	testenv.Root(t)
	src := atRandom(t, fixture(t))
	entries := readExpected(t)
	for name, change := range map[string]func(o *builder.Options){
		"plain":   func(*builder.Options) {},
		"4 KiB":   func(o *builder.Options) { o.ChunkSize = 4 << 10 },
		"blake3":  func(o *builder.Options) { o.Digester, o.ChunkSize = rafs.DigesterBLAKE3, 64<<10 },
		"profile": func(o *builder.Options) { o.List = fixtureList(t, entries) },
		"profile 2": func(o *builder.Options) {
			o.List, o.Compressor, o.VerifyData = fixtureList(t, entries), rafs.CompressorLZ4, true
		},
		"all": func(o *builder.Options) { o.List = everything(entries) },
	} {
		t.Run(name, func(t *testing.T) {
			o := refOptions()
			change(&o)
			res := convert(t, src, o)
			t.Logf("%+v, layers %d", res.Stats, len(res.Layers))
			if name == "all" {
				if len(res.Layers) != 0 || len(res.Blobs) != 1 {
					t.Errorf("%d layers, %d blobs, want the prefetch blob alone", len(res.Layers), len(res.Blobs))
				}
			} else if len(res.Layers) != len(src.Layers) {
				t.Errorf("%d layers are referred to, want %d", len(res.Layers), len(src.Layers))
			}
			builtRef(t, src, res).judge(t)
		})
	}
}

// TestRefDocuments holds manifest, config and bootstrap layer to what nydus-snapshotter's converter writes for such images.
func TestRefDocuments(t *testing.T) {
	t.Parallel()
	src := atRandom(t, fixture(t))
	for _, list := range []bool{false, true} {
		o := refOptions()
		if list {
			o.List = listOf("/app/main")
		}
		res := convert(t, src, o)
		img := openImage(t, res)
		for i, l := range src.Layers {
			b := img.Blobs[i]
			meta, separate := b.MetaBlob()
			f := res.Blobs[i].Descriptor
			want := ocispec.Descriptor{
				MediaType: builder.MediaTypeBlob, Digest: digest.NewDigestFromEncoded(digest.SHA256, meta.ID), Size: int64(meta.CompressedSize),
				Annotations: map[string]string{
					"containerd.io/snapshot/nydus-blob": "true",
					"containerd.io/snapshot/nydus-ref":  l.Descriptor.Digest.String(),
				},
			}
			if diff := cmp.Diff(want, f); !separate || diff != "" {
				t.Errorf("table of layer %d (-want +got):\n%s", i, diff)
			}
			if b.ID != l.Descriptor.Digest.Encoded() || b.CompressedSize != uint64(l.Descriptor.Size) || b.Compressor != rafs.CompressorGzip {
				t.Errorf("blob %d is %+v, want layer %+v", i, b, l.Descriptor)
			}
		}
		if img.Compressor != rafs.CompressorGzip || img.Digester != rafs.DigesterSHA256 {
			t.Errorf("the image has %v and %v", img.Compressor, img.Digester)
		}
		checkDocuments(t, res)
		want := []string{"image", "image/image.boot"}
		if list {
			want = append(want, "image/prefetch.files")
		}
		got := untar(t, res.Bootstrap.Path)
		for i := range src.Layers {
			name := "image/" + res.Blobs[i].Descriptor.Digest.Encoded() + ".blob.meta"
			want = append(want, name)
			b := img.Blobs[i]
			if n := (int(b.MetaUncompressed)+4095)&^4095 + 4096; len(got[name]) != n {
				t.Errorf("%s has %d bytes, want %d", name, len(got[name]), n)
			}
			if tail := got[name][len(got[name])-4096:]; !bytes.HasPrefix(tail, []byte("\x0b\xb1\x0b\xb1")) || !bytes.HasSuffix(tail, []byte("\x0b\xb1\x0b\xb1")) {
				t.Errorf("%s does not end in a header", name)
			}
		}
		var names []string
		for n := range got {
			names = append(names, n)
		}
		slices.Sort(names)
		slices.Sort(want)
		if diff := cmp.Diff(want, names); diff != "" {
			t.Errorf("bootstrap layer (-want +got):\n%s", diff)
		}
	}
}

// untar reads a tar.gz.
func untar(t testing.TB, name string) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err == nil {
			out[h.Name], err = io.ReadAll(tr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestRefCachedTables puts the tables of the bootstrap layer where nydus-snapshotter would, and takes the files
// away that they are of: nydusd serves the image.
func TestRefCachedTables(t *testing.T) {
	testenv.Root(t)
	src := atRandom(t, fixture(t))
	res := convert(t, src, refOptions())
	l := builtRef(t, src, res)
	want := l.dump(t)
	bootstrap, blobs := l.write(t)
	img := openImage(t, res)
	files := untar(t, res.Bootstrap.Path)
	work := t.TempDir()
	for _, b := range img.Blobs {
		meta, _ := b.MetaBlob()
		if err := os.WriteFile(filepath.Join(work, meta.ID+".blob.meta"), files["image/"+meta.ID+".blob.meta"], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(blobs, meta.ID), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sameTree(t, want, dumpDir(t, testenv.MountNydusdCached(t, bootstrap, blobs, work)))
}

// sameTree compares a tree with what nydusd shows, which has mtime 0 as the time of the mount and does not tell links.
func sameTree(t *testing.T, want, got map[string]item) {
	t.Helper()
	for _, tree := range []map[string]item{want, got} {
		for p, i := range tree {
			i.Mtime, i.Link = 0, ""
			tree[p] = i
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tree through nydusd (-want +got):\n%.3000s", diff)
	}
}

// refZoo is a layer with all that a tar may have, and chunks that come again.
func refZoo(t testing.TB) []byte {
	big := string(noise(3, 3<<20+77)) + strings.Repeat("zeros and more ", 200_000)
	half := string(noise(4, testChunk))
	return makeTar(t, dir("d", 0o750), reg("d/big", big), reg("d/again", big), link("d/link", "d/big"), sym("l", "d/big"),
		reg("d/x", half+"one"), reg("d/y", half+"two"), reg("d/z", "one"+half), reg("d/zero1", string(make([]byte, 5*testChunk))+"a"),
		reg("d/zero2", string(make([]byte, 3*testChunk))+"b"), reg("empty", ""), reg("d/tiny", "x"),
		xattr(reg("attr", "attr"), "user.a", "b"), file{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600}, ""},
		file{tar.Header{Typeflag: tar.TypeChar, Name: "dev", Mode: 0o600, Devmajor: 1, Devminor: 3}, ""})
}

// TestRefLayers makes images over layers of every make, with a layer of whiteouts and links above them.
func TestRefLayers(t *testing.T) {
	testenv.Root(t)
	plain := refZoo(t)
	upper := makeTar(t, reg("d/.wh.again", ""), link("d/more", "d/big"), dir("new", 0o755), reg("new/f", "new"), reg("d/.wh.tiny", ""), reg("l", "no link"))
	meta := makeTar(t, dir("only", 0o700), sym("only/link", "/d/big"))
	parallel := func() []byte { // as pgzip and pigz do: blocks that end at bytes, in one member
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		for p := range slices.Chunk(plain, 100_000) {
			if err := errors.Join(write(z, p), z.Flush()); err != nil {
				t.Fatal(err)
			}
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	level := func(n int) []byte {
		var out bytes.Buffer
		z, err := gzip.NewWriterLevel(&out, n)
		if err := errors.Join(err, write(z, plain), z.Close()); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	for name, blob := range map[string][]byte{
		"gzip": gz(t, plain), "pgzip": parallel(), "level 1": level(1), "level 9": level(9), "huffman": level(-2), "stored": level(0), "tar": plain,
	} {
		mediaType := ocispec.MediaTypeImageLayerGzip
		if name == "tar" {
			mediaType = ocispec.MediaTypeImageLayer
		}
		src := atRandom(t, source(t, stored(mediaType, plain, blob), gzLayer(t, meta), gzLayer(t, upper)))
		want := dumpImage(t, convert(t, src, builder.DefaultOptions()))
		for _, chunk := range []uint32{testChunk, 1 << 20} {
			t.Run(fmt.Sprintf("%s, %d", name, chunk), func(t *testing.T) {
				o := refOptions()
				o.ChunkSize, o.VerifyData = chunk, true
				res := convert(t, src, o)
				l := builtRef(t, src, res)
				if diff := cmp.Diff(want, l.dump(t)); diff != "" {
					t.Errorf("tree (-converted whole +referred to):\n%.3000s", diff)
				}
				if res.Stats.CutChunks != 0 || len(res.Layers) != 2 || len(res.Blobs) != 2 {
					t.Errorf("%d cut chunks, %d layers, %d blobs", res.Stats.CutChunks, len(res.Layers), len(res.Blobs))
				}
				l.judgeTwice(t)
			})
		}
	}
}

func write(w io.Writer, p []byte) error {
	_, err := w.Write(p)
	return err
}

// judgeTwice asks nydus-image and nydusd, the latter a second time when all chunks are in its cache, and the
// other way round, and with prefetching.
func (l *loose) judgeTwice(t *testing.T) {
	t.Helper()
	l.judgeTools(t)
	if !asksOthers(t) {
		return
	}
	bootstrap, blobs := l.write(t)
	want := l.dump(t)
	for name, root := range map[string]string{
		"twice":       testenv.MountNydusd(t, bootstrap, blobs),
		"prefetching": testenv.MountNydusdPrefetching(t, bootstrap, blobs),
	} {
		t.Run(name, func(t *testing.T) {
			dumpDir(t, root)
			sameTree(t, want, dumpDir(t, root))
		})
	}
}

// TestRefEStargz refers to eStargz layers. Where their members end inside of chunks, nydusd 2.2.0 cannot read those and
// what it reads with them; everybody else can.
func TestRefEStargz(t *testing.T) {
	testenv.Root(t)
	plain := makeTar(t, reg("a", string(noise(5, 3_000_000))), reg("b", "hot"), reg("c", strings.Repeat("text", 100_000)))
	for size, cut := range map[int]bool{4 << 20: false, 300_000: true} {
		blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), estargz.WithChunkSize(size))
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(blob)
		if err := errors.Join(err, blob.Close()); err != nil {
			t.Fatal(err)
		}
		layer := stored(ocispec.MediaTypeImageLayerGzip, nil, data)
		layer.DiffID = blob.DiffID()
		src := atRandom(t, source(t, layer))
		o := refOptions()
		o.VerifyData = true
		res := convert(t, src, o)
		l := builtRef(t, src, res)
		want := dumpImage(t, convert(t, src, builder.DefaultOptions()))
		if diff := cmp.Diff(want, l.dump(t)); diff != "" {
			t.Errorf("tree (-converted whole +referred to):\n%.3000s", diff)
		}
		if (res.Stats.CutChunks > 0) != cut {
			t.Errorf("members of %d bytes: %d chunks in two members", size, res.Stats.CutChunks)
		}
		if !cut {
			l.judgeTwice(t)
			continue
		}
		l.judgeCheck(t)
		bootstrap, blobs := l.write(t)
		root := testenv.MountNydusd(t, bootstrap, blobs)
		// a has chunks in two members, and c is read together with it.
		if b, err := os.ReadFile(filepath.Join(root, "b")); err != nil || string(b) != "hot" {
			t.Errorf("b: %d bytes, %v", len(b), err)
		}
	}
}

// TestRefSame holds that neither the number of workers nor chance is in the result.
func TestRefSame(t *testing.T) {
	t.Parallel()
	src := atRandom(t, source(t, gzLayer(t, refZoo(t)), gzLayer(t, makeTar(t, reg("x", string(noise(1, 100_000)))))))
	var first digest.Digest
	for _, workers := range []int{1, 8, 3, 1} {
		o := refOptions()
		o.Workers, o.ChunkSize, o.List = workers, testChunk, listOf("/d/x", "/d/big")
		res := convert(t, src, o)
		if first == "" {
			first = res.ManifestDescriptor.Digest
		}
		if got := res.ManifestDescriptor.Digest; got != first {
			t.Errorf("%d workers: manifest %s, want %s", workers, got, first)
		}
	}
}

// TestRefOptimize optimizes an image over OCI layers, and compares it with one that had its list from the beginning.
func TestRefOptimize(t *testing.T) {
	testenv.Root(t)
	src := atRandom(t, fixture(t))
	l := builtRef(t, src, convert(t, src, refOptions()))
	out, res := l.optimize(t, builder.OptimizeOptions{List: listOf("/app/main", "/bin/tool")})
	if c := last(t, out).Compressor; res.Prefetch == nil || c != rafs.CompressorZstd {
		t.Errorf("prefetch blob %v, compressor %v, want zstd", res.Prefetch, c)
	}
	out.judge(t)
	out.judgeTwice(t)
}

// TestRefReadsPrefetchBlobOnly reads the listed files and counts what is read of the layers: nothing.
func TestRefReadsPrefetchBlobOnly(t *testing.T) {
	t.Parallel()
	src := atRandom(t, fixture(t))
	o := refOptions()
	o.List = listOf("/app/main", "/bin/tool")
	l := builtRef(t, src, convert(t, src, o))
	img := l.open(t)
	fsys := img.FS(l.reader)
	for _, f := range []string{"app/main", "bin/tool"} {
		if _, err := fsys.ReadFile(f); err != nil {
			t.Error(err)
		}
	}
	for i, b := range img.Blobs {
		if n := l.blobs[b.ID].bytes.Load(); (n > 0) != (i == len(img.Blobs)-1) {
			t.Errorf("%d bytes were read of blob %d", n, i)
		}
	}
}

// TestRefLikeNydus holds an image over a layer against the one that nydus-image makes over it: the same chunks in the same order, the
// same kind of blob, and no more places to decompress from.
func TestRefLikeNydus(t *testing.T) {
	t.Parallel()
	nydus := testenv.Tool(t, "nydus-image")
	var files []file // no equal chunks in a file: ours keep a distance that nydusd wants
	for i := range 400 {
		files = append(files, reg(fmt.Sprintf("d/%03d", i), string(noise(uint64(i), i*97))+strings.Repeat(fmt.Sprint("text", i), i*50)))
	}
	files = append(files, reg("d/same", files[300].data), reg("d/big", string(noise(1000, 3<<20))), link("d/link", "d/007"))
	layer := gzLayer(t, makeTar(t, append([]file{dir("d", 0o755)}, files...)...))
	src := atRandom(t, source(t, layer))
	ours := openImage(t, convert(t, src, refOptions()))

	work := t.TempDir()
	name, boot, blobs := filepath.Join(work, "layer.tar.gz"), filepath.Join(work, "image.boot"), filepath.Join(work, "blobs")
	if err := errors.Join(os.WriteFile(name, stored1(t, layer), 0o600), os.Mkdir(blobs, 0o700)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(nydus, "create", "-t", "targz-ref", "--features", "blob-toc", "--bootstrap", boot, "--blob-dir", blobs, name).CombinedOutput(); err != nil {
		t.Fatalf("nydus-image create: %v\n%s", err, out)
	}
	l := looseImage(t, boot, blobs)
	l.blobs[layer.Descriptor.Digest.Encoded()] = &counted{data: stored1(t, layer)}
	theirs := l.open(t)

	a, b := ours.Blobs[0], theirs.Blobs[0]
	if a.ID != b.ID || a.Features != b.Features || a.ChunkCount != b.ChunkCount || a.CompressedSize != b.CompressedSize ||
		a.UncompressedSize != b.UncompressedSize || a.Digester != b.Digester || a.Compressor != b.Compressor || a.MetaCompressor != b.MetaCompressor {
		t.Errorf("blob %+v\nnydus-image makes %+v", a, b)
	}
	// A context ends before 2 MiB of tar. nydus-image counts a chunk that is to come as one of full size, and so ends some earlier.
	const record = 24
	if n, m := a.MetaUncompressed-uint64(a.ChunkCount)*record, b.MetaUncompressed-uint64(b.ChunkCount)*record; n > m || n < m/3 {
		t.Errorf("contexts take %d bytes, those of nydus-image %d", n, m)
	}
	x, y := ours.BlobChunks(0), theirs.BlobChunks(0)
	for i := range x {
		p, q := x[i], y[i]
		if p.Digest != q.Digest || p.Index != q.Index || p.UncompressedOffset != q.UncompressedOffset || p.UncompressedSize != q.UncompressedSize || p.Compressed != q.Compressed {
			t.Fatalf("chunk %d is %+v, nydus-image has %+v", i, p, q)
		}
	}
	t.Logf("%d chunks, tables of %d and %d bytes", len(x), a.MetaBlobSize, b.MetaBlobSize)
}
