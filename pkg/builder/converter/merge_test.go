package converter_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// eachVersion runs a test for both versions of the format.
func eachVersion(t *testing.T, test func(t *testing.T, version string)) {
	for _, version := range []string{"5", "6"} {
		t.Run("v"+version, func(t *testing.T) { test(t, version) })
	}
}

// opened opens a bootstrap.
func opened(t testing.TB, boot []byte) *rafs.Image {
	t.Helper()
	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// served returns the content of the regular files that nydusd serves of an image.
func served(t *testing.T, boot []byte, blobs [][]byte) map[string]string {
	t.Helper()
	bootPath, blobDir := store(t, boot, blobs)
	nydusImage(t, "check", "--bootstrap", bootPath, "--blob-dir", blobDir)
	root := testenv.MountNydusd(t, bootPath, blobDir)
	out := map[string]string{}
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		out[strings.TrimPrefix(p, root)] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestChunkDict packs against the bootstrap of an image, in a file, and merges with and without saying so again; then
// nydus-image merges what was packed.
func TestChunkDict(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, version string) {
		shared := strings.Repeat("x", 5000)
		base := pack(t, tarOf(t, "a="+shared), nydus.PackOption{FsVersion: version})
		boot, _ := merge(t, [][]byte{base}, nydus.MergeOption{FsVersion: version})
		dict, _ := store(t, boot, nil)
		app := pack(t, tarOf(t, "b="+shared, "c=new"), nydus.PackOption{FsVersion: version, ChunkDictPath: dict})
		if len(app) > len(base)+8192 {
			t.Errorf("the layer has %d bytes: does it hold the dictionary's chunk?", len(app))
		}
		want := map[string]string{"/b": shared, "/c": "new"}
		var merged []byte
		for _, o := range []nydus.MergeOption{{FsVersion: version}, {FsVersion: version, ChunkDictPath: dict}} {
			out, ids := merge(t, [][]byte{app}, o)
			if want := []digest.Digest{digest.FromBytes(app), digest.FromBytes(base)}; !cmp.Equal(ids, want) {
				t.Errorf("%+v: blobs %v, want the layer's and the dictionary's %v", o, ids, want)
			}
			if diff := cmp.Diff(want, served(t, out, [][]byte{app, base})); diff != "" {
				t.Errorf("%+v: nydusd (-want +got):\n%s", o, diff)
			}
			merged = out
		}
		if err := nydus.Unpack(t.Context(), reader(app), io.Discard, nydus.UnpackOption{}); !errors.Is(err, nydus.ErrUnsupported) {
			t.Errorf("Unpack = %v, want ErrUnsupported: it needs another blob", err)
		}
		theirs := nydusMerge(t, [][]byte{app}, "--chunk-dict", "bootstrap="+dict)
		if diff := cmp.Diff(want, served(t, theirs, [][]byte{app, base})); diff != "" {
			t.Errorf("nydus-image merge (-want +got):\n%s", diff)
		}
		// The parent of a merge counts as a lower layer.
		parent, _ := store(t, merged, nil)
		over, _ := merge(t, [][]byte{pack(t, tarOf(t, ".wh.c", "d=1"), nydus.PackOption{FsVersion: version})}, nydus.MergeOption{ParentBootstrapPath: parent, ChunkDictPath: dict})
		if img := opened(t, over); img.Lookup("/b") == nil || img.Lookup("/d") == nil || img.Lookup("/c") != nil {
			t.Error("merged over a parent: /b and /d should be there, and no /c")
		}
		// A dictionary that the layer was not packed with: it has two blobs then, and one is to be its own.
		wrong, _ := merge(t, [][]byte{pack(t, tarOf(t, "z=other"), nydus.PackOption{FsVersion: version})}, nydus.MergeOption{})
		other, _ := store(t, wrong, nil)
		_, err := nydus.Merge(t.Context(), []nydus.Layer{layerOf(app)}, io.Discard, nydus.MergeOption{ChunkDictPath: other})
		if !errors.Is(err, builder.ErrInvalid) || !strings.Contains(err.Error(), "not of the chunk dictionary") {
			t.Errorf("Merge with another dictionary = %v, want ErrInvalid", err)
		}
	})
}

// nydusMerge lets the real nydus-image merge layers: it wants their bootstraps in files named by the blobs' digests.
func nydusMerge(t *testing.T, blobs [][]byte, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	out := filepath.Join(dir, "merged")
	args := append([]string{"merge", "--bootstrap", out}, options...)
	for _, b := range blobs {
		inner, err := rafs.ReadInline(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, digest.FromBytes(b).Encoded())
		if err := os.WriteFile(name, inner, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, name)
	}
	nydusImage(t, args...)
	merged, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return merged
}

// TestChunkDictOfNydus merges what the real nydus-image has packed against a dictionary.
func TestChunkDictOfNydus(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, version string) {
		dir := t.TempDir()
		shared := string(bytes.Repeat([]byte("shared "), 300_000))
		create := func(name string, layer []byte, options ...string) []byte {
			tarPath, blobPath := filepath.Join(dir, name+".tar"), filepath.Join(dir, name+".blob")
			if err := os.WriteFile(tarPath, layer, 0o600); err != nil {
				t.Fatal(err)
			}
			nydusImage(t, append(append([]string{"create", "--type", "tar-rafs", "--blob-inline-meta", "--whiteout-spec", "none", "--fs-version", version, "--blob", blobPath}, options...), tarPath)...)
			b, err := os.ReadFile(blobPath)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		base := create("base", tarOf(t, "a="+shared))
		boot, _ := merge(t, [][]byte{base}, nydus.MergeOption{})
		dict, _ := store(t, boot, nil)
		app := create("app", tarOf(t, "b="+shared, "c=new"), "--chunk-dict", "bootstrap="+dict)
		want := map[string]string{"/b": shared, "/c": "new"}
		for _, o := range []nydus.MergeOption{{}, {ChunkDictPath: dict}} {
			merged, ids := merge(t, [][]byte{app}, o)
			if len(ids) != 2 {
				t.Errorf("%+v: blobs %v, want the layer's and the dictionary's", o, ids)
			}
			if diff := cmp.Diff(want, served(t, merged, [][]byte{app, base})); diff != "" {
				t.Errorf("%+v: nydusd (-want +got):\n%.500s", o, diff)
			}
		}
	})
}

// TestIssue1081 merges layers whose bootstraps have prefetch tables: they were lost. Numbers are issues of dragonflyoss/nydus.
func TestIssue1081(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, version string) {
		lower, _ := merge(t, [][]byte{pack(t, tarOf(t, "d/", "d/gone=1", "d/stays=2", "e=3"), nydus.PackOption{FsVersion: version})}, nydus.MergeOption{PrefetchPatterns: "/e\n/d/gone\n/d/stays"})
		parent, _ := store(t, lower, nil)
		layer := pack(t, tarOf(t, "d/.wh.gone", "f=4"), nydus.PackOption{FsVersion: version})
		for patterns, want := range map[string][]string{"": {"/"}, "/f\n/d": {"/f", "/d"}, "/missing": nil} {
			boot, _ := merge(t, [][]byte{layer}, nydus.MergeOption{ParentBootstrapPath: parent, PrefetchPatterns: patterns})
			if diff := cmp.Diff(want, tableOf(t, boot)); diff != "" {
				t.Errorf("table for %q (-want +got):\n%s", patterns, diff)
			}
		}
		// Without patterns, what the tables before named is what stays; nydus-image counts the entries of the table.
		var out bytes.Buffer
		if _, err := builder.MergeLayers(t.Context(), &out, []builder.PackedLayer{{Digest: digest.FromBytes(layer), Blob: reader(layer), Size: int64(len(layer))}}, builder.MergeOptions{Parent: opened(t, lower)}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"/e", "/d/stays"}, tableOf(t, out.Bytes())); diff != "" {
			t.Errorf("table of what the parent's named (-want +got):\n%s", diff)
		}
	})
}

// TestDeterministic packs and merges with different numbers of workers, twice.
func TestDeterministic(t *testing.T) {
	layers := fixtureTars(t)
	for _, opt := range []nydus.PackOption{{FsVersion: "5"}, {FsVersion: "6"}, {Compressor: "lz4_block", ChunkSize: "0x1000"}, {ChunkSize: "0x10000", BatchSize: "0x10000"}} {
		var first [][]byte
		var boot []byte
		for _, workers := range []int{1, 1, 2, 7, 7} {
			opt.Workers = workers
			var blobs [][]byte
			for _, l := range layers {
				blobs = append(blobs, pack(t, l, opt))
			}
			merged, _ := merge(t, blobs, nydus.MergeOption{PrefetchPatterns: "/app\n/bin"})
			if first == nil {
				first, boot = blobs, merged
			}
			if !slices.EqualFunc(first, blobs, bytes.Equal) || !bytes.Equal(boot, merged) {
				t.Errorf("%+v: another image", opt)
			}
		}
	}
}

// TestMergeMostBlobs: a merged image has 254 blobs at the most; layers of which nothing is left do not count. Blobs exist when
// they are merged: unlike convert, which makes them, merge cannot join any.
func TestMergeMostBlobs(t *testing.T) {
	eachVersion(t, func(t *testing.T, version string) {
		var blobs [][]byte
		for i := range rafs.MaxBlobs + 1 {
			blobs = append(blobs, pack(t, tarOf(t, fmt.Sprintf("f%d=%d", i, i)), nydus.PackOption{FsVersion: version, Workers: 1}))
		}
		boot, ids := merge(t, blobs[1:], nydus.MergeOption{})
		if len(ids) != rafs.MaxBlobs {
			t.Errorf("%d blobs, want %d", len(ids), rafs.MaxBlobs)
		}
		bootPath, blobDir := store(t, boot, blobs)
		nydusImage(t, "check", "--bootstrap", bootPath, "--blob-dir", blobDir)

		var layers []nydus.Layer
		for _, b := range blobs {
			layers = append(layers, layerOf(b))
		}
		var out bytes.Buffer
		_, err := nydus.Merge(t.Context(), layers, &out, nydus.MergeOption{WithTar: true})
		if want := "the image needs 255 blobs, the format counts 254"; !errors.Is(err, nydus.ErrUnsupported) || !strings.Contains(fmt.Sprint(err), want) || out.Len() > 0 {
			t.Errorf("255 layers: %v and %d bytes, want %q and none", err, out.Len(), want)
		}
		hidden := append(blobs, pack(t, tarOf(t, ".wh.f7", ".wh.f8", "last=1"), nydus.PackOption{FsVersion: version}))
		if _, ids := merge(t, hidden, nydus.MergeOption{}); len(ids) != rafs.MaxBlobs {
			t.Errorf("256 layers, two of which are hidden: %d blobs, want %d", len(ids), rafs.MaxBlobs)
		}
	})
}
