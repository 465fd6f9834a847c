package rafs

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// tinyImage is a bootstrap and its blob, small enough to be mutated well.
func tinyImage(tb testing.TB, o BlobOptions) (bootstrap, blob []byte) {
	tb.Helper()
	var out bytes.Buffer
	w, err := NewBlobWriter(&out, o)
	if err != nil {
		tb.Fatal(err)
	}
	enc, err := NewEncoder(o.Compressor, LevelDefault)
	if err != nil {
		tb.Fatal(err)
	}
	file := &Inode{Mode: modeRegular | 0o644, Size: 4096 + 200}
	for _, p := range [][]byte{bytes.Repeat([]byte("abc."), 1024), bytes.Repeat([]byte("x"), 200)} {
		data, compressed, err := enc.Encode(nil, p)
		if err != nil {
			tb.Fatal(err)
		}
		if w.Batches(uint32(len(p))) {
			data, compressed = p, false
		}
		c, err := w.Append(EncodedChunk{Digest: o.Digester.Sum(p), Data: data, Compressed: compressed, UncompressedSize: uint32(len(p))})
		if err != nil {
			tb.Fatal(err)
		}
		file.Chunks = append(file.Chunks, c)
	}
	b, err := w.Close()
	if err != nil {
		tb.Fatal(err)
	}
	img := &Image{
		Version: o.Version, Blobs: []Blob{b}, ChunkSize: 4096, Compressor: o.Compressor, Digester: o.Digester, Prefetch: []*Inode{file},
		Root: &Inode{Mode: modeDir | 0o755, Children: []Dirent{
			{"dir", &Inode{Mode: modeDir | 0o755, Xattrs: []Xattr{{"user.a", []byte("b")}}}},
			{"file", file},
			{"hard", file},
			{"link", &Inode{Mode: modeSymlink | 0o777, Target: "file"}},
		}},
	}
	var boot bytes.Buffer
	if _, err := WriteBootstrap(&boot, img); err != nil {
		tb.Fatal(err)
	}
	return boot.Bytes(), out.Bytes()
}

func tinyImages(tb testing.TB) [][2][]byte {
	var list [][2][]byte
	for _, o := range []BlobOptions{
		{ChunkSize: 4096},
		{ChunkSize: 4096, Compressor: CompressorZstd, TOC: true},
		{ChunkSize: 4096, Compressor: CompressorLZ4, Digester: DigesterSHA256},
		{ChunkSize: 4096, Compressor: CompressorZstd, BatchSize: 4096},
		{ChunkSize: 4096, Compressor: CompressorGzip, TOC: true},
		{Version: V5, ChunkSize: 4096, Compressor: CompressorZstd},
		{Version: V5, ChunkSize: 4096, Digester: DigesterSHA256},
	} {
		boot, blob := tinyImage(tb, o)
		list = append(list, [2][]byte{boot, blob})
	}
	return list
}

// fixtureFiles returns files of the shared fixtures; none where there are no fixtures.
func fixtureFiles(pattern string) [][]byte {
	names, _ := filepath.Glob(filepath.Join("..", "..", "..", "shared", "fixtures", "nydus", pattern))
	var list [][]byte
	for _, n := range names {
		if p, err := os.ReadFile(n); err == nil {
			list = append(list, p)
		}
	}
	return list
}

func FuzzOpen(f *testing.F) {
	for _, p := range tinyImages(f) {
		f.Add(p[0])
	}
	for _, p := range fixtureFiles("v*/image.boot") {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		img, err := Open(bytes.NewReader(p), int64(len(p)))
		if err != nil {
			if img != nil || !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) {
				t.Errorf("Open = %v, %v", img, err)
			}
			return
		}
		var out bytes.Buffer
		if _, err := WriteBootstrap(&out, img); err != nil {
			if out.Len() > 0 {
				t.Errorf("%d bytes written before %v", out.Len(), err)
			}
			return
		}
		again, err := Open(bytes.NewReader(out.Bytes()), int64(out.Len()))
		if err != nil {
			t.Fatalf("cannot read what was written: %v", err)
		}
		var second bytes.Buffer
		if _, err := WriteBootstrap(&second, again); err != nil || !bytes.Equal(out.Bytes(), second.Bytes()) {
			t.Errorf("the second writing differs: %v", err)
		}
	})
}

func FuzzCheck(f *testing.F) {
	for _, p := range tinyImages(f) {
		f.Add(p[0], p[1])
	}
	f.Fuzz(func(t *testing.T, boot, blob []byte) {
		open := func(Blob) (io.ReaderAt, error) { return bytes.NewReader(blob), nil }
		_, err := Check(context.Background(), bytes.NewReader(boot), int64(len(boot)), open, CheckOptions{Data: true, Workers: 1, MaxFaults: 10})
		if err != nil {
			return
		}
		// What passes is read without a fault.
		img, err := Open(bytes.NewReader(boot), int64(len(boot)))
		if err != nil {
			t.Fatalf("Check passes, Open says %v", err)
		}
		fsys := img.FS(func(b Blob) (*BlobReader, error) { return OpenBlob(bytes.NewReader(blob), b) })
		img.walkInodes(func(ino *Inode) {
			if ino.IsRegular() {
				if err := fsys.CopyFile(context.Background(), io.Discard, ino); err != nil {
					t.Errorf("Check passes, reading says %v", err)
				}
			}
		})
	})
}

func FuzzBlobMeta(f *testing.F) {
	header := func(features, entries, batches uint32, table []byte) []byte {
		return appendRecord(nil, &disk.MetaHeader{
			Magic: disk.MetaMagic, Magic2: disk.MetaMagic, Features: features, Entries: entries,
			CompressedSize: uint64(len(table)), UncompressedSize: uint64(len(table)),
			ContextOffset: uint64(entries) * 24, ContextSize: uint64(batches) * 40, ContextCount: batches,
		})
	}
	v1 := appendRecord(nil, encodeV1(metaRecord{uncompressedSize: 4096, compressedSize: 100}))
	f.Add(uint32(disk.FeatureAligned), v1, header(1, 1, 0, v1))
	v2 := append(make([]byte, 24), make([]byte, 40)...)
	binary.LittleEndian.PutUint64(v2, disk.V2FlagBatch<<disk.V2FlagShift|99<<32)
	binary.LittleEndian.PutUint32(v2[24:], 50)
	binary.LittleEndian.PutUint32(v2[28:], 100)
	f.Add(uint32(disk.FeatureAligned|disk.FeatureV2|disk.FeatureBatch), v2, header(disk.FeatureV2|disk.FeatureBatch, 1, 1, v2))
	both := bytes.Clone(v2) // a chunk that says it is in a batch and in a gzip stream
	binary.LittleEndian.PutUint64(both, (disk.V2FlagBatch|disk.V2FlagZran)<<disk.V2FlagShift|99<<32)
	f.Add(uint32(disk.FeatureAligned|disk.FeatureV2|disk.FeatureBatch), both, header(disk.FeatureV2|disk.FeatureBatch, 1, 1, both))
	zran, zranBlob, layer := tinyRef(f)
	f.Add(zranBlob.Features, zran[0], zran[1])
	f.Fuzz(func(t *testing.T, features uint32, table, header []byte) {
		blob := Blob{ID: "x", ChunkSize: 4096, Features: features, CompressedSize: 1 << 20, UncompressedSize: 1 << 20, MetaUncompressed: uint64(len(table)), MetaCompressed: uint64(len(table))}
		if len(header) >= 16 {
			blob.ChunkCount = binary.LittleEndian.Uint32(header[12:])
			blob.MetaCompressor = Compressor(binary.LittleEndian.Uint32(header[8:]))
		}
		m, err := parseMeta(blob, table, uint64(len(table)), header)
		if err != nil {
			if m != nil {
				t.Error("a table beside an error")
			}
			return
		}
		for i := range m.count {
			if m.check(i) != nil {
				continue
			}
			r := m.record(i)
			if r.zran {
				b := &BlobReader{r: bytes.NewReader(layer), blob: blob, meta: m, decoder: new(decoder)}
				if p, err := b.readZran(r); err == nil && len(p) != int(r.uncompressedSize) || err != nil && p != nil {
					t.Errorf("record %d = %d bytes, %v", i, len(p), err)
				}
			}
			if r.batch && uint64(r.batchOffset)+uint64(r.uncompressedSize) > uint64(m.batches[r.batchIndex].UncompressedSize) {
				t.Errorf("record %d reaches out of its batch", i)
			}
			_ = m.compare(Chunk{Index: i})
		}
	})
}

func FuzzTOC(f *testing.F) {
	for _, p := range tinyImages(f) {
		if n := len(p[1]); n > 1024+512 {
			f.Add(p[1][n-1024:])
			f.Add(p[1])
		}
		// A section that the TOC says to be compressed, and larger than any memory.
		if at := bytes.LastIndex(p[1], []byte("blob.meta\x00")); at > 8 && at+64 < len(p[1]) {
			evil := bytes.Clone(p[1])
			binary.LittleEndian.PutUint32(evil[at-8:], disk.TOCZstd)
			binary.LittleEndian.PutUint64(evil[at+16+32+8:], 1<<40)
			f.Add(evil)
		}
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		blob := Blob{ID: "x", Features: disk.FeatureTOC, CompressedSize: uint64(len(p))}
		entries, err := readTOC(bytes.NewReader(p), uint64(len(p)), blob)
		if err != nil {
			if entries != nil {
				t.Error("entries beside an error")
			}
			return
		}
		for _, e := range entries {
			if checkEntryPlace(e, blob, uint64(len(p))) == nil {
				_ = checkEntryDigest(context.Background(), e, blob, bytes.NewReader(p))
			}
		}
		from, to := digestSection(bytes.NewReader(p), uint64(len(p)), blob)
		if from > to || to > uint64(len(p)) {
			t.Errorf("digest section %d to %d of %d", from, to, len(p))
		}
		_ = checkBlobID(context.Background(), Blob{ID: string(bytes.Repeat([]byte("0"), 64)), Features: blob.Features}, bytes.NewReader(p))
	})
}

func FuzzXattrs(f *testing.F) {
	f.Add(appendXattrs(nil, []Xattr{{"user.a", []byte("b")}, {"security.capability", make([]byte, 20)}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		xattrs, _, err := parseXattrs(p)
		if err != nil {
			return
		}
		if size, err := xattrSize(xattrs); err == nil && int(size) != len(p) && len(xattrs) > 0 {
			t.Errorf("%d bytes, read from %d", size, len(p))
		}
	})
}

func FuzzXattrsV5(f *testing.F) {
	f.Add(appendXattrsV5(nil, []Xattr{{"user.a", []byte("b")}, {"security.capability", make([]byte, 20)}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		xattrs, _, err := parseXattrsV5(p)
		if err != nil {
			if xattrs != nil {
				t.Error("xattrs beside an error")
			}
			return
		}
		if size, err := xattrSizeV5(xattrs); err == nil && size != uint64(len(p)) {
			t.Errorf("%d bytes, read from %d", size, len(p))
		}
	})
}

func FuzzDirBlock(f *testing.F) {
	f.Add(appendDirBlock(nil, []v6Entry{{".", 128, 2}, {"..", 128, 2}, {"abc", 130, 1}}))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > disk.BlockSize {
			return
		}
		n := 0
		_ = readDirBlock(p, func(disk.Dirent, string) error { n++; return nil })
		if n*(disk.SizeDirent+1) > len(p)+disk.SizeDirent {
			t.Errorf("%d entries in %d bytes", n, len(p))
		}
	})
}

func FuzzDecode(f *testing.F) {
	for _, c := range []Compressor{CompressorLZ4, CompressorZstd} {
		enc, err := NewEncoder(c, LevelDefault)
		if err != nil {
			f.Fatal(err)
		}
		out, _, err := enc.Encode(nil, bytes.Repeat([]byte("text"), 100))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint32(c), out, 400)
	}
	f.Fuzz(func(t *testing.T, c uint32, p []byte, size int) {
		if size < 0 || size > 1<<20 {
			return
		}
		var d decoder
		out, err := d.decode(Compressor(c), p, size)
		if err == nil && len(out) != size || err != nil && out != nil {
			t.Errorf("decode to %d = %d bytes, %v", size, len(out), err)
		}
		if d.zstd != nil {
			d.zstd.Close()
		}
	})
}

// tinyRef refers to a small gzip layer: the table's uncompressed content and its header, and the layer.
func tinyRef(tb testing.TB) (table [2][]byte, blob Blob, layer []byte) {
	tb.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(bytes.Repeat([]byte("some text, "), 700)); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	rb, err := NewRefBuilder(bytes.NewReader(z.Bytes()), RefOptions{ChunkSize: 4096})
	if err != nil {
		tb.Fatal(err)
	}
	for i := range 2 {
		p := make([]byte, 3000)
		if err := rb.Begin(3000); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadFull(rb, p); err != nil {
			tb.Fatal(err)
		}
		place, err := rb.End()
		if err != nil {
			tb.Fatal(err)
		}
		if _, err := rb.Append(place, Digest{byte(i)}); err != nil {
			tb.Fatal(err)
		}
	}
	var out bytes.Buffer
	blob, err = rb.Close(&out)
	if err != nil {
		tb.Fatal(err)
	}
	p := out.Bytes()
	t, err := new(decoder).decode(blob.MetaCompressor, p[:blob.MetaCompressed], int(blob.MetaUncompressed))
	if err != nil {
		tb.Fatal(err)
	}
	header := bytes.Clone(p[blob.MetaCompressed:][:disk.SizeMetaHeader])
	binary.LittleEndian.PutUint64(header[24:], uint64(len(t))) // ci_compressed_size: as if it were stored raw
	return [2][]byte{t, header}, blob, z.Bytes()
}
