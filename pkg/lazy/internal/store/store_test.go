package store_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/lazy/internal/store"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// dup returns another descriptor of a file, as one that a process keeps for the next one.
func dup(t testing.TB, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	return os.NewFile(uintptr(fd), f.Name())
}

// layout returns a blob with chunks of the given sizes, one behind the other, and their bytes.
func layout(sizes ...int) (rafs.Blob, []rafs.Chunk, [][]byte) {
	b := rafs.Blob{ID: strings.Repeat("ab", 32), Digester: rafs.DigesterSHA256}
	rnd := rand.New(rand.NewPCG(1, uint64(len(sizes))))
	var chunks []rafs.Chunk
	var data [][]byte
	for i, size := range sizes {
		p := make([]byte, size)
		for j := range p {
			p[j] = byte(rnd.Uint32())
		}
		data = append(data, p)
		chunks = append(chunks, rafs.Chunk{
			Digest: b.Digester.Sum(p), Index: uint32(i), UncompressedOffset: b.UncompressedSize, UncompressedSize: uint32(size),
			CompressedOffset: uint64(i) * 100, CompressedSize: 100, Compressed: i%2 == 0, Batch: i%3 == 0,
		})
		b.UncompressedSize += uint64(size+store.BlockSize-1) / store.BlockSize * store.BlockSize
	}
	return b, chunks, data
}

func open(t testing.TB, dir string, o store.Options) *store.Store {
	t.Helper()
	s, err := store.Open(dir, o)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func openBlob(t testing.TB, s *store.Store, b rafs.Blob, chunks []rafs.Chunk) *store.Blob {
	t.Helper()
	blob, err := s.OpenBlob(b, chunks)
	must(t, err)
	return blob
}

// holds compares what the data file has with what is ready, and fails on a chunk that is neither.
func holds(t testing.TB, b *store.Blob, chunks []rafs.Chunk, data [][]byte) (ready int) {
	t.Helper()
	for i, c := range chunks {
		if !b.Ready(c) {
			continue
		}
		ready++
		p := make([]byte, len(data[i]))
		if _, err := b.File().ReadAt(p, int64(c.UncompressedOffset)); err != nil || !bytes.Equal(p, data[i]) {
			t.Errorf("chunk %d is ready and has other bytes (%v)", i, err)
		}
	}
	return ready
}

func TestPut(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	sizes := []int{1, 4095, 4096, 4097, 300_000, 64 * 4096, 65 * 4096, 5}
	b, chunks, data := layout(sizes...)
	blob := openBlob(t, s, b, chunks)
	if blob.Size() != int64(b.UncompressedSize) || blob.Total() != blob.Size() || blob.Local() != 0 || blob.Complete() {
		t.Errorf("new blob: size %d, total %d, local %d, complete %t; want %d, the same, 0, false", blob.Size(), blob.Total(), blob.Local(), blob.Complete(), b.UncompressedSize)
	}
	local := int64(0)
	for n, i := range []int{7, 0, 3, 2, 1, 6, 5, 4} {
		c := chunks[i]
		if blob.Ready(c) || blob.ReadyRange(int64(c.UncompressedOffset)+int64(c.UncompressedSize)-1, 1) {
			t.Errorf("chunk %d is ready before Put", i)
		}
		got, err := blob.Missing(int64(c.UncompressedOffset), 1)
		if err != nil || len(got) != 1 || got[0] != c {
			t.Errorf("Missing at chunk %d = %v, %v, want it", i, got, err)
		}
		must(t, blob.Put(c, data[i]))
		must(t, blob.Put(c, data[i])) // once more is no harm
		local += int64(len(data[i])+4095) / 4096 * 4096
		if !blob.Ready(c) || blob.Local() != local || blob.Complete() != (n == len(sizes)-1) {
			t.Errorf("after chunk %d: ready %t, local %d, complete %t; want true, %d, %t", i, blob.Ready(c), blob.Local(), blob.Complete(), local, n == len(sizes)-1)
		}
		info, err := blob.File().Stat()
		must(t, err)
		if end := int64(c.UncompressedOffset) + int64(len(data[i])+4095)/4096*4096; info.Size() < end {
			t.Errorf("data file has %d bytes, chunk %d ends its block at %d", info.Size(), i, end)
		}
	}
	select {
	case <-blob.Done():
	default:
		t.Error("complete, and Done is not closed")
	}
	if n := holds(t, blob, chunks, data); n != len(chunks) {
		t.Errorf("%d chunks are ready, want %d", n, len(chunks))
	}
	if got, err := blob.Missing(0, blob.Size()); err != nil || len(got) != 0 {
		t.Errorf("Missing of a complete blob = %v, %v", got, err)
	}
}

func TestChunksOfRanges(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, _ := layout(4096, 100_000, 4096, 8192)
	blob := openBlob(t, s, b, append(chunks[:2:2], chunks[3])) // the third is a gap
	for _, c := range []struct {
		name           string
		offset, length int64
		want           []uint32
	}{
		{"all", 0, blob.Size(), []uint32{0, 1, 3}},
		{"more than all", 0, 1 << 62, []uint32{0, 1, 3}},
		{"first byte", 0, 1, []uint32{0}},
		{"last byte of the first", 4095, 1, []uint32{0}},
		{"over the border", 4095, 2, []uint32{0, 1}},
		{"inside", 50_000, 1, []uint32{1}},
		{"from inside", 50_000, 100_000, []uint32{1, 3}},
		{"the padding behind a chunk belongs to its block", 4096 + 100_000, 1, []uint32{1}},
		{"gap", int64(chunks[2].UncompressedOffset), 4096, nil},
		{"gap and a byte", int64(chunks[2].UncompressedOffset), 4097, []uint32{3}},
		{"last byte", blob.Size() - 1, 1, []uint32{3}},
		{"nothing", 5, 0, nil},
		{"behind the end", blob.Size(), 1, nil},
		{"before the beginning", -1, 5, nil},
	} {
		got, err := blob.Chunks(c.offset, c.length)
		must(t, err)
		var index []uint32
		for _, g := range got {
			index = append(index, g.Index)
		}
		if len(index) != len(c.want) || len(index) > 0 && !equal(index, c.want) {
			t.Errorf("%s: Chunks(%d, %d) = %v, want %v", c.name, c.offset, c.length, index, c.want)
		}
		if ready := blob.ReadyRange(c.offset, c.length); ready != (len(c.want) == 0) {
			t.Errorf("%s: ReadyRange(%d, %d) = %t", c.name, c.offset, c.length, ready)
		}
	}
}

func equal(a, b []uint32) bool {
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return len(a) == len(b)
}

func TestPutRefuses(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, data := layout(5000, 5000)
	blob := openBlob(t, s, b, chunks)
	if err := blob.Put(chunks[0], data[0][:4999]); err == nil {
		t.Error("Put takes too few bytes")
	}
	c := chunks[0]
	c.UncompressedOffset = 4096
	if err := blob.Put(c, data[0]); !errors.Is(err, store.ErrUnknownChunk) {
		t.Errorf("Put inside a chunk = %v, want ErrUnknownChunk", err)
	}
	c.UncompressedOffset = 1 << 50
	if err := blob.Put(c, data[0]); !errors.Is(err, store.ErrUnknownChunk) {
		t.Errorf("Put behind the end = %v, want ErrUnknownChunk", err)
	}
	if blob.Local() != 0 {
		t.Errorf("Local = %d after refused Puts", blob.Local())
	}
}

func TestConcurrentPuts(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	sizes := make([]int, 200)
	for i := range sizes {
		sizes[i] = 1 + i*97
	}
	b, chunks, data := layout(sizes...)
	blob := openBlob(t, s, b, chunks[:150])
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := range 150 {
				i := (n*7 + w*40) % 150
				if err := blob.Put(chunks[i], data[i]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() { // a second image, and syncs, meanwhile
		more, err := s.OpenBlob(b, chunks)
		if err != nil {
			t.Error(err)
			return
		}
		if more != blob {
			t.Error("the second image has another data file")
		}
		for i := 150; i < 200; i++ {
			if err := errors.Join(more.Put(chunks[i], data[i]), more.Sync()); err != nil {
				t.Error(err)
			}
		}
		if err := more.Close(); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if !blob.Complete() || blob.Local() != blob.Total() || holds(t, blob, chunks, data) != 200 {
		t.Errorf("complete %t, local %d of %d", blob.Complete(), blob.Local(), blob.Total())
	}
}

func TestReopen(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b, chunks, data := layout(5000, 4096, 70_000)
	s, err := store.Open(dir, store.Options{})
	must(t, err)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[2], data[2]))
	must(t, blob.Sync())
	must(t, blob.Put(chunks[0], data[0])) // Close makes it durable
	must(t, s.Close())
	again := openBlob(t, open(t, dir, store.Options{}), b, chunks)
	if n := holds(t, again, chunks, data); n != 2 || again.Ready(chunks[1]) {
		t.Errorf("%d chunks are ready after a restart, want 2", n)
	}
}

// TestKept is a process that died without a word: what was ready stays ready through the kept
// descriptors, though nothing was durable.
func TestKept(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b, chunks, data := layout(5000, 4096, 70_000)
	first, err := store.Open(dir, store.Options{})
	must(t, err)
	blob := openBlob(t, first, b, chunks)
	must(t, blob.Put(chunks[1], data[1]))
	d := blob.Descriptors()
	o := store.Options{Lock: dup(t, first.LockFile()), Kept: map[string]store.Kept{blob.Name(): {Data: dup(t, d.Data), Bits: dup(t, d.Bits)}}}
	if _, err := store.Open(dir, store.Options{}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("second Open = %v, want ErrLocked", err)
	}
	s := open(t, dir, o)
	if err := os.WriteFile(filepath.Join(filepath.Dir(blob.Path()), "chunks"), []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := s.Adopt(blob.Name(), b, chunks)
	must(t, err)
	if n := holds(t, again, chunks, data); n != 1 || !again.Ready(chunks[1]) {
		t.Errorf("%d chunks are ready, want chunk 1", n)
	}
	if _, err := s.Adopt(blob.Name()+".1", b, chunks); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Adopt of what was not kept = %v, want ErrNotExist", err)
	}
	// What nobody adopts is given up, unless it is in use.
	user, err := os.Open(blob.Path())
	must(t, err)
	var unmarked int
	unmark := func(*os.File) error { unmarked++; return nil }
	d = blob.Descriptors()
	third := store.Options{Lock: dup(t, first.LockFile()), Kept: map[string]store.Kept{blob.Name(): {Data: dup(t, d.Data), Bits: dup(t, d.Bits)}}}
	other := open(t, dir, third)
	if err := other.Release(blob.Name(), unmark); !errors.Is(err, store.ErrInUse) || unmarked != 0 || len(other.Unadopted()) != 1 {
		t.Errorf("Release of what is in use = %v, %d times unmarked, want ErrInUse, 0", err, unmarked)
	}
	must(t, user.Close())
	if err := other.Release(blob.Name(), unmark); err != nil || unmarked != 1 || len(other.Unadopted()) != 0 {
		t.Errorf("Release = %v, %d times unmarked, want once", err, unmarked)
	}
	// The first process goes; the lock stays with the second.
	must(t, again.Put(chunks[0], data[0]))
	must(t, first.Close())
	if _, err := store.Open(dir, store.Options{}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("Open while the lock is kept = %v, want ErrLocked", err)
	}
}

func TestSharing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, store.Options{})
	b, chunks, data := layout(5000, 4096, 70_000)
	one := openBlob(t, s, b, chunks[:2])
	must(t, one.Put(chunks[0], data[0]))
	must(t, one.Put(chunks[1], data[1]))
	if !one.Complete() {
		t.Error("not complete")
	}
	two := openBlob(t, s, b, chunks[1:])
	if two != one || one.Complete() || one.Ready(chunks[2]) || !one.Ready(chunks[1]) {
		t.Errorf("second image: same file %t, complete %t", two == one, one.Complete())
	}
	select {
	case <-one.Done():
		t.Error("Done is closed, and the blob is not complete any more")
	default:
	}
	other := append([]rafs.Chunk(nil), chunks...)
	other[1].Digest[0] ^= 1
	three := openBlob(t, s, b, other)
	if three == one || three.Name() != b.ID+".1" || three.Local() != 0 {
		t.Errorf("an image with another chunk at the same place got %s", three.Name())
	}
	smaller := b
	smaller.UncompressedSize += 4096
	if four := openBlob(t, s, smaller, chunks); four.Name() != b.ID+".2" {
		t.Errorf("an image that says another size got %s", four.Name())
	}
	// From disk it is the same.
	must(t, s.Close())
	s = open(t, dir, store.Options{})
	if got := openBlob(t, s, b, other); got.Name() != b.ID+".1" {
		t.Errorf("after a restart the third image got %s", got.Name())
	}
	if got := openBlob(t, s, b, chunks); got.Name() != b.ID || !got.Ready(chunks[0]) {
		t.Errorf("after a restart the first image got %s", got.Name())
	}
}

func TestOpenBlobRefuses(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	good, chunks, _ := layout(5000, 4096)
	for _, c := range []struct {
		name   string
		change func(b *rafs.Blob, c []rafs.Chunk)
		want   error
	}{
		{"an id that is a path", func(b *rafs.Blob, _ []rafs.Chunk) { b.ID = "../x" }, store.ErrUnsupported},
		{"no id", func(b *rafs.Blob, _ []rafs.Chunk) { b.ID = "" }, store.ErrUnsupported},
		{"half a block", func(b *rafs.Blob, _ []rafs.Chunk) { b.UncompressedSize += 512 }, store.ErrUnsupported},
		{"too large", func(b *rafs.Blob, _ []rafs.Chunk) { b.UncompressedSize = 1 << 50 }, store.ErrUnsupported},
		{"a chunk inside a block", func(_ *rafs.Blob, c []rafs.Chunk) { c[1].UncompressedOffset += 512 }, store.ErrUnsupported},
		{"a chunk behind the end", func(_ *rafs.Blob, c []rafs.Chunk) { c[1].UncompressedOffset += 4096 }, rafs.ErrInvalid},
		{"a chunk far behind the end", func(_ *rafs.Blob, c []rafs.Chunk) { c[1].UncompressedOffset = 1<<64 - 4096 }, rafs.ErrInvalid},
		{"overlapping chunks", func(_ *rafs.Blob, c []rafs.Chunk) { c[1].UncompressedOffset = 4096 }, rafs.ErrInvalid},
		{"an empty chunk", func(_ *rafs.Blob, c []rafs.Chunk) { c[1].UncompressedSize = 0 }, rafs.ErrInvalid},
	} {
		b, cs := good, append([]rafs.Chunk(nil), chunks...)
		c.change(&b, cs)
		if got, err := s.OpenBlob(b, cs); got != nil || !errors.Is(err, c.want) {
			t.Errorf("%s: OpenBlob = %v, %v, want %v", c.name, got, err, c.want)
		}
	}
	empty := rafs.Blob{ID: "empty"}
	if b := openBlob(t, s, empty, nil); !b.Complete() || b.Total() != 0 {
		t.Error("a blob without chunks is not complete")
	}
}

// A data file is whole when everything that images need of it is durable, of all of them.
func TestWhole(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, data := layout(4096, 100, 8192, 4096)
	blob := openBlob(t, s, b, chunks[:2])
	whole := func() bool {
		dev, ino, ok := s.Whole(blob.Name())
		if wantDev, wantIno := blob.Inode(); ok && (dev != wantDev || ino != wantIno) {
			t.Errorf("Whole = %d, %d, want %d, %d", dev, ino, wantDev, wantIno)
		}
		return ok
	}
	must(t, blob.Put(chunks[0], data[0]))
	must(t, blob.Sync())
	if whole() {
		t.Error("whole with one of two chunks")
	}
	must(t, blob.Put(chunks[1], data[1]))
	if whole() {
		t.Error("whole before it is durable")
	}
	must(t, blob.Sync())
	if !whole() {
		t.Error("not whole with both chunks durable")
	}
	openBlob(t, s, b, chunks)
	if whole() {
		t.Error("whole though another image uses more of it")
	}
	for i, c := range chunks {
		must(t, blob.Put(c, data[i]))
	}
	must(t, blob.Sync())
	if !whole() {
		t.Error("not whole with all chunks durable")
	}
	for _, name := range []string{"", "none", "..", "../../etc"} {
		if _, _, ok := s.Whole(name); ok {
			t.Errorf("Whole(%q) = true", name)
		}
	}
}

// What is known of a blob at one moment is known after its end.
func TestFreeze(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), store.Options{})
	b, chunks, data := layout(4096, 100, 8192, 4096)
	blob := openBlob(t, s, b, chunks)
	must(t, blob.Put(chunks[2], data[2]))
	early, complete := blob.Freeze()
	if complete {
		t.Error("complete with one of four chunks")
	}
	for _, i := range []int{0, 1, 3} {
		must(t, blob.Put(chunks[i], data[i]))
	}
	late, complete := blob.Freeze()
	if !complete {
		t.Error("not complete with all chunks")
	}
	must(t, blob.Close())
	for i, c := range chunks {
		off, n := int64(c.UncompressedOffset), int64(c.UncompressedSize)
		if early(off, n) != (i == 2) || !late(off, n) {
			t.Errorf("chunk %d: %t with chunk 2 there, %t with all", i, early(off, n), late(off, n))
		}
	}
	if early(0, 1<<62) || !late(0, 1<<62) {
		t.Error("a range beyond the end")
	}
}

// What an image claims is bounded for all its blobs together.
func TestCheck(t *testing.T) {
	t.Parallel()
	const most = 256 << 30 // of one blob
	image := func(sizes ...uint64) []rafs.Blob {
		blobs := make([]rafs.Blob, len(sizes))
		for i, size := range sizes {
			blobs[i] = rafs.Blob{ID: "b", UncompressedSize: size}
		}
		return blobs
	}
	many := make([]uint64, rafs.MaxBlobs)
	for i := range many {
		many[i] = most
	}
	for name, tt := range map[string]struct {
		blobs []rafs.Blob
		want  string // empty: it is taken
	}{
		"none":                    {nil, ""},
		"empty blobs":             {image(0, 0), ""},
		"as much as there may be": {image(most, most), ""},
		"a block more":            {image(most, 4096, most), "the first 3 of 3 blobs have 549755817984 bytes uncompressed, want at most 549755813888 in all"},
		"as many as there may be": {image(many...), "the first 3 of 254 blobs"},
		"one that is too large":   {image(0, most+4096), "blob 1 of 2: "},
		"a sum that does not fit": {image(1<<64-4096, 8192), "blob 0 of 2: "},
		"half a block":            {image(512), "want a multiple of 4096"},
		"an id that is a path":    {[]rafs.Blob{{ID: "../x"}}, "want letters"},
	} {
		err := store.Check(tt.blobs)
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, store.ErrUnsupported) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: Check = %v, want %q", name, err, tt.want)
		}
	}
}
