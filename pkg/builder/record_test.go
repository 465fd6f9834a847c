package builder_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/pkg/builder"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// reused is layer l as a conversion finds it that has r from an earlier one: its own bytes
// must not be asked for.
func reused(t *testing.T, l builder.Layer, r builder.Record, img *rafs.Image) builder.Layer {
	t.Helper()
	l.Open = func(context.Context) (io.ReadCloser, error) {
		t.Error("a layer with a record was read")
		return nil, errors.New("not there")
	}
	l.Record = func(context.Context) (io.ReadCloser, error) { return os.Open(r.File.Path) }
	if r.Blob != nil {
		l.Stored = &builder.StoredBlob{Descriptor: r.Blob.Descriptor, Open: openPath(r.Blob.Path)}
		for _, b := range img.Blobs {
			if b.ID == r.Blob.Descriptor.Digest.Encoded() {
				l.Stored.Blob = b
			}
		}
	}
	return l
}

func openPath(path string) func(context.Context) (io.ReaderAt, error) {
	return func(context.Context) (io.ReaderAt, error) { return os.Open(path) }
}

// TestRecords converts random stacks of layers again with the records of the first time in
// place of some layers or all: the image is the same, byte for byte.
func TestRecords(t *testing.T) {
	t.Parallel()
	for seed := range uint64(seeds()) {
		g := &stackGen{Rand: rand.New(rand.NewPCG(seed, 9)), rules: stackRules{again: true, dirXattrs: true, lowerLinks: true, parents: seed%2 == 0, opaque: seed%2 == 0}}
		layers := g.generate(t)
		o := builder.DefaultOptions()
		o.Records, o.TempDir = true, t.TempDir()
		if seed%2 == 1 {
			o.BatchSize, o.PrefetchBatchSize = 1<<14, 1<<15
		}
		first, err := builder.Convert(t.Context(), tars(t, layers...), o)
		if errors.Is(err, builder.ErrInvalid) {
			continue // as unpacking it is
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(first.Records) != len(layers) {
			t.Fatalf("seed %d: %d records of %d layers", seed, len(first.Records), len(layers))
		}
		src := tars(t, layers...)
		for i, r := range first.Records {
			if r.Layer != i || r.Key != builder.RecordKey(src.Layers[i].DiffID, o) {
				t.Errorf("seed %d: record %d = %+v", seed, i, r)
			}
			if seed%3 == 0 || g.IntN(2) == 0 {
				src.Layers[i] = reused(t, src.Layers[i], r, openImage(t, first))
			}
		}
		var paths []string
		for _, n := range g.lower {
			paths = append(paths, "/"+n)
		}
		o.List = listOf(paths...)
		again := convert(t, src, o)
		whole := convert(t, tars(t, layers...), o)
		if diff := cmp.Diff(string(whole.Manifest), string(again.Manifest)); diff != "" {
			t.Errorf("seed %d: with records the manifest differs:\n%s", seed, diff)
		}
		if again.Stats.LayersReused == 0 && seed%3 == 0 {
			t.Errorf("seed %d: nothing was reused", seed)
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestBadRecords refuses records of another layer, with other options, damaged or with another blob.
func TestBadRecords(t *testing.T) {
	one, two := makeTar(t, reg("a", chunked("abc"))), makeTar(t, reg("b", "2"))
	o := builder.DefaultOptions()
	o.Records = true
	first := convert(t, tars(t, one, two), o)
	img := openImage(t, first)
	record, err := os.ReadFile(first.Records[0].File.Path)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := os.ReadFile(first.Records[0].Blob.Path)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(l *builder.Layer, o *builder.Options){
		"another layer": func(l *builder.Layer, _ *builder.Options) {
			l.Record = func(context.Context) (io.ReadCloser, error) { return os.Open(first.Records[1].File.Path) }
		},
		"other options": func(_ *builder.Layer, o *builder.Options) { o.ChunkSize = 1 << 16 },
		"cut off": func(l *builder.Layer, _ *builder.Options) {
			l.Record = func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(record[:len(record)/2])), nil
			}
		},
		"no record": func(l *builder.Layer, _ *builder.Options) {
			l.Record = func(context.Context) (io.ReadCloser, error) { return nil, os.ErrNotExist }
		},
		"no blob": func(l *builder.Layer, _ *builder.Options) { l.Stored = nil },
		"a blob with another table": func(l *builder.Layer, _ *builder.Options) {
			bad := bytes.Clone(blob)
			b := l.Stored.Blob
			bad[b.MetaOffset+b.MetaCompressed] ^= 1 // the table's header
			l.Stored.Open = func(context.Context) (io.ReaderAt, error) { return bytes.NewReader(bad), nil }
		},
		"a blob that is gone": func(l *builder.Layer, _ *builder.Options) {
			l.Stored.Open = func(context.Context) (io.ReaderAt, error) { return nil, os.ErrNotExist }
		},
		"a blob that cannot be read": func(l *builder.Layer, _ *builder.Options) {
			l.Stored.Open = func(context.Context) (io.ReaderAt, error) { return brokenReader{}, nil }
		},
		"a blob that is cut off": func(l *builder.Layer, _ *builder.Options) {
			l.Stored.Open = func(context.Context) (io.ReaderAt, error) { return bytes.NewReader(blob[:1]), nil }
		},
		"a chunk of other data": func(l *builder.Layer, o *builder.Options) {
			o.List = listOf("/a")
			bad := bytes.Clone(blob)
			bad[0] ^= 1
			l.Stored.Open = func(context.Context) (io.ReaderAt, error) { return bytes.NewReader(bad), nil }
		},
		"a blob of other data": func(l *builder.Layer, o *builder.Options) {
			o.VerifyData = true
			bad := bytes.Clone(blob)
			bad[0] ^= 1
			l.Stored.Open = func(context.Context) (io.ReaderAt, error) { return bytes.NewReader(bad), nil }
		},
	} {
		src := tars(t, one, two)
		src.Layers[0] = reused(t, src.Layers[0], first.Records[0], img)
		o := o
		o.TempDir = t.TempDir()
		change(&src.Layers[0], &o)
		if res, err := builder.Convert(t.Context(), src, o); !errors.Is(err, builder.ErrReuse) || res != nil {
			t.Errorf("%s: Convert = %v, %v, want ErrReuse", name, res, err)
		}
		if left, _ := os.ReadDir(o.TempDir); len(left) != 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
}

var errBroken = errors.New("broken")

// brokenReader cannot be read.
type brokenReader struct{}

func (brokenReader) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

// TestFaultsBesideRecords has other things fail than the record that is used: to go without it is no remedy.
func TestFaultsBesideRecords(t *testing.T) {
	one, two := makeTar(t, reg("a", chunked("abc"))), makeTar(t, reg("b", "2"))
	o := builder.DefaultOptions()
	o.Records = true
	first := convert(t, tars(t, one, two), o)
	img := openImage(t, first)
	bad := bytes.Clone(two)
	bad[len(bad)/4] ^= 1
	for name, open := range map[string]func(context.Context) (io.ReadCloser, error){
		"a layer that is not there": func(context.Context) (io.ReadCloser, error) { return nil, errBroken },
		"a layer that cannot be read": func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(io.NewSectionReader(brokenReader{}, 0, 512)), nil
		},
		"a layer that is not what it is": func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(bad)), nil },
	} {
		src := tars(t, one, two)
		src.Layers[0] = reused(t, src.Layers[0], first.Records[0], img)
		src.Layers[1].Open = open
		o := o
		o.TempDir = t.TempDir()
		if res, err := builder.Convert(t.Context(), src, o); err == nil || res != nil || errors.Is(err, builder.ErrReuse) {
			t.Errorf("%s: Convert = %v, %v, want an error that is not ErrReuse", name, res, err)
		}
	}
}

// dictOf makes a dictionary of a result.
func dictOf(t *testing.T, res *builder.Result) *builder.Dict {
	t.Helper()
	d := &builder.Dict{ID: res.ManifestDescriptor.Digest.String(), Image: openImage(t, res)}
	for i, f := range res.Blobs {
		d.Blobs = append(d.Blobs, builder.StoredBlob{Descriptor: f.Descriptor, Blob: d.Image.Blobs[i], Open: openPath(f.Path)})
	}
	return d
}

// TestDict stores what a dictionary does not have, and refers to its blobs for the rest, also
// when another compressor made them.
func TestDict(t *testing.T) {
	common, own := chunked("abcdefghijklmnopqrstuvwxyz"), string(noise(3, 1<<20))
	o := builder.DefaultOptions()
	o.ChunkSize, o.VerifyData = 1<<12, true
	for _, compressor := range []rafs.Compressor{rafs.CompressorZstd, rafs.CompressorLZ4, rafs.CompressorNone} {
		from := o
		from.Compressor = compressor
		base := convert(t, tars(t, makeTar(t, reg("x", common), reg("unused", "1")), makeTar(t, reg("z", "z"))), from)
		layers := [][]byte{makeTar(t, reg("only-common", common)), makeTar(t, reg("own", own), reg("mixed", common[:1<<13]+"tail"))}
		with := o
		with.Dict, with.List = dictOf(t, base), listOf("/mixed")
		res := convert(t, tars(t, layers...), with)
		plain, together := o, withBlobs(res, base)
		plain.List = with.List
		if diff := cmp.Diff(dumpImage(t, convert(t, tars(t, layers...), plain)), dumpImage(t, &together)); diff != "" {
			t.Errorf("%v: the tree differs with a dictionary:\n%s", compressor, diff)
		}
		st := res.Stats
		if st.DictBlobs != 1 || st.DictChunks == 0 || st.Prefetch.Chunks == 0 {
			t.Errorf("%v: Stats = %+v, want chunks of one blob of the dictionary", compressor, st)
		}
		var kinds []bool
		for _, f := range res.Blobs {
			kinds = append(kinds, f.Stored)
		}
		if diff := cmp.Diff([]bool{false, true, false}, kinds); diff != "" {
			t.Errorf("blobs stored elsewhere: %s: want the layer's, the dictionary's, the prefetch blob", diff)
		}
		checkOCI(t, &together)
	}
}

// TestDictOfSeveral refers to the blobs of three images: two share a blob, which is listed once, and of what two have the first
// image's counts. Other chunks, and an image that says something else of a blob, are not referred to.
func TestDictOfSeveral(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		a, b, c := string(noise(1, 2*testChunk)), string(noise(2, 2*testChunk)), string(noise(3, 2*testChunk))
		shared := makeTar(t, reg("a", a))
		one := convert(t, tars(t, shared), o)
		two := convert(t, tars(t, shared, makeTar(t, reg("b", b))), o)
		three := convert(t, tars(t, makeTar(t, reg("other", b+c))), o)
		o.Dict = dictOf(t, one)
		o.Dict.More = []*builder.Dict{dictOf(t, two), dictOf(t, three)}
		src := tars(t, makeTar(t, reg("new/a", a), reg("new/c", c), reg("new/b", b), reg("own", "own")))
		res := convert(t, src, o)
		if st := res.Stats; st.DictBlobs != 3 || st.DictChunks != 6 || st.Chunks != 1 {
			t.Errorf("Stats = %+v, want 6 chunks of 3 blobs, and one stored", st)
		}
		together := withBlobs(res, one, two, three)
		checkOCI(t, &together)
		plain := o
		plain.Dict = nil
		if diff := cmp.Diff(dumpImage(t, convert(t, src, plain)), dumpImage(t, &together)); diff != "" {
			t.Errorf("the tree differs with a dictionary:\n%s", diff)
		}
		for i := range o.Dict.More[0].Image.Blobs {
			o.Dict.More[0].Image.Blobs[i].UncompressedSize += 4096
		}
		if st := convert(t, src, o).Stats; st.DictBlobs != 3 || st.DictChunks != 6 {
			t.Errorf("with a blob that two images describe: Stats = %+v, want what there was", st)
		}
		o.Dict.More[1].Image.ChunkSize /= 2
		if res, err := builder.Convert(t.Context(), src, o); res != nil || !errors.Is(err, builder.ErrUnsupported) {
			t.Errorf("Convert = %v, %v, want ErrUnsupported", res, err)
		}
	})
}

// TestDictChunksThatNydusdMisreads: a file has two chunks of the dictionary that lie near each other in its blob, with a few
// bytes between. The second one is stored again.
func TestDictChunksThatNydusdMisreads(t *testing.T) {
	eachVersion(t, func(t *testing.T, o builder.Options) {
		a, b := string(noise(1, testChunk)), string(noise(2, testChunk))
		z, far := strings.Repeat("z", testChunk), string(noise(3, 3*testChunk))
		base := convert(t, tars(t, makeTar(t, reg("x", a+z+b+far+a[:9]))), o)
		o.Dict = dictOf(t, base)
		// The last file's clash is in the middle of it, behind more than a batch.
		src := tars(t, makeTar(t, reg("near", a+b), reg("far", a+far+b+"end"), reg("back", b+a+z+b), reg("touching", a+z+b+far),
			reg("long", string(noise(4, 1<<20-testChunk))+a+b+z+a+b)))
		res := convert(t, src, o)
		// Stored are the noise, "end", b once for near and long, and the first chunk of far, which lies behind z and b.
		if st := res.Stats; st.DictBlobs != 1 || st.DictChunks != 1+4+4+6+3 || st.Chunks != 255+1+1+1 {
			t.Errorf("Stats = %+v, want 258 chunks, and 18 times one of a dictionary's blob", st)
		}
		together := withBlobs(res, base)
		img := openImage(t, res)
		for _, name := range []string{"near", "far", "back", "touching", "long"} {
			for i, c := range img.Lookup(name).Chunks[1:] {
				if prev := img.Lookup(name).Chunks[i]; rafs.Misread(&prev, &c) {
					t.Errorf("/%s: chunk %d is stored at %d behind one that ends at %d", name, i+1, c.CompressedOffset, prev.CompressedOffset+uint64(prev.CompressedSize))
				}
			}
		}
		var packed bytes.Buffer
		if _, err := builder.PackLayer(t.Context(), &packed, bytes.NewReader(makeTar(t, reg("near", a+b))), o); err != nil {
			t.Fatal(err)
		} else if packed.Len() < testChunk {
			t.Errorf("a packed layer has %d bytes, too few for a chunk", packed.Len())
		}
		want := dumpImage(t, &together)
		root := mountNydusd(t, &together)
		for range 3 {
			for path, w := range want {
				if w.Mode&unix.S_IFMT == unix.S_IFREG && sum(readUncached(t, root+path)) != w.Data {
					t.Errorf("%s: nydusd gives other bytes", path)
				}
			}
		}
	})
}

// withBlobs is res with the paths of the blobs that base has stored.
func withBlobs(res *builder.Result, bases ...*builder.Result) builder.Result {
	both := *res
	both.Blobs = slices.Clone(res.Blobs)
	for i := range both.Blobs {
		for _, base := range bases {
			for _, f := range base.Blobs {
				if f.Descriptor.Digest == both.Blobs[i].Descriptor.Digest {
					both.Blobs[i].Path = f.Path
				}
			}
		}
	}
	return both
}

func TestDictErrors(t *testing.T) {
	layer := makeTar(t, reg("a", "1"))
	o := builder.DefaultOptions()
	base := convert(t, tars(t, layer), o)
	for want, change := range map[string]func(o *builder.Options){
		"chunks of 1048576 bytes": func(o *builder.Options) { o.ChunkSize = 1 << 16 },
		"digests blake3":          func(o *builder.Options) { o.Digester = rafs.DigesterSHA256 },
		"it is RAFS v5":           func(o *builder.Options) { o.Dict.Image.Version = rafs.V5 },
		"is compressed with zstd": func(o *builder.Options) {
			o.FSVersion, o.Compressor, o.Dict.Image.Version = rafs.V5, rafs.CompressorLZ4, rafs.V5
		},
		"do not belong together":      func(o *builder.Options) { o.Dict.Blobs = nil },
		"cannot be opened":            func(o *builder.Options) { o.Dict.Blobs[0].Open = nil },
		"its bootstrap says sha256:x": func(o *builder.Options) { o.Dict.Blobs[0].Blob.ID = "x" },
		"file does not exist": func(o *builder.Options) {
			o.Dict.Blobs[0].Open = func(context.Context) (io.ReaderAt, error) { return nil, os.ErrNotExist }
		},
	} {
		o := o
		o.Dict, o.TempDir = dictOf(t, base), t.TempDir()
		change(&o)
		if res, err := builder.Convert(t.Context(), tars(t, layer), o); err == nil || res != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Convert = %v, %v, want an error with %q", res, err, want)
		}
	}
}
