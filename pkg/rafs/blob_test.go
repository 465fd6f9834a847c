package rafs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

func encoded(d rafs.Digester, p []byte) rafs.EncodedChunk {
	return rafs.EncodedChunk{Digest: d.Sum(p), Data: p, UncompressedSize: uint32(len(p))}
}

func TestBlobWriter(t *testing.T) {
	t.Parallel()
	for _, toc := range []bool{false, true} {
		for _, mark := range []bool{false, true} {
			t.Run(fmt.Sprintf("toc=%v mark=%v", toc, mark), func(t *testing.T) {
				t.Parallel()
				var out bytes.Buffer
				w, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Compressor: rafs.CompressorZstd, ChunkSize: 8192, TOC: toc, MarkPrefetch: mark})
				must(t, err)
				r := rand.New(rand.NewPCG(1, 1))
				var chunks []rafs.Chunk
				var contents [][]byte
				for _, n := range []int{1, 4095, 4096, 4097, 8191, 8192} {
					p := randomBytes(r, n)
					c, err := w.Append(encoded(rafs.DigesterBLAKE3, p))
					must(t, err)
					chunks, contents = append(chunks, c), append(contents, p)
				}
				again, err := w.Append(encoded(rafs.DigesterBLAKE3, contents[3]))
				if err != nil || again != chunks[3] {
					t.Errorf("equal chunk = %+v, %v, want %+v", again, err, chunks[3])
				}
				blob, err := w.Close()
				must(t, err)
				if sum := sha256.Sum256(out.Bytes()); blob.ID != hex.EncodeToString(sum[:]) || blob.CompressedSize != uint64(out.Len()) {
					t.Errorf("blob %s of %d bytes, want %x of %d", blob.ID, blob.CompressedSize, sum, out.Len())
				}
				if blob.UncompressedSize != 4096*(1+1+1+2+2+2) || blob.ChunkCount != 6 {
					t.Errorf("uncompressed size %d, %d chunks", blob.UncompressedSize, blob.ChunkCount)
				}
				if got := blob.Features&rafs.FeaturePrefetch != 0; got != mark {
					t.Errorf("features %#x, want mark %v", blob.Features, mark)
				}
				if got := blob.Features&rafs.FeatureTOC != 0 && blob.TOCSize == 4*128+512; got != toc {
					t.Errorf("features %#x, TOC of %d, want TOC %v", blob.Features, blob.TOCSize, toc)
				}
				reader, err := rafs.OpenBlob(bytes.NewReader(out.Bytes()), blob)
				must(t, err)
				for i, c := range chunks {
					p, err := reader.ReadChunk(context.Background(), c)
					if err != nil || !bytes.Equal(p, contents[i]) {
						t.Errorf("chunk %d = %d bytes, %v", i, len(p), err)
					}
					p, err = reader.ReadStored(context.Background(), c)
					if err != nil || !bytes.Equal(p, contents[i]) {
						t.Errorf("stored chunk %d = %d bytes, %v", i, len(p), err)
					}
				}
				if _, err := w.Append(encoded(rafs.DigesterBLAKE3, contents[0])); err == nil {
					t.Error("Append after Close succeeded")
				}
				if _, err := w.Close(); err == nil {
					t.Error("second Close succeeded")
				}
			})
		}
	}
}

func TestBlobWriterRefuses(t *testing.T) {
	t.Parallel()
	for _, o := range []rafs.BlobOptions{{ChunkSize: 4095}, {ChunkSize: 2048}, {ChunkSize: 32 << 20}, {ChunkSize: 12288}, {BatchSize: 5000}, {BatchSize: 32 << 20}, {ChunkInfoV2: true, ChunkSize: 16 << 20}, {BatchSize: 4096, Version: rafs.V5}, {Compressor: 8}, {Digester: 3}} {
		if _, err := rafs.NewBlobWriter(io.Discard, o); !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrUnsupported) {
			t.Errorf("NewBlobWriter(%+v) = %v", o, err)
		}
	}
	var out counter
	w, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Compressor: rafs.CompressorZstd, ChunkSize: 4096})
	must(t, err)
	for name, c := range map[string]rafs.EncodedChunk{
		"empty":              {},
		"too large":          {Data: make([]byte, 4097), UncompressedSize: 4097},
		"raw of other size":  {Data: make([]byte, 10), UncompressedSize: 11},
		"compressed not":     {Data: make([]byte, 10), UncompressedSize: 10, Compressed: true},
		"compressed nothing": {UncompressedSize: 10, Compressed: true},
	} {
		if _, err := w.Append(c); !errors.Is(err, rafs.ErrInvalid) {
			t.Errorf("%s: Append = %v, want ErrInvalid", name, err)
		}
	}
	if _, err := w.Close(); !errors.Is(err, rafs.ErrNoChunks) || out != 0 {
		t.Errorf("Close without chunks = %v after %d bytes, want ErrNoChunks after 0", err, out)
	}
	none, err := rafs.NewBlobWriter(io.Discard, rafs.BlobOptions{})
	must(t, err)
	if _, err := none.Append(rafs.EncodedChunk{Data: []byte{1}, UncompressedSize: 2, Compressed: true}); !errors.Is(err, rafs.ErrInvalid) {
		t.Errorf("compressed chunk in a blob of none: %v", err)
	}
}

// TestBlobWriterDiesOnError: after a write error nothing more is written and every call says so.
func TestBlobWriterDiesOnError(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 50, 150, 600, 700, 5000} {
		w, err := rafs.NewBlobWriter(&failingWriter{n}, rafs.BlobOptions{TOC: true})
		must(t, err)
		_, first := w.Append(encoded(rafs.DigesterBLAKE3, bytes.Repeat([]byte("a"), 100)))
		if (first != nil) != (n < 100) {
			t.Errorf("after %d bytes: Append = %v", n, first)
		}
		if _, err := w.Close(); !errors.Is(err, errDiskFull) {
			t.Errorf("after %d bytes: Close = %v, want disk full", n, err)
		}
		if _, err := w.Append(encoded(rafs.DigesterBLAKE3, []byte("b"))); !errors.Is(err, errDiskFull) {
			t.Errorf("after %d bytes: Append after Close = %v, want disk full", n, err)
		}
	}
}

func TestReadChunkRefuses(t *testing.T) {
	t.Parallel()
	for _, c := range []rafs.Compressor{rafs.CompressorNone, rafs.CompressorLZ4, rafs.CompressorZstd} {
		b := newBuilder(t, combo{compressor: c, chunkSize: 4096})
		f := b.file("f", 0, bytes.Repeat([]byte("content "), 500))
		s := b.build()
		good := f.Chunks[0]
		blob := b.img.Blobs[0]
		r, err := s.reader(blob)
		must(t, err)
		for name, change := range map[string]func(c *rafs.Chunk){
			"size 0":         func(c *rafs.Chunk) { c.UncompressedSize = 0 },
			"size above":     func(c *rafs.Chunk) { c.UncompressedSize = 4097 },
			"size less":      func(c *rafs.Chunk) { c.UncompressedSize-- },
			"size more":      func(c *rafs.Chunk) { c.UncompressedSize++ },
			"stored 0":       func(c *rafs.Chunk) { c.CompressedSize = 0 },
			"stored more":    func(c *rafs.Chunk) { c.CompressedSize = 1 << 30 },
			"offset":         func(c *rafs.Chunk) { c.CompressedOffset = 1 << 40 },
			"offset wraps":   func(c *rafs.Chunk) { c.CompressedOffset = ^uint64(0) },
			"into the table": func(c *rafs.Chunk) { c.CompressedOffset = blob.MetaOffset },
			"other form":     func(c *rafs.Chunk) { c.Compressed = !c.Compressed },
		} {
			if c == rafs.CompressorNone && name == "other form" {
				continue // the same bytes either way
			}
			bad := good
			change(&bad)
			p, err := r.ReadChunk(context.Background(), bad)
			if !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrDigest) || p != nil {
				t.Errorf("%v, %s: ReadChunk = %d bytes, %v, want ErrInvalid", c, name, len(p), err)
			}
		}
		bad := good
		bad.Digest[0]++
		if _, err := r.ReadChunk(context.Background(), bad); !errors.Is(err, rafs.ErrDigest) || !strings.Contains(err.Error(), bad.Digest.String()) {
			t.Errorf("%v: wrong digest: %v, want ErrDigest with both digests", c, err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := r.ReadChunk(ctx, good); !errors.Is(err, context.Canceled) {
			t.Errorf("%v: cancelled: %v", c, err)
		}
		short, err := rafs.OpenBlob(bytes.NewReader(s.blobs[blob.ID][:good.CompressedSize-1]), blob)
		must(t, err)
		if _, err := short.ReadChunk(context.Background(), good); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v: short blob: %v, want unexpected EOF", c, err)
		}
	}
}

func TestOpenBlobRefuses(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	b.build()
	for _, feature := range []uint32{0x4 | 0x8, 0x100 | 0x4, 0x800, 0x80 | 0x4 | 0x10} {
		blob := b.img.Blobs[0]
		blob.Features |= feature
		blob.MetaUncompressed = uint64(blob.ChunkCount) * 24
		if r, err := rafs.OpenBlob(bytes.NewReader(nil), blob); !errors.Is(err, rafs.ErrUnsupported) || r != nil {
			t.Errorf("OpenBlob with feature %#x = %v, want ErrUnsupported", feature, err)
		}
	}
}

// TestFlippedByteIsFound flips bytes of the chunk data: reads and Check must both see it.
func TestFlippedByteIsFound(t *testing.T) {
	t.Parallel()
	for _, o := range []combo{
		{compressor: rafs.CompressorNone, chunkSize: 4096},
		{compressor: rafs.CompressorLZ4, chunkSize: 4096, digester: rafs.DigesterSHA256},
		{compressor: rafs.CompressorZstd, chunkSize: 4096, toc: true},
		{compressor: rafs.CompressorZstd, chunkSize: 4096, v2: true},
		{compressor: rafs.CompressorGzip, chunkSize: 4096, toc: true},
		{compressor: rafs.CompressorZstd, chunkSize: 4096, batch: 16 << 10, toc: true},
		{compressor: rafs.CompressorNone, chunkSize: 4096, batch: 8 << 10},
	} {
		t.Run(o.String(), func(t *testing.T) {
			t.Parallel()
			b, files := smallImage(t, o)
			s := b.build()
			blob := b.img.Blobs[0]
			r := rand.New(rand.NewPCG(2, 2))
			good := s.blobs[blob.ID]
			for range 200 {
				at := r.IntN(len(good))
				p := bytes.Clone(good)
				p[at] ^= 1 << r.UintN(8)
				s.blobs[blob.ID] = p
				if _, err := s.check(rafs.CheckOptions{Data: true, Workers: 2}); err == nil {
					t.Errorf("Check does not see byte %d of %d changed", at, len(good))
				}
				if uint64(at) >= blob.MetaOffset-512 {
					continue
				}
				fsys := s.open(t).FS(s.reader)
				failed := 0
				for name, want := range files {
					got, err := fsys.ReadFile(name)
					switch {
					case errors.Is(err, rafs.ErrDigest), errors.Is(err, rafs.ErrInvalid):
						failed++
					case err != nil || !bytes.Equal(got, want):
						t.Errorf("ReadFile(%s) with byte %d changed = %d bytes, %v", name, at, len(got), err)
					}
				}
				// A compressed form may hold bits without meaning; then all bytes are right.
				if failed == 0 && o.compressor == rafs.CompressorNone {
					t.Errorf("byte %d changed, and every file reads well", at)
				}
			}
		})
	}
}

// TestAppendBatch stores batches that were compressed elsewhere, among other chunks.
func TestAppendBatch(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	o := rafs.BlobOptions{Compressor: rafs.CompressorZstd, ChunkSize: 64 << 10, BatchSize: 256 << 10, TOC: true}
	w, err := rafs.NewBlobWriter(&out, o)
	must(t, err)
	enc, err := rafs.NewEncoder(o.Compressor, rafs.LevelBest)
	must(t, err)
	r := newRand(9)
	var chunks []rafs.Chunk
	var contents [][]byte
	single := func(n int) {
		p := content(r, n)
		p[0] = byte(len(contents))
		c, err := w.Append(encoded(o.Digester, p))
		must(t, err)
		chunks, contents = append(chunks, c), append(contents, p)
	}
	batch := func(sizes ...int) {
		var raw []byte
		var e rafs.EncodedBatch
		for _, n := range sizes {
			p := content(r, n)
			p[0] = byte(len(contents))
			raw, contents = append(raw, p...), append(contents, p)
			e.Chunks = append(e.Chunks, rafs.BatchedChunk{Digest: o.Digester.Sum(p), UncompressedSize: uint32(n)})
		}
		var err error
		e.Data, e.Compressed, err = enc.Encode(nil, raw)
		must(t, err)
		list, err := w.AppendBatch(e)
		must(t, err)
		chunks = append(chunks, list...)
		if again, err := w.AppendBatch(e); err != nil || again[0] != list[0] {
			t.Errorf("the same batch again = %v, %v", again, err)
		}
	}
	single(100)
	batch(64<<10, 64<<10, 5, 30000)
	single(64 << 10)
	single(7)
	batch(1)
	batch(64<<10, 64<<10, 64<<10, 64<<10, 64<<10)
	blob, err := w.Close()
	must(t, err)
	reader, err := rafs.OpenBlob(bytes.NewReader(out.Bytes()), blob)
	must(t, err)
	if int(blob.ChunkCount) != len(chunks) {
		t.Errorf("%d chunks, want %d", blob.ChunkCount, len(chunks))
	}
	for _, i := range newRand(3).Perm(len(chunks)) {
		if p, err := reader.ReadChunk(t.Context(), chunks[i]); err != nil || !bytes.Equal(p, contents[i]) {
			t.Errorf("chunk %d = %d bytes, %v", i, len(p), err)
		}
	}
	for name, e := range map[string]rafs.EncodedBatch{
		"closed":    {Chunks: []rafs.BatchedChunk{{UncompressedSize: 1}}, Data: []byte{1}},
		"too large": {Chunks: make([]rafs.BatchedChunk, 1), Data: []byte{1}},
	} {
		if _, err := w.AppendBatch(e); err == nil {
			t.Errorf("%s: AppendBatch succeeded", name)
		}
	}
}

func TestAppendBatchRefuses(t *testing.T) {
	t.Parallel()
	plain, err := rafs.NewBlobWriter(io.Discard, rafs.BlobOptions{})
	must(t, err)
	one := []rafs.BatchedChunk{{UncompressedSize: 10}}
	if _, err := plain.AppendBatch(rafs.EncodedBatch{Chunks: one, Data: make([]byte, 10)}); !errors.Is(err, rafs.ErrUnsupported) {
		t.Errorf("AppendBatch without a batch size = %v, want ErrUnsupported", err)
	}
	w, err := rafs.NewBlobWriter(io.Discard, rafs.BlobOptions{ChunkSize: 4096, BatchSize: 4096, Compressor: rafs.CompressorLZ4})
	must(t, err)
	for name, e := range map[string]rafs.EncodedBatch{
		"no chunks":      {Data: []byte{1}},
		"empty chunk":    {Chunks: []rafs.BatchedChunk{{}}},
		"large chunk":    {Chunks: []rafs.BatchedChunk{{UncompressedSize: 4097}}, Data: make([]byte, 4097)},
		"short":          {Chunks: one, Data: make([]byte, 9)},
		"not smaller":    {Chunks: one, Data: make([]byte, 10), Compressed: true},
		"large together": {Chunks: slices.Repeat([]rafs.BatchedChunk{{UncompressedSize: 4096}}, 4097), Data: []byte{1}, Compressed: true},
	} {
		if _, err := w.AppendBatch(e); !errors.Is(err, rafs.ErrInvalid) {
			t.Errorf("%s: AppendBatch = %v, want ErrInvalid", name, err)
		}
	}
}

// TestLargestChunk stores chunks of exactly 16 MiB that do not compress: 2^24 bytes do not fit into a V2 record's size.
func TestLargestChunk(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]rafs.BlobOptions{
		"V1":    {Compressor: rafs.CompressorZstd, ChunkSize: 16 << 20},
		"V5":    {Compressor: rafs.CompressorZstd, ChunkSize: 16 << 20, Version: rafs.V5},
		"batch": {Compressor: rafs.CompressorZstd, ChunkSize: 16 << 20, BatchSize: 64 << 10},
	} {
		var out bytes.Buffer
		w, err := rafs.NewBlobWriter(&out, o)
		must(t, err)
		p := randomBytes(newRand(1), 16<<20)
		c, err := w.Append(encoded(o.Digester, p))
		must(t, err)
		b, err := w.Close()
		must(t, err)
		r, err := rafs.OpenBlob(bytes.NewReader(out.Bytes()), b)
		must(t, err)
		if got, err := r.ReadChunk(t.Context(), c); err != nil || !bytes.Equal(got, p) {
			t.Errorf("%s: chunk = %d bytes, %v", name, len(got), err)
		}
	}
}
