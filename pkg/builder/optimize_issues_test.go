package builder_test

import (
	"bytes"
	"encoding/binary"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// Issues of dragonflyoss/nydus that are about building images, tried with optimize: what conversion makes of them is in
// regress_test.go, of lost diff IDs (1996) in internal/convert.

// chunkBlobs returns the blob of each chunk of a file.
func (l *loose) chunkBlobs(t *testing.T, path string) []int {
	t.Helper()
	ino := l.open(t).Lookup(path)
	if ino == nil {
		t.Fatalf("%s is not there", path)
	}
	var out []int
	for _, c := range ino.Chunks {
		out = append(out, int(c.Blob))
	}
	return out
}

// extendedBlobTable reads, byte by byte, how many entries the extended blob table of a v5 bootstrap has, and their chunk
// counts. Source: rafs-format.md 2.2 and 2.3.
func extendedBlobTable(t *testing.T, boot []byte) (chunkCounts []uint32) {
	t.Helper()
	n, at := binary.LittleEndian.Uint32(boot[68:]), binary.LittleEndian.Uint64(boot[72:])
	for i := range uint64(n) {
		chunkCounts = append(chunkCounts, binary.LittleEndian.Uint32(boot[at+64*i:]))
	}
	return chunkCounts
}

// TestOptimizeIssue1755: chunks read from the wrong blob, a missing extended blob table, hard links that were broken, stale blob
// entries, and chunks of v5 at places as if they were aligned.
func TestOptimizeIssue1755(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		odd := strings.Repeat("odd size ", 777) // one chunk and a part
		src := built(t, convert(t, tars(t,
			makeTar(t, dir("d", 0o755), reg("d/first", chunked("ab")), link("d/second", "d/first"), reg("odd", odd), reg("rest", "rest of layer 0")),
			makeTar(t, reg("upper", chunked("cd")+"tail"), link("third", "d/second"), reg("all-listed", chunked("e"))),
			makeTar(t, reg("odd2", odd+"!"))), o))
		before := src.open(t).Blobs
		out, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/third", "/odd", "/upper", "/all-listed")})
		if diff := cmp.Diff(src.dump(t), out.dump(t)); diff != "" {
			t.Errorf("tree (-source +optimized):\n%s", diff)
		}
		out.judgeTools(t)
		t.Run("blobs", func(t *testing.T) {
			last := len(res.Blobs) - 1
			if last != 2 || res.Stats.Dropped != 1 { // of the second layer every chunk is in the prefetch blob
				t.Fatalf("%d blobs, %d dropped, want 3 and 1", last+1, res.Stats.Dropped)
			}
			for path, want := range map[string][]int{"d/first": {last, last}, "odd": {last, last}, "upper": {last, last, last}, "rest": {0}, "odd2": {last, 1}} {
				if got := out.chunkBlobs(t, path); !slices.Equal(got, want) {
					t.Errorf("chunks of %s are in blobs %v, want %v", path, got, want)
				}
			}
			for i, from := range []int{0, 2} {
				if res.Blobs[i] != before[from] {
					t.Errorf("blob %d is %+v, was %+v", i, res.Blobs[i], before[from])
				}
			}
		})
		t.Run("extended blob table", func(t *testing.T) {
			if o.FSVersion != rafs.V5 {
				t.Skip("skipped: v6 has one table")
			}
			var want []uint32
			for _, b := range res.Blobs {
				want = append(want, b.ChunkCount)
			}
			if got := extendedBlobTable(t, out.boot); !slices.Equal(got, want) {
				t.Errorf("chunks of the extended entries are %v, want %v", got, want)
			}
		})
		t.Run("hard links", func(t *testing.T) {
			img := out.open(t)
			if a := img.Lookup("d/first"); a == nil || a != img.Lookup("d/second") || a != img.Lookup("third") {
				t.Error("the three names are no longer one file")
			}
		})
		t.Run("chunk places", func(t *testing.T) {
			b := res.Blobs[len(res.Blobs)-1]
			var stored, end uint64
			for i, c := range out.open(t).BlobChunks(len(res.Blobs) - 1) {
				if c.CompressedOffset != stored || c.UncompressedOffset != end || int(c.Index) != i {
					t.Errorf("chunk %d is at %d and %d, want %d and %d", c.Index, c.CompressedOffset, c.UncompressedOffset, stored, end)
				}
				stored += uint64(c.CompressedSize)
				end += uint64(c.UncompressedSize)
				if o.FSVersion == rafs.V6 {
					end = (end + 4095) &^ 4095
				}
			}
			if b.UncompressedSize != end || b.CompressedSize < stored || o.FSVersion == rafs.V5 && b.CompressedSize != stored {
				t.Errorf("the blob has %d and %d bytes, its chunks end at %d and %d", b.UncompressedSize, b.CompressedSize, end, stored)
			}
		})
	})
}

// TestOptimizeIssue1445: two files share a chunk, and one of them is listed: both read the copy, and the rest from where it was.
func TestOptimizeIssue1445(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		src := built(t, convert(t, tars(t,
			makeTar(t, reg("one", chunked("abc")), reg("two", chunked("xbc")), reg("last", chunked("b"))),
			makeTar(t, reg("three", chunked("cab")))), o))
		out, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/two")})
		out.judgeTools(t)
		last := len(res.Blobs) - 1
		for path, want := range map[string][]int{"one": {0, last, last}, "two": {last, last, last}, "last": {last}, "three": {last, 1, last}} {
			if got := out.chunkBlobs(t, path); !slices.Equal(got, want) {
				t.Errorf("chunks of %s are in blobs %v, want %v", path, got, want)
			}
		}
		if diff := cmp.Diff(src.dump(t), out.dump(t)); diff != "" {
			t.Errorf("tree (-source +optimized):\n%s", diff)
		}
	})
}

// TestOptimizeIssue1081: the prefetch table names what the list does, not what the source's table did, and is not lost.
func TestOptimizeIssue1081(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		o.List = listOf("/b")
		src := built(t, convert(t, tars(t, makeTar(t, reg("a", "1"), reg("b", "2"), reg("c", "3"), sym("s", "c"), link("z", "a"))), o))
		out, _ := src.optimize(t, builder.OptimizeOptions{List: listOf("/z", "/s", "/missing", "/z")})
		out.judgeTools(t)
		img := out.open(t)
		if want := []*rafs.Inode{img.Lookup("a"), img.Lookup("c")}; !slices.Equal(img.Prefetch, want) {
			t.Errorf("the prefetch table has %d entries, want those of /a and /c", len(img.Prefetch))
		}
	})
}

// TestOptimizeIssue1083: an image with layers without data, and a list.
func TestOptimizeIssue1083(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		for name, layers := range map[string][][]byte{
			"first": {makeTar(t), makeTar(t, reg("f", "data"))},
			"last":  {makeTar(t, reg("f", "data"), reg("g", "more")), makeTar(t, dir("d", 0o700))},
			"only":  {makeTar(t, dir("f", 0o700))},
		} {
			t.Run(name, func(t *testing.T) {
				src := built(t, convert(t, tars(t, layers...), o))
				out, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/f", "/d")})
				if (res.Prefetch == nil) != (name == "only") {
					t.Errorf("prefetch blob: %v", res.Prefetch)
				}
				if diff := cmp.Diff(src.dump(t), out.dump(t)); diff != "" {
					t.Errorf("tree (-source +optimized):\n%s", diff)
				}
				out.judgeTools(t)
			})
		}
	})
}

// TestOptimizeLargestChunk: exactly 16 MiB that do not compress.
func TestOptimizeLargestChunk(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		o.ChunkSize = rafs.MaxChunkSize
		data := string(noise(16, rafs.MaxChunkSize))
		src := built(t, convert(t, tars(t, makeTar(t, reg("exact", data), reg("more", data[1:]+"ab"), reg("rest", "rest"))), o))
		out, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/exact", "/more"), Recompress: true})
		if diff := cmp.Diff(src.dump(t), out.dump(t)); diff != "" || res.Stats.Prefetch.RawBytes != 2*rafs.MaxChunkSize+1 {
			t.Errorf("%d bytes prefetched; tree (-source +optimized):\n%s", res.Stats.Prefetch.RawBytes, diff)
		}
		out.judgeTools(t)
	})
}

// poison fills the chunks of every blob but the last with other bytes; the tables behind them stay.
func (l *loose) poison(t *testing.T) *loose {
	t.Helper()
	img := l.open(t)
	out := &loose{boot: l.boot, blobs: map[string]*counted{}}
	for i, b := range img.Blobs {
		data := bytes.Clone(l.blobs[b.ID].data)
		if i < len(img.Blobs)-1 {
			r, err := l.reader(b)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range img.BlobChunks(i) {
				off, n, err := r.StoredRange(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				for j := range data[off : off+n] {
					data[off+uint64(j)] = 0xee
				}
			}
		}
		out.blobs[b.ID] = &counted{data: data}
	}
	return out
}

// TestOptimizeServesFromPrefetchBlobAlone destroys the chunks of all other blobs of optimized fixtures: the kernel and nydusd
// still read the listed files right, as they need nothing else.
func TestOptimizeServesFromPrefetchBlobAlone(t *testing.T) {
	testenv.Root(t)
	listed := []string{"/app/main", "/app/main-link", "/app/dup-in-other-layer", "/bin/tool"}
	for _, name := range nydusFixtures {
		t.Run(name, func(t *testing.T) {
			src := nydusFixture(t, name)
			want := src.dump(t)
			out, res := src.optimize(t, builder.OptimizeOptions{List: listOf(listed...)})
			if len(res.Blobs) < 2 {
				t.Fatal("nothing is left to destroy")
			}
			img := out.open(t)
			read := func(who, root string) {
				t.Helper()
				for _, p := range listed {
					b, err := os.ReadFile(filepath.Join(root, p))
					if err != nil || sum(string(b)) != want[p].Data {
						t.Errorf("%s: %s has other bytes: %v", who, p, err)
					}
				}
			}
			bad := out.poison(t)
			bootstrap, blobDir := bad.write(t)
			if img.Version == rafs.V6 {
				devices := out.expand(t, img)
				for _, d := range devices[:len(devices)-1] {
					info, err := os.Stat(d)
					if err != nil {
						t.Fatal(err)
					}
					if err := os.WriteFile(d, bytes.Repeat([]byte{0xee}, int(info.Size())), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				read("the kernel", testenv.MountEROFS(t, bootstrap, devices...))
			}
			for _, b := range img.Blobs {
				if b.Features&rafs.FeatureBatch != 0 {
					return // nydusd 2.2.0 knows no batches
				}
			}
			root := testenv.MountNydusd(t, bootstrap, blobDir)
			read("nydusd", root)
			// The test of this test: what is not listed is not to be had. nydusd tries for seconds, so one file has to do.
			for _, p := range slices.Sorted(maps.Keys(want)) {
				w := want[p]
				if w.Mode&unix.S_IFMT != unix.S_IFREG || w.Size < 4096 || slices.Contains(listed, p) || slices.Contains(out.chunkBlobs(t, p[1:]), len(img.Blobs)-1) {
					continue
				}
				if b, err := os.ReadFile(filepath.Join(root, p)); err == nil && sum(string(b)) == w.Data {
					t.Errorf("%s is served from blobs that were destroyed", p)
				}
				return
			}
			t.Error("every file is in the prefetch blob")
		})
	}
}
