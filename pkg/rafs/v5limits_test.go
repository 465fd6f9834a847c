package rafs_test

import (
	"bytes"
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

func TestWriteBootstrapRefusesV5(t *testing.T) {
	t.Parallel()
	file := func() *rafs.Inode { return &rafs.Inode{Mode: unix.S_IFREG | 0o644} }
	for name, c := range map[string]struct {
		want   string
		change func(img *rafs.Image)
	}{
		"no root":             {"root", func(img *rafs.Image) { img.Root = nil }},
		"version":             {"version is 7", func(img *rafs.Image) { img.Version = 7 }},
		"as v6":               {"ALIGNED", func(img *rafs.Image) { img.Version = rafs.V6 }},
		"chunk size":          {"chunk_size is 4096, want 8192", func(img *rafs.Image) { img.ChunkSize = 8192 }},
		"digester of a blob":  {"digester is blake3, want sha256", func(img *rafs.Image) { img.Digester = rafs.DigesterSHA256 }},
		"compressor":          {"a v5 image has one", func(img *rafs.Image) { img.Blobs[0].Compressor = rafs.CompressorLZ4 }},
		"too many blobs":      {"at most 254", func(img *rafs.Image) { img.Blobs = slices.Repeat(img.Blobs, 255) }},
		"blob twice":          {"no other blob has", func(img *rafs.Image) { img.Blobs = slices.Repeat(img.Blobs, 2) }},
		"blob without id":     {"blob 0: id", func(img *rafs.Image) { img.Blobs[0].ID = "" }},
		"NUL in a blob id":    {"blob 0: id", func(img *rafs.Image) { img.Blobs[0].ID = "a\x00b" }},
		"blob without chunks": {"chunk count", func(img *rafs.Image) { img.Blobs[0].ChunkCount = 0 }},
		"blob without bytes":  {"sizes", func(img *rafs.Image) { img.Blobs[0].UncompressedSize = 0 }},
		"batch":               {"unsupported", func(img *rafs.Image) { img.Blobs[0].Features |= 0x80 }},
		"tarfs":               {"tarfs", func(img *rafs.Image) { img.Blobs[0].Features |= 0x40 }},
		"directory twice":     {"/dir/sub2", func(img *rafs.Image) { insert(img.Lookup("dir"), "sub2", img.Lookup("dir/sub")) }},
		"loop":                {"/dir/sub/root", func(img *rafs.Image) { insert(img.Lookup("dir/sub"), "root", img.Root) }},
		"unsorted":            {"sorted", func(img *rafs.Image) { slices.Reverse(img.Lookup("dir").Children) }},
		"no inode":            {"without an inode", func(img *rafs.Image) { insert(img.Root, "x", nil) }},
		"long name":           {"1 to 255 bytes", func(img *rafs.Image) { insert(img.Root, strings.Repeat("n", 256), file()) }},
		"no type":             {`"/x": rafs: invalid: attributes: mode is 0644`, func(img *rafs.Image) { insert(img.Root, "x", &rafs.Inode{Mode: 0o644}) }},
		"empty target":        {`"/link"`, func(img *rafs.Image) { img.Lookup("link").Target = "" }},
		"xattr prefix":        {"btrfs.x", func(img *rafs.Image) { img.Root.Xattrs = []rafs.Xattr{{Name: "btrfs.x"}} }},
		"xattr value": {"at most 65536", func(img *rafs.Image) {
			img.Root.Xattrs = []rafs.Xattr{{Name: "user.x", Value: make([]byte, 65537)}}
		}},
		"xattr twice":     {"there twice", func(img *rafs.Image) { img.Root.Xattrs = []rafs.Xattr{{Name: "user.a"}, {Name: "user.a"}} }},
		"too few chunks":  {"number is 1, want 2", func(img *rafs.Image) { img.Lookup("dir/one").Size = 4097 }},
		"chunk outside":   {"uncompressed end", func(img *rafs.Image) { img.Lookup("dir/one").Chunks[0].UncompressedOffset = 1 << 40 }},
		"chunk disagrees": {"two different records", func(img *rafs.Image) { img.Lookup("dir/one").Chunks[0].Index++ }},
		"batched chunk":   {"part of a batch", func(img *rafs.Image) { img.Lookup("dir/one").Chunks[0].Batch = true }},
		"prefetch":        {"not in the tree", func(img *rafs.Image) { img.Prefetch = []*rafs.Inode{file()} }},
		"prefetch of nil": {"not in the tree", func(img *rafs.Image) { img.Prefetch = []*rafs.Inode{nil} }},
		"prefetch of a link": {"neither file nor directory", func(img *rafs.Image) {
			img.Prefetch = []*rafs.Inode{img.Lookup("link")}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, _ := smallImage(t, smallCombo)
			b.img.Version = rafs.V5
			img := b.build().open(t)
			c.change(img)
			isRefused(t, img, c.want)
		})
	}
}

// TestLimitsV5 writes what is just allowed and shows it to the real tools.
func TestLimitsV5(t *testing.T) {
	b := newBuilder(t, smallCombo)
	b.img.Version = rafs.V5
	name := strings.Repeat("n", 255)
	b.img.Root.Xattrs = []rafs.Xattr{{Name: "user.root", Value: []byte("r")}, {Name: "trusted.empty", Value: []byte{}}}
	b.add(name, &rafs.Inode{Mode: unix.S_IFDIR | 0o7777, UID: 1<<32 - 2, GID: 1<<32 - 2, Mtime: -1 << 33, MtimeNsec: 999_999_999})
	b.add(name+"/"+name, &rafs.Inode{Mode: unix.S_IFLNK | 0o777, Target: strings.Repeat("t", 4095), Size: 4095, Mtime: 1 << 33})
	b.add("big", &rafs.Inode{Mode: unix.S_IFCHR | 0o600, Rdev: rafs.EncodeDevice(4095, 1<<20-1), Mtime: 1})
	f := b.file("xattrs", 0, []byte("x"))
	f.Xattrs = []rafs.Xattr{
		{Name: "user." + strings.Repeat("n", 250), Value: bytes.Repeat([]byte("v"), 4000)},
		{Name: "user.empty", Value: []byte{}},
		{Name: "trusted.binary", Value: []byte{0, 1, 0, 0xff}},
		{Name: "security.s", Value: bytes.Repeat([]byte("x"), 65535)},
	}
	d := b.add("dir", &rafs.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: 1})
	for i := range 20 { // each name repeats the xattrs
		insert(d, fmt.Sprintf("%s%05d", strings.Repeat("m", 250), i), f)
	}
	s := b.build()
	diff(t, "tree", flatten(t, s.open(t), nil), flatten(t, b.img, nil))
	if err := s.sole(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	t.Run("nydus-image", s.checkNydus)
	t.Run("nydusd", s.compareNydusd)
}

// TestManyBlobsV5 fills the blob table.
func TestManyBlobsV5(t *testing.T) {
	b := newBuilder(t, smallCombo)
	b.img.Version = rafs.V5
	for i := range rafs.MaxBlobs {
		b.file(fmt.Sprintf("f%03d", i), i, []byte(fmt.Sprintf("content of blob %d", i)))
	}
	s := b.build()
	if err := s.sole(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	t.Run("nydus-image", s.checkNydus)
	t.Run("nydusd", s.compareNydusd)
}

// TestLargeSparseFileV5 stores 6 GiB of zeros as one chunk, and reads behind them, also through nydusd.
func TestLargeSparseFileV5(t *testing.T) {
	b := newBuilder(t, combo{compressor: rafs.CompressorZstd, chunkSize: 1 << 20})
	b.img.Version = rafs.V5
	f := b.file("sparse", 0, append(make([]byte, 1<<20), "end of the file"...))
	blobs := b.build().blobs
	const units = 6 << 10
	f.Chunks = append(slices.Repeat(f.Chunks[:1], units), f.Chunks[1])
	f.Size = units<<20 + uint64(f.Chunks[units].UncompressedSize)
	var out bytes.Buffer
	info, err := rafs.WriteBootstrap(&out, b.img)
	must(t, err)
	if info.Chunks != 2 || info.Size != int64(out.Len()) {
		t.Errorf("WriteBootstrap = %+v, want 2 chunks in %d bytes", info, out.Len())
	}
	s := &stored{bootstrap: out.Bytes(), blobs: blobs}
	if err := s.sole(rafs.CheckOptions{Data: true}); err != nil {
		t.Error(err)
	}
	readTail := func(t *testing.T, r io.ReaderAt) {
		tail := make([]byte, 100)
		n, err := r.ReadAt(tail, units<<20-5)
		if want := "\x00\x00\x00\x00\x00end of the file"; string(tail[:n]) != want || !errors.Is(err, io.EOF) {
			t.Errorf("tail = %q, %v, want %q", tail[:n], err, want)
		}
	}
	img := s.open(t)
	file, err := img.FS(s.reader).Open("sparse")
	must(t, err)
	readTail(t, file.(io.ReaderAt))
	must(t, file.Close())
	t.Run("nydus-image", s.checkNydus)
	t.Run("nydusd", func(t *testing.T) {
		bootstrap, blobs, _ := s.write(t, t.TempDir())
		f, err := os.Open(testenv.MountNydusd(t, bootstrap, blobs) + "/sparse")
		must(t, err)
		readTail(t, f)
		st, err := f.Stat()
		if must(t, err); uint64(st.Size()) != img.Root.Children[0].Inode.Size {
			t.Errorf("size %d", st.Size())
		}
		must(t, f.Close())
	})
}

// TestDeterministicV5 builds the same image twice, with what has no order shuffled.
func TestDeterministicV5(t *testing.T) {
	t.Parallel()
	o := combo{compressor: rafs.CompressorZstd, chunkSize: 4096, acl: true}
	build := func(shuffle bool) *stored {
		b := randomImage(t, 98, o)
		b.img.Version = rafs.V5
		r := rand.New(rand.NewPCG(1, 9))
		must(t, b.img.Walk(func(_ string, ino *rafs.Inode) error {
			if shuffle {
				r.Shuffle(len(ino.Xattrs), func(i, j int) { ino.Xattrs[i], ino.Xattrs[j] = ino.Xattrs[j], ino.Xattrs[i] })
			}
			return nil
		}))
		return b.build()
	}
	first, second := build(false), build(true)
	if !bytes.Equal(first.bootstrap, second.bootstrap) {
		t.Error("bootstraps differ")
	}
	for id := range first.blobs {
		if !bytes.Equal(first.blobs[id], second.blobs[id]) {
			t.Errorf("blob %s differs", id)
		}
	}
}

// TestLinksOfEveryTypeV5: only regular files have several names in v5; names of others become files of their own.
func TestLinksOfEveryTypeV5(t *testing.T) {
	b := newBuilder(t, smallCombo)
	b.img.Version = rafs.V5
	b.add("d", &rafs.Inode{Mode: unix.S_IFDIR | 0o755, Mtime: 1})
	for name, ino := range map[string]*rafs.Inode{
		"link": {Mode: unix.S_IFLNK | 0o777, Target: "x", Size: 1, Mtime: 1}, "fifo": {Mode: unix.S_IFIFO | 0o600, Mtime: 1},
		"char": {Mode: unix.S_IFCHR | 0o600, Rdev: rafs.EncodeDevice(1, 3), Mtime: 1}, "sock": {Mode: unix.S_IFSOCK | 0o600, Mtime: 1},
		"file": {Mode: unix.S_IFREG | 0o600, Mtime: 1},
	} {
		for _, path := range []string{"a-" + name, "d/" + name, "z-" + name} {
			b.add(path, ino)
		}
	}
	s := b.build()
	report, err := s.check(rafs.CheckOptions{})
	if err != nil || report.Inodes != 2+1+4*3 {
		t.Errorf("Check = %+v, %v, want 15 inodes", report, err)
	}
	img := s.open(t)
	if img.Lookup("a-file") != img.Lookup("z-file") || img.Lookup("a-fifo") == img.Lookup("z-fifo") {
		t.Error("names of the file are apart, or those of the fifo together")
	}
	t.Run("nydus-image", s.checkNydus)
	t.Run("nydusd", s.compareNydusd)
}

// TestBlobWriterV5: chunks lie one behind the other, equal ones once, with nothing behind them.
func TestBlobWriterV5(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	w, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Version: rafs.V5, ChunkSize: 4096})
	must(t, err)
	var at uint64
	contents := [][]byte{bytes.Repeat([]byte("a"), 4096), []byte("bcd"), bytes.Repeat([]byte("a"), 4096), bytes.Repeat([]byte("e"), 4095)}
	places := []uint64{0, 4096, 0, 4099}
	for i, p := range contents {
		c, err := w.Append(rafs.EncodedChunk{Digest: rafs.DigesterBLAKE3.Sum(p), Data: p, UncompressedSize: uint32(len(p))})
		must(t, err)
		if c.UncompressedOffset != places[i] || c.CompressedOffset != places[i] || c.UncompressedSize != uint32(len(p)) {
			t.Errorf("chunk %d = %+v, want it at %d", i, c, places[i])
		}
		at = max(at, places[i]+uint64(len(p)))
	}
	blob, err := w.Close()
	must(t, err)
	if blob.CompressedSize != at || blob.UncompressedSize != at || uint64(out.Len()) != at || blob.ChunkCount != 3 || blob.Features != 0x4000_0000 {
		t.Errorf("Close = %+v with %d bytes written, want %d and 3 chunks", blob, out.Len(), at)
	}
	if _, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Version: rafs.V5, TOC: true}); !errors.Is(err, rafs.ErrUnsupported) {
		t.Errorf("NewBlobWriter of v5 with a TOC = %v, want ErrUnsupported", err)
	}
	if _, err := rafs.NewBlobWriter(&out, rafs.BlobOptions{Version: 4}); !errors.Is(err, rafs.ErrUnsupported) {
		t.Errorf("NewBlobWriter of v4 = %v, want ErrUnsupported", err)
	}
}
