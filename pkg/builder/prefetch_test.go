package builder_test

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

const testChunk = 4096

// chunked makes content of chunks, each filled with one letter of s.
func chunked(s string) string {
	var b strings.Builder
	for _, c := range s {
		b.WriteString(strings.Repeat(string(c), testChunk))
	}
	return b.String()
}

// prefetched reads the prefetch blob of res back: one letter for each chunk.
func prefetched(t *testing.T, res *builder.Result) string {
	t.Helper()
	img := openImage(t, res)
	if res.Stats.Prefetch.Chunks == 0 {
		return ""
	}
	last := len(img.Blobs) - 1
	r, err := openBlob(t, res, img.Blobs[last])
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	var compressedEnd, uncompressedEnd uint64
	for i, c := range img.BlobChunks(last) {
		if int(c.Index) != i || c.CompressedOffset < compressedEnd || c.UncompressedOffset != uncompressedEnd {
			t.Errorf("chunk %d of the prefetch blob is %+v, want index %d from %d on and at %d", i, c, i, compressedEnd, uncompressedEnd)
		}
		compressedEnd = c.CompressedOffset + uint64(c.CompressedSize)
		uncompressedEnd += testChunk
		b, err := r.ReadChunk(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b[0])
	}
	return string(out)
}

func TestPrefetch(t *testing.T) {
	layers := [][]byte{
		makeTar(t,
			reg("usr/abc", chunked("abc")), reg("usr/d", chunked("d")), reg("usr/tail", chunked("x")+"y"),
			link("usr/hard", "usr/abc"), sym("bin", "usr"), sym("usr/soft", "../bin/d"), sym("loop", "loop"),
			reg("usr/empty", ""), reg("gone", chunked("g")), sym("abs", "/usr/../../usr")),
		makeTar(t, reg("top/ab", chunked("ab")), reg("top/e", chunked("eeee")), reg(".wh.gone", "")),
	}
	of := func(path string, ranges ...trace.Range) trace.Access { return trace.Access{Path: path, Ranges: ranges} }
	list := func(a ...trace.Access) *persist.List { return &persist.List{Trace: trace.Trace{Accesses: a}} }
	tests := map[string]struct {
		list  *persist.List
		want  string   // letters of the prefetch blob
		table []string // paths of the prefetch table
		stats builder.PrefetchStats
	}{
		"no list":    {list: nil},
		"empty list": {list: list()},
		"nothing matches": {
			list:  listOf("/gone", "/nowhere/at/all", "/usr", "/loop", "/usr/d/x", "relative", "/usr/empty", ""),
			stats: builder.PrefetchStats{Listed: 8, Missing: 6, NotRegular: 1, Files: 1},
		},
		"list order, not tar order": {
			list: listOf("/top/e", "/usr/d", "/usr/abc"), want: "edabc", table: []string{"/top/e", "/usr/d", "/usr/abc"},
			stats: builder.PrefetchStats{Listed: 3, Files: 3, Chunks: 5, RawBytes: 5 * testChunk},
		},
		"equal chunks once, across layers": {
			list: listOf("/top/ab", "/usr/abc"), want: "abc", table: []string{"/top/ab", "/usr/abc"},
			stats: builder.PrefetchStats{Listed: 2, Files: 2, Chunks: 3, RawBytes: 3 * testChunk},
		},
		"repeated paths and other names": {
			list: listOf("/usr/hard", "/usr/abc", "/bin/hard", "/usr/soft", "/usr/d", "/abs/d"), want: "abcd", table: []string{"/usr/hard", "/usr/d"},
			stats: builder.PrefetchStats{Listed: 6, Files: 2, Repeated: 4, Chunks: 4, RawBytes: 4 * testChunk},
		},
		"ranges": {
			list: list(of("/usr/abc", trace.Range{Offset: testChunk, Length: 1}), of("/usr/tail", trace.Range{Offset: testChunk, Length: 1 << 62}),
				of("/usr/abc", trace.Range{Offset: 2 * testChunk, Length: 5}), of("/usr/d", trace.Range{Offset: testChunk, Length: 5}, trace.Range{Offset: -1, Length: 9}, trace.Range{Length: 0})),
			want: "byc", table: []string{"/usr/abc", "/usr/tail", "/usr/d"},
			stats: builder.PrefetchStats{Listed: 4, Files: 3, Repeated: 1, Chunks: 3, RawBytes: 2*testChunk + 1},
		},
		"pattern through a symlink, that matches one": {
			list: typed("/bin/[!ab]*"), want: "dabcxy", table: []string{"/usr/d", "/usr/hard", "/usr/tail"},
			stats: builder.PrefetchStats{Listed: 1, Patterns: 1, Files: 4, Chunks: 6, RawBytes: 5*testChunk + 1},
		},
		"patterns that meet a loop": {
			list: typed("/*/ab?", "/**/sof[!u]", "/loop/*"), want: "abcd", table: []string{"/usr/abc", "/usr/d"},
			stats: builder.PrefetchStats{Listed: 3, Missing: 1, Patterns: 2, Files: 2, Chunks: 4, RawBytes: 4 * testChunk},
		},
		"marks that are none": {
			list:  typed(`/usr/\[!d]`, "/usr/[d", "/usr/[!d/]*"),
			stats: builder.PrefetchStats{Listed: 3, Missing: 3},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := builder.Options{ChunkSize: testChunk, List: tt.list}
			res := convert(t, tars(t, layers...), o)
			plain := convert(t, tars(t, layers...), builder.Options{ChunkSize: testChunk})
			if diff := cmp.Diff(dumpImage(t, plain), dumpImage(t, res)); diff != "" {
				t.Errorf("the list changed the tree (-without +with):\n%s", diff)
			}
			if got := prefetched(t, res); got != tt.want {
				t.Errorf("prefetch blob holds %q, want %q", got, tt.want)
			}
			got := res.Stats.Prefetch
			if (got.BlobBytes > 0) != (tt.want != "") {
				t.Errorf("BlobBytes = %d", got.BlobBytes)
			}
			got.BlobBytes = 0
			if diff := cmp.Diff(tt.stats, got); diff != "" {
				t.Errorf("stats (-want +got):\n%s", diff)
			}
			img := openImage(t, res)
			if len(img.Prefetch) != len(tt.table) {
				t.Fatalf("prefetch table has %d inodes, want %v", len(img.Prefetch), tt.table)
			}
			for i, p := range tt.table {
				if img.Prefetch[i] != img.Lookup(p) {
					t.Errorf("entry %d of the prefetch table is not %s", i, p)
				}
			}
		})
	}
}

// TestPrefetchSharedChunks makes sure that no inode keeps a chunk in a layer's blob that the
// prefetch blob has.
func TestPrefetchSharedChunks(t *testing.T) {
	layers := [][]byte{makeTar(t, reg("a", chunked("ab")), reg("b", chunked("bc"))), makeTar(t, reg("c", chunked("bd")))}
	res := convert(t, tars(t, layers...), builder.Options{ChunkSize: testChunk, List: listOf("/c")})
	img := openImage(t, res)
	want := map[string][]uint16{"/a": {0, 1}, "/b": {1, 0}, "/c": {1, 1}}
	for p, w := range want {
		var got []uint16
		for _, c := range img.Lookup(p).Chunks {
			got = append(got, c.Blob)
		}
		if diff := cmp.Diff(w, got); diff != "" {
			t.Errorf("blobs of %s (-want +got):\n%s", p, diff)
		}
	}
	// The second layer's chunks are all in the prefetch blob: its own blob is dropped.
	if len(res.Blobs) != 2 || res.Blobs[0].SourceLayer != 0 || res.Blobs[1].SourceLayer != -1 || res.Stats.BlobsDropped != 1 {
		t.Errorf("blobs are %+v, %d dropped", res.Blobs, res.Stats.BlobsDropped)
	}
	checkOCI(t, res)
}

// TestRecompress makes the prefetch blob smaller than copies of the stored chunks would be.
func TestRecompress(t *testing.T) {
	words := strings.Fields("the quick brown fox jumps over a lazy dog while jackdaws love their big sphinx of quartz")
	var text strings.Builder
	for _, b := range noise(1, 30000) {
		text.WriteString(words[int(b)%len(words)] + " ")
	}
	data := text.String()
	src := tars(t, makeTar(t, reg("a", data), reg("b", string(noise(2, 9000)))))
	o := builder.DefaultOptions()
	o.List = listOf("/a", "/b")
	best := convert(t, src, o)
	o.NoRecompress = true
	same := convert(t, src, o)
	if b, s := best.Stats.Prefetch.BlobBytes, same.Stats.Prefetch.BlobBytes; b >= s {
		t.Errorf("recompressed blob has %d bytes, the copied one %d", b, s)
	}
	if n := best.Stats.Prefetch.Recoded; n != 1 {
		t.Errorf("Recoded = %d, want 1", n)
	}
	if diff := cmp.Diff(dumpImage(t, same), dumpImage(t, best)); diff != "" {
		t.Errorf("trees differ:\n%s", diff)
	}
}

// TestMarkPrefetchBlob looks for the feature bit, which only the prefetch blob may have.
func TestMarkPrefetchBlob(t *testing.T) {
	src := tars(t, makeTar(t, reg("a", "1"), reg("b", "2")))
	for _, mark := range []bool{false, true} {
		o := builder.DefaultOptions()
		o.List, o.MarkPrefetchBlob = listOf("/a"), mark
		img := openImage(t, convert(t, src, o))
		got := []bool{img.Blobs[0].Features&rafs.FeaturePrefetch != 0, img.Blobs[1].Features&rafs.FeaturePrefetch != 0}
		if diff := cmp.Diff([]bool{false, mark}, got); diff != "" {
			t.Errorf("MarkPrefetchBlob = %v: features (-want +got):\n%s", mark, diff)
		}
	}
}

// TestDeterminism converts the fixture with different numbers of workers.
func TestDeterminism(t *testing.T) {
	entries := readExpected(t)
	var first *builder.Result
	for _, workers := range []int{1, 2, 7} {
		o := builder.DefaultOptions()
		o.ChunkSize, o.Workers, o.List = 1<<14, workers, fixtureList(t, entries)
		res := convert(t, fixture(t), o)
		if first == nil {
			first = res
			continue
		}
		if diff := cmp.Diff(string(first.Manifest), string(res.Manifest)); diff != "" {
			t.Errorf("%d workers: manifest differs:\n%s", workers, diff)
		}
		if diff := cmp.Diff(first.Stats, res.Stats); diff != "" {
			t.Errorf("%d workers: stats differ:\n%s", workers, diff)
		}
	}
}

// TestLayerBlobIsPure converts one layer alone, above another and compressed in other ways.
func TestLayerBlobIsPure(t *testing.T) {
	layer := makeTar(t, reg("a", string(noise(1, 50_000))), reg("b", chunked("bbbb")))
	base := makeTar(t, reg("a", chunked("bb")), reg("c", "3"))
	o := builder.DefaultOptions()
	alone := convert(t, tars(t, layer), o)
	above := convert(t, source(t, tarLayer(base), stored("application/vnd.docker.image.rootfs.diff.tar.gzip", layer, gz(t, layer))), o)
	zstd := convert(t, source(t, stored("application/vnd.oci.image.layer.v1.tar+zstd", layer, zst(t, layer))), o)
	multi := convert(t, source(t, stored("application/vnd.oci.image.layer.v1.tar+gzip", layer, append(gz(t, layer[:7777]), gz(t, layer[7777:])...))), o)
	want := alone.Blobs[0].Descriptor
	for name, got := range map[string]builder.File{"above": above.Blobs[1], "zstd": zstd.Blobs[0], "multi": multi.Blobs[0]} {
		if diff := cmp.Diff(want, got.Descriptor); diff != "" {
			t.Errorf("%s (-alone +%s):\n%s", name, name, diff)
		}
	}
	// The same layer twice shares a blob.
	twice := convert(t, tars(t, layer, layer), o)
	if len(twice.Blobs) != 1 {
		t.Errorf("the same layer twice has %d blobs", len(twice.Blobs))
	}
	checkOCI(t, twice)
}

// TestConfig keeps what a config has beyond the specification, and makes its history fit.
func TestConfig(t *testing.T) {
	full, empty := makeTar(t, reg("a", "1")), makeTar(t, dir("d", 0o755))
	src := tars(t, full, empty)
	var cfg map[string]json.RawMessage
	if err := json.Unmarshal(src.Config, &cfg); err != nil {
		t.Fatal(err)
	}
	cfg["config"] = json.RawMessage(`{"Cmd":["/a"],"Labels":{"x":"<&>"},"ArgsEscaped":true,"Healthcheck":{"Interval":30000000000000001}}`)
	cfg["moby.buildkit.cache.v0"] = json.RawMessage(`"AAAA"`)
	cfg["history"] = json.RawMessage(`[{"created_by":"one","x":1},{"created_by":"env","empty_layer":true},{"created_by":"two"}]`)
	src.Config, _ = json.Marshal(cfg)
	src.Annotations = map[string]string{"org.example": "kept"}
	o := builder.DefaultOptions()
	o.List = listOf("/a")
	res := convert(t, src, o)
	checkOCI(t, res)
	var got map[string]json.RawMessage
	if err := json.Unmarshal(res.Config, &got); err != nil {
		t.Fatal(err)
	}
	var sent map[string]json.RawMessage
	if err := json.Unmarshal(src.Config, &sent); err != nil {
		t.Fatal(err)
	}
	for k, v := range sent {
		if k == "history" || k == "rootfs" {
			continue
		}
		if diff := cmp.Diff(string(v), string(got[k])); diff != "" {
			t.Errorf("%s (-want +got):\n%s", k, diff)
		}
	}
	// The only chunk is in the prefetch blob, so no source layer has a blob.
	const want = `[{"created_by":"one","empty_layer":true,"x":1},{"created_by":"env","empty_layer":true},{"created_by":"two","empty_layer":true},{"comment":"prefetch blob","created_by":"headstart"},{"comment":"bootstrap","created_by":"headstart"}]`
	if string(got["history"]) != want {
		t.Errorf("history = %s\nwant      %s", got["history"], want)
	}
	if !bytes.Contains(res.Manifest, []byte(`"org.example":"kept"`)) {
		t.Errorf("manifest lost the annotation: %s", res.Manifest)
	}

	cfg["history"] = json.RawMessage(`[{"created_by":"one"}]`) // fits nothing
	src.Config, _ = json.Marshal(cfg)
	checkOCI(t, convert(t, src, builder.DefaultOptions()))
	delete(cfg, "history")
	src.Config, _ = json.Marshal(cfg)
	checkOCI(t, convert(t, src, builder.DefaultOptions()))
}

// TestNoData converts images without a single chunk.
func TestNoData(t *testing.T) {
	for name, src := range map[string]builder.Source{
		"no layers":      tars(t),
		"empty tar":      tars(t, makeTar(t)),
		"no bytes":       source(t, tarLayer(nil)),
		"only metadata":  tars(t, makeTar(t, dir("d", 0o755), reg("empty", ""), sym("s", "d"))),
		"all whited out": tars(t, makeTar(t, reg("a", "1")), makeTar(t, reg(".wh.a", ""))),
	} {
		t.Run(name, func(t *testing.T) {
			o := builder.DefaultOptions()
			o.List = listOf("/a", "/empty")
			res := convert(t, src, o)
			if len(res.Blobs) != 0 {
				t.Errorf("blobs: %v", res.Blobs)
			}
			checkOCI(t, res)
			checkTools(t, res)
		})
	}
}

// TestClose removes everything, twice.
func TestClose(t *testing.T) {
	o := builder.DefaultOptions()
	o.TempDir = t.TempDir()
	res, err := builder.Convert(t.Context(), tars(t, makeTar(t, reg("a", "1"))), o)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := res.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(o.TempDir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
