package rafs_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

// bigRefLayer is a gzip layer whose table has more than 4 MiB: from there on tables are not held in memory. Every piece of
// half a megabyte has a dictionary, of noise or of words.
func bigRefLayer(t *testing.T, noise bool) []byte {
	t.Helper()
	const size = 70 << 20
	r := newRand(5)
	p := make([]byte, size)
	for i := 0; i < size; i += 8 {
		v := r.Uint64()
		if !noise {
			v = v&0x0707070707070707 | 0x6060606060606060
		}
		for j := range 8 {
			p[i+j] = byte(v >> (8 * j))
		}
	}
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	must(t, tw.WriteHeader(&tar.Header{Name: "big", Typeflag: tar.TypeReg, Mode: 0o644, Size: size}))
	_, err := tw.Write(p)
	must(t, err)
	must(t, tw.Close())
	return gzipped(t, out.Bytes(), 0, 0)
}

func scratchFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

// TestRefBigTable writes and reads tables that go through a file, compressed and not, and lets the real tools judge them.
func TestRefBigTable(t *testing.T) {
	testenv.Root(t)
	if raceEnabled {
		t.Skip("skipped under the race detector: 70 MB of data, read many times by one goroutine")
	}
	for name, noise := range map[string]bool{"words": false, "noise": true} {
		t.Run(name, func(t *testing.T) {
			layer := bigRefLayer(t, noise)
			o := rafs.RefOptions{ChunkSize: 64 << 10, Digester: rafs.DigesterSHA256, TOC: true, Scratch: scratchFile(t)}
			s := refer(t, layer, o)
			blob := s.open(t).Blobs[0]
			if blob.MetaUncompressed < 4<<20 {
				t.Fatalf("a table of %d bytes: too small for this test", blob.MetaUncompressed)
			}
			o.Scratch = nil
			if again := refer(t, layer, o); !bytes.Equal(s.bootstrap, again.bootstrap) {
				t.Error("with memory in place of a file the image is another")
			}
			if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
				t.Error(err)
			}
			checkSpilling(t, s, blob)
			t.Run("read", func(t *testing.T) { readBigTable(t, s, blob) })
			t.Run("damage", func(t *testing.T) { damageBigTable(t, s, blob) })
			t.Run("nydus-image", s.checkNydus)
			t.Run("nydusd", s.compareNydusd)
		})
	}
}

// checkSpilling checks with room for the dictionaries, which go there, and with one that has none left.
func checkSpilling(t *testing.T, s *stored, blob rafs.Blob) {
	room := &closedScratch{}
	o := rafs.CheckOptions{Data: true, Scratch: func() (rafs.Scratch, error) { return room, nil }}
	if _, err := s.check(o); err != nil {
		t.Error(err)
	}
	if least := int(blob.MetaUncompressed / 2); room.buf.Len() < least || room.closed != 1 {
		t.Errorf("%d bytes were put by, want at least %d; closed %d times", room.buf.Len(), least, room.closed)
	}
	o.Scratch = func() (rafs.Scratch, error) { return &brokenScratch{room: 1 << 20}, nil }
	if _, err := s.check(o); !errors.Is(err, errScratch) {
		t.Errorf("with a full disk: %v, want %v", err, errScratch)
	}
	o.Scratch = func() (rafs.Scratch, error) { return nil, errScratch }
	if _, err := s.check(o); !errors.Is(err, errScratch) {
		t.Errorf("without a file: %v, want %v", err, errScratch)
	}
}

// closedScratch is memory that counts how often it is closed.
type closedScratch struct {
	brokenScratch
	closed int
}

func (s *closedScratch) Write(p []byte) (int, error) { return s.buf.Write(p) }

func (s *closedScratch) Close() error {
	s.closed++
	return nil
}

// readBigTable reads chunks in any order, with the dictionaries in memory and in a file, and the table as it is kept in caches.
func readBigTable(t *testing.T, s *stored, blob rafs.Blob) {
	img := s.open(t)
	chunks := img.BlobChunks(0)
	for _, spill := range []bool{false, true} {
		r, err := s.reader(blob)
		must(t, err)
		if spill {
			r.Spill(scratchFile(t))
		}
		for i := range 40 {
			c := chunks[(i*7919)%len(chunks)]
			if _, err := r.ReadChunk(t.Context(), c); err != nil {
				t.Fatalf("chunk %d, dictionaries in a file: %v: %v", c.Index, spill, err)
			}
		}
		var cached bytes.Buffer
		n, err := r.CopyTable(&cached)
		if want := int64(blob.MetaUncompressed+4095)/4096*4096 + 4096; err != nil || n != want || int64(cached.Len()) != want {
			t.Errorf("CopyTable = %d, %v and %d bytes, want %d", n, err, cached.Len(), want)
		}
	}
}

// damageBigTable damages the table: it is refused or not believed.
func damageBigTable(t *testing.T, s *stored, blob rafs.Blob) {
	meta, _ := blob.MetaBlob()
	whole := s.blobs[meta.ID]
	defer func() { s.blobs[meta.ID] = whole }()
	for _, at := range []uint64{0, 5, blob.MetaCompressed / 2, blob.MetaCompressed - 1, blob.MetaCompressed + 50} {
		bad := bytes.Clone(whole)
		bad[blob.MetaOffset+at] ^= 0x41
		s.blobs[meta.ID] = bad
		if _, err := s.check(rafs.CheckOptions{Data: true}); !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrDigest) {
			t.Errorf("byte %d of the table: %v", at, err)
		}
	}
	s.blobs[meta.ID] = whole[:blob.MetaOffset+blob.MetaCompressed/2]
	if _, err := s.check(rafs.CheckOptions{}); err == nil {
		t.Error("half a table is accepted")
	}
}

// brokenScratch takes so many bytes.
type brokenScratch struct {
	buf  bytes.Buffer // no field of which methods are ours: it would read past Write
	room int
}

var errScratch = errors.New("no room")

func (s *brokenScratch) Write(p []byte) (int, error) {
	if s.room -= len(p); s.room < 0 {
		return 0, errScratch
	}
	return s.buf.Write(p)
}

func (s *brokenScratch) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(s.buf.Bytes()).ReadAt(p, off)
}

// TestRefScratchFails: a full disk fails the blob, whenever it is full.
func TestRefScratchFails(t *testing.T) {
	t.Parallel()
	layer, _ := refLayer(t)
	z := gzipped(t, layer, 6, 0)
	for _, room := range []int{0, 40 << 10} {
		rb, err := rafs.NewRefBuilder(bytes.NewReader(z), rafs.RefOptions{ChunkSize: 4096, Scratch: &brokenScratch{room: room}})
		must(t, err)
		for err == nil {
			p := make([]byte, 4096)
			must(t, rb.Begin(uint32(len(p))))
			if _, err = io.ReadFull(rb, p); err != nil {
				t.Fatalf("with room for %d bytes nothing fails: %v", room, err)
			}
			var place rafs.RefPlace
			if place, err = rb.End(); err == nil {
				_, err = rb.Append(place, rafs.DigesterBLAKE3.Sum(p))
			}
		}
		if !errors.Is(err, errScratch) {
			t.Errorf("room for %d bytes: %v, want %v", room, err, errScratch)
		}
	}
}
