package converter_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/nydusimage"
	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func gzipped(t testing.TB, p []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// refLayers returns the fixture's layers as they are stored: gzip, or plain.
func refLayers(t testing.TB, plain bool) [][]byte {
	t.Helper()
	out := fixtureTars(t)
	for i := range out {
		if !plain {
			out[i] = gzipped(t, out[i])
		}
	}
	return out
}

// mergeRefs merges blobs that refer to layers, as nydus-snapshotter's callers do.
func mergeRefs(t testing.TB, blobs, layers [][]byte, opt nydus.MergeOption) ([]byte, []digest.Digest) {
	t.Helper()
	var list []nydus.Layer
	for i := range blobs {
		l, id := layerOf(blobs[i]), digest.FromBytes(layers[i])
		l.OriginalDigest = &id
		list = append(list, l)
	}
	var out bytes.Buffer
	ids, err := nydus.Merge(t.Context(), list, &out, opt)
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), ids
}

// TestRef packs layers that stay where they are and merges them, with ours and with nydus-image's merge, called as
// nydus-snapshotter calls it.
func TestRef(t *testing.T) {
	testenv.Root(t)
	for name, c := range map[string]struct {
		opt   nydus.PackOption
		plain bool
	}{
		"gzip":        {nydus.PackOption{OCIRef: true}, false},
		"options":     {nydus.PackOption{OCIRef: true, FsVersion: "6", Compressor: "lz4_block", ChunkSize: "0x10000", BatchSize: "0", AlignedChunk: true}, false},
		"plain tar":   {nydus.PackOption{OCIRef: true}, true},
		"a directory": {nydus.PackOption{OCIRef: true, WorkDir: filepath.Join(t.TempDir(), "to", "be", "made")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			layers := refLayers(t, c.plain)
			var blobs [][]byte
			var ids []digest.Digest
			for _, l := range layers {
				blobs = append(blobs, pack(t, l, c.opt))
				ids = append(ids, digest.FromBytes(l))
			}
			boot, got := mergeRefs(t, blobs, layers, nydus.MergeOption{OCIRef: true, FsVersion: "6"})
			if diff := cmp.Diff(ids, got); diff != "" {
				t.Errorf("blobs (-want +got):\n%s", diff)
			}
			all := append(append([][]byte{}, blobs...), layers...)
			judge(t, boot, all, true)
			if again, _ := merge(t, blobs, nydus.MergeOption{}); !bytes.Equal(again, boot) {
				t.Error("without OriginalDigest the image is another, although the blobs say what they refer to")
			}
			theirs := mergeByNydus(t, blobs, layers)
			judge(t, theirs, all, true)
			if _, err := os.Stat(c.opt.WorkDir); c.opt.WorkDir != "" {
				left, rerr := os.ReadDir(c.opt.WorkDir)
				if err != nil || rerr != nil || len(left) > 0 {
					t.Errorf("the work directory: %v, %v, %d files left", err, rerr, len(left))
				}
			}
		})
	}
}

// mergeByNydus has nydus-image merge the bootstraps of blobs: files named by the layers, and lists of the blobs' digests and sizes.
// Source: nydus-snapshotter pkg/converter/convert_unix.go Merge.
func mergeByNydus(t *testing.T, blobs, layers [][]byte) []byte {
	t.Helper()
	dir := t.TempDir()
	var digests, sizes, sources []string
	for i, b := range blobs {
		inner, err := rafs.ReadInline(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, digest.FromBytes(layers[i]).Encoded())
		if err := os.WriteFile(path, inner, 0o600); err != nil {
			t.Fatal(err)
		}
		digests, sizes, sources = append(digests, digest.FromBytes(b).Encoded()), append(sizes, fmt.Sprint(len(b))), append(sources, path)
	}
	args := append([]string{"merge", "--bootstrap", filepath.Join(dir, "merged")}, sources...)
	nydusImage(t, append(args, "--blob-digests", strings.Join(digests, ","), "--blob-sizes", strings.Join(sizes, ","))...)
	merged, err := os.ReadFile(filepath.Join(dir, "merged"))
	if err != nil {
		t.Fatal(err)
	}
	return merged
}

// TestRefOfNydus merges what nydus-image has made over layers.
func TestRefOfNydus(t *testing.T) {
	testenv.Root(t)
	layers := refLayers(t, false)
	var blobs [][]byte
	for i, l := range fixtureTars(t) {
		dir := t.TempDir()
		name, blob := filepath.Join(dir, "layer.tar.gz"), filepath.Join(dir, "blob")
		// As Go writes it: nydus-image 2.2.0 refuses the blank device fields of GNU tar's fifos.
		layers[i] = gzipped(t, unpacked(t, pack(t, l, nydus.PackOption{})))
		if err := os.WriteFile(name, layers[i], 0o600); err != nil {
			t.Fatal(err)
		}
		nydusImage(t, "create", "--type", "targz-ref", "--blob-inline-meta", "--features", "blob-toc", "--blob", blob, name)
		b, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, b)
	}
	boot, _ := mergeRefs(t, blobs, layers, nydus.MergeOption{OCIRef: true})
	judge(t, boot, append(blobs, layers...), false)
}

// TestRefLayerRules: layers without data, whiteouts, more than one member, nothing at all.
func TestRefLayerRules(t *testing.T) {
	testenv.Root(t)
	layers := [][]byte{
		gzipped(t, tarOf(t, "d/", "d/gone=1", "d/stays="+strings.Repeat("stays ", 100_000))),
		gzipped(t, tarOf(t, "d/.wh.gone", "d/empty")),
		append(gzipped(t, tarOf(t, "e=4")[:1024]), gzipped(t, tarOf(t, "e=4")[1024:])...),
		nil,
	}
	var blobs [][]byte
	for _, l := range layers {
		blobs = append(blobs, pack(t, l, nydus.PackOption{OCIRef: true}))
	}
	boot, ids := mergeRefs(t, blobs, layers, nydus.MergeOption{OCIRef: true, PrefetchPatterns: "/e"})
	if diff := cmp.Diff([]digest.Digest{digest.FromBytes(layers[0]), digest.FromBytes(layers[2])}, ids); diff != "" {
		t.Errorf("blobs (-want +got):\n%s", diff)
	}
	want := map[string]string{"/d/stays": strings.Repeat("stays ", 100_000), "/d/empty": "", "/e": "4"}
	if diff := cmp.Diff(want, served(t, boot, append(blobs, layers...))); diff != "" {
		t.Errorf("nydusd (-want +got):\n%.500s", diff)
	}
	first := pack(t, layers[0], nydus.PackOption{OCIRef: true})
	for _, workers := range []int{1, 7} {
		if again := pack(t, layers[0], nydus.PackOption{OCIRef: true, Workers: workers}); !bytes.Equal(first, again) {
			t.Errorf("%d workers make another blob", workers)
		}
	}
}

// TestRefErrors: what is refused, and how.
func TestRefErrors(t *testing.T) {
	layer := gzipped(t, tarOf(t, "a="+strings.Repeat("abc", 30_000)))
	packing := func(data []byte, dest io.Writer) error {
		w, err := nydus.Pack(t.Context(), dest, nydus.PackOption{OCIRef: true})
		if err != nil {
			return err
		}
		_, _ = w.Write(data) // Close says it
		return w.Close()
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	instant := time.Nanosecond
	late := func() error {
		w, err := nydus.Pack(t.Context(), io.Discard, nydus.PackOption{OCIRef: true, Timeout: &instant})
		if err != nil {
			return err
		}
		_, _ = w.Write(layer)
		return w.Close()
	}
	flipped := bytes.Clone(layer)
	flipped[len(flipped)-6] ^= 1
	blob := pack(t, layer, nydus.PackOption{OCIRef: true})
	own := pack(t, tarOf(t, "b=1"), nydus.PackOption{})
	other, wrong := digest.FromString("another"), digest.Digest("sha256:short")
	merging := func(b []byte, original *digest.Digest, opt nydus.MergeOption) error {
		l := layerOf(b)
		l.OriginalDigest = original
		_, err := nydus.Merge(t.Context(), []nydus.Layer{l}, io.Discard, opt)
		return err
	}
	for name, c := range map[string]struct {
		got, want error
		text      string
	}{
		"zstd":          {packing(z.EncodeAll(layer, nil), io.Discard), nydus.ErrUnsupported, "zstd"},
		"no layer":      {packing([]byte(strings.Repeat("no tar", 200)), io.Discard), builder.ErrInvalid, "tar"},
		"cut off":       {packing(layer[:len(layer)/2], io.Discard), builder.ErrInvalid, "cut off"},
		"cut trailer":   {packing(layer[:len(layer)-3], io.Discard), builder.ErrInvalid, "cut off"},
		"checksum":      {packing(flipped, io.Discard), builder.ErrInvalid, "checksum"},
		"timeout":       {late(), context.DeadlineExceeded, ""},
		"no directory":  {packingIn(t, "/dev/null/none"), syscall.ENOTDIR, ""},
		"broken dest":   {packing(layer, brokenWriter{}), errBroken, ""},
		"unpack":        {nydus.Unpack(t.Context(), reader(blob), io.Discard, nydus.UnpackOption{}), nydus.ErrUnsupported, digest.FromBytes(layer).String()},
		"another layer": {merging(blob, &other, nydus.MergeOption{}), builder.ErrInvalid, other.String()},
		"no digest":     {merging(blob, &wrong, nydus.MergeOption{}), builder.ErrInvalid, "sha256:short"},
		"no reference":  {merging(own, &other, nydus.MergeOption{}), builder.ErrInvalid, "refer"},
		"own chunks":    {merging(own, nil, nydus.MergeOption{OCIRef: true}), nydus.ErrUnsupported, "OCIRef"},
	} {
		if !errors.Is(c.got, c.want) || !strings.Contains(fmt.Sprint(c.got), c.text) {
			t.Errorf("%s: %v, want %v and %q", name, c.got, c.want, c.text)
		}
	}
}

// packingIn packs with a work directory.
func packingIn(t *testing.T, dir string) error {
	t.Helper()
	w, err := nydus.Pack(t.Context(), io.Discard, nydus.PackOption{OCIRef: true, WorkDir: dir})
	if err != nil {
		return err
	}
	return w.Close()
}

// TestContainerdConverterRef converts an image in a content store to one over its own layers, as acceleration-service does with
// oci_ref.
func TestContainerdConverterRef(t *testing.T) {
	testenv.Root(t)
	cs := newStore(t)
	source := putLayers(t, cs, false, true, "amd64")
	pack := nydus.PackOption{WorkDir: t.TempDir(), FsVersion: "6", Compressor: "zstd", ChunkSize: "0x100000", BatchSize: "0", OCIRef: true}
	got, err := convertImage(t, cs, source, pack, nydus.MergeOption{OCIRef: true, FsVersion: "6", OCI: true, WithReferrer: true}, true)
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	var from, m ocispec.Manifest
	get(t, cs, source, &index)
	get(t, cs, index.Manifests[0], &from)
	raw := get(t, cs, *got, &m)
	if len(m.Layers) != len(from.Layers)+1 {
		t.Fatalf("layers %+v", m.Layers)
	}
	doc, err := nydusimage.Parse(raw, get(t, cs, m.Config, nil))
	if err != nil {
		t.Fatal(err)
	}
	info, err := cs.Info(t.Context(), got.Digest)
	if err != nil {
		t.Fatal(err)
	}
	var blobs [][]byte
	var ids []string
	for i, l := range from.Layers {
		table := m.Layers[i]
		if table.MediaType != nydus.MediaTypeNydusBlob || !nydus.IsNydusBlob(table) || table.Annotations["containerd.io/snapshot/nydus-ref"] != l.Digest.String() {
			t.Errorf("layer %d is %+v, want a blob that refers to %s", i, table, l.Digest)
		}
		if label := info.Labels[fmt.Sprintf("containerd.io/gc.ref.content.ref.%d", i)]; label != l.Digest.String() {
			t.Errorf("label of layer %d is %q: containerd's collector would remove the layer", i, label)
		}
		blobs = append(blobs, get(t, cs, l, nil), get(t, cs, table, nil))
		ids = append(ids, l.Digest.Encoded())
	}
	if err := doc.Check(ids); err != nil {
		t.Error(err)
	}
	judge(t, bootstrapOf(t, cs, m.Layers[len(m.Layers)-1]), blobs, true)
	tables := 0
	for tr := tar.NewReader(gunzip(t, get(t, cs, m.Layers[len(m.Layers)-1], nil))); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(h.Name, ".blob.meta") {
			tables++
		}
	}
	if tables != len(from.Layers) {
		t.Errorf("%d tables beside the bootstrap, want %d", tables, len(from.Layers))
	}
}

// TestTargetLabel: a layer of which the store says what was made is not packed again.
func TestTargetLabel(t *testing.T) {
	cs := newStore(t)
	layer := put(t, cs, ocispec.MediaTypeImageLayer, tarOf(t, "a=1"))
	blob := put(t, cs, nydus.MediaTypeNydusBlob, pack(t, tarOf(t, "a=2"), nydus.PackOption{}))
	info, err := cs.Info(t.Context(), layer.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for target, want := range map[digest.Digest]bool{blob.Digest: true, digest.FromString("gone"): false} {
		info.Labels = map[string]string{nydus.LayerAnnotationNydusTargetDigest: target.String()}
		if _, err := cs.Update(t.Context(), info); err != nil {
			t.Fatal(err)
		}
		got, err := nydus.LayerConvertFunc(nydus.PackOption{})(t.Context(), cs, layer)
		if (err == nil) != want || want && (got.Digest != blob.Digest || got.Size != blob.Size || !nydus.IsNydusBlob(*got)) {
			t.Errorf("label %s: %+v, %v", target, got, err)
		}
	}
}
