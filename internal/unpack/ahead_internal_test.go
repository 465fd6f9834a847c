package unpack

import (
	"bytes"
	"context"
	"errors"
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
	src := Source{Image: img, Read: func(_ context.Context, c rafs.Chunk) ([]byte, error) {
		if n := reads.Add(1); n-used.Load() > maxAhead>>20+1 {
			t.Errorf("chunk %d is read when %d are used", n, used.Load())
		}
		return bytes.Repeat([]byte{byte(c.Index)}, int(c.UncompressedSize)), nil
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
	src := Source{Image: img, Read: func(_ context.Context, c rafs.Chunk) ([]byte, error) {
		if c.Index == 7 {
			return nil, broken
		}
		return []byte{byte(c.Index)}, nil
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
