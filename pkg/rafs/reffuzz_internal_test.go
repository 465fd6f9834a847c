package rafs

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs/internal/disk"
)

// FuzzRefBuilder refers to any bytes as a layer: what was read of it while the table was made is read again through the table.
func FuzzRefBuilder(f *testing.F) {
	_, _, layer := tinyRef(f)
	f.Add(layer, uint16(100))
	f.Add(append(bytes.Clone(layer), layer...), uint16(4000))
	f.Add([]byte("a plain tar, or nearly"), uint16(3))
	f.Fuzz(func(t *testing.T, layer []byte, size uint16) {
		rb, err := NewRefBuilder(bytes.NewReader(layer), RefOptions{ChunkSize: 4096})
		if err != nil {
			return
		}
		n := uint32(size)%4096 + 1
		var chunks []Chunk
		for rb.Offset() < 1<<20 {
			if rb.Begin(n) != nil {
				break
			}
			p := make([]byte, n)
			got, err := io.ReadFull(rb, p)
			if got == 0 {
				break
			}
			place, endErr := rb.End()
			if endErr != nil {
				break
			}
			c, appendErr := rb.Append(place, DigesterBLAKE3.Sum(p[:got]))
			if appendErr != nil {
				t.Fatal(appendErr)
			}
			if chunks = append(chunks, c); err != nil {
				break
			}
		}
		var table bytes.Buffer
		b, err := rb.Close(&table)
		if err != nil {
			if table.Len() > 0 || len(chunks) == 0 != errors.Is(err, ErrNoChunks) && !errors.Is(err, ErrInvalid) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("Close = %v with %d chunks and %d bytes written", err, len(chunks), table.Len())
			}
			return
		}
		r, err := OpenSeparateBlob(bytes.NewReader(layer), bytes.NewReader(table.Bytes()), b)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chunks {
			if _, err := r.ReadChunk(context.Background(), c); err != nil {
				t.Fatalf("chunk %d of %d: %v", c.Index, len(chunks), err)
			}
		}
	})
}

func FuzzInspectBlob(f *testing.F) {
	for _, p := range tinyImages(f) {
		f.Add(p[1])
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		info, err := InspectBlob(bytes.NewReader(p), int64(len(p)))
		if (info == nil) != (err != nil) || err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("InspectBlob = %+v, %v", info, err)
		}
		if err != nil {
			return
		}
		for _, s := range info.Sections {
			if s.Offset > uint64(len(p)) || s.Size > uint64(len(p))-s.Offset {
				t.Errorf("section %+v of %d bytes", s, len(p))
			}
		}
	})
}

// TestZranWorkIsBounded makes tables that would have a reader decompress the same bytes again and again, or many that are
// not there.
func TestZranWorkIsBounded(t *testing.T) {
	t.Parallel()
	const size, out = 4096, 1 << 20
	var z bytes.Buffer
	w, err := flate.NewWriter(&z, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(make([]byte, out))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	in := uint32(z.Len())
	zran := func(offset uint32) metaRecord {
		return metaRecord{uncompressedSize: size, compressedSize: 10, compressed: true, zran: true, batchOffset: offset}
	}
	for name, tt := range map[string]struct {
		outSize uint32
		records []metaRecord
		want    string // of check of the last record, or of the table
	}{
		"one pass":           {out, []metaRecord{zran(0), zran(size), zran(out - size)}, ""},
		"all that can be":    {(in + 1) * 1032, []metaRecord{zran(0)}, ""},
		"overlap":            {out, []metaRecord{zran(0), zran(out - size - 1), zran(out - size)}, "offset in its ZRAN context"},
		"again":              {out, []metaRecord{zran(out - size), zran(out - size)}, "offset in its ZRAN context"},
		"back behind no one": {out, []metaRecord{zran(out - size), {uncompressedSize: size, compressedSize: size}, zran(0)}, "flags"},
		"more than there is": {(in+1)*1032 + 1, []metaRecord{zran(0)}, "out_len"},
	} {
		var table []byte
		for i, r := range tt.records {
			r.uncompressedOffset = uint64(i) * size
			table = appendV2(table, r)
		}
		n := uint32(len(tt.records))
		b := Blob{
			ID: "x", ChunkSize: size, ChunkCount: n, Compressor: CompressorGzip, MetaCompressor: CompressorNone,
			Features:       disk.FeatureZran | disk.FeatureSeparate | disk.FeatureV2 | disk.FeatureAligned,
			CompressedSize: uint64(in), UncompressedSize: uint64(n) * size,
		}
		table = appendRecord(table, &disk.ZranContext{InSize: in, OutSize: tt.outSize})
		b.MetaCompressed, b.MetaUncompressed = uint64(len(table)), uint64(len(table))
		m, err := parseMeta(b, table, uint64(len(table)), appendRecord(nil, &disk.MetaHeader{
			Magic: disk.MetaMagic, Magic2: disk.MetaMagic, Entries: n, CompressedSize: b.MetaCompressed, UncompressedSize: b.MetaUncompressed,
			ContextOffset: uint64(n) * disk.SizeMetaV2, ContextSize: disk.SizeZranContext, ContextCount: 1,
		}))
		for i := uint32(0); err == nil && i < n; i++ {
			if err = m.check(i); err != nil && i < n-1 {
				t.Errorf("%s: check(%d) = %v", name, i, err)
			}
		}
		if bad := tt.want != ""; bad != errors.Is(err, ErrInvalid) || bad && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		if err != nil {
			continue
		}
		r := &BlobReader{r: bytes.NewReader(z.Bytes()), blob: b, meta: m, decoder: new(decoder)}
		for i := range n {
			if p, err := r.readZran(m.record(i)); err != nil || !bytes.Equal(p, make([]byte, size)) {
				t.Errorf("%s: record %d reads as %d bytes, %v", name, i, len(p), err)
			}
		}
	}
}

// TestBatchWorkIsBounded reads tables of batches that hold as much as their chunks, and more.
func TestBatchWorkIsBounded(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		size  uint64 // what the blob says to hold
		batch uint32 // what each of its two batches holds
		ok    bool
	}{
		"two chunks":         {8192, 4096, true},
		"more than the blob": {8192, 4097, false},
		"more than chunks":   {1 << 40, 1 << 20, false},
	} {
		var table []byte
		for i := range uint32(2) {
			table = appendV2(table, metaRecord{uncompressedOffset: uint64(i) * 4096, uncompressedSize: 4096, compressed: true, batch: true, batchIndex: i})
		}
		records := uint64(len(table))
		for range 2 {
			table = appendRecord(table, &disk.BatchContext{CompressedSize: 10, UncompressedSize: tt.batch})
		}
		b := Blob{
			ID: "x", ChunkSize: 4096, ChunkCount: 2, Features: disk.FeatureBatch | disk.FeatureV2 | disk.FeatureAligned, UncompressedSize: tt.size,
			CompressedSize: 1 << 20, MetaOffset: 1 << 19, MetaCompressed: uint64(len(table)), MetaUncompressed: uint64(len(table)),
		}
		m, err := parseMeta(b, table, uint64(len(table)), appendRecord(nil, &disk.MetaHeader{
			Magic: disk.MetaMagic, Magic2: disk.MetaMagic, Entries: 2, Offset: b.MetaOffset, CompressedSize: b.MetaCompressed,
			UncompressedSize: b.MetaUncompressed, ContextOffset: records, ContextSize: 2 * disk.SizeBatchContext, ContextCount: 2,
		}))
		if (err == nil) != tt.ok || !tt.ok && (m != nil || !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "all batches")) {
			t.Errorf("%s: parseMeta = %v, want it taken: %v", name, err, tt.ok)
		}
	}
}

// unread is a file that must not be read.
type unread struct{}

var errUnread = errors.New("not to be read")

func (unread) ReadAt([]byte, int64) (int, error) { return 0, errUnread }

// TestZranTableIsBounded opens tables that decompress to more than the contexts of their layer can need; those that do not
// get as far as to be read.
func TestZranTableIsBounded(t *testing.T) {
	t.Parallel()
	const chunks, records = 1 << 17, 1 << 17 * (disk.SizeMetaV2 + disk.SizeZranContext)
	for name, tt := range map[string]struct {
		layer   io.ReaderAt
		claimed uint64 // size of the layer
		table   uint64
		ok      bool
	}{
		"little":                 {bytes.NewReader(nil), 1000, records + 64<<20, true},
		"more":                   {bytes.NewReader(nil), 1000, records + 64<<20 + 1, false},
		"more of a small layer":  {unread{}, 1000, records + 64<<20 + 1, false},
		"much of a claimed one":  {bytes.NewReader(make([]byte, 1000)), 1 << 40, 4 << 30, false},
		"much of a large one":    {io.NewSectionReader(unread{}, 0, 1<<30), 1 << 30, 4 << 30, true},
		"nobody knows the layer": {unread{}, 1 << 30, 4 << 30, true},
	} {
		b := Blob{
			ID: "x", ChunkSize: 1 << 20, ChunkCount: chunks, Compressor: CompressorGzip, MetaCompressor: CompressorZstd,
			Features:       disk.FeatureZran | disk.FeatureSeparate | disk.FeatureV2 | disk.FeatureAligned,
			CompressedSize: tt.claimed, UncompressedSize: chunks << 12, MetaCompressed: 5 << 20, MetaUncompressed: tt.table,
		}
		r := &BlobReader{r: tt.layer, metaFile: unread{}, blob: b, decoder: new(decoder)}
		if _, err := r.table(); errors.Is(err, errUnread) != tt.ok || errors.Is(err, ErrInvalid) == tt.ok {
			t.Errorf("%s: table = %v, to be read: %v", name, err, tt.ok)
		}
	}
}
