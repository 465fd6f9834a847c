package unpack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/headstart-oci/headstart/pkg/rafs"
)

// tree returns an image of n files with two chunks each; every third is there under two names.
func tree(n int) *rafs.Image {
	root := &rafs.Inode{Mode: typeDir | 0o755}
	for i := range n {
		ino := &rafs.Inode{Mode: typeFile | 0o644, Size: 2 << 20}
		for j := range 2 {
			ino.Chunks = append(ino.Chunks, rafs.Chunk{Index: uint32(2*i + j), UncompressedSize: 1 << 20})
		}
		names := []string{"a"}
		if i%3 == 0 {
			names = append(names, "b")
		}
		for _, suffix := range names {
			root.Children = append(root.Children, rafs.Dirent{Name: string([]byte{'0' + byte(i/100), '0' + byte(i/10%10), '0' + byte(i%10)}) + suffix, Inode: ino})
		}
	}
	return &rafs.Image{Root: root}
}

// TestAhead reads every chunk once, in order, and never much more than is asked for.
func TestAhead(t *testing.T) {
	t.Parallel()
	img := tree(40)
	var reads, used atomic.Int64
	src := Source{Image: img, Read: func(_ context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error {
		if n := reads.Add(1); n-used.Load() > maxAhead>>20+1 {
			t.Errorf("chunk %d is read when %d are used", n, used.Load())
		}
		buf.Raw = bytes.Repeat([]byte{byte(c.Index)}, int(c.UncompressedSize))
		return nil
	}}
	a := readAhead(t.Context(), src)
	defer a.stop()
	for ino := range files(t.Context(), img) {
		for _, c := range ino.Chunks {
			p, err := a.read(t.Context(), c)
			if err != nil || len(p) != 1<<20 || p[0] != byte(c.Index) {
				t.Fatalf("read(%d) = %d bytes, %v", c.Index, len(p), err)
			}
			used.Add(1)
		}
	}
	if reads.Load() != 80 || a.lost {
		t.Errorf("%d reads, want 80 in order", reads.Load())
	}
}

// TestAheadOutOfOrder asks for other chunks than were expected, and stops in the middle.
func TestAheadOutOfOrder(t *testing.T) {
	t.Parallel()
	img := tree(40)
	broken := errors.New("broken")
	src := Source{Image: img, Read: func(_ context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error {
		if c.Index == 7 {
			return broken
		}
		buf.Raw = []byte{byte(c.Index)}
		return nil
	}}
	a := readAhead(t.Context(), src)
	for _, i := range []uint32{0, 1, 5, 2, 7} {
		p, err := a.read(t.Context(), rafs.Chunk{Index: i, UncompressedSize: 1 << 20})
		if i == 7 && !errors.Is(err, broken) || i != 7 && (err != nil || p[0] != byte(i)) {
			t.Errorf("read(%d) = %v, %v", i, p, err)
		}
	}
	a.stop()
	ctx, cancel := context.WithCancel(t.Context())
	a = readAhead(ctx, src)
	cancel()
	a.stop()
	// A directory in itself has no end.
	loop := &rafs.Inode{Mode: typeDir | 0o755}
	loop.Children = []rafs.Dirent{{Name: "a", Inode: loop}, {Name: "b", Inode: loop}}
	a = readAhead(t.Context(), Source{Image: &rafs.Image{Root: loop}, Read: src.Read})
	a.stop()
}

// TestAheadBatches reads chunks of sizes that share a batch, fill one, or are more than one holds: each has its own
// bytes when its turn comes, and a chunk that cannot be read fails when it is asked for, not before.
func TestAheadBatches(t *testing.T) {
	t.Parallel()
	sizes := []uint32{1, maxBatch - 1, 1, maxBatch, maxBatch + 1, 7, maxKept, 9, maxKept + 1, 9, 9}
	root := &rafs.Inode{Mode: typeDir | 0o755}
	var chunks []rafs.Chunk
	for i := range 4000 {
		size := uint32(i%97 + 1)
		if i%300 < len(sizes) {
			size = sizes[i%300]
		}
		c := rafs.Chunk{Index: uint32(i), UncompressedSize: size}
		chunks = append(chunks, c)
		ino := &rafs.Inode{Mode: typeFile | 0o644, Size: uint64(size), Chunks: []rafs.Chunk{c}}
		root.Children = append(root.Children, rafs.Dirent{Name: fmt.Sprintf("%05d", i), Inode: ino})
	}
	broken := errors.New("broken")
	const bad = 3500
	src := Source{Image: &rafs.Image{Root: root}, Read: func(_ context.Context, c rafs.Chunk, buf *rafs.ChunkBuffer) error {
		if c.Index == bad {
			return broken
		}
		if cap(buf.Raw) < int(c.UncompressedSize) {
			buf.Raw = make([]byte, c.UncompressedSize)
		}
		buf.Raw = buf.Raw[:c.UncompressedSize]
		for i := range buf.Raw {
			buf.Raw[i] = byte(c.Index % 251)
		}
		return nil
	}}
	a := readAhead(t.Context(), src)
	defer a.stop()
	for _, c := range chunks[:bad] {
		p, err := a.read(t.Context(), c)
		if err != nil || len(p) != int(c.UncompressedSize) || bytes.Count(p, []byte{byte(c.Index % 251)}) != len(p) {
			t.Fatalf("read(%d) = %d bytes, %v, want %d of %d", c.Index, len(p), err, c.UncompressedSize, c.Index%251)
		}
	}
	if p, err := a.read(t.Context(), chunks[bad]); !errors.Is(err, broken) || p != nil || a.lost {
		t.Errorf("read(%d) = %d bytes, %v, want %v", bad, len(p), err, broken)
	}
	// In the middle of a batch another chunk than the next is asked for.
	if p, err := a.read(t.Context(), chunks[20]); err != nil || len(p) != int(chunks[20].UncompressedSize) || !a.lost {
		t.Errorf("read(20) = %d bytes, %v", len(p), err)
	}
}
