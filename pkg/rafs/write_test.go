package rafs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/headstart-oci/headstart/internal/testenv"
	"github.com/headstart-oci/headstart/pkg/rafs"
)

func TestWriteBootstrapRefuses(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("n", 256)
	file := func() *rafs.Inode { return &rafs.Inode{Mode: unix.S_IFREG | 0o644} }
	xattr := func(name string, n int) func(img *rafs.Image) {
		return func(img *rafs.Image) {
			img.Lookup("dir/one").Xattrs = []rafs.Xattr{{Name: name, Value: make([]byte, n)}}
		}
	}
	chunk := func(change func(c *rafs.Chunk)) func(img *rafs.Image) {
		return func(img *rafs.Image) { change(&img.Lookup("dir/one").Chunks[0]) }
	}
	for name, c := range map[string]struct {
		want   string
		change func(img *rafs.Image)
	}{
		"no root":            {"root", func(img *rafs.Image) { img.Root = nil }},
		"root a file":        {"root", func(img *rafs.Image) { img.Root = file() }},
		"chunk size":         {"chunk size is 5000", func(img *rafs.Image) { img.ChunkSize = 5000 }},
		"other chunk size":   {"chunk_size is 4096, want 8192", func(img *rafs.Image) { img.ChunkSize = 8192 }},
		"compressor":         {"compressor", func(img *rafs.Image) { img.Compressor = 9 }},
		"digester":           {"digester", func(img *rafs.Image) { img.Digester = 9 }},
		"digester of a blob": {"digester is blake3, want sha256", func(img *rafs.Image) { img.Digester = rafs.DigesterSHA256 }},
		"too many blobs":     {"number of blobs is 255, want at most 254", func(img *rafs.Image) { img.Blobs = slices.Repeat(img.Blobs, 255) }},
		"blob twice":         {"one that no other blob has", func(img *rafs.Image) { img.Blobs = slices.Repeat(img.Blobs, 2) }},
		"blob without id":    {"blob 0: id", func(img *rafs.Image) { img.Blobs[0].ID = "" }},
		"long blob id":       {"1 to 64", func(img *rafs.Image) { img.Blobs[0].ID += "0" }},
		"blob without chunks": {"chunk count", func(img *rafs.Image) {
			img.Blobs[0].ChunkCount, img.Blobs[0].MetaUncompressed, img.Blobs[0].MetaCompressed = 0, 0, 0
		}},
		"odd blob":              {"uncompressed size", func(img *rafs.Image) { img.Blobs[0].UncompressedSize++ }},
		"huge blobs":            {"flat address", func(img *rafs.Image) { img.Blobs[0].UncompressedSize = 1 << 44 }},
		"tarfs":                 {"tarfs", func(img *rafs.Image) { img.Blobs[0].Features |= 0x40 }},
		"directory twice":       {"/dir/sub2", func(img *rafs.Image) { insert(img.Lookup("dir"), "sub2", img.Lookup("dir/sub")) }},
		"loop":                  {"/dir/sub/root", func(img *rafs.Image) { insert(img.Lookup("dir/sub"), "root", img.Root) }},
		"unsorted":              {"sorted", func(img *rafs.Image) { slices.Reverse(img.Lookup("dir").Children) }},
		"name twice":            {"sorted", func(img *rafs.Image) { img.Root.Children = slices.Insert(img.Root.Children, 0, img.Root.Children[0]) }},
		"no inode":              {"without an inode", func(img *rafs.Image) { insert(img.Root, "x", nil) }},
		"long name":             {"1 to 255 bytes", func(img *rafs.Image) { insert(img.Root, long, file()) }},
		"empty name":            {"1 to 255 bytes", func(img *rafs.Image) { insert(img.Root, "", file()) }},
		"dot":                   {"not . or ..", func(img *rafs.Image) { insert(img.Root, ".", file()) }},
		"dot dot":               {"not . or ..", func(img *rafs.Image) { insert(img.Root, "..", file()) }},
		"slash":                 {"without /", func(img *rafs.Image) { insert(img.Root, "a/b", file()) }},
		"NUL":                   {"NUL", func(img *rafs.Image) { insert(img.Root, "a\x00b", file()) }},
		"no type":               {`"/x": rafs: invalid: attributes: mode is 0644`, func(img *rafs.Image) { insert(img.Root, "x", &rafs.Inode{Mode: 0o644}) }},
		"mode":                  {"mode", func(img *rafs.Image) { img.Lookup("dir/one").Mode |= 1 << 20 }},
		"nanoseconds":           {"nanoseconds", func(img *rafs.Image) { img.Lookup("dir/one").MtimeNsec = 1e9 }},
		"empty target":          {`"/link"`, func(img *rafs.Image) { img.Lookup("link").Target = "" }},
		"long target":           {"length of the symlink target is 4097, want 1 to 4096", func(img *rafs.Image) { img.Lookup("link").Target = strings.Repeat("t", 4097) }},
		"NUL in target":         {"NUL", func(img *rafs.Image) { img.Lookup("link").Target = "a\x00" }},
		"children of a file":    {"children", func(img *rafs.Image) { img.Lookup("dir/one").Children = img.Root.Children }},
		"chunks of a directory": {"chunks", func(img *rafs.Image) { img.Lookup("dir").Chunks = img.Lookup("dir/one").Chunks }},
		"xattr prefix":          {`"/dir/one": rafs: invalid: xattr: name is "btrfs.x"`, xattr("btrfs.x", 1)},
		"xattr without name":    {"name", xattr("user.", 1)},
		"xattr name":            {"at most 255", xattr("user."+strings.Repeat("n", 251), 1)},
		"xattr value":           {`"/dir/one": rafs: invalid: xattr user.big: length of the value is 65536, want at most 65535`, xattr("user.big", 65536)},
		"xattr twice":           {"there twice", func(img *rafs.Image) { img.Root.Xattrs = []rafs.Xattr{{Name: "user.a"}, {Name: "user.a"}} }},
		"xattrs in sum": {"total size", func(img *rafs.Image) {
			for i := range 5 {
				img.Root.Xattrs = append(img.Root.Xattrs, rafs.Xattr{Name: fmt.Sprintf("user.%d", i), Value: make([]byte, 60000)})
			}
		}},
		"too few chunks":  {`"/dir/one": rafs: invalid: chunks: number is 1, want 2`, func(img *rafs.Image) { img.Lookup("dir/one").Size = 4097 }},
		"too many chunks": {"number is 1, want 0", func(img *rafs.Image) { img.Lookup("dir/one").Size = 0 }},
		"chunk bytes":     {"chunk 0: size", chunk(func(c *rafs.Chunk) { c.UncompressedSize = 2 })},
		"chunk blob":      {"below 1", chunk(func(c *rafs.Chunk) { c.Blob = 1 })},
		"chunk index":     {"index", chunk(func(c *rafs.Chunk) { c.Index = 1000 })},
		"chunk place":     {"multiple of 4096", chunk(func(c *rafs.Chunk) { c.UncompressedOffset++ })},
		"chunk outside":   {"uncompressed end", chunk(func(c *rafs.Chunk) { c.UncompressedOffset = 1 << 40 })},
		"stored outside":  {"compressed end", chunk(func(c *rafs.Chunk) { c.CompressedOffset = 1 << 39 })},
		"chunk disagrees": {"two different records", chunk(func(c *rafs.Chunk) { c.Index++ })},
		"prefetch":        {"not in the tree", func(img *rafs.Image) { img.Prefetch = []*rafs.Inode{file()} }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, _ := smallImage(t, smallCombo)
			img := b.build().open(t)
			c.change(img)
			isRefused(t, img, c.want)
		})
	}
}

// isRefused holds that the image is not written, with an error that says want, and not begun either.
func isRefused(t *testing.T, img *rafs.Image, want string) {
	t.Helper()
	var out counter
	_, err := rafs.WriteBootstrap(&out, img)
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("WriteBootstrap = %v, want an error about %q", err, want)
	}
	if !errors.Is(err, rafs.ErrInvalid) && !errors.Is(err, rafs.ErrUnsupported) {
		t.Errorf("WriteBootstrap = %v: neither ErrInvalid nor ErrUnsupported", err)
	}
	if out != 0 {
		t.Errorf("%d bytes were written before the error", out)
	}
}

// TestLimits writes what is just allowed and shows it to the kernel and the tools.
func TestLimits(t *testing.T) {
	b := newBuilder(t, smallCombo)
	name := strings.Repeat("n", 255)
	b.add(name, &rafs.Inode{Mode: unix.S_IFDIR | 0o7777, UID: 1<<32 - 2, GID: 1<<32 - 2, Mtime: -1 << 40, MtimeNsec: 999_999_999})
	b.add(name+"/"+name, &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", 4095), Size: 4095, Mtime: 1 << 40})
	b.add("big", &rafs.Inode{Mode: unix.S_IFCHR | 0o600, Rdev: rafs.EncodeDevice(4095, 1<<20-1)})
	f := b.file("xattrs", 0, []byte("x"))
	f.Xattrs = []rafs.Xattr{
		{Name: "user." + strings.Repeat("n", 250), Value: bytes.Repeat([]byte("v"), 65535)},
		{Name: "user.empty"},
		{Name: "trusted.t", Value: bytes.Repeat([]byte("w"), 65535)},
		{Name: "security.s", Value: bytes.Repeat([]byte("x"), 65535)},
	}
	d := b.add("dir", &rafs.Inode{Mode: unix.S_IFDIR | 0o755, Xattrs: []rafs.Xattr{{Name: "user.d", Value: bytes.Repeat([]byte("d"), 30000)}}})
	names := 3000
	if raceEnabled {
		names = 300
	}
	for i := range names {
		insert(d, fmt.Sprintf("%s%05d", strings.Repeat("m", 250), i), f)
	}
	s := b.build()
	diff(t, "tree", flatten(t, s.open(t), nil), flatten(t, b.img, nil))
	if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	t.Run("kernel", s.compareMount)
	t.Run("fsck", s.checkFsck)
	t.Run("nydus-image", s.checkNydus)
}

func TestEmptyImage(t *testing.T) {
	b := newBuilder(t, smallCombo)
	b.img.Root.Xattrs = []rafs.Xattr{{Name: "user.a", Value: []byte("b")}}
	b.add("empty", &rafs.Inode{Mode: unix.S_IFREG | 0o644})
	b.add("link", &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: "empty", Size: 5})
	b.img.Prefetch = []*rafs.Inode{b.img.Root} // nothing to fetch: the table is left out
	s := b.build()
	if len(s.blobs) != 0 || binary.LittleEndian.Uint32(s.bootstrap[1064:]) != 0 {
		t.Errorf("%d blobs, meta_blkaddr %d", len(s.blobs), binary.LittleEndian.Uint32(s.bootstrap[1064:]))
	}
	diff(t, "tree", flatten(t, s.open(t), nil), flatten(t, b.img, nil))
	t.Run("kernel", s.compareMount)
	t.Run("fsck", s.checkFsck)
	t.Run("nydus-image", s.checkNydus)
}

func TestManyBlobs(t *testing.T) {
	b := newBuilder(t, smallCombo)
	for i := range rafs.MaxBlobs {
		b.file(fmt.Sprintf("f%03d", i), i, []byte(fmt.Sprintf("content of blob %d", i)))
	}
	s := b.build()
	if _, err := s.check(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	t.Run("kernel", s.compareMount)
	t.Run("nydus-image", s.checkNydus)
}

// TestLargeSparseFile stores 6 GiB of zeros as one chunk.
func TestLargeSparseFile(t *testing.T) {
	b := newBuilder(t, combo{compressor: rafs.CompressorZstd, chunkSize: 1 << 20})
	zeros := make([]byte, 1<<20)
	f := b.file("sparse", 0, append(zeros, "end of the file"...))
	b.build()
	const units = 6 << 10
	end := f.Chunks[1]
	f.Chunks = append(slices.Repeat(f.Chunks[:1], units), end)
	f.Size = units<<20 + uint64(end.UncompressedSize)
	b.img.Blobs, b.files = nil, [][]fileToStore{{{f, append(zeros, "end of the file"...)}}}
	chunks := f.Chunks
	f.Chunks = nil
	store := newBuilder(t, b.o) // the blob again, for the bytes
	g := store.file("x", 0, append(zeros, "end of the file"...))
	blobs := store.build().blobs
	if g.Chunks[1] != end {
		t.Fatal("blobs differ")
	}
	f.Chunks = chunks
	b.img.Blobs = store.img.Blobs
	var out bytes.Buffer
	info, err := rafs.WriteBootstrap(&out, b.img)
	must(t, err)
	if info.Chunks != 2 {
		t.Errorf("%d chunk records, want 2", info.Chunks)
	}
	s := &stored{bootstrap: out.Bytes(), blobs: blobs}
	img := s.open(t)
	file, err := img.FS(s.reader).Open("sparse")
	must(t, err)
	tail := make([]byte, 100)
	n, err := file.(io.ReaderAt).ReadAt(tail, units<<20-5)
	if want := "\x00\x00\x00\x00\x00end of the file"; string(tail[:n]) != want || !errors.Is(err, io.EOF) {
		t.Errorf("tail = %q, %v, want %q", tail[:n], err, want)
	}
	must(t, file.Close())
	t.Run("kernel", func(t *testing.T) {
		bootstrap, _, devices := s.write(t, t.TempDir())
		dir := testenv.MountEROFS(t, bootstrap, devices...)
		f, err := os.Open(dir + "/sparse")
		must(t, err)
		defer func() { must(t, f.Close()) }()
		st, err := f.Stat()
		must(t, err)
		if uint64(st.Size()) != img.Root.Children[0].Inode.Size {
			t.Errorf("size %d", st.Size())
		}
		n, err := f.ReadAt(tail, units<<20-5)
		if want := "\x00\x00\x00\x00\x00end of the file"; string(tail[:n]) != want {
			t.Errorf("tail = %q, %v, want %q", tail[:n], err, want)
		}
	})
	t.Run("nydus-image", s.checkNydus)
}

// TestDeterministic builds the same image twice, with what has no order shuffled.
func TestDeterministic(t *testing.T) {
	t.Parallel()
	o := combo{compressor: rafs.CompressorZstd, chunkSize: 4096, toc: true, acl: true}
	first := randomImage(t, 99, o).build()
	b := randomImage(t, 99, o)
	r := rand.New(rand.NewPCG(1, 9))
	must(t, b.img.Walk(func(_ string, ino *rafs.Inode) error {
		r.Shuffle(len(ino.Xattrs), func(i, j int) { ino.Xattrs[i], ino.Xattrs[j] = ino.Xattrs[j], ino.Xattrs[i] })
		return nil
	}))
	second := b.build()
	if !bytes.Equal(first.bootstrap, second.bootstrap) {
		t.Error("bootstraps differ")
	}
	for id := range first.blobs {
		if !bytes.Equal(first.blobs[id], second.blobs[id]) {
			t.Errorf("blob %s differs", id)
		}
	}
}

// TestLinksOfEveryType gives two names to files of each type, which the real tools do for regular files only.
func TestLinksOfEveryType(t *testing.T) {
	b := newBuilder(t, smallCombo)
	b.add("d", &rafs.Inode{Mode: unix.S_IFDIR | 0o755})
	for name, ino := range map[string]*rafs.Inode{
		"link": {Mode: unix.S_IFLNK | 0o777, Target: "x", Size: 1}, "fifo": {Mode: unix.S_IFIFO | 0o600},
		"char": {Mode: unix.S_IFCHR | 0o600, Rdev: rafs.EncodeDevice(1, 3)}, "sock": {Mode: unix.S_IFSOCK | 0o600},
		"file": {Mode: unix.S_IFREG | 0o600},
	} {
		for _, path := range []string{"a-" + name, "d/" + name, "z-" + name} {
			b.add(path, ino)
		}
	}
	s := b.build()
	if _, err := s.check(rafs.CheckOptions{}); err != nil {
		t.Error(err)
	}
	t.Run("kernel", s.compareMount)
	t.Run("fsck", s.checkFsck)
	t.Run("nydus-image", s.checkNydus)
}

// TestDirentOrder puts names around "." and ".." and looks them all up through the kernel.
func TestDirentOrder(t *testing.T) {
	b := newBuilder(t, smallCombo)
	for c := 1; c < 256; c++ {
		if c == '/' {
			continue
		}
		for _, name := range []string{string([]byte{byte(c)}), "." + string([]byte{byte(c)}), ".." + string([]byte{byte(c)}), string([]byte{byte(c)}) + "."} {
			if name != "." && name != ".." {
				b.add(name, &rafs.Inode{Mode: unix.S_IFREG | 0o644})
			}
		}
	}
	s := b.build()
	t.Run("kernel", s.compareMount)
	t.Run("fsck", s.checkFsck)
	t.Run("nydus-image", s.checkNydus)
}

// TestCompactInodes turns extended inodes into compact ones, which nydus-image no longer writes.
func TestCompactInodes(t *testing.T) {
	b := newBuilder(t, smallCombo)
	for i := range 20 {
		b.add(fmt.Sprintf("f%d", i), &rafs.Inode{Mode: unix.S_IFREG | 0o640, UID: 1000, GID: 65535})
	}
	s := b.build()
	le := binary.LittleEndian
	p := s.bootstrap
	changed := 0
	for at := 4096 + 64; at+64 <= len(p); at += 32 {
		if le.Uint16(p[at:]) != 1|4<<1 || le.Uint16(p[at+4:]) != 0o100640 {
			continue
		}
		old := bytes.Clone(p[at : at+64])
		clear(p[at : at+64])
		le.PutUint16(p[at:], 4<<1)
		le.PutUint16(p[at+4:], 0o100640)
		le.PutUint16(p[at+6:], 1) // nlink
		copy(p[at+16:at+20], old[16:20])
		le.PutUint16(p[at+24:], 1000)
		le.PutUint16(p[at+26:], 65535)
		changed++
	}
	if changed != 20 {
		t.Fatalf("%d inodes changed", changed)
	}
	diff(t, "tree", flatten(t, s.open(t), nil), flatten(t, b.img, nil))
	t.Run("kernel", s.compareMount)
	t.Run("nydus-image", s.checkNydus)
}

type failingWriter struct{ left int }

var errDiskFull = errors.New("disk full")

func (w *failingWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		n := w.left
		w.left = 0
		return n, errDiskFull
	}
	w.left -= len(p)
	return len(p), nil
}

func TestWriteErrors(t *testing.T) {
	t.Parallel()
	b, _ := smallImage(t, smallCombo)
	s := b.build()
	for _, n := range []int{0, 1, 4096, len(s.bootstrap) - 1} {
		if _, err := rafs.WriteBootstrap(&failingWriter{n}, b.img); !errors.Is(err, errDiskFull) {
			t.Errorf("WriteBootstrap on a full disk after %d bytes = %v", n, err)
		}
	}
	r, err := s.reader(b.img.Blobs[0])
	must(t, err)
	if err := b.img.ExpandBlob(context.Background(), 0, r, fullWriterAt{}); !errors.Is(err, errDiskFull) {
		t.Errorf("ExpandBlob on a full disk = %v", err)
	}
	if err := b.img.ExpandBlob(context.Background(), 1, r, fullWriterAt{}); !errors.Is(err, rafs.ErrInvalid) {
		t.Errorf("ExpandBlob of no blob = %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	f, err := os.OpenFile(t.TempDir()+"/x", os.O_CREATE|os.O_WRONLY, 0o600)
	must(t, err)
	defer func() { must(t, f.Close()) }()
	if err := b.img.ExpandBlob(ctx, 0, r, f); !errors.Is(err, context.Canceled) {
		t.Errorf("ExpandBlob cancelled = %v", err)
	}
}

type fullWriterAt struct{}

func (fullWriterAt) WriteAt([]byte, int64) (int, error) { return 0, errDiskFull }

func BenchmarkWriteBootstrap(b *testing.B) {
	img := manyFiles(100_000)
	b.ReportAllocs()
	for b.Loop() {
		var n counter
		_, err := rafs.WriteBootstrap(&n, img)
		must(b, err)
		b.SetBytes(int64(n))
	}
}

func BenchmarkOpen(b *testing.B) {
	var out bytes.Buffer
	_, err := rafs.WriteBootstrap(&out, manyFiles(100_000))
	must(b, err)
	b.SetBytes(int64(out.Len()))
	b.ReportAllocs()
	for b.Loop() {
		_, err := rafs.Open(bytes.NewReader(out.Bytes()), int64(out.Len()))
		must(b, err)
	}
}
