package builder_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// What went wrong in nydus-image optimize, each in both versions of the format where it applies.
// O1 to O9 are items of the format reference's section 7, numbers issues of dragonflyoss/nydus.

// built is a converted image as loose files.
func built(t *testing.T, res *builder.Result) *loose {
	t.Helper()
	l := &loose{blobs: map[string]*counted{}}
	var err error
	if l.boot, err = os.ReadFile(res.BootstrapPath); err != nil {
		t.Fatal(err)
	}
	for _, f := range res.Blobs {
		b, err := os.ReadFile(f.Path)
		if err != nil {
			t.Fatal(err)
		}
		l.blobs[f.Descriptor.Digest.Encoded()] = &counted{data: b}
	}
	return l
}

// judgeTools asks nydus-image, nydusd and, of v6, the kernel, which must see the tree that we do.
func (l *loose) judgeTools(t *testing.T) {
	t.Helper()
	l.judgeCheck(t)
	if !asksOthers(t) {
		return
	}
	bootstrap, blobDir := l.write(t)
	out, err := exec.Command(testenv.Tool(t, "nydus-image"), "check", "--bootstrap", bootstrap, "--blob-dir", blobDir).CombinedOutput()
	if err != nil {
		t.Errorf("nydus-image check: %v\n%s", err, out)
	}
	if img := l.open(t); img.Version == rafs.V6 {
		want, got := l.dump(t), dumpDir(t, testenv.MountEROFS(t, bootstrap, l.expand(t, img)...))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("tree through the kernel (-ours +theirs):\n%.3000s", diff)
		}
	}
	want, got := l.dump(t), dumpDir(t, testenv.MountNydusd(t, bootstrap, blobDir))
	for _, tree := range []map[string]item{want, got} {
		for p, i := range tree { // nydusd shows mtime 0 as the time of the mount
			i.Mtime, i.Link = 0, ""
			tree[p] = i
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tree through nydusd (-ours +theirs):\n%.3000s", diff)
	}
}

// last returns the entry of the prefetch blob.
func last(t *testing.T, l *loose) rafs.Blob {
	t.Helper()
	blobs := l.open(t).Blobs
	return blobs[len(blobs)-1]
}

// TestOptimizeBlobEntry: table offset 0, records of the wrong size, the builder's chunk size and digester in place
// of the image's, features that the new blob has not (O1, O2, O4, O8; stale blob info, nydus#1755).
func TestOptimizeBlobEntry(t *testing.T) {
	t.Parallel()
	for _, name := range nydusFixtures {
		src := nydusFixture(t, name)
		out, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/app/main", "/bin/tool")})
		from, b := src.open(t), last(t, out)
		if b.ChunkSize != from.ChunkSize || b.Digester != from.Digester || b.ChunkCount != uint32(res.Stats.Prefetch.Chunks) ||
			b.CompressedSize != uint64(res.Prefetch.Descriptor.Size) {
			t.Errorf("%s: %+v", name, b)
		}
		if b.Features&(rafs.FeatureTOC|rafs.FeatureInlinedBootstrap|rafs.FeatureBatch|0x20) != 0 {
			t.Errorf("%s: features %#x are those of an old blob", name, b.Features)
		}
		if from.Version == rafs.V6 && (b.MetaOffset == 0 || b.MetaUncompressed != 16*uint64(b.ChunkCount) || b.MetaOffset >= b.CompressedSize) {
			t.Errorf("%s: table of %d bytes at %d for %d chunks", name, b.MetaUncompressed, b.MetaOffset, b.ChunkCount)
		}
		for i, old := range from.Blobs[:min(2, len(from.Blobs))] {
			got := out.open(t).Blobs[i]
			old.Features &^= rafs.FeatureInlinedBootstrap
			if got != old {
				t.Errorf("%s: blob %d is %+v, was %+v", name, i, got, old)
			}
		}
	}
}

// TestOptimizeSharedChunks: a path listed twice, equal chunks of several files stored once, a chunk that two inodes
// share, hard links, a file of equal chunks (O6, O7; nydus#1445, nydus#1755).
func TestOptimizeSharedChunks(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		one, two := string(noise(1, testChunk)), string(noise(2, testChunk))
		res := convert(t, tars(t, makeTar(t,
			reg("a", one+two), reg("b", two+one), reg("c", one+one+one), link("d", "a"), reg("e", one), reg("rest", string(noise(3, 3*testChunk))),
		)), o)
		src := built(t, res)
		want := src.dump(t)
		for name, test := range map[string]struct {
			list   []string
			chunks int
		}{
			"twice": {[]string{"/a", "/a", "/a"}, 2}, "equal": {[]string{"/e", "/c"}, 1}, "link": {[]string{"/d", "/a"}, 2},
			"crossed": {[]string{"/b", "/a"}, 2}, "all": {[]string{"/a", "/b", "/c", "/d", "/e", "/rest"}, 5},
		} {
			t.Run(name, func(t *testing.T) {
				out, res := src.optimize(t, builder.OptimizeOptions{List: listOf(test.list...)})
				if diff := cmp.Diff(want, out.dump(t)); diff != "" {
					t.Errorf("tree (-source +optimized):\n%s", diff)
				}
				// Chunks that nydusd would misread are stored a second time, and only then.
				if n := res.Stats.Prefetch.Chunks; n != test.chunks {
					t.Errorf("%d chunks, want %d", n, test.chunks)
				}
				out.judgeTools(t)
			})
		}
	})
}

// TestOptimizeEmptyList: nothing selected gave an image that nobody can open (O9).
func TestOptimizeEmptyList(t *testing.T) {
	testenv.Root(t)
	eachVersion(t, func(t *testing.T, o builder.Options) {
		src := built(t, convert(t, tars(t, makeTar(t, reg("a", "data"), reg("empty", ""), dir("d", 0o755), sym("l", "nowhere"))), o))
		for name, l := range map[string]*persist.List{
			"nil": nil, "empty": {}, "no data": listOf("/empty", "/d", "/l", "/missing"),
			"no range": {Trace: trace.Trace{Accesses: []trace.Access{{Path: "/a", Ranges: []trace.Range{}}}}},
		} {
			out, res := src.optimize(t, builder.OptimizeOptions{List: l})
			if res.Prefetch != nil || len(out.blobs) != 1 {
				t.Errorf("%s: prefetch blob %v, %d blobs", name, res.Prefetch, len(out.blobs))
			}
			out.judgeTools(t)
		}
		none := built(t, convert(t, tars(t, makeTar(t, dir("d", 0o755))), o))
		if _, res := none.optimize(t, builder.OptimizeOptions{List: listOf("/d")}); len(res.Blobs) != 0 {
			t.Errorf("an image without blobs has %v", res.Blobs)
		}
	})
}

// TestOptimizeMostBlobs: 253 blobs and a prefetch blob fill the table; with one more it is refused in words,
// unless the prefetch blob takes the place of another.
func TestOptimizeMostBlobs(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		for layers := 253; layers <= 254; layers++ {
			var list []([]byte)
			for i := range layers {
				list = append(list, makeTar(t, reg(fmt.Sprintf("f%d", i), fmt.Sprintf("content %d", i)), reg(fmt.Sprintf("g%d", i), fmt.Sprintf("more %d", i))))
			}
			src := built(t, convert(t, tars(t, list...), o))
			_, err := builder.Optimize(t.Context(), src.source(), builder.OptimizeOptions{List: listOf("/f7"), TempDir: t.TempDir()})
			switch {
			case layers == 253:
				out, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/f7")})
				if len(res.Blobs) != 254 {
					t.Errorf("%d blobs", len(res.Blobs))
				}
				out.judgeCheck(t)
			case !errors.Is(err, builder.ErrUnsupported) || !strings.Contains(err.Error(), "needs 255 blobs, the format counts 254"):
				t.Errorf("Optimize of 254 blobs = %v", err)
			default:
				if _, res := src.optimize(t, builder.OptimizeOptions{List: listOf("/f7", "/g7")}); len(res.Blobs) != 254 || res.Stats.Dropped != 1 {
					t.Errorf("%d blobs, %d dropped", len(res.Blobs), res.Stats.Dropped)
				}
			}
		}
	})
}

// TestOptimizeOCIRef optimizes an image over a plain gzip layer: its chunks do not stand alone.
func TestOptimizeOCIRef(t *testing.T) {
	testenv.Root(t)
	nydus := testenv.Tool(t, "nydus-image")
	work := t.TempDir()
	layer := filepath.Join(work, "layer.tar.gz")
	content := map[string]string{"a": strings.Repeat("some text ", 300_000), "b": string(noise(9, 100_000)), "c": "short"}
	var files []file
	for _, n := range []string{"a", "b", "c"} {
		files = append(files, reg(n, content[n]))
	}
	if err := os.WriteFile(layer, gz(t, makeTar(t, files...)), 0o600); err != nil {
		t.Fatal(err)
	}
	blobs := filepath.Join(work, "blobs")
	if err := os.Mkdir(blobs, 0o700); err != nil {
		t.Fatal(err)
	}
	boot := filepath.Join(work, "image.boot")
	if out, err := exec.Command(nydus, "create", "-t", "targz-ref", "--bootstrap", boot, "--blob-dir", blobs, layer).CombinedOutput(); err != nil {
		t.Fatalf("nydus-image create: %v\n%s", err, out)
	}
	src := looseImage(t, boot, blobs)
	b, err := os.ReadFile(layer)
	if err != nil {
		t.Fatal(err)
	}
	src.blobs[src.open(t).Blobs[0].ID] = &counted{data: b}
	want := src.dump(t)
	for _, paths := range [][]string{{"/c"}, {"/b", "/a"}, {"/a", "/b", "/c"}} {
		out, res := src.optimize(t, builder.OptimizeOptions{List: listOf(paths...)})
		if diff := cmp.Diff(want, out.dump(t)); diff != "" {
			t.Errorf("%q: tree (-source +optimized):\n%s", paths, diff)
		}
		if res.Stats.Dropped == 1 != (len(paths) == 3) {
			t.Errorf("%q: %d blobs dropped", paths, res.Stats.Dropped)
		}
		bootstrap, blobDir := out.write(t)
		if text, err := exec.Command(nydus, "check", "--bootstrap", bootstrap, "--blob-dir", blobDir).CombinedOutput(); err != nil {
			t.Errorf("%q: nydus-image check: %v\n%s", paths, err, text)
		}
		// Once more: the source has blobs of two compressors then.
		again, _ := out.optimize(t, builder.OptimizeOptions{List: listOf("/a", "/c")})
		if diff := cmp.Diff(want, again.dump(t)); diff != "" {
			t.Errorf("%q, again: tree (-source +optimized):\n%s", paths, diff)
		}
	}
}

// TestOptimizeFullDisk optimizes into a file system that is too small.
func TestOptimizeFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		testenv.Kernel(t, "tmpfs mounts", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	src := built(t, convert(t, tars(t, makeTar(t, reg("a", string(noise(1, 3<<20))))), builder.DefaultOptions()))
	res, err := builder.Optimize(t.Context(), src.source(), builder.OptimizeOptions{List: listOf("/a"), TempDir: dir})
	if res != nil || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "prefetch blob: ") {
		t.Errorf("Optimize = %v, %v; want %v", res, err, unix.ENOSPC)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestOptimizeDamagedChunk: a chunk that is not what its digest says gets into no blob, at whatever place it is damaged.
func TestOptimizeDamagedChunk(t *testing.T) {
	t.Parallel()
	for _, name := range nydusFixtures {
		src := nydusFixture(t, name)
		img := src.open(t)
		c := img.Lookup("app/main").Chunks[0]
		id := img.Blobs[c.Blob].ID
		good := src.blobs[id].data
		for _, at := range []uint64{0, uint64(c.CompressedSize) / 2, uint64(c.CompressedSize) - 1} {
			bad := slices.Clone(good)
			bad[c.CompressedOffset+at] ^= 0x20
			src.blobs[id] = &counted{data: bad}
			res, err := builder.Optimize(t.Context(), src.source(), builder.OptimizeOptions{List: listOf("/app/main"), TempDir: t.TempDir()})
			if err == nil || res != nil {
				t.Errorf("%s: byte %d: %v", name, at, err)
			} else if !errors.Is(err, rafs.ErrDigest) && !errors.Is(err, rafs.ErrInvalid) {
				t.Errorf("%s: byte %d: %v, want ErrDigest or ErrInvalid", name, at, err)
			}
		}
		src.blobs[id] = &counted{data: good}
	}
}

// TestOptimizeCancel ends soon and leaves nothing.
func TestOptimizeCancel(t *testing.T) {
	t.Parallel()
	src := nydusFixture(t, "v6-zstd")
	for _, stage := range []builder.Stage{builder.StagePrefetch, builder.StageBootstrap, builder.StageVerify} {
		ctx, cancel := context.WithCancel(t.Context())
		tmp := t.TempDir()
		res, err := builder.Optimize(ctx, src.source(), builder.OptimizeOptions{
			List: listOf("/app/main", "/bin/tool"), TempDir: tmp,
			Progress: func(e builder.Event) {
				if e.Stage == stage {
					cancel()
				}
			},
		})
		cancel()
		if res != nil || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, %v", stage, res, err)
		}
		if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", stage, left, err)
		}
	}
	boot := bytes.Clone(src.boot)
	boot[1024] ^= 1
	bad := src.source()
	bad.Bootstrap = bytes.NewReader(boot)
	if _, err := builder.Optimize(t.Context(), bad, builder.OptimizeOptions{}); !errors.Is(err, rafs.ErrInvalid) {
		t.Errorf("damaged bootstrap: %v", err)
	}
}
