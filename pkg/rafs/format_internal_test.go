package rafs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	p, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestMetaRecordVectors uses records of real blobs. Source: rafs-format, test vectors.
func TestMetaRecordVectors(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		hex  string
		want metaRecord
	}{
		{"0000000000202204 0000000000b02d01", metaRecord{uncompressedSize: 16931, compressedSize: 4828, compressed: true}},
		{"0050000000704503 dc12000000d0b900", metaRecord{uncompressedOffset: 20480, uncompressedSize: 13400, compressedOffset: 4828, compressedSize: 2974, compressed: true}},
	} {
		var m disk.MetaV1
		p := unhex(t, c.hex)
		if _, err := binary.Decode(p, binary.LittleEndian, &m); err != nil {
			t.Fatal(err)
		}
		if got := decodeV1(m); got != c.want {
			t.Errorf("decodeV1(%s) = %+v, want %+v", c.hex, got, c.want)
		}
		if got := appendV1(nil, c.want); !bytes.Equal(got, p) {
			t.Errorf("appendV1(%+v) = %x, want %x", c.want, got, p)
		}
	}
	var m disk.MetaV2
	if _, err := binary.Decode(unhex(t, "02000000de8e0003 6504000000852300 0016000000000000"), binary.LittleEndian, &m); err != nil {
		t.Fatal(err)
	}
	want := metaRecord{uncompressedOffset: 8192, uncompressedSize: 36575, compressedOffset: 1125, compressedSize: 9093, compressed: true, zran: true, batchOffset: 0x1600}
	if got := decodeV2(m); got != want {
		t.Errorf("decodeV2 = %+v, want %+v", got, want)
	}
	if got := encodeV2(want); got != m {
		t.Errorf("encodeV2 = %x, want %x", got, m)
	}
}

func TestMetaV1RoundTrip(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	for range 10000 {
		want := metaRecord{
			uncompressedOffset: r.Uint64N(disk.MaxBlobExpanded) &^ (disk.BlockSize - 1), uncompressedSize: 1 + r.Uint32N(MaxChunkSize),
			compressedOffset: r.Uint64N(disk.MaxBlobStored), compressedSize: 1 + r.Uint32N(MaxChunkSize),
		}
		want.compressed = want.compressedSize != want.uncompressedSize
		got := decodeV1(encodeV1(want))
		if got != want {
			t.Fatalf("decodeV1(encodeV1(%+v)) = %+v", want, got)
		}
		want = metaRecord{
			uncompressedOffset: r.Uint64N(disk.MaxBlobExpanded) &^ (disk.BlockSize - 1), uncompressedSize: 1 + r.Uint32N(MaxChunkSize),
			compressedOffset: r.Uint64N(disk.MaxBlobStored), compressedSize: r.Uint32N(MaxChunkSize),
			compressed: r.Uint32()&1 != 0, batch: r.Uint32()&1 != 0,
		}
		if want.batch {
			want.batchIndex, want.batchOffset = r.Uint32(), r.Uint32()
		}
		if got := decodeV2(encodeV2(want)); got != want {
			t.Fatalf("decodeV2(encodeV2(%+v)) = %+v", want, got)
		}
	}
}

func TestChunkIndexEncoding(t *testing.T) {
	t.Parallel()
	c := Chunk{Blob: 253, Index: 0xabcdef, UncompressedOffset: 0x12345678 << 12}
	want := disk.ChunkIndex{IndexLow: 0xcdef, Device: 0xab00 | 254, Block: 0x12345678}
	p := appendChunkIndex(nil, &c)
	if !bytes.Equal(p, appendRecord(nil, want)) {
		t.Errorf("appendChunkIndex = %x, want %x", p, appendRecord(nil, want))
	}
	if got := parseChunkIndex(p); got != want {
		t.Errorf("parseChunkIndex = %+v, want %+v", got, want)
	}
	first := appendChunkIndex(nil, &Chunk{Index: 1, UncompressedOffset: 5 * disk.BlockSize})
	if hex.EncodeToString(first) != "0100010005000000" { // rafs-format, test vectors
		t.Errorf("chunk 1 of blob 0, block 5 = %x", first)
	}
}

func TestSectionHeader(t *testing.T) {
	t.Parallel()
	h := sectionHeader("rafs.blob.toc", 512)
	if got := string(h[148:156]); got != "0006255\x00" { // rafs-format, test vectors
		t.Errorf("checksum %q, want 0006255", got)
	}
	for _, size := range []uint64{0, 1, 512, tarSizeLimit, tarSizeLimit + 1, disk.MaxBlobStored} {
		h := sectionHeader("blob.meta", size)
		if len(h) != disk.TarHeaderSize {
			t.Fatalf("%d bytes", len(h))
		}
		std, err := tar.NewReader(bytes.NewReader(h)).Next()
		if err != nil || std.Name != "blob.meta" || uint64(std.Size) != size {
			t.Errorf("archive/tar reads %+v, %v, want blob.meta of %d", std, err, size)
		}
		name, got, err := parseSectionHeader(h)
		if name != "blob.meta" || got != size || err != nil {
			t.Errorf("parseSectionHeader = %q, %d, %v, want blob.meta, %d", name, got, err, size)
		}
	}
}

func TestDirSize(t *testing.T) {
	t.Parallel()
	// "." and ".." take 13 and 14 bytes.
	name := func(i int) string { return string([]byte{'a' + byte(i/26/26), 'a' + byte(i/26%26), 'a' + byte(i%26)}) }
	list := func(n, length int) []Dirent {
		var l []Dirent
		for i := range n {
			l = append(l, Dirent{Name: name(i) + strings.Repeat("x", length-3)})
		}
		return l
	}
	for _, c := range []struct {
		children []Dirent
		want     uint64
	}{
		{nil, 27},
		{list(1, 3), 27 + 15},
		{list(15, 255), 27 + 15*267},
		{list(16, 255), 4096 + 267},      // 27+15*267 = 4032: the next does not fit
		{list(41, 255), 2*4096 + 11*267}, // 15 in the first block, 15 in the second
		{append(list(15, 255), Dirent{Name: strings.Repeat("z", 52)}), 4096},
		{append(list(15, 255), Dirent{Name: strings.Repeat("z", 53)}), 4096 + 65},
	} {
		if got := dirSize(c.children); got != c.want {
			t.Errorf("dirSize(%d children) = %d, want %d", len(c.children), got, c.want)
		}
	}
}

func TestWalkSorted(t *testing.T) {
	t.Parallel()
	children := []Dirent{{Name: "!"}, {Name: "-"}, {Name: ".!"}, {Name: ".-"}, {Name: "..."}, {Name: ".a"}, {Name: "0"}}
	var got []string
	walkSorted(children, func(n string) { got = append(got, n) }, func(i int) { got = append(got, children[i].Name) })
	if want := []string{"!", "-", ".", ".!", ".-", "..", "...", ".a", "0"}; !slices.Equal(got, want) {
		t.Errorf("order %q, want %q", got, want)
	}
}

func TestXattrRoundTrip(t *testing.T) {
	t.Parallel()
	in := []Xattr{
		{"user.b", []byte("1")},
		{"user.a", nil},
		{"trusted.overlay.opaque", []byte("y")},
		{"security.capability", bytes.Repeat([]byte{7}, 20)},
		{"system.posix_acl_access", []byte{2, 0, 0, 0}},
		{"system.posix_acl_default", []byte{2}},
		{"user." + strings.Repeat("n", 250), bytes.Repeat([]byte("v"), MaxXattrValue)},
	}
	size, err := xattrSize(in)
	if err != nil {
		t.Fatal(err)
	}
	p := appendXattrs(nil, in)
	if len(p) != int(size) {
		t.Errorf("%d bytes, want %d", len(p), size)
	}
	got, _, err := parseXattrs(p)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(in, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	in[slices.IndexFunc(in, func(x Xattr) bool { return x.Name == "user.a" })].Value = []byte{}
	if d := cmp.Diff(in, got); d != "" {
		t.Errorf("xattrs differ:\n%.500s", d)
	}
	for i := range p { // no cut is taken for the whole
		if _, _, err := parseXattrs(p[:i]); err == nil && i%4 != 0 {
			t.Errorf("parseXattrs of %d of %d bytes succeeded", i, len(p))
		}
	}
}

// TestAllocatorKeepsApart places many inodes and looks for overlaps and for data crossing blocks.
func TestAllocatorKeepsApart(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 4))
	a := v6Allocator{off: disk.BlockSize}
	type span struct{ from, to uint64 }
	var spans []span
	for range 20000 {
		n := v6Node{inode: &Inode{Mode: []uint32{modeRegular, modeDir, modeSymlink, modeFifo}[r.IntN(4)]}}
		if r.IntN(4) == 0 {
			n.xattrs = xattrWords(4 * (3 + r.Uint32N(2000)))
		}
		chunks := 0
		s := disk.SizeInodeExtended + n.xattrBytes()
		switch n.inode.Mode {
		case modeRegular:
			chunks = r.IntN(30) * r.IntN(30)
			s = alignUp(s, 8) + uint64(chunks)*8
		case modeDir, modeSymlink:
			n.size = 1 + r.Uint64N(1<<r.UintN(15))
		}
		a.place(&n, chunks)
		tail := n.size % disk.BlockSize
		if n.inline {
			s += tail
			if n.offset()/disk.BlockSize != (n.offset()+s-1)/disk.BlockSize {
				t.Fatalf("inline inode of %d bytes at %d crosses a block", s, n.offset())
			}
		}
		spans = append(spans, span{n.offset(), n.offset() + s})
		if hasBlocks(&n) {
			end := n.data() + n.size
			if n.inline {
				end -= tail
			}
			spans = append(spans, span{n.data(), end})
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return int(int64(a.from) - int64(b.from)) })
	for i := 1; i < len(spans); i++ {
		if spans[i].from < spans[i-1].to {
			t.Fatalf("%v overlaps %v", spans[i], spans[i-1])
		}
	}
	if last := spans[len(spans)-1]; last.to > a.off {
		t.Errorf("end %d, want at least %d", a.off, last.to)
	}
}

func TestReadDirBlockRefuses(t *testing.T) {
	t.Parallel()
	good := appendDirBlock(nil, []v6Entry{{".", 128, 2}, {"..", 128, 2}, {"abc", 130, 1}})
	count := 0
	if err := readDirBlock(good, func(disk.Dirent, string) error { count++; return nil }); err != nil || count != 3 {
		t.Fatalf("good block: %d entries, %v", count, err)
	}
	for name, change := range map[string]func(p []byte) []byte{
		"empty":            func(p []byte) []byte { return nil },
		"short":            func(p []byte) []byte { return p[:11] },
		"no name":          func(p []byte) []byte { return p[:36] },
		"first 0":          func(p []byte) []byte { p[8] = 0; return p },
		"first odd":        func(p []byte) []byte { p[8] = 37; return p },
		"first beyond":     func(p []byte) []byte { p[9] = 0xff; return p },
		"descending":       func(p []byte) []byte { p[12+8] = 36; return p },
		"second beyond":    func(p []byte) []byte { p[12+9] = 0x10; return p },
		"last beyond":      func(p []byte) []byte { p[24+8] = 200; return p },
		"into the dirents": func(p []byte) []byte { p[24+8] = 12; return p },
	} {
		p := change(bytes.Clone(good))
		if err := readDirBlock(p, func(disk.Dirent, string) error { return nil }); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestDecodeGzip(t *testing.T) {
	t.Parallel()
	want := bytes.Repeat([]byte("gzip "), 1000)
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err := w.Write(want)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	var d decoder
	got, err := d.decode(CompressorGzip, z.Bytes(), len(want))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("decode = %d bytes, %v", len(got), err)
	}
	for _, n := range []int{0, 1, len(want) - 1, len(want) + 1} {
		if _, err := d.decode(CompressorGzip, z.Bytes(), n); !errors.Is(err, ErrInvalid) {
			t.Errorf("decode to %d bytes of %d = %v, want ErrInvalid", n, len(want), err)
		}
	}
	z.Bytes()[z.Len()-6]++ // the checksum
	if _, err := d.decode(CompressorGzip, z.Bytes(), len(want)); !errors.Is(err, ErrInvalid) {
		t.Errorf("decode with a wrong checksum = %v, want ErrInvalid", err)
	}
	if _, err := d.decode(9, nil, 1); !errors.Is(err, ErrUnsupported) {
		t.Errorf("decode with compressor 9 = %v, want ErrUnsupported", err)
	}
}

// TestBatchPlaces moves a record of a batch, so that two of one batch name different places, and so that batches go
// backwards: check says so, also when their neighbors have been read.
func TestBatchPlaces(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w, err := NewBlobWriter(&out, BlobOptions{BatchSize: 1 << 14})
	if err != nil {
		t.Fatal(err)
	}
	var chunks []Chunk
	for i := range 8 { // two batches of three, one of one, and a chunk of its own
		p := bytes.Repeat([]byte{byte(i + 1)}, 5000+i/7*5000)
		c, err := w.Append(EncodedChunk{Digest: DigesterBLAKE3.Sum(p), Data: p, UncompressedSize: uint32(len(p))})
		if err != nil {
			t.Fatal(err)
		}
		chunks = append(chunks, c)
	}
	b, err := w.Close()
	if err != nil || b.MetaCompressor != CompressorNone {
		t.Fatalf("Close = %+v, %v, want a raw table", b, err)
	}
	for name, tt := range map[string]struct {
		record, word int
		change       func(v uint64) uint64
		want         string // of check of that record
	}{
		"unchanged":       {1, 1, func(v uint64) uint64 { return v }, ""},
		"compressed_size": {1, 1, func(v uint64) uint64 { return v + 1<<disk.V2CompSizeShift }, ""}, // says nothing in a batch
		"offset":          {2, 1, func(v uint64) uint64 { return v + 77 }, "compressed offset of its batch"},
		"index":           {4, 2, func(v uint64) uint64 { return v & disk.V2DataOffsetMask }, "batch index"},
	} {
		p := bytes.Clone(out.Bytes())
		at := p[b.MetaOffset+uint64(tt.record*disk.SizeMetaV2+8*tt.word):]
		binary.LittleEndian.PutUint64(at, tt.change(binary.LittleEndian.Uint64(at)))
		r, err := OpenBlob(bytes.NewReader(p), b)
		if err != nil {
			t.Fatal(err)
		}
		table, err := r.table()
		if err != nil {
			t.Fatal(err)
		}
		for i := range table.count {
			err := table.check(i)
			if bad := int(i) == tt.record && tt.want != ""; bad != errors.Is(err, ErrInvalid) || bad && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: check(%d) = %v, want %q", name, i, err, tt.want)
			}
		}
		for i, c := range chunks {
			_, first := r.ReadChunk(t.Context(), c)
			if bad := i == tt.record && tt.want != ""; (first != nil) != bad {
				t.Errorf("%s: ReadChunk(%d) = %v", name, i, first)
			}
		}
	}
}

// TestBatchApart moves a record of a batch behind one that is in none, where check does not compare it: what it
// reads as does not depend on what was read before.
func TestBatchApart(t *testing.T) {
	t.Parallel()
	stored := append(bytes.Repeat([]byte("a"), 5000), bytes.Repeat([]byte("b"), 5000)...)
	stored = append(stored, make([]byte, 100)...)
	var records []byte
	for i, r := range []metaRecord{
		{compressed: true, batch: true},
		{compressedSize: 5000}, // raw
		{compressed: true, batch: true, batchOffset: 5000, compressedOffset: 77},
	} {
		r.uncompressedOffset, r.uncompressedSize = uint64(i)*8192, 5000
		records = appendV2(records, r)
	}
	b := Blob{
		ID: "x", ChunkSize: 1 << 14, ChunkCount: 3, Features: disk.FeatureV2 | disk.FeatureBatch | disk.FeatureAligned,
		CompressedSize: uint64(len(stored)), UncompressedSize: 3 * 8192, MetaOffset: uint64(len(stored)),
	}
	table := &metaTable{blob: b, records: records, size: disk.SizeMetaV2, count: 3, batches: []disk.BatchContext{{CompressedSize: 10000, UncompressedSize: 10000}}}
	read := func(r *BlobReader, i uint32) string {
		if err := table.check(i); err != nil {
			t.Fatal(err)
		}
		p, err := r.readBatched(table.record(i))
		if err != nil {
			t.Fatal(err)
		}
		return string(p)
	}
	one := &BlobReader{r: bytes.NewReader(stored), blob: b, meta: table, decoder: new(decoder)}
	first, last := read(one, 0), read(one, 2)
	other := &BlobReader{r: bytes.NewReader(stored), blob: b, meta: table, decoder: new(decoder)}
	if again := read(other, 2); again != last {
		t.Error("record 2 reads as another chunk behind record 0")
	}
	if again := read(other, 0); again != first {
		t.Error("record 0 reads as another chunk behind record 2")
	}
}
