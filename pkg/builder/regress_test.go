package builder_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// What went wrong in other builders, each in both versions of the format. Numbers are issues of dragonflyoss/nydus.

// eachVersion runs a test for both, with chunks of 4 KiB.
func eachVersion(t *testing.T, test func(t *testing.T, o builder.Options)) {
	t.Helper()
	for _, v := range []rafs.Version{rafs.V5, rafs.V6} {
		t.Run("v"+v.String(), func(t *testing.T) {
			t.Parallel()
			test(t, builder.Options{FSVersion: v, Compressor: rafs.CompressorZstd, ChunkSize: testChunk, VerifyData: true})
		})
	}
}

// judge asks nydus-image and nydusd 2.2.0 and, of v6, fsck.erofs and the kernel about an image and returns its tree as we read it.
func judge(t *testing.T, res *builder.Result) map[string]item {
	t.Helper()
	checkOCI(t, res)
	checkNydusImage(t, res)
	want := dumpImage(t, res)
	if openImage(t, res).Version == rafs.V6 {
		checkFsck(t, res)
		t.Run("kernel", func(t *testing.T) {
			got := dumpDir(t, testenv.MountEROFS(t, res.BootstrapPath, expandAll(t, res)...))
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("tree through the kernel (-ours +theirs):\n%.3000s", diff)
			}
		})
	}
	t.Run("nydusd", func(t *testing.T) {
		got := dumpDir(t, mountNydusd(t, res))
		for p, w := range want {
			if g, ok := got[p]; ok && w.Mtime == 0 { // shown as the time of the mount
				g.Mtime = 0
				got[p] = g
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("tree through nydusd (-ours +theirs):\n%.3000s", diff)
		}
	})
	return want
}

// checkBlobTable makes sure that every blob is used, and that its entry fits the chunks that files have of it.
func checkBlobTable(t *testing.T, res *builder.Result) {
	t.Helper()
	img := openImage(t, res)
	align := uint64(1)
	if img.Version == rafs.V6 {
		align = 4096
	}
	for i, b := range img.Blobs {
		chunks := img.BlobChunks(i)
		if len(chunks) == 0 || uint32(len(chunks)) != b.ChunkCount {
			t.Errorf("blob %d has %d chunks, files use %d", i, b.ChunkCount, len(chunks))
		}
		var end, stored uint64
		for j, c := range chunks {
			if c.UncompressedOffset != end || c.CompressedOffset != stored || int(c.Index) != j {
				t.Errorf("blob %d: chunk %d is at %d and %d, want %d and %d", i, c.Index, c.UncompressedOffset, c.CompressedOffset, end, stored)
			}
			end += (uint64(c.UncompressedSize) + align - 1) &^ (align - 1)
			stored += uint64(c.CompressedSize)
		}
		if b.UncompressedSize != end || b.CompressedSize < stored || img.Version == rafs.V5 && b.CompressedSize != stored {
			t.Errorf("blob %d has %d and %d bytes, its chunks end at %d and %d", i, b.UncompressedSize, b.CompressedSize, end, stored)
		}
	}
}

// blobsOf returns the blob of each chunk of a file.
func blobsOf(t *testing.T, res *builder.Result, path string) []int {
	t.Helper()
	ino := openImage(t, res).Lookup(path)
	if ino == nil {
		t.Fatalf("%s is not there", path)
	}
	var out []int
	for _, c := range ino.Chunks {
		out = append(out, int(c.Blob))
	}
	return out
}

// TestIssue1755: chunks read from the wrong blob, no extended blob table, hard links broken, stale blob entries, and
// chunks of v5 at aligned places, all after a prefetch blob was added.
func TestIssue1755(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		odd := strings.Repeat("odd size ", 777) // one chunk and a part
		src := tars(t,
			makeTar(t, dir("d", 0o755), reg("d/first", chunked("ab")), link("d/second", "d/first"), reg("odd", odd), reg("rest", "rest of layer 0")),
			makeTar(t, reg("upper", chunked("cd")+"tail"), link("third", "d/second"), reg("gone-with-it", chunked("e"))),
			makeTar(t, reg(".wh.gone-with-it", ""), reg("odd2", odd+"!")))
		o.List = listOf("/third", "/odd", "/upper")
		res := convert(t, src, o)
		tree := judge(t, res)
		if l := tree["/third"].Link; l != "d/first" || tree["/d/second"].Link != l {
			t.Errorf("hard links are %q and %q, want d/first", l, tree["/d/second"].Link)
		}
		img := openImage(t, res)
		last := len(img.Blobs) - 1
		for path, want := range map[string][]int{"d/first": {last, last}, "odd": {last, last}, "upper": {last, last, last}, "rest": {0}, "odd2": {last, 1}} {
			if got := blobsOf(t, res, path); !slices.Equal(got, want) {
				t.Errorf("chunks of %s are in blobs %v, want %v", path, got, want)
			}
		}
		if last != 2 {
			t.Errorf("%d blobs, want those of two layers and the prefetch blob", last+1)
		}
		for i, b := range img.Blobs {
			if b.ID != res.Blobs[i].Descriptor.Digest.Encoded() || int64(b.CompressedSize) != res.Blobs[i].Descriptor.Size || b.ChunkCount == 0 {
				t.Errorf("blob %d is %+v, its layer %+v", i, b, res.Blobs[i].Descriptor)
			}
		}
	})
}

// TestBlobTables: without a list, every entry of the blob table tells exactly what its chunks need.
func TestBlobTables(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		res := convert(t, tars(t,
			makeTar(t, reg("a", chunked("ab")+"x"), reg("b", "1"), reg("c", string(noise(3, 3*testChunk+5)))),
			makeTar(t, reg("d", chunked("q")), reg("e", chunked("ab")))), o)
		checkBlobTable(t, res)
		judge(t, res)
	})
}

// TestIssue1445: two files have equal chunks and one of them is listed.
func TestIssue1445(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		src := tars(t,
			makeTar(t, reg("one", chunked("abc")), reg("two", chunked("xbc")), reg("last", chunked("b"))),
			makeTar(t, reg("three", chunked("cab"))))
		o.List = listOf("/two")
		res := convert(t, src, o)
		tree := judge(t, res)
		if got := prefetchedLetters(t, res); got != "xbc" {
			t.Errorf("the prefetch blob holds %q, want xbc", got)
		}
		last := len(res.Blobs) - 1
		for path, want := range map[string][]int{"one": {0, last, last}, "two": {last, last, last}, "last": {last}, "three": {last, 1, last}} {
			if got := blobsOf(t, res, path); !slices.Equal(got, want) {
				t.Errorf("chunks of %s are in blobs %v, want %v", path, got, want)
			}
		}
		if got := tree["/three"].Data; got != sum(chunked("cab")) {
			t.Errorf("/three has sha256 %s", got)
		}
	})
}

// prefetchedLetters reads the prefetch blob back: one letter for each chunk.
func prefetchedLetters(t *testing.T, res *builder.Result) string {
	t.Helper()
	img := openImage(t, res)
	last := len(img.Blobs) - 1
	r, err := openBlob(t, res, img.Blobs[last])
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for _, c := range img.BlobChunks(last) {
		b, err := r.ReadChunk(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b[0])
	}
	return string(out)
}

// prefetchTable returns the paths of the prefetch table, the first name of each file.
func prefetchTable(t *testing.T, res *builder.Result) []string {
	t.Helper()
	img := openImage(t, res)
	names := map[*rafs.Inode]string{}
	if err := img.Walk(func(path string, ino *rafs.Inode) error {
		if names[ino] == "" {
			names[ino] = path
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, ino := range img.Prefetch {
		out = append(out, names[ino])
	}
	return out
}

// TestIssue1081: the prefetch table was lost when layers were merged.
func TestIssue1081(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		src := tars(t,
			makeTar(t, dir("d", 0o755), reg("d/low", "low"), reg("d/under", "hidden")),
			makeTar(t, reg("d/under", "shown")),
			makeTar(t, reg("top", "top"), sym("s", "d/low")))
		o.List = listOf("/top", "/s", "/d/under", "/top")
		res := convert(t, src, o)
		judge(t, res)
		if got, want := prefetchTable(t, res), []string{"/top", "/d/low", "/d/under"}; !slices.Equal(got, want) {
			t.Errorf("prefetch table is %q, want %q", got, want)
		}
	})
}

// TestIssue1083: a layer without any entry, in every place, and a list.
func TestIssue1083(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		full := makeTar(t, reg("f", "data"))
		for name, src := range map[string]builder.Source{
			"first":  tars(t, makeTar(t), full),
			"last":   tars(t, full, makeTar(t)),
			"around": tars(t, makeTar(t), full, makeTar(t, dir("d", 0o700)), makeTar(t)),
		} {
			t.Run(name, func(t *testing.T) {
				o := o
				o.List = listOf("/f", "/not/there")
				res := convert(t, src, o)
				if tree := judge(t, res); tree["/f"].Data != sum("data") || res.Stats.Prefetch.Chunks != 1 {
					t.Errorf("tree %v, prefetch %+v", tree, res.Stats.Prefetch)
				}
			})
		}
	})
}

// TestFifoWithBlankDevice: GNU tar leaves the device fields of a fifo blank, and upstream fails on that.
func TestFifoWithBlankDevice(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		f := file{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o640, Format: tar.FormatGNU}, ""}
		b := makeTar(t, f, reg("after", "x"))
		clear(b[329:345]) // devmajor and devminor
		copy(b[148:156], "        ")
		total := 0
		for _, c := range b[:512] {
			total += int(c)
		}
		copy(b[148:156], fmt.Sprintf("%06o\x00 ", total))
		tree := judge(t, convert(t, tars(t, b), o))
		if got := tree["/fifo"]; got.Mode != unix.S_IFIFO|0o640 || got.Rdev != 0 || tree["/after"].Data != sum("x") {
			t.Errorf("fifo is %+v, the tree %v", got, tree)
		}
	})
}

// TestWhiteoutsInTheLowestLayer: markers with nothing below them are not shown.
func TestWhiteoutsInTheLowestLayer(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		tree := judge(t, convert(t, tars(t, makeTar(t,
			reg(".wh.gone", ""), dir("d", 0o755), reg("d/.wh..wh..opq", ""), reg("d/.wh.x", ""), reg("d/kept", "kept"), reg(".wh..wh.plnk", ""))), o))
		if len(tree) != 3 || tree["/d/kept"].Data != sum("kept") {
			t.Errorf("the tree is %v, want /, /d and /d/kept", tree)
		}
	})
}

// TestMissingParents: directories that no entry describes, also where they sort between others (upstream puts such entries elsewhere).
func TestMissingParents(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		tree := judge(t, convert(t, tars(t, makeTar(t,
			reg("a/f", "1"), dir("z", 0o700), reg("m/n/o/f", "2"), reg("zz", "3"), reg("m/n/f", "4"))), o))
		for path, want := range map[string]string{"/a/f": "1", "/m/n/o/f": "2", "/m/n/f": "4", "/zz": "3"} {
			if tree[path].Data != sum(want) {
				t.Errorf("%s is %+v", path, tree[path])
			}
		}
		if d := tree["/m/n/o"]; d.Mode != unix.S_IFDIR|0o755 || len(tree) != 10 {
			t.Errorf("/m/n/o is %+v of %d entries, want a directory of mode 0755 and 10", d, len(tree))
		}
	})
}

// TestEmptyList: a list of nothing, and one that names nothing of the image, give an image without a prefetch blob.
func TestEmptyList(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		src := func() builder.Source { return tars(t, makeTar(t, reg("f", "data"), reg("empty", ""))) }
		plain := convert(t, src(), o)
		for _, list := range []*persist.List{listOf(), listOf("/nowhere", "relative", "/empty/below")} {
			o := o
			o.List = list
			res := convert(t, src(), o)
			if !bytes.Equal(res.Manifest, plain.Manifest) || len(res.Blobs) != 1 {
				t.Errorf("list of %d: the image is not the one without a list", len(list.Accesses))
			}
		}
		judge(t, plain)
	})
}

// TestLargestChunk: exactly 16 MiB that do not compress, the largest chunk there is; one that does, and one byte more.
func TestLargestChunk(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		o.ChunkSize = rafs.MaxChunkSize
		data := string(noise(16, rafs.MaxChunkSize))
		src := tars(t, makeTar(t, reg("exact", data), reg("more", data[1:]+"ab"), reg("zeros", strings.Repeat("\x00", rafs.MaxChunkSize))))
		o.List = listOf("/exact", "/zeros")
		res := convert(t, src, o)
		tree := judge(t, res)
		if tree["/exact"].Data != sum(data) || tree["/more"].Size != rafs.MaxChunkSize+1 {
			t.Errorf("the tree is %v", tree)
		}
		if c := openImage(t, res).Lookup("exact").Chunks; len(c) != 1 || c[0].Compressed || c[0].CompressedSize != rafs.MaxChunkSize {
			t.Errorf("chunks of the file: %+v, want one of %d raw bytes", c, rafs.MaxChunkSize)
		}
	})
}

// TestMostLayers: 253 layers and a prefetch blob fill the blob table; with one more layer two share a blob.
func TestMostLayers(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		var layers [][]byte
		for i := range rafs.MaxBlobs {
			layers = append(layers, makeTar(t, reg(fmt.Sprintf("f%03d", i), fmt.Sprintf("layer %d", i)), reg(fmt.Sprintf("g%03d", i), fmt.Sprintf("more of %d", i))))
		}
		o.List = listOf("/f000", "/f252", "/f100")
		res := convert(t, tars(t, layers[:rafs.MaxBlobs-1]...), o)
		if n := len(openImage(t, res).Blobs); n != rafs.MaxBlobs || len(res.Blobs) != n {
			t.Errorf("%d blobs, want %d", n, rafs.MaxBlobs)
		}
		if tree := judge(t, res); tree["/f252"].Data != sum("layer 252") || tree["/g000"].Data != sum("more of 0") {
			t.Errorf("/f252 is %+v, /g000 %+v", tree["/f252"], tree["/g000"])
		}
		if n := res.Stats.JoinedLayers; n != 0 {
			t.Errorf("%d layers of 253 share a blob", n)
		}
		more := convert(t, tars(t, layers...), o)
		if n := more.Stats.JoinedLayers; n != 2 || len(more.Blobs) != rafs.MaxBlobs {
			t.Errorf("%d of %d layers share a blob, want 2; %d blobs", n, len(layers), len(more.Blobs))
		}
		if tree := judge(t, more); tree["/f253"].Data != sum("layer 253") || tree["/g000"].Data != sum("more of 0") {
			t.Errorf("/f253 is %+v, /g000 %+v", tree["/f253"], tree["/g000"])
		}
		checkOCI(t, more)
	})
}

// TestChunksThatNydusdMisreads: nydusd reads two chunks of a file as one when both are in its cache and the second is stored
// a little behind the first, so that it gives what lies between. Images must not have such chunks.
func TestChunksThatNydusdMisreads(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		head, mid := string(noise(5, testChunk)), string(noise(6, testChunk))
		src := tars(t, makeTar(t,
			reg("a", head+"aaaa"), reg("b", head+"bbbb"), reg("c", head+"cccc"), reg("d", head+mid+"aaaa"), reg("e", mid+"bbbb"),
			reg("f", chunked("xyz")), reg("g", chunked("xz")), reg("h", chunked("yxzzx")), reg("i", head+"cccc"+strings.Repeat("i", testChunk)),
			reg("j", chunked("pq")), reg("k", chunked("prs")), reg("l", chunked("qps"))))
		for name, list := range map[string]*persist.List{"layer": nil, "prefetched": listOf("/j", "/k", "/a", "/l", "/b", "/d", "/h", "/f", "/g")} {
			t.Run(name, func(t *testing.T) {
				o := o
				o.List = list
				res := convert(t, src, o)
				if checkNydusImage(t, res); o.FSVersion == rafs.V6 {
					checkTools(t, res)
				}
				want := dumpImage(t, res)
				root := mountNydusd(t, res)
				for range 3 {
					for path, w := range want {
						if w.Mode&unix.S_IFMT != unix.S_IFREG {
							continue
						}
						if got := readUncached(t, root+path); sum(got) != w.Data {
							t.Errorf("%s: nydusd gives other bytes", path)
						}
					}
				}
			})
		}
	})
}

// readUncached reads a file without what the kernel remembers of it, so that nydusd is asked again.
func readUncached(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(bufio.NewReaderSize(f, 1<<16))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
