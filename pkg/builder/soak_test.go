package builder_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/persist"
	"github.com/headstart-oci/headstart/pkg/rafs"
	"github.com/headstart-oci/headstart/pkg/trace"
)

// TestRandomImages builds and optimizes a few random images; see [attack].
func TestRandomImages(t *testing.T) {
	testenv.Root(t)
	n := uint64(10)
	if testing.Short() || raceEnabled {
		n = 3
	}
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { attack(t, seed) })
	}
}

// TestSoakRandomImages goes on with other seeds for the duration in SOAK, from the seed in SOAK_SEED or 1000. It stops at the
// first image that is wrong: -run 'TestSoakRandomImages/SEED$' with SOAK_SEED=SEED makes that one again.
func TestSoakRandomImages(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK says no duration: make soak")
	}
	seed := uint64(1000)
	if s := os.Getenv("SOAK_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatalf("SOAK_SEED=%s: %v", s, err)
		}
	}
	first := seed
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { attack(t, seed) })
	}
	t.Logf("seeds %d to %d", first, seed-1)
}

// randomOptions returns options that fit together.
func randomOptions(r *rand.Rand) builder.Options {
	o := builder.Options{
		FSVersion:  []rafs.Version{rafs.V5, rafs.V6, rafs.V6}[r.IntN(3)],
		Compressor: []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd, rafs.CompressorZstd}[r.IntN(4)],
		Digester:   []rafs.Digester{rafs.DigesterBLAKE3, rafs.DigesterSHA256}[r.IntN(2)],
		ChunkSize:  uint32(1) << []int{12, 12, 12, 13, 16, 16, 20, 24}[r.IntN(8)],
		Workers:    1 + r.IntN(3), NoRecompress: r.IntN(2) == 0, VerifyData: true,
	}
	if (o.FSVersion == rafs.V5 || o.ChunkSize < 1<<24) && r.IntN(8) == 0 {
		o.Compressor = rafs.CompressorGzip
	}
	if o.FSVersion == rafs.V6 && r.IntN(4) == 0 {
		o.BatchSize = min(o.ChunkSize, 1<<(12+r.IntN(9)))
	}
	if o.FSVersion == rafs.V6 && r.IntN(8) == 0 {
		o.PrefetchBatchSize = 1 << (12 + r.IntN(9))
	}
	return o
}

// attack makes the random image of a seed with random options, converts it, packs and merges it, gives it a prefetch blob
// for random lists in all forms, and asks every judge of each.
func attack(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 5))
	o := randomOptions(r)
	g := newRandomImage(r, int(o.ChunkSize))
	g.lowerLinks = r.IntN(2) == 0
	for range 1 + r.IntN(8) {
		g.layer(t)
	}
	t.Logf("%d layers, %d names, %+v", len(g.layers), len(g.tree), o)
	src := g.source(t)
	if r.IntN(2) == 0 {
		l, _ := g.list(r)
		o.List = l
	}
	res := convert(t, src, o)
	checkOCI(t, res)
	img := built(t, res)
	t.Run("convert", func(t *testing.T) { img.judgeRandom(t, g, r, "nydusd") })
	if !g.lowerLinks { // no layer can say such links alone
		t.Run("pack and merge", func(t *testing.T) { g.packed(t, o).judgeRandom(t, g, r, "nydusd") })
	}
	if r.IntN(3) == 0 {
		t.Run("of nydus-image", func(t *testing.T) { g.optimizeNydus(t, r) })
	}
	for i := range 2 {
		l, whole := g.list(r)
		text, form := g.write(t, r, l)
		read, err := persist.ReadAny(strings.NewReader(text))
		if err != nil {
			t.Fatalf("list in form %s: %v\n%s", form, err, text)
		}
		oo := builder.OptimizeOptions{List: read, Workers: 1 + r.IntN(3), Recompress: r.IntN(3) == 0}
		if o.FSVersion == rafs.V6 && r.IntN(8) == 0 {
			oo.BatchSize = 1 << (12 + r.IntN(9))
		}
		out, opt := img.optimize(t, oo)
		again, _ := img.optimize(t, builder.OptimizeOptions{List: read, Workers: 1, Recompress: oo.Recompress, BatchSize: oo.BatchSize})
		if !bytes.Equal(out.boot, again.boot) {
			t.Error("optimized again with one worker: another bootstrap")
		}
		t.Run(fmt.Sprintf("optimize %d, %s", i, form), func(t *testing.T) {
			out.readListed(t, g, whole, form, opt)
			out.judgeRandom(t, g, r, "nydusd")
		})
		img = out
	}
}

// packed packs the layers and merges them.
func (g *randomImage) packed(t *testing.T, o builder.Options) *loose {
	t.Helper()
	out := &loose{blobs: map[string]*counted{}}
	var layers []builder.PackedLayer
	for _, l := range g.layers {
		var b bytes.Buffer
		if _, err := builder.PackLayer(t.Context(), &b, bytes.NewReader(l), o); err != nil {
			t.Fatal(err)
		}
		d := digest.FromBytes(b.Bytes())
		out.blobs[d.Encoded()] = &counted{data: b.Bytes()}
		layers = append(layers, builder.PackedLayer{Digest: d, Blob: bytes.NewReader(b.Bytes()), Size: int64(b.Len())})
	}
	var boot bytes.Buffer
	if _, err := builder.MergeLayers(t.Context(), &boot, layers, builder.MergeOptions{Prefetch: []string{"/"}}); err != nil {
		t.Fatal(err)
	}
	out.boot = boot.Bytes()
	return out
}

// list returns a random list: files by any of their names, through symlinks, with and without ranges, repeated, missing,
// directories. whole has the files of which every byte is listed.
func (g *randomImage) list(r *rand.Rand) (l *persist.List, whole []string) {
	l = listOf()
	files := g.files()
	r.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	for _, p := range files[:r.IntN(len(files)+1)] {
		a := trace.Access{Path: "/" + p, How: trace.Opened}
		switch size := int64(len(g.tree[p].data)); r.IntN(5) {
		case 0:
			a.Ranges = []trace.Range{{Offset: r.Int64N(size), Length: 1 + r.Int64N(size)}}
		case 1:
			a.Ranges = []trace.Range{{Offset: 0, Length: 1}}
			if size > 1 {
				a.Ranges = append(a.Ranges, trace.Range{Offset: size - 1, Length: 1})
			}
		default:
			whole = append(whole, p)
		}
		l.Accesses = append(l.Accesses, a)
		switch r.IntN(12) {
		case 0:
			l.Accesses = append(l.Accesses, l.Accesses[r.IntN(len(l.Accesses))])
		case 1:
			l.Accesses = append(l.Accesses, trace.Access{Path: "/missing/" + p, How: trace.Opened})
		case 2:
			all := g.paths()
			l.Accesses = append(l.Accesses, trace.Access{Path: "/" + all[r.IntN(len(all))], How: trace.Opened})
		}
	}
	return l, whole
}

// write writes l in one of the forms that optimize reads; paths say nothing of ranges.
func (g *randomImage) write(t *testing.T, r *rand.Rand, l *persist.List) (text, form string) {
	t.Helper()
	form = []string{"list", "json", "paths"}[r.IntN(3)]
	for _, a := range l.Accesses {
		if !utf8.ValidString(a.Path) || strings.Contains(a.Path, "\n") {
			form = "list" // the others cannot say it
		}
	}
	var b strings.Builder
	switch form {
	case "list":
		l.Grade = persist.GradeRange
		if _, err := l.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
	case "json":
		type entry struct {
			Path   string     `json:"path"`
			Ranges [][2]int64 `json:"ranges,omitempty"`
		}
		doc := struct {
			Version string  `json:"version"`
			Files   []entry `json:"files"`
		}{Version: "v1"}
		for _, a := range l.Accesses {
			e := entry{Path: a.Path}
			for _, s := range a.Ranges {
				e.Ranges = append(e.Ranges, [2]int64{s.Offset, s.Length})
			}
			doc.Files = append(doc.Files, e)
		}
		if err := json.NewEncoder(&b).Encode(doc); err != nil {
			t.Fatal(err)
		}
	case "paths":
		for _, a := range l.Accesses {
			fmt.Fprintln(&b, a.Path)
		}
	}
	return b.String(), form
}

// readListed reads the files of which every byte is listed, and counts what is read of the blobs.
func (l *loose) readListed(t *testing.T, g *randomImage, whole []string, form string, res *builder.Optimized) {
	t.Helper()
	prefetch := ""
	if res.Prefetch != nil {
		prefetch = res.Prefetch.Descriptor.Digest.Encoded()
	}
	for _, b := range l.blobs {
		b.reads.Store(0)
	}
	img := l.open(t)
	fsys := img.FS(l.reader)
	for _, p := range whole {
		var b bytes.Buffer
		if err := fsys.CopyFile(t.Context(), &b, img.Lookup(p)); err != nil {
			t.Fatal(err)
		}
		if b.String() != g.tree[p].data {
			t.Errorf("%q has other bytes", p)
		}
	}
	for id, b := range l.blobs {
		if n := b.reads.Load(); n > 0 && id != prefetch {
			t.Errorf("%s: reading listed files reads %d times of blob %s; the prefetch blob is %q", form, n, id, prefetch)
		}
	}
}

// optimizeNydus has the real nydus-image make an image of g's tree, and optimizes that.
func (g *randomImage) optimizeNydus(t *testing.T, r *rand.Rand) {
	t.Helper()
	o := builder.Options{FSVersion: rafs.V6}
	v6 := built(t, convert(t, g.source(t), o))
	bootstrap, _ := v6.write(t)
	tree := testenv.MountEROFS(t, bootstrap, v6.expand(t, v6.open(t))...)
	dir := t.TempDir()
	boot, blobs := dir+"/image.boot", dir+"/blobs"
	if err := os.Mkdir(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{
		"create", "--type", "directory", "--bootstrap", boot, "--blob-dir", blobs, "--whiteout-spec", "none",
		"--compressor", []string{"none", "lz4_block", "zstd"}[r.IntN(3)], "--digester", []string{"blake3", "sha256"}[r.IntN(2)],
		"--chunk-size", fmt.Sprintf("%#x", 1<<[]int{12, 16, 20, 24}[r.IntN(4)]), "--fs-version", fmt.Sprint(5 + r.IntN(2)),
	}
	if args[len(args)-1] == "5" && r.IntN(2) == 0 {
		args = append(args, "--aligned-chunk")
	}
	if out, err := exec.Command(testenv.Tool(t, "nydus-image"), append(args, tree)...).CombinedOutput(); err != nil {
		t.Fatalf("nydus-image %q: %v\n%.2000s", args, err, out)
	}
	src := looseImage(t, boot, blobs)
	l, whole := g.list(r)
	out, res := src.optimize(t, builder.OptimizeOptions{List: l, Recompress: r.IntN(3) == 0})
	out.readListed(t, g, whole, fmt.Sprintf("%q", args), res)
	// What nydus-image has placed so that its own nydusd misreads it stays so: nydusd is no judge.
	out.judgeRandom(t, g, r, "nydus-image")
}

// judgeRandom asks everybody who reads such an image whether it is g's; last is the last of them to be asked.
func (l *loose) judgeRandom(t *testing.T, g *randomImage, r *rand.Rand, last string) {
	t.Helper()
	want := g.want()
	compare := func(who string, got map[string]item, lax bool) {
		t.Helper()
		delete(got, "/")
		if lax { // nydusd shows second 0 as the time of the mount, and hard links as files of their own
			for p, w := range want {
				if it, ok := got[p]; ok {
					it.Link = w.Link
					if w.Mtime < 1e9 {
						it.Mtime = w.Mtime
					}
					got[p] = it
				}
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%.3000s", who, diff)
		}
	}
	compare("our reader", l.dump(t), false)
	l.judgeCheck(t)
	img := l.open(t)
	bootstrap, blobDir := l.write(t)
	if img.Version == rafs.V6 {
		devices := l.expand(t, img)
		root := testenv.MountEROFS(t, bootstrap, devices...)
		compare("the kernel", dumpDir(t, root), false)
		args := []string{"--extract"}
		for _, d := range devices {
			args = append(args, "--device="+d)
		}
		if out, err := exec.Command(testenv.Tool(t, "fsck.erofs"), append(args, bootstrap)...).CombinedOutput(); err != nil {
			t.Errorf("fsck.erofs: %v\n%.2000s", err, out)
		}
	}
	for _, b := range img.Blobs {
		if b.Features&rafs.FeatureBatch != 0 {
			return // nydus-image and nydusd 2.2.0 know no batches
		}
	}
	if out, err := exec.Command(testenv.Tool(t, "nydus-image"), "check", "--bootstrap", bootstrap, "--blob-dir", blobDir).CombinedOutput(); err != nil {
		t.Errorf("nydus-image check: %v\n%.2000s", err, out)
	}
	if last != "nydusd" {
		return
	}
	mount := testenv.MountNydusdPrefetching
	if slices.ContainsFunc(img.Blobs, func(b rafs.Blob) bool { return b.Compressor == rafs.CompressorGzip }) {
		mount = testenv.MountNydusd // it ends where it is to prefetch gzip chunks
	}
	root := mount(t, bootstrap, blobDir)
	compare("nydusd", dumpDir(t, root), true)
	g.readAtRandom(t, r, root)
}

// readAtRandom reads pieces of files, in any order, what is cached and what is not.
func (g *randomImage) readAtRandom(t *testing.T, r *rand.Rand, root string) {
	t.Helper()
	files := g.files()
	for range min(len(files)*4, 120) {
		p := files[r.IntN(len(files))]
		size := len(g.tree[p].data)
		off := r.IntN(size)
		buf := make([]byte, min(size-off, 1+r.IntN(4*g.chunk)))
		f, err := os.Open(root + "/" + p)
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // to ask nydusd again
		_, err = f.ReadAt(buf, int64(off))
		f.Close()
		if err != nil && !errors.Is(err, io.EOF) {
			t.Errorf("nydusd: read %d bytes at %d of %q: %v", len(buf), off, p, err)
			return
		}
		if !g.sameBytes(p, off, buf) {
			t.Errorf("nydusd gives other bytes for %d at %d of %q", len(buf), off, p)
			return
		}
	}
}
