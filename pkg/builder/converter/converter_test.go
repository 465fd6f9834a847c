package converter_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	nydus "github.com/headstart-oci/headstart/pkg/builder/converter"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// memory is a blob in memory as containerd's readers are.
type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

func reader(b []byte) memory { return memory{bytes.NewReader(b)} }

// fixtureTars returns the uncompressed layers of the fixture's source image.
func fixtureTars(t testing.TB) [][]byte {
	t.Helper()
	root := filepath.Join(testenv.Fixtures(t), "oci", "source")
	blob := func(d digest.Digest) []byte {
		b, err := os.ReadFile(filepath.Join(root, "blobs", "sha256", d.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	decode := func(b []byte, v any) {
		if err := json.Unmarshal(b, v); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(root, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	var m ocispec.Manifest
	decode(b, &index)
	decode(blob(index.Manifests[0].Digest), &m)
	var out [][]byte
	for _, l := range m.Layers {
		z, err := gzip.NewReader(bytes.NewReader(blob(l.Digest)))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(z)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, plain)
	}
	return out
}

// pack packs a tar, given in odd pieces.
func pack(t testing.TB, layer []byte, opt nydus.PackOption) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := nydus.Pack(t.Context(), &out, opt)
	if err != nil {
		t.Fatal(err)
	}
	for len(layer) > 0 {
		n := min(len(layer), 77777)
		if _, err := w.Write(layer[:n]); err != nil {
			t.Fatal(err)
		}
		layer = layer[n:]
	}
	for range 2 { // twice does no harm
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return out.Bytes()
}

func layerOf(b []byte) nydus.Layer {
	return nydus.Layer{Digest: digest.FromBytes(b), ReaderAt: reader(b)}
}

func merge(t testing.TB, blobs [][]byte, opt nydus.MergeOption) ([]byte, []digest.Digest) {
	t.Helper()
	var layers []nydus.Layer
	for _, b := range blobs {
		layers = append(layers, layerOf(b))
	}
	var out bytes.Buffer
	ids, err := nydus.Merge(t.Context(), layers, &out, opt)
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), ids
}

// store writes a bootstrap and blobs as nydus-image wants them.
func store(t *testing.T, boot []byte, blobs [][]byte) (bootPath, blobDir string) {
	t.Helper()
	dir := t.TempDir()
	bootPath, blobDir = filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs")
	err := errors.Join(os.Mkdir(blobDir, 0o755), os.WriteFile(bootPath, boot, 0o600))
	for _, b := range blobs {
		err = errors.Join(err, os.WriteFile(filepath.Join(blobDir, digest.FromBytes(b).Encoded()), b, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	return bootPath, blobDir
}

func nydusImage(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(testenv.Tool(t, "nydus-image"), args...).CombinedOutput(); err != nil {
		t.Errorf("nydus-image %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// judge looks at a merged image with everything: our check of every chunk, nydus-image, and the
// kernel's mount against what the fixture means, but for what nydus-image loses.
func judge(t *testing.T, boot []byte, blobs [][]byte, ours bool) {
	t.Helper()
	bootPath, blobDir := store(t, boot, blobs)
	open := func(b rafs.Blob) (io.ReaderAt, error) { return os.Open(filepath.Join(blobDir, b.ID)) }
	if _, err := rafs.Check(t.Context(), bytes.NewReader(boot), int64(len(boot)), open, rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	nydusImage(t, "check", "--bootstrap", bootPath, "--blob-dir", blobDir)

	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		t.Fatal(err)
	}
	compareNydusd(t, testenv.MountNydusd(t, bootPath, blobDir), ours)
	if img.Version == rafs.V5 {
		return
	}
	var devices []string
	for i, b := range img.Blobs {
		name := filepath.Join(filepath.Dir(bootPath), fmt.Sprint("device-", i))
		device, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		r, err := rafs.OpenBlobFrom(func(b rafs.Blob) (io.ReaderAt, error) {
			data, err := os.ReadFile(filepath.Join(blobDir, b.ID))
			return bytes.NewReader(data), err
		}, b)
		if err == nil {
			err = img.ExpandBlob(t.Context(), i, r, device)
		}
		if err := errors.Join(err, device.Close()); err != nil {
			t.Fatal(err)
		}
		devices = append(devices, name)
	}
	root := testenv.MountEROFS(t, bootPath, devices...)
	fixtures := testenv.Fixtures(t)
	out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), root, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if ours && err != nil || !ours && strings.Count(string(out), "\n") > 1+strings.Count(string(out), lostByNydus) {
		t.Errorf("kernel mount: %v\n%s", err, out)
	}
}

// compareNydusd compares what nydusd serves with the fixture: it shows mtime 0 as the time of the mount, and hard links as
// files of their own.
func compareNydusd(t *testing.T, root string, ours bool) {
	t.Helper()
	fixtures := testenv.Fixtures(t)
	out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), root, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if err != nil && !strings.Contains(string(out), " differences") {
		t.Errorf("cmp_tree.py: %v\n%.2000s", err, out)
		return
	}
	for line := range strings.Lines(string(out)) {
		known := strings.Contains(line, "mtime") || strings.Contains(line, "not the same inode") || !ours && strings.Contains(line, lostByNydus)
		if !known && !strings.HasSuffix(line, " differences\n") {
			t.Errorf("nydusd: %s", line)
		}
	}
}

// TestPackAndMerge packs the layers of the fixture and merges them, with ours and with
// nydus-image's merge.
func TestPackAndMerge(t *testing.T) {
	testenv.Root(t)
	layers := fixtureTars(t)
	for name, opt := range map[string]nydus.PackOption{
		"defaults":         {},
		"lz4_block, 64KiB": {Compressor: "lz4_block", ChunkSize: "0x10000", FsVersion: "6", BatchSize: "0"},
		"none":             {Compressor: "none"},
		"v5":               {FsVersion: "5"},
		"v5, lz4, 64KiB":   {FsVersion: "5", Compressor: "lz4_block", ChunkSize: "0x10000"},
		"v5, none, 16MiB":  {FsVersion: "5", Compressor: "none", ChunkSize: "0x1000000"},
	} {
		t.Run(name, func(t *testing.T) {
			var blobs [][]byte
			for _, l := range layers {
				blobs = append(blobs, pack(t, l, opt))
			}
			boot, ids := merge(t, blobs, nydus.MergeOption{FsVersion: opt.FsVersion})
			if len(ids) != 2 || ids[0] != digest.FromBytes(blobs[0]) || ids[1] != digest.FromBytes(blobs[1]) {
				t.Errorf("blobs %v", ids)
			}
			judge(t, boot, blobs, true)

			// The real merge wants the bootstraps in files that are named by their blob's digest.
			dir := t.TempDir()
			args := []string{"merge", "--bootstrap", filepath.Join(dir, "merged")}
			for _, b := range blobs {
				inner, err := rafs.ReadInline(bytes.NewReader(b), int64(len(b)))
				if err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, digest.FromBytes(b).Encoded())
				if err := os.WriteFile(path, inner, 0o600); err != nil {
					t.Fatal(err)
				}
				args = append(args, path)
			}
			nydusImage(t, args...)
			merged, err := os.ReadFile(filepath.Join(dir, "merged"))
			if err != nil {
				t.Fatal(err)
			}
			_, blobDir := store(t, merged, blobs)
			nydusImage(t, "check", "--bootstrap", filepath.Join(dir, "merged"), "--blob-dir", blobDir)
			img, err := rafs.Open(bytes.NewReader(merged), int64(len(merged)))
			if err != nil {
				t.Fatal(err)
			}
			for i, b := range img.Blobs {
				if b.ID != digest.FromBytes(blobs[i]).Encoded() {
					t.Errorf("nydus-image merge: blob %d is %s, want %s", i, b.ID, digest.FromBytes(blobs[i]))
				}
			}
		})
	}
}

// lostByNydus is a file with a group above 2^21, which a PAX record says: nydus-image 2.2.0 reads
// it as 0.
const lostByNydus = "private/big-ids"

// TestNydusLayers merges and unpacks what the real nydus-image has packed.
func TestNydusLayers(t *testing.T) {
	testenv.Root(t)
	for _, args := range [][]string{
		{"--features", "blob-toc"},
		{"--features", "blob-toc", "--compressor", "lz4_block", "--chunk-size", "0x10000"},
		{"--digester", "sha256"}, // without a TOC
		{"--fs-version", "5"},
		{"--fs-version", "5", "--compressor", "lz4_block", "--chunk-size", "0x10000", "--digester", "sha256"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			var blobs [][]byte
			for i, l := range fixtureTars(t) {
				dir := t.TempDir()
				tarPath, blobPath := filepath.Join(dir, "layer.tar"), filepath.Join(dir, "blob")
				// As Go writes it: nydus-image 2.2.0 refuses the blank device fields of GNU tar's fifos.
				if err := os.WriteFile(tarPath, unpacked(t, pack(t, l, nydus.PackOption{})), 0o600); err != nil {
					t.Fatal(err)
				}
				nydusImage(t, append(append([]string{"create", "--type", "tar-rafs", "--blob-inline-meta", "--whiteout-spec", "none", "--blob", blobPath}, args...), tarPath)...)
				b, err := os.ReadFile(blobPath)
				if err != nil {
					t.Fatal(err)
				}
				want, got := names(t, l), names(t, unpacked(t, b))
				delete(want, lostByNydus)
				delete(got, lostByNydus)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("layer %d, unpacked (-tar +ours):\n%s", i, diff)
				}
				blobs = append(blobs, b)
			}
			boot, _ := merge(t, blobs, nydus.MergeOption{PrefetchPatterns: "/app\n/missing"})
			judge(t, boot, blobs, false)
		})
	}
}

func unpacked(t testing.TB, blob []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := nydus.Unpack(t.Context(), reader(blob), &out, nydus.UnpackOption{}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// names lists what a tar makes: of every name its type, size, owner and data.
func names(t testing.TB, b []byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		sum := digest.SHA256.Digester()
		if _, err := io.Copy(sum.Hash(), r); err != nil {
			t.Fatal(err)
		}
		name := strings.Trim(strings.TrimPrefix(h.Name, "."), "/")
		if name == "" {
			continue // the root may have no entry
		}
		switch h.Typeflag {
		case tar.TypeLink:
			// Which of its names is the file is up to the writer.
			out[name] = out[strings.Trim(strings.TrimPrefix(h.Linkname, "."), "/")]
			continue
		case tar.TypeSymlink:
			h.Mode = 0o777
		}
		out[name] = fmt.Sprintf("%c %o %d:%d %d %d:%d %s %s", h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid, h.Size, h.Devmajor, h.Devminor, h.Linkname, sum.Digest())
	}
}

// TestUnpack packs and unpacks: the tar says the same.
func TestUnpack(t *testing.T) {
	for _, version := range []string{"5", "6"} {
		for i, l := range fixtureTars(t) {
			if diff := cmp.Diff(names(t, l), names(t, unpacked(t, pack(t, l, nydus.PackOption{FsVersion: version})))); diff != "" {
				t.Errorf("v%s: layer %d (-tar +unpacked):\n%s", version, i, diff)
			}
		}
	}
}

// tarOf makes a tar of names: "dir/", "file=content", "link->target".
func tarOf(t testing.TB, entries ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := tar.Header{Typeflag: tar.TypeReg, Name: e, Mode: 0o640, ModTime: time.Unix(1000, 0)}
		data := ""
		if name, content, ok := strings.Cut(e, "="); ok {
			h.Name, data, h.Size = name, content, int64(len(content))
		} else if name, target, ok := strings.Cut(e, "=>"); ok {
			h.Typeflag, h.Name, h.Linkname = tar.TypeLink, name, target
		} else if strings.HasSuffix(e, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o700
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestMergeRules: whiteouts in any layer, directories without an entry, layers without data.
func TestMergeRules(t *testing.T) {
	blobs := [][]byte{
		pack(t, tarOf(t, "d/", "d/gone=1", "d/stays=2", "e/", "e/old=3", ".wh.never"), nydus.PackOption{}),
		pack(t, tarOf(t, "d/.wh.gone", "d/new", "e/.wh..wh..opq"), nydus.PackOption{}), // no data
		pack(t, tarOf(t, "e/new=4"), nydus.PackOption{}),
	}
	boot, ids := merge(t, blobs, nydus.MergeOption{PrefetchPatterns: "/d/stays"})
	if want := []digest.Digest{digest.FromBytes(blobs[0]), digest.FromBytes(blobs[2])}; !cmp.Equal(ids, want) {
		t.Errorf("blobs %v, want %v", ids, want)
	}
	img, err := rafs.Open(bytes.NewReader(boot), int64(len(boot)))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint32{}
	if err := img.Walk(func(p string, ino *rafs.Inode) error { got[p] = ino.Mode & 0o7777; return nil }); err != nil {
		t.Fatal(err)
	}
	// d and e keep the mode that the first layer gives them: later ones have no entry for them.
	want := map[string]uint32{"/": 0o755, "/d": 0o700, "/d/new": 0o640, "/d/stays": 0o640, "/e": 0o700, "/e/new": 0o640}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	if len(img.Prefetch) != 1 {
		t.Errorf("prefetch table of %d entries", len(img.Prefetch))
	}
	bootPath, blobDir := store(t, boot, blobs)
	nydusImage(t, "check", "--bootstrap", bootPath, "--blob-dir", blobDir)
}

func gunzip(t testing.TB, b []byte) io.Reader {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return z
}
