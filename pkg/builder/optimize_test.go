package builder_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// nydusFixtures are the images of shared/fixtures/nydus that can be read.
var nydusFixtures = []string{"v6-zstd", "v6-lz4_block", "v6-zstd-sha256-64k", "v6-zstd-batch", "v5-zstd", "v5-lz4-sha256"}

// typed is a list that a person typed.
func typed(paths ...string) *persist.List {
	l := listOf(paths...)
	l.Engine = ""
	return l
}

// loose is a bare bootstrap with its blobs, and how much was read of each.
type loose struct {
	boot  []byte
	blobs map[string]*counted // by id
}

// counted is a blob file that counts what is read of it.
type counted struct {
	data  []byte
	reads atomic.Int64
	bytes atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	c.reads.Add(1)
	c.bytes.Add(int64(len(p)))
	return bytes.NewReader(c.data).ReadAt(p, off)
}

func (c *counted) Size() int64 { return int64(len(c.data)) }

func looseImage(t testing.TB, bootstrap, blobDir string) *loose {
	t.Helper()
	l := &loose{blobs: map[string]*counted{}}
	var err error
	if l.boot, err = os.ReadFile(bootstrap); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(blobDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(blobDir, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		l.blobs[n.Name()] = &counted{data: b}
	}
	return l
}

func nydusFixture(t testing.TB, name string) *loose {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), "nydus", name)
	return looseImage(t, filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs"))
}

func (l *loose) reader(b rafs.Blob) (*rafs.BlobReader, error) {
	return rafs.OpenBlobFrom(func(b rafs.Blob) (io.ReaderAt, error) {
		f, ok := l.blobs[b.ID]
		if !ok {
			return nil, fmt.Errorf("no blob %s", b.ID)
		}
		return f, nil
	}, b)
}

func (l *loose) source() builder.NydusSource {
	return builder.NydusSource{
		Bootstrap: bytes.NewReader(l.boot), BootstrapSize: int64(len(l.boot)),
		OpenBlob: func(_ context.Context, b rafs.Blob) (*rafs.BlobReader, error) { return l.reader(b) },
	}
}

func (l *loose) open(t testing.TB) *rafs.Image {
	t.Helper()
	img, err := rafs.Open(bytes.NewReader(l.boot), int64(len(l.boot)))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// dump reads the whole tree.
func (l *loose) dump(t testing.TB) map[string]item {
	t.Helper()
	return dumpRAFS(t, l.open(t), l.reader)
}

// optimize optimizes l and returns the result as an image of its own, with the blobs of l
// that it still needs.
func (l *loose) optimize(t testing.TB, o builder.OptimizeOptions) (*loose, *builder.Optimized) {
	t.Helper()
	tmp := t.TempDir()
	o.TempDir = tmp
	res, err := builder.Optimize(t.Context(), l.source(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := res.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
	out := &loose{blobs: map[string]*counted{}}
	if out.boot, err = os.ReadFile(res.BootstrapPath); err != nil {
		t.Fatal(err)
	}
	for _, b := range res.Blobs {
		id := b.ID
		if res.Prefetch != nil && id == res.Prefetch.Descriptor.Digest.Encoded() {
			b, err := os.ReadFile(res.Prefetch.Path)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != id {
				t.Errorf("prefetch blob has sha256 %s, is named %s", got, id)
			}
			out.blobs[id] = &counted{data: b}
			continue
		}
		if l.blobs[id] == nil {
			t.Fatalf("the bootstrap refers to blob %s, which the source has not", id)
		}
		out.blobs[id] = &counted{data: l.blobs[id].data}
		if meta, separate := b.MetaBlob(); separate {
			out.blobs[meta.ID] = &counted{data: l.blobs[meta.ID].data}
		}
	}
	return out, res
}

// write puts the image into files.
func (l *loose) write(t testing.TB) (bootstrap, blobDir string) {
	t.Helper()
	dir := t.TempDir()
	bootstrap, blobDir = filepath.Join(dir, "image.boot"), filepath.Join(dir, "blobs")
	if err := os.Mkdir(blobDir, 0o700); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{bootstrap: l.boot}
	for id, b := range l.blobs {
		files[filepath.Join(blobDir, id)] = b.data
	}
	for name, b := range files {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return bootstrap, blobDir
}

// judge asks everybody who reads such images, and compares the trees with the fixtures'.
func (l *loose) judge(t *testing.T) {
	t.Helper()
	checkExpected(t, l.dump(t), readExpected(t))
	l.judgeCheck(t)
	if !asksOthers(t) {
		return
	}
	bootstrap, blobDir := l.write(t)
	img := l.open(t)
	batch := false
	for _, b := range img.Blobs {
		batch = batch || b.Features&rafs.FeatureBatch != 0
	}
	t.Run("nydus-image", func(t *testing.T) {
		if batch {
			t.Skip("skipped: nydus-image 2.2.0 knows no batch blobs")
		}
		out, err := exec.Command(testenv.Tool(t, "nydus-image"), "check", "--bootstrap", bootstrap, "--blob-dir", blobDir).CombinedOutput()
		if err != nil {
			t.Errorf("nydus-image check: %v\n%s", err, out)
		}
	})
	t.Run("nydusd", func(t *testing.T) {
		if batch {
			t.Skip("skipped: nydusd 2.2.0 knows no batch blobs")
		}
		// It shows mtime 0 as the time of the mount, and hard links as files of their own.
		compareTree(t, testenv.MountNydusd(t, bootstrap, blobDir), "mtime", "not the same inode")
	})
	if img.Version == rafs.V5 {
		return
	}
	t.Run("kernel", func(t *testing.T) {
		compareTree(t, testenv.MountEROFS(t, bootstrap, l.expand(t, img)...))
	})
	t.Run("fsck.erofs", func(t *testing.T) {
		args := []string{"--extract"}
		for _, d := range l.expand(t, img) {
			args = append(args, "--device="+d)
		}
		out, err := exec.Command(testenv.Tool(t, "fsck.erofs"), append(args, bootstrap)...).CombinedOutput()
		if err != nil {
			t.Errorf("fsck.erofs: %v\n%.2000s", err, out)
		}
	})
}

// judgeCheck asks our own checker.
func (l *loose) judgeCheck(t *testing.T) {
	t.Helper()
	open := func(b rafs.Blob) (io.ReaderAt, error) { return l.blobs[b.ID], nil }
	if _, err := rafs.Check(t.Context(), bytes.NewReader(l.boot), int64(len(l.boot)), open, rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
}

// expand writes the device file of every blob.
func (l *loose) expand(t testing.TB, img *rafs.Image) []string {
	t.Helper()
	var devices []string
	for i, b := range img.Blobs {
		r, err := l.reader(b)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(t.TempDir(), fmt.Sprint(i)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		err = img.ExpandBlob(t.Context(), i, r, f)
		if cerr := f.Close(); err != nil || cerr != nil {
			t.Fatal(err, cerr)
		}
		devices = append(devices, f.Name())
	}
	return devices
}

// compareTree runs the fixtures' comparer on a mounted tree; lines with one of tolerated are
// no difference.
func compareTree(t *testing.T, root string, tolerated ...string) {
	t.Helper()
	fixtures := testenv.Fixtures(t)
	out, err := exec.Command(testenv.Tool(t, "python3"), filepath.Join(fixtures, "cmp_tree.py"), root, filepath.Join(fixtures, "expected.json")).CombinedOutput()
	if err == nil {
		return
	}
	if len(tolerated) == 0 || !strings.Contains(string(out), " differences") {
		t.Errorf("cmp_tree.py: %v\n%.2000s", err, out)
		return
	}
	for line := range strings.Lines(string(out)) {
		known := slices.ContainsFunc(tolerated, func(s string) bool { return strings.Contains(line, s) })
		if !known && !strings.HasSuffix(line, " differences\n") {
			t.Errorf("cmp_tree.py: %s", line)
		}
	}
}

// TestOptimizeFixtures optimizes images of the real nydus-image for many lists.
func TestOptimizeFixtures(t *testing.T) {
	entries := readExpected(t)
	lists := map[string]*persist.List{
		"all files": everything(entries),
		"one file":  listOf("/app/main"),
		"awkward":   fixtureList(t, entries),
		"empty":     {},
		"missing":   listOf("/nowhere", "/app/nothing"),
		"patterns":  typed("/app/*", "/**/tool*", "/[nothing", "/bin/**"),
	}
	for _, name := range nydusFixtures {
		t.Run(name, func(t *testing.T) {
			src := nydusFixture(t, name)
			want := src.dump(t)
			for listName, l := range lists {
				for _, recompress := range []bool{false, true} {
					if recompress && (listName != "awkward" || raceEnabled && name != "v6-zstd") {
						continue
					}
					t.Run(fmt.Sprintf("%s, recompress %v", listName, recompress), func(t *testing.T) {
						out, res := src.optimize(t, builder.OptimizeOptions{List: l, Recompress: recompress})
						st := res.Stats
						t.Logf("%+v", st)
						if diff := cmp.Diff(want, out.dump(t)); diff != "" {
							t.Errorf("tree (-source +optimized):\n%s", diff)
						}
						if empty := listName == "empty" || listName == "missing"; (res.Prefetch == nil) != empty || (st.Prefetch.Chunks == 0) != empty {
							t.Errorf("prefetch blob %v, %d chunks", res.Prefetch, st.Prefetch.Chunks)
						}
						if !raceEnabled && (!testing.Short() || listName == "awkward") {
							out.judge(t)
						}
					})
				}
			}
		})
	}
}

// TestOptimizeReadsPrefetchBlobOnly reads the listed files of an optimized image and counts
// what is read of its blobs.
func TestOptimizeReadsPrefetchBlobOnly(t *testing.T) {
	t.Parallel()
	for _, name := range nydusFixtures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			src := nydusFixture(t, name)
			paths := []string{"/app/main", "/app/dup-in-other-layer", "/bin/tool"}
			out, res := src.optimize(t, builder.OptimizeOptions{List: listOf(paths...)})
			prefetch := res.Prefetch.Descriptor.Digest.Encoded()
			for id := range out.blobs {
				out.blobs[id].reads.Store(0)
			}
			fsys := out.open(t).FS(out.reader)
			for _, p := range paths {
				if _, err := fsys.ReadFile(p[1:]); err != nil {
					t.Fatal(err)
				}
			}
			for id, b := range out.blobs {
				if n := b.reads.Load(); (n > 0) != (id == prefetch) {
					t.Errorf("%d reads of blob %s, the prefetch blob is %s", n, id, prefetch)
				}
			}
			if len(out.blobs) < 2 {
				t.Errorf("%d blobs: nothing is left to be not read", len(out.blobs))
			}
		})
	}
}

// TestOptimizeReadsOnlyChunksNeeded counts what optimizing reads of the source's blobs.
func TestOptimizeReadsOnlyChunksNeeded(t *testing.T) {
	t.Parallel()
	src := nydusFixture(t, "v6-zstd")
	_, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/app/main")})
	var read, total int64
	for _, b := range src.blobs {
		read += b.bytes.Load()
		total += int64(len(b.data))
	}
	// Each chunk is read twice: to verify it, and to copy it.
	if most := 2 * res.Prefetch.Descriptor.Size; read == 0 || read > most {
		t.Errorf("%d bytes read of %d, want at most %d", read, total, most)
	}
}

// TestOptimizeAgain optimizes an optimized image: the same list gives the same bytes, and a
// prefetch blob that nothing refers to any more is gone.
func TestOptimizeAgain(t *testing.T) {
	t.Parallel()
	for _, name := range nydusFixtures {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			src := nydusFixture(t, name)
			once, first := src.optimize(t, builder.OptimizeOptions{List: listOf("/app/main")})
			twice, second := once.optimize(t, builder.OptimizeOptions{List: listOf("/app/main")})
			if !bytes.Equal(once.boot, twice.boot) || second.Stats.Dropped != 1 {
				t.Errorf("the same list gives another image; %d blobs dropped", second.Stats.Dropped)
			}
			more, third := once.optimize(t, builder.OptimizeOptions{List: listOf("/bin/tool", "/app/main")})
			if third.Stats.Dropped < 1 || more.blobs[first.Prefetch.Descriptor.Digest.Encoded()] != nil {
				t.Errorf("the old prefetch blob stays: %v", third.Blobs)
			}
			other, _ := once.optimize(t, builder.OptimizeOptions{List: listOf("/bin/tool")})
			if other.blobs[first.Prefetch.Descriptor.Digest.Encoded()] == nil {
				t.Error("the old prefetch blob is gone, and files were in it")
			}
			for _, l := range []*loose{more, other} {
				l.judgeCheck(t)
				checkExpected(t, l.dump(t), readExpected(t))
			}
		})
	}
}

// TestOptimizeDeterminism holds that neither workers nor repetition change a byte.
func TestOptimizeDeterminism(t *testing.T) {
	t.Parallel()
	list := everything(readExpected(t))
	if raceEnabled { // slow: the strongest level
		list = listOf("/app/main", "/bin/tool", "/app/dup-in-other-layer")
	}
	for _, recompress := range []bool{false, true} {
		var boot []byte
		var id string
		for _, workers := range []int{1, 8, 3, 1} {
			src := nydusFixture(t, "v6-zstd-batch")
			out, res := src.optimize(t, builder.OptimizeOptions{List: list, Workers: workers, Recompress: recompress})
			if boot == nil {
				boot, id = out.boot, res.Prefetch.Descriptor.Digest.Encoded()
			}
			if !bytes.Equal(boot, out.boot) || id != res.Prefetch.Descriptor.Digest.Encoded() {
				t.Errorf("%d workers, recompress %v: another image", workers, recompress)
			}
		}
	}
}

// TestOptimizeStats holds the summary: what was listed, found, repeated and missing.
func TestOptimizeStats(t *testing.T) {
	t.Parallel()
	src := nydusFixture(t, "v6-zstd")
	l := typed("/app/main", "/app/main-link", "/app/main", "/app", "/nowhere", "relative", "/app/dup*", "/no/*")
	_, res := src.optimize(t, builder.OptimizeOptions{List: l})
	st := res.Stats
	got := []any{st.Prefetch.Listed, st.Prefetch.Files, st.Prefetch.Repeated, st.Prefetch.NotRegular, st.Prefetch.Missing, st.Prefetch.Patterns, st.Prefetch.Directories, st.MissingPaths, st.VerifiedChunks == st.Prefetch.Chunks}
	want := []any{8, 2, 4, 0, 3, 1, 1, []string{"/nowhere", "relative", "/no/*"}, true}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stats (-want +got):\n%s\n%+v", diff, st)
	}
	// What an engine recorded is a path, whatever it looks like.
	l.Engine = "fanotify"
	if _, res := src.optimize(t, builder.OptimizeOptions{List: l}); res.Stats.Prefetch.Patterns != 0 || res.Stats.Prefetch.Missing != 4 {
		t.Errorf("recorded list: %+v", res.Stats)
	}
}

// TestOptimizeRanges holds that only touched chunks are copied.
func TestOptimizeRanges(t *testing.T) {
	t.Parallel()
	src := nydusFixture(t, "v6-zstd-sha256-64k")
	const chunk = 64 << 10
	for name, test := range map[string]struct {
		ranges []trace.Range
		want   int
	}{
		"nil":         {nil, 5},
		"none":        {[]trace.Range{}, 0},
		"first byte":  {[]trace.Range{{Offset: 0, Length: 1}}, 1},
		"whole chunk": {[]trace.Range{{Offset: chunk, Length: chunk}}, 1},
		"edges":       {[]trace.Range{{Offset: chunk - 1, Length: 2}}, 2},
		"beyond":      {[]trace.Range{{Offset: 1 << 40, Length: 1 << 40}}, 0},
	} {
		l := &persist.List{}
		l.Accesses = []trace.Access{{Path: "/app/main", Ranges: test.ranges}}
		_, res := src.optimize(t, builder.OptimizeOptions{List: l})
		if got := res.Stats.Prefetch.Chunks; got != test.want {
			t.Errorf("%s: %d chunks, want %d", name, got, test.want)
		}
	}
}
