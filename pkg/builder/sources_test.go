package builder_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
)

// skippable is a zstd frame that decoders pass over.
func skippable(b string) []byte {
	out := binary.LittleEndian.AppendUint32([]byte("\x50\x2a\x4d\x18"), uint32(len(b)))
	return append(out, b...)
}

// TestSeekableLayers reads layers that other lazy formats have cut into many members or frames, with
// tables between and behind them: the image is that of the plain tar.
func TestSeekableLayers(t *testing.T) {
	plain := makeTar(t, dir("d", 0o755), reg("d/a", string(noise(4, 300_000))), reg("d/b", strings.Repeat("b", 100_000)), sym("l", "d/a"))
	want := convert(t, tars(t, plain), builder.DefaultOptions())

	// zstd:chunked and the seekable format: a frame for each piece, then skippable frames.
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	frames := skippable("first")
	for rest := plain; len(rest) > 0; {
		n := min(len(rest), 65_537)
		frames = append(frames, encoder.EncodeAll(rest[:n], nil)...)
		frames = append(frames, skippable("between")...)
		rest = rest[n:]
	}
	frames = append(frames, skippable(strings.Repeat("table of contents", 100))...)
	frames = append(frames, skippable("")...)
	// gzip: a member for each piece, and an empty one with an extra field at the end, as stargz' footer is.
	var members []byte
	for rest := plain; len(rest) > 0; {
		n := min(len(rest), 65_537)
		members = append(members, gz(t, rest[:n])...)
		rest = rest[n:]
	}
	members = append(members, "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00000000000000000aSTARGZ\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"...)
	for name, l := range map[string]builder.Layer{
		"zstd frames":  stored(ocispec.MediaTypeImageLayerZstd, plain, frames),
		"gzip members": stored(ocispec.MediaTypeImageLayerGzip, plain, members),
	} {
		res := convert(t, source(t, l), builder.DefaultOptions())
		if got, want := res.Blobs[0].Descriptor.Digest, want.Blobs[0].Descriptor.Digest; got != want {
			t.Errorf("%s: blob %s, the plain tar's is %s", name, got, want)
		}
		checkTools(t, res)
	}
	// Bytes behind the last member or frame that are none of it are refused.
	for name, l := range map[string]builder.Layer{
		"zstd": stored(ocispec.MediaTypeImageLayerZstd, plain, append(bytes.Clone(frames), "garbage"...)),
		"gzip": stored(ocispec.MediaTypeImageLayerGzip, plain, append(bytes.Clone(members), "garbage"...)),
	} {
		o := builder.DefaultOptions()
		o.TempDir = t.TempDir()
		if res, err := builder.Convert(t.Context(), source(t, l), o); err == nil {
			t.Errorf("%s with garbage: %v", name, res.Close())
		}
	}
}

// TestEStargz converts a real eStargz layer. Its landmark and its table of contents are files of the
// layer: they stay, as in the layer that containerd unpacks, and as the diff ID wants. So does nydusify, which has
// nydus-image read layers as plain tars; only its types estargz-rafs and estargz-ref leave them out
// (nydus-rs 2.2.0, builder/tarball.rs, is_special_files).
func TestEStargz(t *testing.T) {
	plain := makeTar(t, reg("a", string(noise(5, 200_000))), reg("b", "hot"))
	for name, option := range map[string]estargz.Option{
		".prefetch.landmark":    estargz.WithPrioritizedFiles([]string{"b"}),
		".no.prefetch.landmark": estargz.WithChunkSize(50_000),
	} {
		blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), option)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(blob)
		if err != nil {
			t.Fatal(err)
		}
		if err := blob.Close(); err != nil {
			t.Fatal(err)
		}
		l := stored(ocispec.MediaTypeImageLayerGzip, nil, data)
		l.DiffID = blob.DiffID()
		unpacked := t.TempDir()
		z, err := compression.DecompressStream(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		_, err = archive.Apply(t.Context(), unpacked, z, archive.WithNoSameOwner())
		if err := errors.Join(err, z.Close()); err != nil {
			t.Fatal(err)
		}
		o := builder.DefaultOptions()
		o.List = listOf("/b")
		res := convert(t, source(t, l), o)
		tree := dumpImage(t, res)
		for p, want := range dumpDir(t, unpacked) {
			if got, ok := tree[p]; !ok || got.Data != want.Data || p != "/" && got.Mode != want.Mode {
				t.Errorf("%s: %s is %+v, containerd unpacks %+v", name, p, got, want)
			}
		}
		if len(tree) != 5 || tree["/a"].Size != 200_000 || tree["/b"].Data != sum("hot") || tree["/"+name].Size == 0 || tree["/stargz.index.json"].Size == 0 {
			t.Errorf("%s: tree %v", name, tree)
		}
		checkTools(t, res)
	}
}

// TestLargeSparse converts a sparse file of 5 GiB with data at its ends, in each of GNU tar's ways to
// write one: its holes are one chunk, and the file reads as it should behind 4 GiB.
func TestLargeSparse(t *testing.T) {
	if raceEnabled || testing.Short() {
		t.Skip("skipped: digests 5 GiB of zeros a few times")
	}
	testenv.Root(t)
	root := t.TempDir()
	f, err := os.OpenFile(filepath.Join(root, "sparse"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	const size = 5<<30 + 12345
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 4<<30 - 3, size - 6} {
		if _, err := f.WriteAt([]byte("island"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	var first *builder.Result
	for _, args := range [][]string{{"--format=gnu"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"}} {
		b, err := exec.Command("tar", append(args, "--sparse", "--mtime=@0", "--owner=0", "--group=0", "-C", root, "-cf", "-", "sparse")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		o := builder.DefaultOptions()
		res := convert(t, tars(t, b), o)
		img := openImage(t, res)
		ino := img.Lookup("/sparse")
		if ino == nil || ino.Size != size || len(ino.Chunks) != 5<<10+1 || res.Blobs[0].Descriptor.Size > 1<<16 || img.Blobs[0].ChunkCount != 5 {
			t.Fatalf("%v: inode %+v of %d chunks, blob of %d bytes and %d chunks", args, ino, len(ino.Chunks), res.Blobs[0].Descriptor.Size, img.Blobs[0].ChunkCount)
		}
		r, err := openBlob(t, res, img.Blobs[0])
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]int{}
		for i, c := range ino.Chunks {
			if i > 0 && i < 4095 || i > 4096 && i < 5120 {
				if c != ino.Chunks[1] {
					t.Fatalf("%v: chunk %d is %+v, another than the hole's", args, i, c)
				}
				continue
			}
			p, err := r.ReadChunk(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			got[strings.Trim(string(p), "\x00")]++
		}
		if diff := cmp.Diff(map[string]int{"island": 2, "isl": 1, "and": 1}, got); diff != "" {
			t.Errorf("%v: data (-want +got):\n%s", args, diff)
		}
		checkTools(t, res)
		if first == nil {
			first = res
		} else if first.Blobs[0].Descriptor.Digest != res.Blobs[0].Descriptor.Digest {
			t.Errorf("%v: another blob", args)
		}
	}
}

// TestSparse converts sparse files, in each of GNU tar's ways to write one, to both versions: nydusd, and of v6 the kernel, show
// holes as zeros, with and without a prefetch blob, and blobs stay small.
func TestSparse(t *testing.T) {
	testenv.Root(t)
	gnutar := testenv.Tool(t, "tar")
	root := t.TempDir()
	const chunk = 1 << 16
	for name, islands := range map[string][]int64{
		"begin": {0}, "end": {20*chunk - 7}, "ends": {0, 20*chunk - 7}, "middle": {7*chunk - 3, 9 * chunk}, "none": {},
		"every": {5, chunk + 5, 2*chunk + 5, 3*chunk + 5, 19*chunk + 5},
	} {
		f, err := os.OpenFile(filepath.Join(root, name), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		err = f.Truncate(20 * chunk)
		for _, at := range islands {
			_, werr := f.WriteAt([]byte("island!"), at)
			err = errors.Join(err, werr)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	want := dumpDir(t, root)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		o.ChunkSize, o.List = chunk, listOf("/middle", "/none")
		var first []byte
		for _, args := range [][]string{{"--format=gnu"}, {"--format=posix", "--sparse-version=0.0"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"}} {
			t.Run(fmt.Sprint(args), func(t *testing.T) {
				b, err := exec.Command(gnutar, append(args, "--sparse", "--mtime=@1000", "--owner=0", "--group=0", "--sort=name", "-C", root, "-cf", "-", ".")...).Output()
				if err != nil {
					t.Fatal(err)
				}
				if len(b) > 60*chunk {
					t.Fatalf("the tar has %d bytes: are there holes?", len(b))
				}
				res := convert(t, tars(t, b), o)
				tree := judge(t, res)
				for p, w := range want {
					if w.Size > 0 && (tree[p].Data != w.Data || tree[p].Size != w.Size) {
						t.Errorf("%s is %+v, want %+v", p, tree[p], w)
					}
				}
				img := openImage(t, res)
				for i, b := range res.Blobs { // the tails of six files; holes compress to nothing, and a few are stored twice to keep chunks apart
					if b.Descriptor.Size > 6*chunk {
						t.Errorf("blob %d has %d bytes", i, b.Descriptor.Size)
					}
				}
				if first == nil {
					first = res.Manifest
				} else if !bytes.Equal(first, res.Manifest) && len(img.Blobs) > 0 {
					var a, b ocispec.Manifest
					if err := errors.Join(json.Unmarshal(first, &a), json.Unmarshal(res.Manifest, &b)); err != nil {
						t.Fatal(err)
					}
					if a.Layers[0].Digest != b.Layers[0].Digest {
						t.Error("another way to write holes gives another blob")
					}
				}
			})
		}
	})
}

// TestShuffledTar converts two tars of the same files in another order: each gives one image, always
// the same, and both have the same tree.
func TestShuffledTar(t *testing.T) {
	files := []file{dir("d", 0o755), reg("d/a", chunked("abc")), reg("d/b", chunked("bcd")), reg("c", ""), sym("s", "d"), {tar.Header{Typeflag: tar.TypeFifo, Name: "f", Mode: 0o600}, ""}}
	o := builder.DefaultOptions()
	o.ChunkSize, o.List = 1<<12, listOf("/d/b", "/s/a")
	var trees []map[string]item
	for _, order := range [][]int{{0, 1, 2, 3, 4, 5}, {5, 3, 0, 2, 4, 1}} {
		var shuffled []file
		for _, i := range order {
			shuffled = append(shuffled, files[i])
		}
		layer := makeTar(t, shuffled...)
		var first string
		for _, workers := range []int{1, 2, 8, 8} {
			o.Workers = workers
			res := convert(t, tars(t, layer), o)
			if first == "" {
				first = string(res.Manifest)
				trees = append(trees, dumpImage(t, res))
			} else if first != string(res.Manifest) {
				t.Errorf("order %v with %d workers: another image", order, workers)
			}
		}
	}
	if diff := cmp.Diff(trees[0], trees[1]); diff != "" {
		t.Errorf("trees differ by the order of the tar:\n%s", diff)
	}
}
