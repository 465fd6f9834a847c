package builder

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/headstart-oci/headstart/pkg/builder/internal/gunzip"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// textTar is a tar of files of many sizes, some of them compressible, and its members' content.
func textTar(t *testing.T) []byte {
	t.Helper()
	r := rand.New(rand.NewPCG(5, 6))
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for i := range 60 {
		data := make([]byte, 0, 1<<20)
		for n := r.IntN(1 << r.IntN(21)); len(data) < n; {
			if r.IntN(8) == 0 {
				data = append(data, byte(r.IntN(256)))
			}
			data = fmt.Appendf(data, "%d times %d; ", r.IntN(50), r.IntN(50))
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i), Size: int64(len(data)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestMatchesOfPieces cuts a gzip layer into chunks as a conversion does: what is known of each chunk
// is true, and covers most of it.
func TestMatchesOfPieces(t *testing.T) {
	t.Parallel()
	plain := textTar(t)
	var stored bytes.Buffer
	z := gzip.NewWriter(&stored)
	if _, err := z.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := openLayer(t.Context(), Layer{
		Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(stored.Bytes()), Size: int64(stored.Len())},
		DiffID:     digest.FromBytes(plain),
		Open:       func(context.Context) (io.ReadCloser, error) { return io.NopCloser(&stored), nil },
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const chunk = 64 << 10
	free := newBatches(1, 1)
	c := chunker{chunkSize: chunk, free: free, order: make(chan *batch, cap(free)), stream: s, pool: &pool{jobs: make(chan job, 1)}}
	var size, covered int
	c.flushed = func() {
		<-c.pool.jobs
		b := <-c.order
		n, m := verifyPieces(t, b)
		size, covered = size+n, covered+m
		c.free <- b
	}
	if err := (&layerReader{tree: newTree(), sink: &c, chunkSize: chunk}).read(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := c.flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if size == 0 || covered < size*8/10 {
		t.Errorf("matches cover %d of %d bytes, want 8 of 10", covered, size)
	}
}

// verifyPieces returns the bytes of b and how many of them its matches cover.
func verifyPieces(t *testing.T, b *batch) (size, covered int) {
	t.Helper()
	for i, p := range b.pieces {
		src := b.raw[p.off : p.off+p.n]
		size += p.n
		for _, m := range b.matchesOf(i) {
			for at := int(m.Pos); at < int(m.Pos)+int(m.Length); at++ {
				// What reaches behind the chunk is known, and of no use.
				if from := at - int(m.Back); from >= 0 && src[from] != src[at] {
					t.Fatalf("piece %d: match %+v is no repetition", i, m)
				}
			}
			covered += int(m.Length)
		}
	}
	return size, covered
}

// TestMatchLogBounds fills the log: the chunk that it could not hold has no matches, later ones do.
func TestMatchLogBounds(t *testing.T) {
	t.Parallel()
	var l matchLog
	l.keep(100)
	one := func(pos int64) { l.add(pos, []gunzip.Match{{Length: 3, Back: 1}}) }
	for i := range int64(maxLogged) {
		one(100 + 3*i)
	}
	room := make([]rafs.Match, 0, 2*maxLogged)
	if got := len(l.appendTo(room, 3*maxLogged)); got != maxLogged {
		t.Errorf("a full log gives %d matches, want %d", got, maxLogged)
	}
	one(100 + 3*maxLogged)
	if got := len(l.appendTo(room, 3*maxLogged+3)); got != 0 {
		t.Errorf("a log that dropped a match of the chunk gives %d, want none", got)
	}
	l.keep(101 + 3*maxLogged)
	one(110 + 3*maxLogged)
	if got := l.appendTo(room, 100); len(got) != 1 || got[0].Pos != 9 {
		t.Errorf("after the chunk: %+v, want one match at 9", got)
	}
	if got := l.appendTo(make([]rafs.Match, 0), 100); len(got) != 0 {
		t.Errorf("%d matches where there is no room", len(got))
	}
}
